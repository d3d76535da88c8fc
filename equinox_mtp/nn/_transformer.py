"""The reference decoder: a pre-norm transformer of the Llama family."""

import dataclasses
import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jax import lax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from .._decoder import AbstractCachedDecoder, AbstractCachedDecoderLayer
from .._types import checked
from ._attention import (
    AttentionFunction,
    GroupedQueryAttention,
    KeyValueCache,
    causal_attention,
)
from ._feed_forward import SwiGLU
from ._init import fan_in_normal
from ._norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of `TransformerDecoder` and `TransformerDecoderLayer`.

    **Fields:**

    - `vocab_size`, `embed_size`, `num_layers`, `num_heads`: sizes.
    - `num_kv_heads`: key and value heads; divides `num_heads`, and equals it if `None`.
    - `head_dim`: `embed_size / num_heads` if `None`.
    - `mlp_size`: about `8/3 · embed_size`, rounded up to a multiple of 64, if `None`.
    - `rope_theta`: the base of the rotary frequencies.
    - `attention_scale`: of the attention logits; `1 / sqrt(head_dim)` if `None`. 1 for weights of
        MaxText, whose query kernels hold that factor.
    - `norm_epsilon`: the epsilon of every RMSNorm.
    - `tie_embeddings`: whether the output head is the embedding.
    - `dropout_rate`: of attention and feed-forward outputs; 0 needs no `key`.
    - `dtype`: the compute dtype, `float32` or `bfloat16`. Parameters are always float32; softmax,
        norms and losses are computed in float32.
    - `remat`: recompute each layer in the backward pass, to save memory.
    - `attention`: the attention function, with the arguments of `causal_attention`.

    **Raises:** `ValueError` for sizes that do not fit together.
    """

    vocab_size: int
    embed_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_size: int | None = None
    rope_theta: float = 10_000.0
    attention_scale: float | None = None
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    attention: AttentionFunction = causal_attention

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive; got {getattr(self, name)}.")
        for name in ("num_kv_heads", "head_dim", "mlp_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be positive, or `None`; got {value}.")
        if self.head_dim is None and self.embed_size % self.num_heads:
            raise ValueError(
                f"`num_heads` must divide `embed_size` if `head_dim` is not given; got "
                f"{self.num_heads} and {self.embed_size}."
            )
        if self.resolved_head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even for rotary embeddings; got {self.resolved_head_dim}."
            )
        if self.num_heads % self.resolved_num_kv_heads:
            raise ValueError(
                f"`num_kv_heads` must divide `num_heads`; got {self.num_kv_heads} and "
                f"{self.num_heads}."
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"`dropout_rate` must lie in [0, 1); got {self.dropout_rate}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"`dtype` must be 'float32' or 'bfloat16'; got {self.dtype!r}.")

    @property
    def resolved_num_kv_heads(self) -> int:
        """`num_kv_heads`, with its default."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def resolved_head_dim(self) -> int:
        """`head_dim`, with its default."""
        return self.embed_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def resolved_mlp_size(self) -> int:
        """`mlp_size`, with its default."""
        if self.mlp_size is None:
            return 64 * math.ceil(8 * self.embed_size / (3 * 64))
        return self.mlp_size


class TransformerDecoderLayer(AbstractCachedDecoderLayer):
    """A pre-norm transformer layer.

    y = x + attention(norm(x)); out = y + feed_forward(norm(y)).
    """

    attention_norm: RMSNorm
    attention: GroupedQueryAttention
    feed_forward_norm: RMSNorm
    feed_forward: SwiGLU
    dropout: eqx.nn.Dropout

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        """**Arguments:**

        - `config`: sizes and choices; `vocab_size` does not matter here.
        - `key`: for the initial values.
        """
        attention_key, feed_forward_key = jax.random.split(key)
        # Every layer adds twice to the residual stream: keep its scale whatever the depth.
        out_scale = 1 / math.sqrt(2 * config.num_layers)
        self.attention_norm = RMSNorm(config.embed_size, epsilon=config.norm_epsilon)
        self.attention = GroupedQueryAttention(
            config.embed_size,
            config.num_heads,
            config.resolved_num_kv_heads,
            config.resolved_head_dim,
            rope_theta=config.rope_theta,
            scale=config.attention_scale,
            out_scale=out_scale,
            attention=config.attention,
            key=attention_key,
        )
        self.feed_forward_norm = RMSNorm(config.embed_size, epsilon=config.norm_epsilon)
        self.feed_forward = SwiGLU(
            config.embed_size, config.resolved_mlp_size, out_scale=out_scale, key=feed_forward_key
        )
        self.dropout = eqx.nn.Dropout(config.dropout_rate)

    @checked
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Runs the layer; see `AbstractDecoderLayer`."""
        keys = (None, None) if key is None else jax.random.split(key)
        attended = self.attention(
            self.attention_norm(hidden_states), position_ids=position_ids, segment_ids=segment_ids
        )
        hidden_states += self.dropout(attended, key=keys[0], inference=inference)
        fed_forward = self.feed_forward(self.feed_forward_norm(hidden_states))
        return hidden_states + self.dropout(fed_forward, key=keys[1], inference=inference)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> KeyValueCache:
        """Keys and values of the attention."""
        return self.attention.init_cache(batch_size, max_length, dtype)

    @checked
    def decode(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: KeyValueCache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], KeyValueCache]:
        """Runs a few positions, without dropout; see `AbstractCachedDecoderLayer`."""
        attended, cache = self.attention.decode(
            self.attention_norm(hidden_states), cache, position_ids=position_ids
        )
        hidden_states += attended
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states)), cache


class TransformerDecoder(AbstractCachedDecoder):
    """A small, complete language model: embedding, layers, norm and head.

    The layers are stacked over a leading axis and scanned, so compile time does not grow with their
    number.
    """

    embedding: Float[Array, "vocab embed"]
    layers: TransformerDecoderLayer
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
        return self.embedding[input_ids].astype(self.config.dtype)

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
        layer_arrays, layer_static = eqx.partition(self.layers, eqx.is_array)
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

        run_layer = jax.checkpoint(run_layer) if self.config.remat else run_layer
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
        return self.for_decoding().decode(input_ids, cache, position_ids=position_ids)

    def for_decoding(self) -> "UnrolledDecoder":
        """The layers one by one."""
        return UnrolledDecoder(self, tuple(map(self.layer, range(self.config.num_layers))))

    def layer(self, index: int) -> TransformerDecoderLayer:
        """One layer; they count from 0."""
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


class UnrolledDecoder(AbstractCachedDecoder):
    """A `TransformerDecoder` whose layers are arrays of their own: what `for_decoding` gives.

    Its cached step goes layer by layer, not in a scan, which would copy every cache and parameter.
    """

    stacked: TransformerDecoder
    layers: tuple[TransformerDecoderLayer, ...]

    def embed(
        self, input_ids: Integer[Array, "batch seq"], position_ids: Integer[Array, "batch seq"]
    ) -> Float[Array, "batch seq embed"]:
        """That of the decoder, as everything but the cached step."""
        return self.stacked.embed(input_ids, position_ids)

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
        return self.stacked(
            input_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
            key=key,
            inference=inference,
        )

    def final_norm(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """The norm before the head."""
        return self.stacked.final_norm(hidden_states)

    def output_head(self) -> Float[Array, "vocab embed"]:
        """The head."""
        return self.stacked.output_head()

    def init_cache(self, batch_size: int, max_length: int) -> tuple[KeyValueCache, ...]:
        """A cache for each layer."""
        return self.stacked.init_cache(batch_size, max_length)

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
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            hidden_states, layer_cache = layer.decode(
                hidden_states, layer_cache, position_ids=position_ids
            )
            caches.append(layer_cache)
        return hidden_states, tuple(caches)
