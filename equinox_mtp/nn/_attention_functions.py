"""Attention of queries to keys and values, for whole rows."""

from collections.abc import Callable
from typing import TypeAlias

import jax
from jaxtyping import Array, Float, Integer

from .._types import checked

AttentionFunction: TypeAlias = Callable[..., Array]
"""`attention(query, key, value, *, position_ids, segment_ids, scale)`, as `causal_attention`; for
layers with a window it has the argument `window`, too."""


@checked
def causal_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    *,
    position_ids: Integer[Array, "batch seq"],
    segment_ids: Integer[Array, "batch seq"] | None = None,
    scale: float | None = None,
    window: int | None = None,
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
    - `window`: how many positions a position sees, itself included; `None` for all before it.
    """
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="xla",
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
    window: int | None = None,
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
    distances = position_ids[:, :, None] - position_ids[:, None, :]
    mask = distances >= 0
    if window is not None:
        mask &= distances < window
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], scale=scale, implementation="xla"
    )
