"""The output head: from final hidden states to logits."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer

from .._checks import check_integer, check_number
from .._platform import accumulation_dtype
from .._products import rows_times
from .._types import OutputHead, checked
from ..sharding import HeadSharding, current_head_sharding
from ._partitioning import tokens_on_all_devices
from ._tile_sizes import default_token_tile, default_vocab_tile


class LinearHead(eqx.Module):
    """A linear output head, with an optional bias and an optional soft-cap of the logits.

        logits = cap · tanh((weight · hidden_states + bias) / cap)

    The soft-cap is Gemma 2's (arXiv 2408.00118, §2). The loss computes such a head in tiles
    of the vocabulary; a plain matrix stands for `LinearHead(matrix)`.

    >>> head = emtp.LinearHead(jnp.eye(3), bias=jnp.asarray([0.0, 0.0, 9.0]), soft_cap=2.0)
    >>> print(np.asarray(head(jnp.asarray([0.0, 1.0, 0.0]))).round(3))
    [0.    0.924 2.   ]
    """

    weight: Float[Array, "vocab embed"]
    bias: Float[Array, "vocab"] | None
    soft_cap: float | None = eqx.field(static=True)
    sharding: HeadSharding | None = eqx.field(static=True)
    recompute_logits: bool = eqx.field(static=True)
    token_tile: int | None = eqx.field(static=True)
    vocab_tile: int | None = eqx.field(static=True)

    @checked
    def __init__(
        self,
        weight: Float[Array, "vocab embed"],
        bias: Float[Array, "vocab"] | None = None,
        *,
        soft_cap: float | int | np.floating | np.integer | None = None,
        sharding: HeadSharding | None = None,
        recompute_logits: bool = False,
        token_tile: int | np.integer | None = None,
        vocab_tile: int | np.integer | None = None,
    ):
        """**Arguments:**

        - `weight`: one row for each token id.
        - `bias`: added to the logits.
        - `soft_cap`: bounds the logits' magnitude, positive and finite; `None` leaves them as they
            are.
        - `sharding`: where things lie on a mesh; by default as the rules of `sharding.use_rules`
            say.
        - `recompute_logits`: whether a summed loss computes the logits again in the backward pass,
            rather than keep the head's gradient from the forward pass: less memory, more time.
        - `token_tile`, `vocab_tile`: on each device logits are computed for this many tokens and
            ids at a time. A summed loss keeps the logits of `token_tile` tokens and all ids, in
            float32. `None` takes what was measured to be fast: 256 tokens × 1024 ids on a CPU; on
            an accelerator as many tokens as its ratio of arithmetic to bandwidth asks for, 4096 on
            an H100 (those whose logits take 2 GiB, if fewer) × all ids, or × 32,768 if logits are
            computed again.

        **Raises:** `ValueError` for a soft-cap or a tile that is not positive, a soft-cap that is
        not finite, or a head without ids.
        """
        if weight.shape[0] == 0:
            raise ValueError(
                f"`weight` must have a row for each token id, at least one; got {weight.shape}."
            )
        self.weight = weight
        self.bias = bias
        # As plain Python numbers: equal heads are to compile to one program.
        self.soft_cap = None if soft_cap is None else check_number("soft_cap", soft_cap, above=0)
        self.sharding = sharding
        self.recompute_logits = recompute_logits
        self.token_tile, self.vocab_tile = (
            None if tile is None else check_integer(name, tile, at_least=1)
            for name, tile in (("token_tile", token_tile), ("vocab_tile", vocab_tile))
        )

    @checked
    def __call__(self, hidden_states: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """The logits of all token ids, accumulated in float32 (float64 for float64)."""
        return self.logits(hidden_states)

    @checked
    def rows(self, ids: Integer[Array, "ids"]) -> "LinearHead":
        """The head of some token ids alone, such as those that may be drafted.

        >>> head = emtp.LinearHead(jnp.eye(3)).rows(jnp.asarray([0, 2]))
        >>> head(jnp.asarray([1.0, 2.0, 3.0])).tolist()
        [1.0, 3.0]
        """
        return self.with_arrays(self.weight[ids], None if self.bias is None else self.bias[ids])

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
        tokens = self.token_tile
        tokens = default_token_tile(self.weight.shape[0]) if tokens is None else tokens
        return tokens if self.sharding is not None else tokens_on_all_devices(tokens)

    @property
    def ids_at_a_time(self) -> int:
        """How many ids a tile should hold."""
        if self.vocab_tile is not None:
            return self.vocab_tile
        return default_vocab_tile(self.weight.shape[0], keeps_logits=not self.defers_gradients)

    def with_arrays(self, weight: Any, bias: Any) -> "LinearHead":
        """The same head with other arrays, or with what describes them: specs, axis words."""
        head = eqx.tree_at(lambda head: head.weight, self, weight)
        return head if bias is None else eqx.tree_at(lambda head: head.bias, head, bias)

    def logits(self, hidden_states: Array) -> Array:
        """`__call__`, without its checks."""
        logits = rows_times(
            hidden_states,
            self.weight.astype(hidden_states.dtype),
            preferred_element_type=accumulation_dtype(hidden_states),
        )
        if self.bias is not None:
            logits += self.bias.astype(logits.dtype)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def cotangent(self, logits: Array, cotangent: Array) -> Array:
        """The cotangent before the soft-cap, from the logits' cotangent."""
        if self.soft_cap is None:
            return cotangent
        return cotangent * (1 - jnp.square(logits / self.soft_cap))


def as_linear_head(head: OutputHead) -> LinearHead | None:
    """A matrix or a `LinearHead`, with its own sharding or the one of the rules in force.

    `None` for a callable of another kind.
    """
    if not isinstance(head, LinearHead):
        if isinstance(head, eqx.nn.Linear):
            raise ValueError(
                "`head` must be a matrix, a `LinearHead`, or map [batch seq embed] to [batch seq "
                "vocab]; an `equinox.nn.Linear` maps one vector. Write "
                "`LinearHead(linear.weight, bias=linear.bias)`."
            )
        if callable(head):
            return None
        head = LinearHead(head)
    if head.sharding is not None:
        return head
    sharding = current_head_sharding()
    if sharding is None:
        return head
    return LinearHead(
        head.weight,
        head.bias,
        soft_cap=head.soft_cap,
        sharding=sharding,
        recompute_logits=head.recompute_logits,
        token_tile=head.token_tile,
        vocab_tile=head.vocab_tile,
    )


def head_vocab_size(head: Any) -> int | None:
    """The number of ids that an output head knows, if it is a matrix or a `LinearHead`.

    `MTPModel` and `speculative.generate` check token ids by it. `None` for any other callable.

    >>> emtp.cross_entropy.head_vocab_size(jnp.ones((32, 16)))
    32
    """
    if isinstance(head, LinearHead):
        return head.weight.shape[0]
    return None if callable(head) else head.shape[0]
