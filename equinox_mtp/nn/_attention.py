import math
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from .._checks import check_integer, check_number
from .._types import checked
from ._init import fan_in_normal
from ._rotary import rotary_embedding

AttentionFunction: TypeAlias = Callable[..., Array]
"""`attention(query, key, value, *, position_ids, segment_ids, scale)`, as `causal_attention`."""


@checked
def causal_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    *,
    position_ids: Integer[Array, "batch seq"],
    segment_ids: Integer[Array, "batch seq"] | None = None,
    scale: float | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Grouped-query attention, causal in the order of the row, and within documents.

    `softmax(scale · query · keyᵀ + mask) · value`, with the softmax in float32; query head h reads
    key head `h // (heads / kv_heads)`.

    >>> query, key = jnp.zeros((1, 3, 1, 2)), jnp.zeros((1, 3, 1, 2))
    >>> value = jnp.broadcast_to(jnp.asarray([0.0, 2.0, 4.0])[:, None, None], (1, 3, 1, 2))
    >>> out = emtp.nn.causal_attention(query, key, value, position_ids=jnp.asarray([[0, 1, 2]]))
    >>> print(out[0, :, 0, 0])  # the mean of what a position sees
    [0. 1. 2.]

    **Arguments:**

    - `query`, `key`, `value`: after the positional encoding.
    - `position_ids`: not used here; there for functions whose rows are not in order.
    - `segment_ids`: a position attends only to its own document; `None` means one document a row.
    - `scale`: of the attention logits; `1 / sqrt(head_dim)` if `None`.
    """
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, is_causal=True, implementation="xla"
    )


@checked
def causal_attention_by_position(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    *,
    position_ids: Integer[Array, "batch seq"],
    segment_ids: Integer[Array, "batch seq"] | None = None,
    scale: float | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """`causal_attention` for rows in any order.

    A position sees the positions of its document that `position_ids` does not put after it.

    They must tell the order of the text: all different within a document. The arguments are those
    of `causal_attention`.

    >>> query, key = jnp.zeros((1, 3, 1, 2)), jnp.zeros((1, 3, 1, 2))
    >>> value = jnp.broadcast_to(jnp.asarray([4.0, 2.0, 0.0])[:, None, None], (1, 3, 1, 2))
    >>> position_ids = jnp.asarray([[2, 1, 0]])  # the row stands in reverse order
    >>> out = emtp.nn.causal_attention_by_position(query, key, value, position_ids=position_ids)
    >>> print(out[0, :, 0, 0])
    [2. 1. 0.]
    """
    mask = position_ids[:, None, :] <= position_ids[:, :, None]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], scale=scale, implementation="xla"
    )


class KeyValueCache(eqx.Module):
    """Keys and values of the positions seen so far, after the positional encoding.

    Laid out as the products of a few queries with them want it: nothing is transposed to attend.

    >>> layer = decoder.layer(0)
    >>> cache = layer.init_cache(batch_size=2, max_length=8, dtype=jnp.float32)
    >>> cache.key.shape, cache.value.shape
    ((2, 2, 8, 8), (2, 2, 8, 8))
    """

    key: Float[Array, "batch kv_heads head_dim max_length"]
    value: Float[Array, "batch kv_heads max_length head_dim"]

    @checked
    def write(
        self,
        key: Float[Array, "batch seq kv_heads head_dim"],
        value: Float[Array, "batch seq kv_heads head_dim"],
        position_ids: Integer[Array, "batch seq"],
    ) -> "KeyValueCache":
        """Puts keys and values at their positions; drops what is outside."""
        rows = jnp.arange(position_ids.shape[0])[:, None]
        # A negative index would count from the end.
        slots = jnp.where(position_ids < 0, self.value.shape[2], position_ids)
        return KeyValueCache(
            self.key.at[rows, :, :, slots].set(key, mode="drop"),
            self.value.at[rows, :, slots].set(value, mode="drop"),
        )

    @checked
    def attend(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq kv_heads head_dim"],
        value: Float[Array, "batch seq kv_heads head_dim"],
        position_ids: Integer[Array, "batch seq"],
        scale: float | None,
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Attention of some positions, which follow one another.

        To what is cached of the positions before the first of them, and among each other: they are
        not in the cache yet. The softmax is in float32. A position before the row's first sees
        nothing, and gets a mean.
        """
        batch, seq, heads, head_dim = query.shape
        kv_heads, max_length = self.value.shape[1:3]
        scale = 1 / math.sqrt(head_dim) if scale is None else scale
        groups = heads // kv_heads
        query = query.reshape(batch, seq, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
        key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
        slots, offsets = jnp.arange(max_length), jnp.arange(seq)
        is_before = jnp.broadcast_to(slots < position_ids[:, :1, None], (batch, seq, max_length))
        is_causal = (offsets <= offsets[:, None]) & (position_ids >= 0)[:, None]

        def logits(keys: Array, visible: Array) -> Array:
            rows = query.reshape(batch, kv_heads, groups * seq, head_dim)
            products = jnp.einsum("bkqd,bkdl->bkql", rows, keys, preferred_element_type=jnp.float32)
            products = products.reshape(batch, kv_heads, groups, seq, keys.shape[-1])
            return jnp.where(visible[:, None, None], scale * products, jnp.finfo(jnp.float32).min)

        def weighted(weights: Array, values: Array) -> Array:
            rows = weights.reshape(batch, kv_heads, groups * seq, values.shape[2])
            rows = rows.astype(values.dtype)
            products = jnp.einsum(
                "bkql,bkld->bkqd", rows, values, preferred_element_type=jnp.float32
            )
            return products.reshape(query.shape)

        cached, new = logits(self.key, is_before), logits(key, is_causal)
        highest = jnp.maximum(
            jnp.max(cached, axis=-1, keepdims=True), jnp.max(new, axis=-1, keepdims=True)
        )
        cached, new = jnp.exp(cached - highest), jnp.exp(new - highest)
        total = jnp.sum(cached, axis=-1, keepdims=True) + jnp.sum(new, axis=-1, keepdims=True)
        attended = (weighted(cached, self.value) + weighted(new, value)) / total
        attended = attended.astype(query.dtype).transpose(0, 3, 1, 2, 4)
        return attended.reshape(batch, seq, heads, head_dim)


class GroupedQueryAttention(eqx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads.

    Grouped-query attention is arXiv 2305.13245. Runs in the dtype of its input.

    >>> attention = emtp.nn.GroupedQueryAttention(16, 2, 2, 8, key=jax.random.key(0))
    >>> attention(jnp.ones((1, 3, 16)), position_ids=jnp.asarray([[0, 1, 2]])).shape
    (1, 3, 16)
    """

    query_kernel: Float[Array, "embed heads head_dim"]
    key_kernel: Float[Array, "embed kv_heads head_dim"]
    value_kernel: Float[Array, "embed kv_heads head_dim"]
    out_kernel: Float[Array, "heads head_dim embed"]
    attention: AttentionFunction = eqx.field(static=True)
    rope_theta: float = eqx.field(static=True)
    scale: float | None = eqx.field(static=True)

    def __init__(
        self,
        embed_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope_theta: float = 10_000.0,
        scale: float | None = None,
        out_scale: float = 1.0,
        attention: AttentionFunction = causal_attention,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `embed_size`, `num_heads`, `num_kv_heads`, `head_dim`: sizes; `num_kv_heads` divides
            `num_heads`.
        - `rope_theta`: the base of the rotary frequencies.
        - `scale`: of the attention logits; `1 / sqrt(head_dim)` if `None`. For another one
            the query's initial values make up, as in MaxText, which has a scale of 1.
        - `out_scale`: multiplies the initial output kernel.
        - `attention`: the attention function, with the arguments of `causal_attention`.
        - `key`: for the initial values.
        """
        for name, size in (
            ("embed_size", embed_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
        ):
            check_integer(name, size, at_least=1)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"`num_kv_heads` must divide `num_heads`; got {num_kv_heads} and {num_heads}."
            )
        check_number("rope_theta", rope_theta, above=0)
        if scale is not None:
            check_number("scale", scale, above=0)
        query_key, key_key, value_key, out_key = jax.random.split(key, 4)
        query_scale = 1.0 if scale is None else 1 / (scale * math.sqrt(head_dim))
        self.query_kernel = fan_in_normal(
            query_key, (embed_size, num_heads, head_dim), embed_size, query_scale
        )
        kv_shape = (embed_size, num_kv_heads, head_dim)
        self.key_kernel = fan_in_normal(key_key, kv_shape, embed_size)
        self.value_kernel = fan_in_normal(value_key, kv_shape, embed_size)
        self.out_kernel = fan_in_normal(
            out_key, (num_heads, head_dim, embed_size), num_heads * head_dim, out_scale
        )
        self.attention = attention
        self.rope_theta = rope_theta
        self.scale = scale

    @checked
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Attends; see `AbstractDecoderLayer` for the arguments."""
        attended = self.attention(
            *self._project(hidden_states, position_ids),
            position_ids=position_ids,
            segment_ids=segment_ids,
            scale=self.scale,
        )
        return self._project_out(attended)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> KeyValueCache:
        """An empty cache; see `AbstractCachedDecoderLayer`."""
        _, num_kv_heads, head_dim = self.key_kernel.shape
        return KeyValueCache(
            jnp.zeros((batch_size, num_kv_heads, head_dim, max_length), dtype),
            jnp.zeros((batch_size, num_kv_heads, max_length, head_dim), dtype),
        )

    def decode(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        cache: KeyValueCache,
        *,
        position_ids: Integer[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq embed"], KeyValueCache]:
        """Attends to what is cached up to each position; see `AbstractCachedDecoderLayer`."""
        query, key, value = self._project(hidden_states, position_ids)
        attended = cache.attend(query, key, value, position_ids, self.scale)
        # Adds nothing, but has the cache written after it is read: XLA would copy it otherwise.
        nothing = 0 * attended[:, :, : key.shape[2]]
        return self._project_out(attended), cache.write(
            key + nothing, value + nothing, position_ids
        )

    def _project(self, hidden_states: Array, position_ids: Array) -> tuple[Array, Array, Array]:
        """Query, key and value, with their positions."""

        def project(kernel: Array) -> Array:
            return jnp.einsum("bse,ehd->bshd", hidden_states, kernel.astype(hidden_states.dtype))

        return (
            rotary_embedding(project(self.query_kernel), position_ids, theta=self.rope_theta),
            rotary_embedding(project(self.key_kernel), position_ids, theta=self.rope_theta),
            project(self.value_kernel),
        )

    def _project_out(self, attended: Array) -> Array:
        # As one matrix: an `einsum` over two axes would transpose the kernel, in every step.
        kernel = self.out_kernel.astype(attended.dtype).reshape(-1, self.out_kernel.shape[-1])
        return attended.reshape(*attended.shape[:-2], kernel.shape[0]) @ kernel
