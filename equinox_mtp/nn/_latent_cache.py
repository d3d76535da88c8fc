"""What latent attention keeps of the positions that a row has seen."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .._platform import accumulation_dtype
from .._types import checked
from ._key_value_cache import visible_positions


class LatentCache(eqx.Module):
    """Compressed latents and shared rotated keys of the positions seen so far; nothing of heads.

    `kv_lora_rank + qk_rope_head_dim` numbers a position (DeepSeek-V2, arXiv 2405.04434, §2.1.3).
    Both products of attention read the latents as they lie: nothing is transposed to attend.

    >>> cache = emtp.nn.LatentCache(latent=jnp.zeros((2, 8, 6)), rotary_key=jnp.zeros((2, 8, 4)))
    >>> latent, rotary_key = jnp.ones((2, 1, 6)), jnp.ones((2, 1, 4))
    >>> cache = cache.write(latent, rotary_key, position_ids=jnp.asarray([[3], [5]]))
    >>> print(cache.latent[:, :, 0])
    [[0. 0. 0. 1. 0. 0. 0. 0.]
     [0. 0. 0. 0. 0. 1. 0. 0.]]

    **Fields:**

    - `latent`: what keys and values are projected from, after its norm.
    - `rotary_key`: the rotated part of the keys, which all heads share.
    """

    latent: Float[Array, "batch max_length kv_rank"]
    rotary_key: Float[Array, "batch max_length head_dim"]

    @checked
    def write(
        self,
        latent: Float[Array, "batch seq kv_rank"],
        rotary_key: Float[Array, "batch seq head_dim"],
        position_ids: Integer[Array, "batch seq"],
    ) -> "LatentCache":
        """Puts latents and keys at their positions; drops what is outside."""
        rows = jnp.arange(position_ids.shape[0])[:, None]
        # A negative index would count from the end.
        slots = jnp.where(position_ids < 0, self.latent.shape[1], position_ids)
        return LatentCache(
            self.latent.at[rows, slots].set(latent, mode="drop"),
            self.rotary_key.at[rows, slots].set(rotary_key, mode="drop"),
        )

    @checked
    def write_first(
        self,
        latent: Float[Array, "batch seq kv_rank"],
        rotary_key: Float[Array, "batch seq head_dim"],
    ) -> "LatentCache":
        """Puts latents and keys at the first positions; drops what is beyond the last."""
        seq = min(latent.shape[1], self.latent.shape[1])
        return LatentCache(
            self.latent.at[:, :seq].set(latent[:, :seq]),
            self.rotary_key.at[:, :seq].set(rotary_key[:, :seq]),
        )

    @checked
    def attend(
        self,
        latent_query: Float[Array, "batch seq heads kv_rank"],
        rotary_query: Float[Array, "batch seq heads head_dim"],
        latent: Float[Array, "batch seq kv_rank"],
        rotary_key: Float[Array, "batch seq head_dim"],
        position_ids: Integer[Array, "batch seq"],
        scale: float,
    ) -> Float[Array, "batch seq heads kv_rank"]:
        """The latents that some positions, which follow one another, attend to.

        What is cached of the positions before the first of them, and their own: those are not in
        the cache yet. The softmax is in float32. A position before the row's first sees nothing,
        and gets a mean. There may be 0 positions, for which the result is empty.

        **Arguments:**

        - `latent_query`: queries times the up-projection of keys.
        - `rotary_query`: the rotated part of queries.
        - `latent`, `rotary_key`: of the same positions.
        - `position_ids`: as in `AbstractCachedDecoderLayer.decode`.
        - `scale`: of the logits.
        """
        batch, seq, heads, rank = latent_query.shape
        if seq == 0:
            return latent_query
        dtype = accumulation_dtype(latent_query)
        is_before, is_causal = visible_positions(position_ids, self.latent.shape[1])
        queries = [x.reshape(batch, seq * heads, -1) for x in (latent_query, rotary_query)]

        def logits(latents: Array, keys: Array, visible: Array) -> Array:
            # Positions first: a CPU then reads the cache as it lies.
            products = sum(
                jnp.einsum("blr,bqr->blq", x, query, preferred_element_type=dtype)
                for x, query in zip((latents, keys), queries, strict=True)
            )
            visible = jnp.repeat(visible.transpose(0, 2, 1), heads, axis=2)
            return jnp.where(visible, scale * products, jnp.finfo(dtype).min)

        def weighted(weights: Array, latents: Array) -> Array:
            weights = weights.astype(latents.dtype)
            return jnp.einsum("blq,blr->bqr", weights, latents, preferred_element_type=dtype)

        cached = logits(self.latent, self.rotary_key, is_before)
        new = logits(latent, rotary_key, is_causal)
        highest = jnp.maximum(
            jnp.max(cached, axis=1, keepdims=True),
            jnp.max(new, axis=1, keepdims=True),
        )
        cached, new = jnp.exp(cached - highest), jnp.exp(new - highest)
        total = jnp.sum(cached, axis=1) + jnp.sum(new, axis=1)
        attended = (weighted(cached, self.latent) + weighted(new, latent)) / total[..., None]
        return attended.astype(latent_query.dtype).reshape(batch, seq, heads, rank)
