"""The attention functions."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .._checks import check_integer, check_number
from .._types import checked
from ..sharding import with_auto_axes
from ._choice import (
    AttentionCall,
    AttentionImplementation,
    attention_implementation,
    tile_size,
    why_not,
)
from ._implementations import cudnn_attention, dense_attention, splash_attention
from ._partitioning import AttentionSpecs
from ._tiled import Plan, tiled_attention
from ._tiles import Places, Softmax

AttentionFunction: TypeAlias = Callable[..., Array]
"""`attention(query, key, value, *, position_ids, segment_ids, scale)`, as `causal_attention`; for
layers with a window it has the argument `window`, too."""


@checked
def causal_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    *,
    position_ids: Integer[Array, "batch seq"],
    segment_ids: Integer[Array, "batch seq"] | None = None,
    scale: float | int | None = None,
    window: int | None = None,
    soft_cap: float | int | None = None,
    implementation: AttentionImplementation | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """Grouped-query attention, causal in the order of the row, and within documents.

    `softmax(scale · query · keyᵀ + mask) · value`, with the softmax in float32; query head h reads
    key head `h // (heads / kv_heads)` (arXiv 2305.13245). Memory is linear in the length of the
    rows: by tiles, with an online softmax, whose backward pass makes the logits again
    (FlashAttention-2, arXiv 2307.08691), or by the vendor's kernel. Tiles in which no position sees
    another are not computed: of other documents, or outside of the window.

    If the rules in force (`sharding.use_rules`) split positions over devices, keys and values go
    around a ring of these (arXiv 2310.01889): in each round a device sends its part to the next. In
    the backward pass the gradients of keys and values go with them.

    The tiles have a derivative of their own: `jax.grad` and forward over reverse work, as for
    products with a Hessian; `jax.jvp` of the function itself needs `implementation="dense"`.

    >>> query, key = jnp.zeros((1, 3, 1, 2)), jnp.zeros((1, 3, 1, 2))
    >>> value = jnp.broadcast_to(jnp.asarray([0.0, 2.0, 4.0])[:, None, None], (1, 3, 1, 2))
    >>> out = emtp.nn.causal_attention(query, key, value, position_ids=jnp.asarray([[0, 1, 2]]))
    >>> print(out[0, :, 0, 0])  # the mean of what a position sees
    [0. 1. 2.]

    **Arguments:**

    - `query`: `[batch seq heads head_dim]` of any floating dtype, after the positional encoding.
    - `key`, `value`: `[batch seq kv_heads …]`, taken in the dtype of `query`; `kv_heads` divides
        `heads`, and `value_dim` may differ from `head_dim`.
    - `position_ids`: ignored, but required, so that attention functions are interchangeable.
    - `segment_ids`: a position attends only to its own document; `None` means one document a row.
    - `scale`: of the attention logits, positive; `1 / sqrt(head_dim)` if `None`.
    - `window`: how many positions a position sees, itself included; `None` for all before it.
    - `soft_cap`: `soft_cap · tanh(logits / soft_cap)` in place of the logits (arXiv 2408.00118).
    - `implementation`: `None` chooses, as `attention.attention_implementation` says.

    **Returns:** the attended values, in the dtype of `query`.

    **Raises:** `ValueError` if `kv_heads` does not divide `heads`, a number is out of its range, or
    the implementation does not support the call; under rules, if rows or positions are no multiple
    of the devices that share them.
    """
    order = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    options = _Options(scale, window, soft_cap, implementation, in_order=True)
    return _attention(options, query, key, value, order, segment_ids)


@checked
def causal_attention_by_position(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    *,
    position_ids: Integer[Array, "batch seq"],
    segment_ids: Integer[Array, "batch seq"] | None = None,
    scale: float | int | None = None,
    window: int | None = None,
    soft_cap: float | int | None = None,
    implementation: AttentionImplementation | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """`causal_attention` for rows in any order.

    A position sees the positions of its document that `position_ids` does not put after it.

    Tiles are skipped by their least and greatest position: the order of `sharding.zigzag_order`
    costs no more than the text's own, if its chunks are no shorter than a tile.

    >>> query, key = jnp.zeros((1, 3, 1, 2)), jnp.zeros((1, 3, 1, 2))
    >>> value = jnp.broadcast_to(jnp.asarray([4.0, 2.0, 0.0])[:, None, None], (1, 3, 1, 2))
    >>> position_ids = jnp.asarray([[2, 1, 0]])  # the row stands in reverse order
    >>> out = emtp.nn.causal_attention_by_position(query, key, value, position_ids=position_ids)
    >>> print(out[0, :, 0, 0])
    [2. 1. 0.]

    **Arguments:** those of `causal_attention`, but for one.

    - `position_ids`: `[batch seq]`, where each position stands in the text of its document. They
        are all different within a document, and less than 2^30.

    **Returns:** the attended values, in the dtype of `query`, and in the order of the row.

    **Raises:** `ValueError` as `causal_attention` does; also for the implementations `"cudnn"` and
    `"splash"`, which need rows in order.
    """
    options = _Options(scale, window, soft_cap, implementation, in_order=False)
    return _attention(options, query, key, value, position_ids.astype(jnp.int32), segment_ids)


class _Options(NamedTuple):
    """What a call says besides its arrays."""

    scale: float | int | None
    window: int | None
    soft_cap: float | int | None
    implementation: AttentionImplementation | None
    in_order: bool

    def softmax(self, head_dim: int) -> Softmax:
        """The checked numbers."""
        scale, window, soft_cap = self.scale, self.window, self.soft_cap
        if window is not None:
            window = check_integer("window", window, at_least=1, at_most=2**31 - 1)
        return Softmax(
            1 / math.sqrt(head_dim) if scale is None else check_number("scale", scale, above=0),
            window,
            None if soft_cap is None else check_number("soft_cap", soft_cap, above=0),
        )


def _attention(
    options: _Options,
    query: Array,
    key: Array,
    value: Array,
    order: Array,
    segment_ids: Array | None,
) -> Array:
    softmax = options.softmax(query.shape[3])
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"`key` must have a number of heads that divides that of `query`; got {key.shape[2]} "
            f"and {query.shape[2]}."
        )
    specs = AttentionSpecs.in_force(query, key)
    call = AttentionCall(
        seq=query.shape[1],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        dtype=str(query.dtype),
        in_order=options.in_order,
        packed=segment_ids is not None,
        soft_cap=softmax.soft_cap is not None,
        split=specs is not None and bool(specs.ring),
    )
    chosen: AttentionImplementation = options.implementation or attention_implementation(call)
    if (lacks := why_not(chosen, call)) is not None:
        raise ValueError(
            f"`implementation` {chosen!r} does not support {lacks}. Leave it out, or take 'tiled'."
        )
    if query.shape[1] == 0:
        chosen = "dense"

    def on_devices(query: Array, key: Array, value: Array, places: Places) -> Array:
        # GSPMD splits the formula by itself.
        if specs is None or chosen == "dense":
            return _local(chosen, softmax, (), query, key, value, places)
        return specs.shard_map(
            partial(_local, chosen, softmax, specs.ring), check_vma=chosen == "tiled"
        )(query, key, value, places)

    compute = with_auto_axes(on_devices, lambda spec: spec, query)
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return compute(query, key, value, Places(order, segment_ids))


def _local(
    chosen: AttentionImplementation,
    softmax: Softmax,
    ring: tuple[str, ...],
    query: Array,
    key: Array,
    value: Array,
    places: Places,
) -> Array:
    if chosen == "dense":
        return dense_attention(softmax, query, key, value, places)
    if chosen == "cudnn":
        return cudnn_attention(softmax, query, key, value, places)
    if chosen == "splash":
        return splash_attention(softmax, query, key, value, places)
    plan = Plan(softmax, tile_size(query.shape[1]), ring)
    return tiled_attention(plan, query, key, value, places)
