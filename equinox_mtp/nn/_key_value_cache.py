"""What attention keeps of the positions that a row has seen."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .._platform import accumulation_dtype
from .._types import checked


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
    def write_first(
        self,
        key: Float[Array, "batch seq kv_heads head_dim"],
        value: Float[Array, "batch seq kv_heads head_dim"],
    ) -> "KeyValueCache":
        """Puts keys and values at the first positions; drops what is beyond the last."""
        seq = min(key.shape[1], self.value.shape[2])
        return KeyValueCache(
            self.key.at[..., :seq].set(key[:, :seq].transpose(0, 2, 3, 1)),
            self.value.at[:, :, :seq].set(value[:, :seq].transpose(0, 2, 1, 3)),
        )

    @checked
    def attend(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq kv_heads head_dim"],
        value: Float[Array, "batch seq kv_heads head_dim"],
        position_ids: Integer[Array, "batch seq"],
        scale: float | None,
        window: int | None = None,
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Attention of some positions, which follow one another.

        To what is cached of the positions before the first of them, and among each other: they are
        not in the cache yet. The softmax is in float32. A position before the row's first sees
        nothing, and gets a mean. `scale` and `window` are those of `causal_attention`. There may be
        0 positions, for which the result is empty.
        """
        batch, seq, heads, head_dim = query.shape
        if seq == 0:
            return query
        kv_heads, max_length = self.value.shape[1:3]
        scale = 1 / math.sqrt(head_dim) if scale is None else scale
        groups, dtype = heads // kv_heads, accumulation_dtype(query)
        query = query.reshape(batch, seq, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
        key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
        is_before, is_causal = visible_positions(position_ids, max_length, window)

        def logits(keys: Array, visible: Array) -> Array:
            rows = query.reshape(batch, kv_heads, groups * seq, head_dim)
            products = jnp.einsum("bkqd,bkdl->bkql", rows, keys, preferred_element_type=dtype)
            products = products.reshape(batch, kv_heads, groups, seq, keys.shape[-1])
            return jnp.where(visible[:, None, None], scale * products, jnp.finfo(dtype).min)

        def weighted(weights: Array, values: Array) -> Array:
            rows = weights.reshape(batch, kv_heads, groups * seq, values.shape[2])
            rows = rows.astype(values.dtype)
            products = jnp.einsum("bkql,bkld->bkqd", rows, values, preferred_element_type=dtype)
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


def visible_positions(
    position_ids: Integer[Array, "batch seq"], max_length: int, window: int | None = None
) -> tuple[Bool[Array, "batch seq max_length"], Bool[Array, "batch seq seq"]]:
    """What positions that follow one another see: of a cache, and of each other.

    Of the cache it is what precedes the first of them; one below 0 stands for no token.
    """
    slots, offsets = jnp.arange(max_length), jnp.arange(position_ids.shape[1])
    shape = (*position_ids.shape, max_length)
    is_before = jnp.broadcast_to(slots < position_ids[:, :1, None], shape)
    is_causal = (offsets <= offsets[:, None]) & (position_ids >= 0)[:, None]
    if window is not None:
        is_before &= slots > position_ids[:, :, None] - window
        is_causal &= offsets > offsets[:, None] - window
    return is_before, is_causal
