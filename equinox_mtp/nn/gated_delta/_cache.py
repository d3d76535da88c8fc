"""What a Gated DeltaNet keeps of the positions that a row has seen."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Integer


class GatedDeltaInputs(eqx.Module):
    """What is projected from each position, before the convolution.

    >>> layer = emtp.nn.GatedDeltaNet(16, 1, 2, 4, 8, key=jax.random.key(0))
    >>> layer.project(jnp.ones((2, 3, 16))).value.shape
    (2, 3, 2, 8)

    **Fields:**

    - `query`, `key`, `value`: of each head; those of queries and keys are `kv_heads`.
    - `decay`, `beta`: one number for each head of values, from which its decay and its rate follow.
    """

    query: Float[Array, "batch seq kv_heads head_dim"]
    key: Float[Array, "batch seq kv_heads head_dim"]
    value: Float[Array, "batch seq heads v_head_dim"]
    decay: Float[Array, "batch seq heads"]
    beta: Float[Array, "batch seq heads"]


class GatedDeltaCache(eqx.Module):
    """The state after the first positions of each row, and the inputs of those that follow.

    A recurrence cannot be undone: to go back, the state is kept that was before the first position
    to which `decode` may return, and the inputs from there on are run again. They take less memory
    than a state for each position.

    >>> layer = emtp.nn.GatedDeltaNet(16, 1, 2, 4, 8, key=jax.random.key(0))
    >>> cache = layer.init_cache(2, 100, jnp.float32, rollback=3)
    >>> cache.state.shape, cache.inputs.value.shape  # 3 positions, and 3 for the convolution
    ((2, 2, 4, 8), (2, 6, 2, 8))

    **Fields:**

    - `state`: before position `start`.
    - `inputs`: of the positions from `start` on, after those that the convolution sees before it.
    - `start`: counts from 0; one for each row.
    """

    state: Float32[Array, "batch heads head_dim v_head_dim"]
    inputs: GatedDeltaInputs
    start: Int32[Array, "batch"]

    def continued(
        self, inputs: GatedDeltaInputs, position_ids: Integer[Array, "batch seq"], history: int
    ) -> GatedDeltaInputs:
        """The kept inputs with new ones at their positions, as rows without gaps.

        What stood at these positions is replaced. `history` positions are before `start`.
        """
        rows = jnp.arange(position_ids.shape[0])[:, None]
        places = position_ids - self.start[:, None] + history

        def put(kept: Array, new: Array) -> Array:
            length = kept.shape[1] + new.shape[1]
            line = jnp.pad(kept, ((0, 0), (0, new.shape[1]), *[(0, 0)] * (new.ndim - 2)))
            # Below 0 there is no token, and before `start` no state any more.
            is_place = (position_ids >= 0) & (places >= history)
            return line.at[rows, jnp.where(is_place, places, length)].set(new, mode="drop")

        return jax.tree.map(put, self.inputs, inputs)


def window_of(inputs: Any, first: Integer[Array, "batch"], length: int) -> Any:
    """`length` positions of each row, from its own first one on."""
    places = first[:, None] + jnp.arange(length)

    def take(x: Array) -> Array:
        return x[jnp.arange(x.shape[0])[:, None], places]

    return jax.tree.map(take, inputs)
