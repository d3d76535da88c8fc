"""The two small interfaces through which any language model is plugged in."""

import abc
from typing import Any, ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree

from ._parameters import matrix_flops
from ._types import OutputHead

HiddenStates: TypeAlias = (
    Float[Array, "batch seq embed"] | tuple[Float[Array, "batch seq embed"], Any]
)
"""Hidden states, or a pair of them and a pytree of auxiliary outputs (a router's balance loss)."""


class AbstractDecoderLayer(eqx.Module):
    """One transformer layer: from hidden states to hidden states of the same shape.

    A layer that has statistics over tokens, such as a router's load or balance loss, should leave
    out positions that carry no token: padding, where `segment_ids` is 0, and at prediction depth k
    the last k positions of each document. It is told which if it sets `takes_token_mask` in its
    class, and has the keyword argument `token_mask: Bool[Array, "batch seq"] | None = None` more:

    >>> class Layer(emtp.AbstractDecoderLayer):
    ...     takes_token_mask = True
    ...
    ...     def __call__(self, hidden_states, *, token_mask=None, **unused):
    ...         return hidden_states, jnp.sum(token_mask)
    >>> other_block = emtp.MultiTokenPredictionBlock(
    ...     block.config, lambda key: Layer(), embed_size=16, key=jax.random.key(0)
    ... )
    >>> output = eqx.filter_jit(emtp.MTPModel(decoder, other_block))(batch)
    >>> print(output.mtp.auxiliary)  # tokens at depths 1 and 2
    [14 12]
    """

    takes_token_mask: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> HiddenStates:
        """Runs the layer: causal, and within documents if `segment_ids` are given.

        **Arguments:**

        - `hidden_states`: in the compute dtype, which the result keeps.
        - `position_ids`: positions for the positional encoding.
        - `segment_ids`: which document each position belongs to; 0 is padding.
        - `key`, `inference`: for dropout, as everywhere in Equinox.

        **Returns:** hidden states, or `(hidden_states, auxiliary)`.
        """

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of the forward pass, for `equinox_mtp.flops_per_token`.

        Two for each number of every matrix. A layer whose matrices do not all meet every token, or
        that multiplies activations with one another, as attention does, has a method of its own.

        **Arguments:**

        - `seq_len`: positions per row.

        **Returns:** the mean over the tokens of a row.
        """
        del seq_len
        return matrix_flops(self)


class AbstractDecoder(eqx.Module):
    """A language model, as Multi-Token Prediction sees it.

    `output_head() · final_norm(decoder(input_ids))` are its logits. The MTP layers share `embed`,
    `final_norm` and `output_head` with it, so that its pytree holds every weight once.

    >>> class Bigrams(emtp.AbstractDecoder):  # a model without any layers
    ...     table: jax.Array
    ...
    ...     def embed(self, input_ids, position_ids):
    ...         return self.table[input_ids]
    ...     def __call__(self, input_ids, *, position_ids, **unused):
    ...         return self.embed(input_ids, position_ids)
    ...     def final_norm(self, hidden_states):
    ...         return hidden_states
    ...     def output_head(self):
    ...         return self.table
    >>> model = emtp.MTPModel(Bigrams(jnp.zeros((32, 16))), block)
    >>> model.decoder.output_head().shape
    (32, 16)
    """

    @abc.abstractmethod
    def embed(
        self, input_ids: Integer[Array, "batch seq"], position_ids: Integer[Array, "batch seq"]
    ) -> Float[Array, "batch seq embed"]:
        """Looks tokens up, in the compute dtype.

        `position_ids` are for models that add learned positions to the embedding; others ignore
        them. All depths' tokens are looked up at once, in a `jax.vmap` over depths.
        """

    @abc.abstractmethod
    def __call__(
        self,
        input_ids: Integer[Array, "batch seq"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> HiddenStates:
        """Embeds and runs all layers, up to the hidden states **before** the final norm.

        See `AbstractDecoderLayer` for the arguments. **Returns:** hidden states, or
        `(hidden_states, auxiliary)`.
        """

    @abc.abstractmethod
    def final_norm(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """The norm between the last layer and the output head."""

    @abc.abstractmethod
    def output_head(self) -> OutputHead:
        """The output head: a matrix `[vocab embed]`, a `LinearHead` (bias, soft-cap, sharding), or
        any callable from final hidden states `[batch seq embed]` to logits `[batch seq vocab]`.
        """

    def flops_per_token(self, seq_len: int) -> float:
        """Of all layers, without the output head; see `AbstractDecoderLayer.flops_per_token`.

        Matrices with an axis of the vocabulary's size are embeddings and heads: they do not count.
        """
        del seq_len
        return matrix_flops(self, except_axis_size=logit_sizes(self)[1])


def logit_sizes(decoder: AbstractDecoder) -> tuple[int, int]:
    """How many features the output head reads, and how many logits it gives."""

    def run(decoder: AbstractDecoder) -> tuple[int, int]:
        # As many rows, and positions, as any mesh can share.
        num_devices = max(1, jax.sharding.get_abstract_mesh().size)
        ids = jnp.zeros((num_devices, num_devices), jnp.int32)
        hidden_states, head = decoder.embed(ids, ids), decoder.output_head()
        vocab = head(hidden_states).shape[-1] if callable(head) else head.shape[0]
        return hidden_states.shape[-1], vocab

    return eqx.filter_eval_shape(run, decoder)


Cache: TypeAlias = PyTree[Any]
"""What a layer, or a whole decoder, keeps of the positions it has seen; of a static size."""


class AbstractCachedDecoderLayer(AbstractDecoderLayer):
    """A layer that can also run a few positions at a time, given a cache of those before.

    A cache of states, of a recurrence or a convolution, cannot be written again position by
    position: to go back a layer must keep what it was before, and what pads a row at its end would
    enter its state. Such a layer sets `takes_rollback` in its class, as `nn.GatedDeltaNet` does,
    and has two keyword arguments more: `rollback: int = 0` of `init_cache`, and `lengths:
    Integer[Array, "batch"] | None = None` of `prefill`. A decoder of such layers does the same.

    >>> layer = decoder.layer(0)
    >>> cache = layer.init_cache(batch_size=2, max_length=8, dtype=jnp.float32)
    >>> x, first = jnp.ones((2, 1, 16)), jnp.zeros((2, 1), int)
    >>> decode = eqx.filter_jit(layer.decode)
    >>> hidden_states, cache = decode(x, cache, position_ids=first)
    >>> hidden_states.shape
    (2, 1, 16)
    """

    takes_rollback: ClassVar[bool] = False

    @abc.abstractmethod
    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> Cache:
        """An empty cache for positions `0 … max_length - 1` of `batch_size` rows.

        `dtype` is the hidden states' own. `rollback`, for those who take it, is how many of the
        last positions may be run again: how far behind the end of the furthest position that was
        run a call of `decode` may begin.
        """

    @abc.abstractmethod
    def decode(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """Runs the layer at some positions, and puts them into the cache.

        Every position attends to the cached ones up to and including itself, and to no later one.
        Hence nothing need be deleted to go back: positions from there on are written again before
        they are read. Positions outside the cache are not written.

        **Arguments:**

        - `hidden_states`: of the new positions only.
        - `cache`: of `init_cache`, or of the call before.
        - `position_ids`: where each of them stands in its row. They follow one another; rows may
            stand at different positions; one below 0 stands for no token.

        **Returns:** the layer's output, and the cache.
        """

    def prefill(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """`decode` for the first positions of all rows, 0 … seq-1, and an empty cache.

        The same result. A layer may take less time for it, as nothing that is cached precedes.

        **Arguments:**

        - `hidden_states`: of the first positions.
        - `cache`: of `init_cache`.
        - `position_ids`: 0 … seq-1 in every row.
        - `lengths`, for those who take `rollback`: how many positions of each row are tokens; what
            follows them pads it. All are if `None`.

        **Returns:** the layer's output, and the cache.
        """
        return self.decode(hidden_states, cache, position_ids=position_ids)

    def for_decoding(self, dtype: Any) -> "AbstractCachedDecoderLayer":
        """The same layer, laid out for many small steps on hidden states of `dtype`; or itself.

        Called once, outside of the loop over steps. A layer that casts its parameters to the dtype
        of its input should do so here: in the loop it would read and cast all of them in each step.
        `nn.outputs_first` lays out the kernels of the parts of `nn`.
        """
        del dtype
        return self


class AbstractCachedDecoder(AbstractDecoder):
    """A language model that can also run a few tokens at a time, as generation needs it.

    >>> cache = decoder.init_cache(batch_size=2, max_length=8)
    >>> ids, first = jnp.asarray([[5], [7]]), jnp.zeros((2, 1), int)
    >>> decode = eqx.filter_jit(decoder.decode)
    >>> hidden_states, cache = decode(ids, cache, position_ids=first)
    >>> hidden_states.shape
    (2, 1, 16)
    """

    takes_rollback: ClassVar[bool] = False

    @abc.abstractmethod
    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for positions `0 … max_length - 1` of `batch_size` rows.

        See `AbstractCachedDecoderLayer` for `rollback`.
        """

    @abc.abstractmethod
    def decode(
        self,
        input_ids: Integer[Array, "batch seq"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """Embeds and runs all layers at some positions; see `AbstractCachedDecoderLayer.decode`.

        **Returns:** hidden states before the final norm, and the cache.
        """

    def prefill(
        self,
        input_ids: Integer[Array, "batch seq"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """`decode` for the first tokens of all rows; see `AbstractCachedDecoderLayer.prefill`.

        **Arguments:**

        - `input_ids`: the first tokens; what pads a row at its end is run like tokens.
        - `cache`: of `init_cache`.
        - `position_ids`: 0 … seq-1 in every row.
        - `lengths`: see `AbstractCachedDecoderLayer.prefill`.

        **Returns:** hidden states before the final norm, and the cache.
        """
        return self.decode(input_ids, cache, position_ids=position_ids)

    def for_decoding(self) -> "AbstractCachedDecoder":
        """The same decoder, laid out for many small steps; itself, if it is that already.

        Called once, outside of the loop over steps. A decoder that stacks its layers' parameters
        should take them apart here: in the loop they would be copied in every step.
        """
        return self


def if_taken(part: Any, **arguments: Any) -> dict[str, Any]:
    """The keyword arguments `rollback` and `lengths`, for a part that takes them."""
    return arguments if part.takes_rollback else {}


def split_auxiliary(output: HiddenStates) -> tuple[Float[Array, "batch seq embed"], Any]:
    """`(hidden_states, auxiliary)`, with `None` for a layer that has no auxiliary outputs."""
    return output if isinstance(output, tuple) else (output, None)
