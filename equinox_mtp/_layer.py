"""One depth of Multi-Token Prediction."""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from ._config import PROJECTED, ConcatOrder, MTPConfig, NormPlacement
from ._decoder import (
    AbstractCachedDecoderLayer,
    AbstractDecoderLayer,
    Cache,
    if_taken,
    split_auxiliary,
)
from ._parameters import matrix_flops
from ._types import MakeLayer, checked
from .nn import Linear, RMSNorm, cast_matrices, outputs_first

Norm: TypeAlias = Callable[[Float[Array, "batch seq embed"]], Float[Array, "batch seq embed"]]
"""From hidden states to hidden states of another scale."""


def enter_first_depth(
    config: MTPConfig, hidden_states: Float[Array, "batch seq embed"], final_norm: Norm
) -> Float[Array, "batch seq embed"]:
    """The main model's hidden states, before its final norm, as depth 1 takes them."""
    return final_norm(hidden_states) if config.input_hidden_state == "after_norm" else hidden_states


class MultiTokenPredictionLayer(eqx.Module):
    """Combines a hidden state with the embedding of a later token, and transforms the result.

        h_k = TransformerLayer_k( W_k · concat( RMSNorm(Emb(t[i+k])), RMSNorm(h_{k-1}) ) )

    See DeepSeek-V3 (arXiv 2412.19437, §2.2, eq. 21 and 22).

    >>> hidden_states, token_embeddings = jnp.ones((2, 8, 16)), jnp.ones((2, 8, 16))
    >>> position_ids = jnp.asarray(batch.position_ids)
    >>> layer = eqx.filter_jit(block.layer(depth=1))
    >>> hidden_states, _ = layer(hidden_states, token_embeddings, position_ids=position_ids)
    >>> hidden_states.shape
    (2, 8, 16)
    """

    embedding_norm: RMSNorm
    hidden_state_norm: RMSNorm
    projection_layer: Linear
    transformer_layer: AbstractDecoderLayer
    output_norm: RMSNorm | None
    concat_order: ConcatOrder = eqx.field(static=True)
    carried_hidden_state: NormPlacement = eqx.field(static=True)

    @checked
    def __init__(
        self,
        config: MTPConfig,
        make_layer: MakeLayer,
        *,
        embed_size: int,
        norm_epsilon: float = 1e-5,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `config`: the conventions.
        - `make_layer`: `make_layer(key=key)` builds the transformer layer.
        - `embed_size`: features of hidden states and embeddings.
        - `norm_epsilon`: the epsilon of the layer's own norms.
        - `key`: for the initial values.

        **Raises:** `TypeError` if `make_layer` is a layer, or does not make an
        `AbstractDecoderLayer`.
        """
        if isinstance(make_layer, AbstractDecoderLayer):
            raise TypeError(
                "`make_layer` must be a function that builds a layer; got a layer. Pass "
                f"`lambda key: {type(make_layer).__name__}(..., key=key)`, for instance."
            )
        projection_key, layer_key = jax.random.split(key)
        transformer_layer = make_layer(key=layer_key)
        if not isinstance(transformer_layer, AbstractDecoderLayer):
            raise TypeError(
                "`make_layer` must return an `AbstractDecoderLayer`; got a "
                f"`{type(transformer_layer).__name__}`. Wrap it: subclass `AbstractDecoderLayer`, "
                "hold your layer in a field, and call it in `__call__`."
            )
        self.embedding_norm = RMSNorm(embed_size, epsilon=norm_epsilon)
        self.hidden_state_norm = RMSNorm(embed_size, epsilon=norm_epsilon)
        self.projection_layer = Linear(2 * embed_size, embed_size, key=projection_key)
        self.transformer_layer = transformer_layer
        own_norm = config.output_norm == "own"
        self.output_norm = RMSNorm(embed_size, epsilon=norm_epsilon) if own_norm else None
        self.concat_order = config.concat_order
        self.carried_hidden_state = config.carried_hidden_state

    @checked
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        token_embeddings: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        token_mask: Bool[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Any]:
        """Runs one depth.

        **Arguments:**

        - `hidden_states`: of the depth before; at depth 1, of the main model.
        - `token_embeddings`: of the tokens k positions later, `[batch seq embed]`.
        - `position_ids`, `segment_ids`: of the query positions, **not** shifted.
        - `token_mask`: where `token_embeddings` are of a token, and not of fill; passed to a
            transformer layer that takes it.
        - `key`, `inference`: passed to the transformer layer.

        **Returns:** `(hidden_states, auxiliary)`: the transformer layer's raw output, before any
        norm, and its auxiliary outputs or `None`.
        """
        layer: Any = self.transformer_layer
        output = layer(
            self._combine(hidden_states, token_embeddings),
            position_ids=position_ids,
            segment_ids=segment_ids,
            key=key,
            inference=inference,
            **({"token_mask": token_mask} if layer.takes_token_mask else {}),
        )
        return split_auxiliary(output)

    def normed_and_carried(
        self, hidden_states: Float[Array, "batch seq embed"], final_norm: Norm
    ) -> tuple[Float[Array, "batch seq embed"], Float[Array, "batch seq embed"]]:
        """What enters the output head, and what enters the next depth.

        **Arguments:**

        - `hidden_states`: of `__call__` or `decode`.
        - `final_norm`: the main model's, for layers without an output norm of their own.
        """
        norm = final_norm if self.output_norm is None else self.output_norm
        normed = norm(hidden_states)
        return normed, normed if self.carried_hidden_state == "after_norm" else hidden_states

    def decode(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        token_embeddings: Float[Array, "batch seq embed"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """One depth at a few positions; see `AbstractCachedDecoderLayer.decode`."""
        layer = self.transformer_layer
        assert isinstance(layer, AbstractCachedDecoderLayer)
        combined = self._combine(hidden_states, token_embeddings)
        return layer.decode(combined, cache, position_ids=position_ids)

    def prefill(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        token_embeddings: Float[Array, "batch seq embed"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
        lengths: Integer[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """One depth at the first positions; see `AbstractCachedDecoderLayer.prefill`."""
        layer = self.transformer_layer
        assert isinstance(layer, AbstractCachedDecoderLayer)
        combined = self._combine(hidden_states, token_embeddings)
        taken = if_taken(layer, lengths=lengths)
        return layer.prefill(combined, cache, position_ids=position_ids, **taken)

    def flops_per_token(self, seq_len: int) -> float:
        """Of the projection and the transformer layer; see `AbstractDecoderLayer`."""
        of_projection = matrix_flops(self.projection_layer)
        return of_projection + self.transformer_layer.flops_per_token(seq_len)

    def for_decoding(self, dtype: Any) -> "MultiTokenPredictionLayer":
        """The same depth, laid out for many small steps; see `AbstractCachedDecoderLayer`."""
        layer = self.transformer_layer
        assert isinstance(layer, AbstractCachedDecoderLayer)
        return eqx.tree_at(
            lambda depth: (depth.projection_layer, depth.transformer_layer),
            self,
            (
                outputs_first(cast_matrices(self.projection_layer, dtype)),
                layer.for_decoding(dtype),
            ),
        )

    def _combine(self, hidden_states: Array, token_embeddings: Array) -> Array:
        embedding = self.embedding_norm(token_embeddings)
        hidden = self.hidden_state_norm(hidden_states)
        if self.concat_order == "embedding_first":
            parts = [embedding, hidden]
        else:
            parts = [hidden, embedding]
        projected = self.projection_layer(jnp.concatenate(parts, axis=-1))
        return checkpoint_name(projected, PROJECTED)
