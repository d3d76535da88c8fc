"""One layer of the reference decoder, and its sizes and choices."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from .._checks import (
    check_checkpoint_policy,
    check_choice,
    check_flag,
    check_integer,
    check_number,
)
from .._decoder import (
    AbstractCachedDecoderLayer,
    Cache,
    HiddenStates,
    if_taken,
    split_auxiliary,
)
from .._types import checked, module_of
from ..attention import AttentionFunction, causal_attention
from ..sharding import constrain_hidden_states
from ._attention import GroupedQueryAttention
from ._feed_forward import SwiGLU
from ._norm import RMSNorm
from ._parts import AbstractAttention, AbstractFeedForward
from ._rotary import Rotary


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of `TransformerDecoder` and `TransformerDecoderLayer`.

    >>> config = emtp.nn.TransformerConfig(
    ...     vocab_size=32, embed_size=16, num_layers=1, num_heads=2
    ... )
    >>> config.resolved_head_dim, config.resolved_mlp_size
    (8, 64)

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
    - `checkpoint_policy`: what a layer keeps for the backward pass, as in `jax.checkpoint`: all of
        it by default. `None` keeps its input alone and recomputes the rest, to save memory.
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
    checkpoint_policy: Callable[..., Any] | None = jax.checkpoint_policies.everything_saveable
    attention: AttentionFunction = causal_attention

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_size", "num_layers", "num_heads"):
            self._set(name, check_integer(name, getattr(self, name), at_least=1))
        for name in ("num_kv_heads", "head_dim", "mlp_size"):
            if (value := getattr(self, name)) is not None:
                self._set(name, check_integer(name, value, at_least=1))
        self._set("tie_embeddings", check_flag("tie_embeddings", self.tie_embeddings))
        check_checkpoint_policy(self.checkpoint_policy)
        self._set("rope_theta", check_number("rope_theta", self.rope_theta, above=0))
        self._set("norm_epsilon", check_number("norm_epsilon", self.norm_epsilon, at_least=0))
        rate = check_number("dropout_rate", self.dropout_rate, at_least=0, below=1)
        self._set("dropout_rate", rate)
        if self.attention_scale is not None:
            scale = check_number("attention_scale", self.attention_scale, above=0)
            self._set("attention_scale", scale)
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
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if not callable(self.attention):
            raise ValueError(
                "`attention` must be a function with the arguments of `nn.causal_attention`; got "
                f"{self.attention!r:.60}."
            )

    def _set(self, name: str, value: Any) -> None:
        # As a plain Python number: equal configurations are to compile to one program.
        object.__setattr__(self, name, value)

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

    `TransformerDecoderLayer(config, key=key)` has the parts that `config` describes;
    `TransformerDecoderLayer.of` takes any.

    >>> layer = emtp.nn.TransformerDecoderLayer(config, key=jax.random.key(0))
    >>> layer(jnp.ones((1, 3, 16)), position_ids=jnp.asarray([[0, 1, 2]])).shape
    (1, 3, 16)
    """

    takes_token_mask: ClassVar[bool] = True
    takes_rollback: ClassVar[bool] = True

    attention_norm: RMSNorm
    attention: AbstractAttention
    feed_forward_norm: RMSNorm
    feed_forward: AbstractFeedForward
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
            rotary=Rotary(config.rope_theta),
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

    @classmethod
    @checked
    def of(
        cls,
        attention: AbstractAttention,
        feed_forward: AbstractFeedForward,
        *,
        attention_norm: RMSNorm,
        feed_forward_norm: RMSNorm,
        dropout_rate: float = 0.0,
    ) -> "TransformerDecoderLayer":
        """A layer of given parts.

        >>> keys = jax.random.split(jax.random.key(0))
        >>> attention = emtp.nn.GroupedQueryAttention(16, 2, 1, 8, norm_epsilon=1e-6, key=keys[0])
        >>> layer = emtp.nn.TransformerDecoderLayer.of(
        ...     attention,
        ...     emtp.nn.SwiGLU(16, 32, key=keys[1]),
        ...     attention_norm=emtp.nn.RMSNorm(16),
        ...     feed_forward_norm=emtp.nn.RMSNorm(16),
        ... )
        >>> layer.attention.query_norm.scale.shape
        (8,)

        **Arguments:**

        - `attention`, `feed_forward`: modules of these two abstract classes.
        - `attention_norm`, `feed_forward_norm`: the norms in front of them.
        - `dropout_rate`: of both outputs; 0 needs no `key`.

        **Raises:** `ValueError` for norms of different sizes.
        """
        sizes = attention_norm.scale.shape[0], feed_forward_norm.scale.shape[0]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "`attention_norm` and `feed_forward_norm` must have the same number of features, "
                f"that of the hidden states; got {sizes[0]} and {sizes[1]}."
            )
        return module_of(
            cls,
            attention_norm=attention_norm,
            attention=attention,
            feed_forward_norm=feed_forward_norm,
            feed_forward=feed_forward,
            dropout=eqx.nn.Dropout(dropout_rate),
        )

    @checked
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        token_mask: Bool[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> HiddenStates:
        """Runs the layer; see `AbstractDecoderLayer`.

        `token_mask` and auxiliary outputs are those of the feed-forward network.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        hidden_states = constrain_hidden_states(hidden_states)
        attended = self.attention(
            self.attention_norm(hidden_states), position_ids=position_ids, segment_ids=segment_ids
        )
        attended = self.dropout(attended, key=keys[0], inference=inference)
        hidden_states = constrain_hidden_states(hidden_states + attended)
        fed_forward, auxiliary = self._feed_forward(hidden_states, token_mask)
        fed_forward = self.dropout(fed_forward, key=keys[1], inference=inference)
        hidden_states = constrain_hidden_states(hidden_states + fed_forward)
        return hidden_states if auxiliary is None else (hidden_states, auxiliary)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any, *, rollback: int = 0
    ) -> Cache:
        """What the attention keeps; see `AbstractCachedDecoderLayer`."""
        taken = if_taken(self.attention, rollback=rollback)
        return self.attention.init_cache(batch_size, max_length, dtype, **taken)

    def for_decoding(self, dtype: Any) -> "TransformerDecoderLayer":
        """With matrices of `dtype`, laid out; see `AbstractCachedDecoderLayer`."""
        return eqx.tree_at(
            lambda layer: (layer.attention, layer.feed_forward),
            self,
            (self.attention.for_decoding(dtype), self.feed_forward.for_decoding(dtype)),
        )

    @checked
    def decode(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """Runs a few positions, without dropout; see `AbstractCachedDecoderLayer`."""
        attended, cache = self.attention.decode(
            self.attention_norm(hidden_states), cache, position_ids=position_ids
        )
        return self._add(hidden_states, attended), cache

    @checked
    def prefill(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: Cache,
        *,
        position_ids: Integer[Array, "batch seq"],
        lengths: Integer[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """Runs the first positions, without dropout; see `AbstractCachedDecoderLayer`."""
        taken = if_taken(self.attention, lengths=lengths)
        attended, cache = self.attention.prefill(
            self.attention_norm(hidden_states), cache, position_ids=position_ids, **taken
        )
        return self._add(hidden_states, attended), cache

    def flops_per_token(self, seq_len: int) -> float:
        """Of both parts; see `AbstractDecoderLayer`."""
        parts = (self.attention, self.feed_forward)
        return sum(part.flops_per_token(seq_len) for part in parts)

    def _add(self, hidden_states: Array, attended: Array) -> Array:
        hidden_states += attended
        return hidden_states + self._feed_forward(hidden_states, None)[0]

    def _feed_forward(self, hidden_states: Array, token_mask: Array | None) -> tuple[Array, Any]:
        """The feed-forward network's output, and its auxiliary outputs or `None`."""
        feed_forward: Any = self.feed_forward
        masks = {"token_mask": token_mask} if feed_forward.takes_token_mask else {}
        return split_auxiliary(feed_forward(self.feed_forward_norm(hidden_states), **masks))
