"""The two parts that a transformer layer is composed of."""

import abc
from typing import Any, ClassVar, TypeVar

import equinox as eqx
from jaxtyping import Array, Float, Integer

from .._decoder import Cache, HiddenStates
from .._parameters import matrix_flops
from ._kernels import cast_matrices, outputs_first

_Part = TypeVar("_Part", bound=eqx.Module)


class AbstractAttention(eqx.Module):
    """What mixes positions in a `TransformerDecoderLayer`; `GroupedQueryAttention` is one.

    >>> isinstance(decoder.layer(0).attention, emtp.nn.AbstractAttention)
    True
    """

    takes_rollback: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Attends; see `AbstractDecoderLayer` for the arguments."""

    @abc.abstractmethod
    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> Cache:
        """An empty cache; see `AbstractCachedDecoderLayer`."""

    @abc.abstractmethod
    def decode(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """Attends to what is cached up to each position; see `AbstractCachedDecoderLayer`."""

    def prefill(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """`decode` for the first positions of rows; see `AbstractCachedDecoderLayer`."""
        return self.decode(hidden_states, cache, position_ids=position_ids)

    def for_decoding(self: _Part, dtype: Any) -> _Part:
        """With matrices of `dtype`, laid out; see `AbstractCachedDecoderLayer`.

        Call an inner `Linear`: what is in its `kernel` then is no plain array on a CPU.
        """
        return outputs_first(cast_matrices(self, dtype))

    def flops_per_token(self, seq_len: int) -> float:
        """See `AbstractDecoderLayer`; by default two for each number of every matrix."""
        del seq_len
        return matrix_flops(self)


class AbstractFeedForward(eqx.Module):
    """What transforms each position in a `TransformerDecoderLayer`; `SwiGLU` is one.

    >>> isinstance(decoder.layer(0).feed_forward, emtp.nn.AbstractFeedForward)
    True
    """

    takes_token_mask: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "batch seq embed"]) -> HiddenStates:
        """Transforms each position by itself, in the dtype of its input.

        **Returns:** hidden states, or `(hidden_states, auxiliary)`, as a decoder layer does. A
        network with statistics over tokens sets `takes_token_mask` in its class, and is called with
        `token_mask`; see `AbstractDecoderLayer`.
        """

    def for_decoding(self: _Part, dtype: Any) -> _Part:
        """With matrices of `dtype`, laid out; see `AbstractCachedDecoderLayer`.

        Call an inner `Linear`: what is in its `kernel` then is no plain array on a CPU.
        """
        return outputs_first(cast_matrices(self, dtype))

    def flops_per_token(self, seq_len: int) -> float:
        """See `AbstractDecoderLayer`; by default two for each number of every matrix."""
        del seq_len
        return matrix_flops(self)


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """How many positions a position of a row sees in the mean, itself included, of `window`."""
    within = seq_len if window is None else min(window, seq_len)
    return within - within * (within - 1) / (2 * seq_len)
