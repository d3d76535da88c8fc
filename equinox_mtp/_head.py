"""The output head: from final hidden states to logits."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from ._devices import tokens_on_all_devices
from ._head_sharding import HeadSharding
from ._types import checked

DEFAULT_TOKEN_TILE = 1024
DEFAULT_VOCAB_TILE = 2048


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
        - `token_tile`, `vocab_tile`: on each device logits are computed for so many tokens and ids
            at a time. A summed loss keeps those of `token_tile` tokens and all ids, in float32.

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
    def defers_gradients(self) -> bool:
        """Whether gradients wait for the backward pass.

        They must if the vocabulary is split: the softmax of a tile of tokens is only known once all
        devices have been through it, and the loop over tiles would have to wait for them each time.
        """
        return self.recompute_logits or bool(self.vocab_axes)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes of a `shard_map` over which tokens are split."""
        return () if self.sharding is None else self.sharding.token_axes

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """The axes of a `shard_map` over which the vocabulary is split."""
        return () if self.sharding is None else self.sharding.vocab_axes

    @property
    def first_id(self) -> Array | int:
        """The token id of this device's first row."""
        return lax.axis_index(self.vocab_axes) * self.weight.shape[0] if self.vocab_axes else 0

    @property
    def tokens_at_a_time(self) -> int:
        """How many tokens a tile should hold, of all devices together where shapes are theirs."""
        sharded = self.sharding is not None
        return self.token_tile if sharded else tokens_on_all_devices(self.token_tile)

    def with_arrays(self, weight: Array, bias: Array | None) -> "LinearHead":
        """The same head of other arrays, or their gradients."""
        head = eqx.tree_at(lambda head: head.weight, self, weight)
        return head if bias is None else eqx.tree_at(lambda head: head.bias, head, bias)

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
