"""The reference decoder: a pre-norm transformer of the Llama family."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from .._checks import check_integer
from .._decoder import AbstractCachedDecoder
from .._types import checked
from ._attention import KeyValueCache
from ._embedding import embed_tokens
from ._init import fan_in_normal
from ._linear import cast_matrices
from ._norm import RMSNorm
from ._transformer_layer import TransformerConfig, TransformerDecoderLayer


class TransformerDecoder(AbstractCachedDecoder):
    """A small, complete language model: embedding, layers, norm and head.

    `layers` are stacked over a leading axis and scanned, so compile time does not grow with their
    number; after `for_decoding` they are a tuple.

    >>> input_ids, position_ids = jnp.asarray([[5, 6, 7]]), jnp.asarray([[0, 1, 2]])
    >>> hidden_states = eqx.filter_jit(decoder)(input_ids, position_ids=position_ids)
    >>> logits = decoder.final_norm(hidden_states) @ decoder.output_head().T
    >>> logits.shape
    (1, 3, 32)
    """

    embedding: Float[Array, "vocab embed"]
    layers: TransformerDecoderLayer | tuple[TransformerDecoderLayer, ...]
    norm: RMSNorm
    head: Float[Array, "vocab embed"] | None
    config: TransformerConfig = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: sizes and choices.
        - `key`: for the initial values.
        """
        embedding_key, layers_key, head_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.embed_size)
        self.embedding = fan_in_normal(embedding_key, shape, config.embed_size)
        make_layer = partial(TransformerDecoderLayer, config)
        self.layers = eqx.filter_vmap(lambda layer_key: make_layer(key=layer_key))(
            jax.random.split(layers_key, config.num_layers)
        )
        self.norm = RMSNorm(config.embed_size, epsilon=config.norm_epsilon)
        self.head = (
            None if config.tie_embeddings else fan_in_normal(head_key, shape, config.embed_size)
        )
        self.config = config

    @checked
    def embed(
        self, input_ids: Integer[Array, "batch seq"], position_ids: Integer[Array, "batch seq"]
    ) -> Float[Array, "batch seq embed"]:
        """Looks tokens up, in the compute dtype; positions enter in the attention."""
        return embed_tokens(self.embedding, input_ids, dtype=self.config.dtype)

    @checked
    def __call__(
        self,
        input_ids: Integer[Array, "batch seq"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Runs all layers; see `AbstractDecoder`."""
        layers = self.layers
        if isinstance(layers, tuple):
            layers = jax.tree.map(lambda *x: jnp.stack(x) if eqx.is_array(x[0]) else x[0], *layers)
        layer_arrays, layer_static = eqx.partition(layers, eqx.is_array)
        keys = None if key is None else jax.random.split(key, self.config.num_layers)

        def run_layer(
            hidden_states: Array, layer_and_key: tuple[TransformerDecoderLayer, Array | None]
        ) -> tuple[Array, None]:
            arrays, layer_key = layer_and_key
            layer = eqx.combine(arrays, layer_static)
            hidden_states = layer(
                hidden_states,
                position_ids=position_ids,
                segment_ids=segment_ids,
                key=layer_key,
                inference=inference,
            )
            return hidden_states, None

        policy = self.config.checkpoint_policy
        if policy is not jax.checkpoint_policies.everything_saveable:
            # In a scan nothing is merged across iterations: `prevent_cse` would only cost.
            run_layer = jax.checkpoint(run_layer, policy=policy, prevent_cse=False)
        hidden_states = self.embed(input_ids, position_ids)
        return lax.scan(run_layer, hidden_states, (layer_arrays, keys))[0]

    def init_cache(self, batch_size: int, max_length: int) -> tuple[KeyValueCache, ...]:
        """A cache for each layer."""
        return tuple(
            self.layer(index).init_cache(batch_size, max_length, self.config.dtype)
            for index in range(self.config.num_layers)
        )

    @checked
    def decode(
        self,
        input_ids: Integer[Array, "batch seq"],
        cache: tuple[KeyValueCache, ...],
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], tuple[KeyValueCache, ...]]:
        """Runs a few tokens; see `AbstractCachedDecoder`."""
        hidden_states = self.embed(input_ids, position_ids)
        caches = []
        # Layer by layer: a scan would copy every cache and parameter.
        for index, layer_cache in enumerate(cache):
            hidden_states, layer_cache = self.layer(index).decode(
                hidden_states, layer_cache, position_ids=position_ids
            )
            caches.append(layer_cache)
        return hidden_states, tuple(caches)

    def for_decoding(self) -> "TransformerDecoder":
        """The same decoder with one array for each layer's matrix, in the compute dtype."""
        dtype = self.config.dtype
        layers = tuple(
            self.layer(index).for_decoding(dtype) for index in range(self.config.num_layers)
        )
        return eqx.tree_at(
            lambda decoder: (decoder.embedding, decoder.head, decoder.layers),
            self,
            (*cast_matrices((self.embedding, self.head), dtype), layers),
            is_leaf=lambda x: x is None,
        )

    def layer(self, index: int) -> TransformerDecoderLayer:
        """One layer; they count from 0.

        **Raises:** `ValueError` if there is no such layer.
        """
        index = check_integer("index", index, at_least=0, at_most=self.config.num_layers - 1)
        if isinstance(self.layers, tuple):
            return self.layers[index]
        return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, self.layers)

    @checked
    def final_norm(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """The norm before the head."""
        return self.norm(hidden_states)

    def output_head(self) -> Float[Array, "vocab embed"]:
        """The embedding if tied, the head's own matrix otherwise."""
        return self.embedding if self.head is None else self.head
