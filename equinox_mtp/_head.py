"""The output head: from final hidden states to logits."""

import dataclasses
import math
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P
from jaxtyping import Array, Float, Float32

from ._types import checked

DEFAULT_TOKEN_TILE = 1024
DEFAULT_VOCAB_TILE = 4096

MeshAxes: TypeAlias = str | tuple[str, ...] | None
"""The mesh axis, or axes, over which an array axis is split; `None` if it is not."""


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """Where hidden states and output head lie on a mesh, for the loss.

    With it the loss runs in a `shard_map`: every device works on its own tokens and its own part of
    the vocabulary, and devices exchange results once, outside of all loops. Without it the loss is
    right too, and no hidden state or logit moves, but the head's gradient is summed over devices in
    each tile.

    **Fields:**

    - `mesh`: the mesh; `None` takes the one set by `jax.set_mesh`.
    - `batch`, `seq`: mesh axes over which tokens are split.
    - `vocab`: mesh axes over which the head's rows, and so the logits, are split.

    **Raises:** `ValueError` if an axis is named twice or is none of the mesh.
    """

    mesh: Mesh | AbstractMesh | None = None
    batch: MeshAxes = None
    seq: MeshAxes = None
    vocab: MeshAxes = None

    def __post_init__(self) -> None:
        names = (*self.token_axes, *_names(self.vocab))
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"`batch`, `seq` and `vocab` must be split over different mesh axes; {name!r} "
                    "is named twice."
                )
            if self.mesh is not None and name not in self.mesh.axis_names:
                known = ", ".join(repr(axis) for axis in self.mesh.axis_names)
                raise ValueError(f"`mesh` has the axes {known}; {name!r} is none of them.")

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes over which tokens are split."""
        return (*_names(self.batch), *_names(self.seq))

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the vocabulary is split."""
        return _names(self.vocab)

    def spec(self, axis_words: str) -> P:
        """The partition spec of an array with these axis words."""
        split = {"batch": self.batch, "seq": self.seq, "vocab": self.vocab}
        return P(*(split.get(word) for word in axis_words.split()))


class LinearHead(eqx.Module):
    """A linear output head, with an optional bias and an optional soft-cap of the logits.

        logits = cap · tanh((weight · hidden_states + bias) / cap)

    The soft-cap is that of Gemma 2 (arXiv 2408.00118, §2). The loss computes such a head in tiles
    of the vocabulary; a plain matrix stands for `LinearHead(matrix)`.
    """

    weight: Float[Array, "vocab embed"]
    bias: Float[Array, "vocab"] | None
    soft_cap: float | None = eqx.field(static=True)
    sharding: HeadSharding | None = eqx.field(static=True)
    recompute_logits: bool = eqx.field(static=True)
    token_tile: int = eqx.field(static=True)
    vocab_tile: int = eqx.field(static=True)

    @checked
    def __init__(
        self,
        weight: Float[Array, "vocab embed"],
        bias: Float[Array, "vocab"] | None = None,
        *,
        soft_cap: float | int | None = None,
        sharding: HeadSharding | None = None,
        recompute_logits: bool = False,
        token_tile: int = DEFAULT_TOKEN_TILE,
        vocab_tile: int = DEFAULT_VOCAB_TILE,
    ):
        """**Arguments:**

        - `weight`: one row for each token id.
        - `bias`: added to the logits.
        - `soft_cap`: bounds the logits' magnitude; `None` leaves them as they are.
        - `sharding`: where things lie on a mesh, if on several devices.
        - `recompute_logits`: whether a summed loss computes the logits again in the backward pass,
            rather than keep the head's gradient from the forward pass: less memory, more time.
        - `token_tile`, `vocab_tile`: the loss keeps `token_tile · vocab` float32 logits at a time
            on each device, computed `vocab_tile` ids at a time.

        **Raises:** `ValueError` for a soft-cap or a tile that is not positive.
        """
        if soft_cap is not None and not soft_cap > 0:
            raise ValueError(f"`soft_cap` must be positive, or `None`; got {soft_cap}.")
        for name, tile in (("token_tile", token_tile), ("vocab_tile", vocab_tile)):
            if tile < 1:
                raise ValueError(f"`{name}` must be at least 1; got {tile}.")
        self.weight = weight
        self.bias = bias
        self.soft_cap = None if soft_cap is None else float(soft_cap)
        self.sharding = sharding
        self.recompute_logits = recompute_logits
        self.token_tile = token_tile
        self.vocab_tile = vocab_tile

    @checked
    def __call__(
        self, hidden_states: Float[Array, "*batch embed"]
    ) -> Float32[Array, "*batch vocab"]:
        """The logits of all token ids, accumulated in float32."""
        return self.logits(hidden_states, self.weight, self.bias)

    @property
    def keeps_no_gradient(self) -> bool:
        """Whether gradients wait for the backward pass.

        They must if the vocabulary is split: the softmax of a tile of tokens is only known once all
        devices have been through it, and the loop over tiles would have to wait for them each time.
        """
        return self.recompute_logits or (
            self.sharding is not None and bool(self.sharding.vocab_axes)
        )

    def logits(self, hidden_states: Array, weight: Array, bias: Array | None) -> Array:
        """The logits of some of the ids: those of the rows of `weight` and `bias`."""
        logits = jnp.einsum(
            "...e,ve->...v",
            hidden_states,
            weight.astype(hidden_states.dtype),
            preferred_element_type=jnp.float32,
        )
        if bias is not None:
            logits += bias.astype(jnp.float32)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def cotangent(self, logits: Array, cotangent: Array) -> Array:
        """The cotangent before the soft-cap, from that of the logits."""
        if self.soft_cap is None:
            return cotangent
        return cotangent * (1 - jnp.square(logits / self.soft_cap))


def _names(axes: MeshAxes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes


def tokens_on_all_devices(tokens: int) -> int:
    """The size of a tile that has `tokens` tokens on each device.

    Under automatic partitioning shapes are those of all devices of the current mesh together; in a
    `shard_map` they are those of one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = (size for name, size in mesh.shape.items() if name not in mesh.manual_axes)
    return tokens * math.prod(sizes)
