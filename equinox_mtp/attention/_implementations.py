"""The implementations besides tiles: the formula as it stands, and the vendors' kernels."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._config import ATTENDED
from .._platform import accumulation_dtype
from ._tiles import Places, Softmax


def dense_attention(
    softmax: Softmax,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    places: Places,
) -> Float[Array, "batch seq heads value_dim"]:
    """The formula, with the logits of all pairs of positions in memory."""
    batch, seq, heads, head_dim = query.shape
    groups = query.reshape(batch, seq, key.shape[2], heads // key.shape[2], head_dim)
    dtype = accumulation_dtype(query)
    products = jnp.einsum("bqkgd,blkd->bkgql", groups, key, preferred_element_type=dtype)
    mask = softmax.sees(places.order[:, :, None], places.order[:, None])
    if places.segment_ids is not None:
        mask &= places.segment_ids[:, :, None] == places.segment_ids[:, None]
    lowest = jnp.finfo(dtype).min
    logits = jnp.where(mask[:, None, None], softmax.logits(products), lowest)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    attended = jnp.einsum("bkgql,blkd->bqkgd", weights, value)
    return attended.reshape(batch, seq, heads, value.shape[-1])


def cudnn_attention(
    softmax: Softmax,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    places: Places,
) -> Float[Array, "batch seq heads head_dim"]:
    """cuDNN's kernel, for rows in order of one document."""
    window = softmax.window
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=softmax.scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def splash_attention(
    softmax: Softmax,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    places: Places,
) -> Float[Array, "batch seq heads head_dim"]:
    """The Pallas kernel for TPUs, for rows in order."""
    # Imported where it is used: other platforms need not have all of Pallas.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    seq, heads = query.shape[1:3]
    if softmax.window is None:
        mask = splash.CausalMask((seq, seq))
    else:
        mask = splash.LocalMask((seq, seq), (softmax.window - 1, 0), 0)
    block = next(size for size in (512, 256, 128) if seq % size == 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softmax.soft_cap,
        residual_checkpoint_name=ATTENDED,
    )
    segment_ids = places.segment_ids
    # Scaled in float32: in bfloat16 the scale itself would be rounded, too.
    scaled = (query.astype(accumulation_dtype(query)) * softmax.scale).astype(query.dtype)
    rows = (jnp.swapaxes(x, 1, 2) for x in (scaled, key, value))
    segments = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
    attended: Any = jax.vmap(kernel)(*rows, segment_ids=segments)
    return jnp.swapaxes(attended, 1, 2)
