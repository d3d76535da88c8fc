"""The loops over tiles of queries and keys, on one device.

The forward loop is an online softmax (FlashAttention-2, arXiv 2307.08691, §3.1): of each query it
keeps the highest logit m so far, s = Σ exp(logit - m) and the sum of values with these weights. A
tile of keys with a higher maximum m' rescales both sums by exp(m - m'). The backward loop
recomputes the weights as exp(logit - log-sum-exp): nothing of the square is kept.

Tiles in which no query sees a key are never computed. Which these are follows from the least and
the greatest order and segment of each tile, so it holds for rows in any order: `visits` makes a
list for each tile, and the loops have as many rounds as it is long.

Heads that share a key are rows of one matrix: a tile of queries is
`[batch kv_heads groups·tile head_dim]`, a tile of keys `[batch kv_heads tile head_dim]`. Tiles are
the leading axis of what is looped over.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from .._platform import accumulation_dtype

FAR = 2**30
"""An order after (keys) or, negative, before (queries) all others: of positions that pad a row."""

_Tree = TypeVar("_Tree")


class Places(NamedTuple):
    """Where the positions of tiles stand: queries see keys of their segment, up to their order.

    `order` has one row if it is the same for all; `segment_ids` is `None` for one document a row.
    """

    order: Int32[Array, "tiles rows tile"]
    segment_ids: Int32[Array, "tiles batch tile"] | None


class Softmax(NamedTuple):
    """How logits become weights: `softmax(soft_cap · tanh(scale · products / soft_cap) + mask)`."""

    scale: float
    window: int | None
    soft_cap: float | None

    def logits(self, products: Array) -> Array:
        """The logits of products of queries and keys."""
        scaled = products * self.scale
        return scaled if self.soft_cap is None else self.soft_cap * jnp.tanh(scaled / self.soft_cap)

    def slope(self, logits: Array) -> Array | float:
        """The derivative of logits with respect to products."""
        if self.soft_cap is None:
            return self.scale
        return self.scale * (1 - jnp.square(logits / self.soft_cap))

    def sees(self, query_order: Array, key_order: Array) -> Array:
        """Whether the causal mask and the window let a query see a key."""
        sees = key_order <= query_order
        return sees if self.window is None else sees & (query_order - key_order < self.window)


class Running(NamedTuple):
    """What a query knows of the keys that it has been through."""

    max_logit: Float[Array, "*rows"]
    sum_exp: Float[Array, "*rows"]
    weighted_values: Float[Array, "*rows value_dim"]


# From arrays to tiles, and back


def split_tiles(x: Array, size: int, *, fill: int = 0) -> Array:
    """`[batch seq …]` as `[tiles batch size …]`, the last tile padded."""
    batch, seq = x.shape[:2]
    widths = [(0, 0), (0, -seq % size), *[(0, 0)] * (x.ndim - 2)]
    x = jnp.pad(x, widths, constant_values=fill) if seq % size else x
    return jnp.moveaxis(x.reshape(batch, -(-seq // size), size, *x.shape[2:]), 1, 0)


def split_heads(x: Array, size: int, num_kv_heads: int) -> Array:
    """`[batch seq heads …]` as tiles `[tiles batch kv_heads groups·size …]`."""
    groups = x.shape[2] // num_kv_heads
    tiles = split_tiles(x.reshape(*x.shape[:2], num_kv_heads, groups, *x.shape[3:]), size)
    tiles = jnp.moveaxis(tiles, 2, 4)  # tiles batch kv_heads groups size …
    return tiles.reshape(*tiles.shape[:3], groups * size, *tiles.shape[5:])


def join_heads(tiles: Array, size: int, seq: int) -> Array:
    """The inverse of `split_heads`."""
    groups = tiles.shape[3] // size
    x = jnp.moveaxis(tiles.reshape(*tiles.shape[:3], groups, size, *tiles.shape[4:]), 4, 2)
    x = jnp.moveaxis(x, 0, 1)  # batch tiles size kv_heads groups …
    return x.reshape(x.shape[0], x.shape[1] * size, x.shape[3] * groups, *x.shape[5:])[:, :seq]


def split_places(places: Places, size: int, *, fill: int) -> Places:
    """`[batch seq]` as tiles; `fill` is the order of what pads them."""
    segment_ids = places.segment_ids
    return Places(
        split_tiles(places.order, size, fill=fill),
        None if segment_ids is None else split_tiles(segment_ids, size),
    )


# Which tiles see which


class Visits(NamedTuple):
    """For each tile the tiles that it has to visit: the first `num` of a row of `tiles`."""

    tiles: Int32[Array, "tiles others"]
    num: Int32[Array, "tiles"]


def visible_tiles(
    softmax: Softmax, queries: Places, keys: Places
) -> Bool[Array, "query_tiles key_tiles"]:
    """Where a query of a tile may see a key of another, in any row: no pair that sees is left out.

    Segments of two tiles may meet if their ranges do.
    """

    def ends(x: Array) -> tuple[Array, Array]:
        return jnp.min(x, axis=-1), jnp.max(x, axis=-1)

    first_query, last_query = (x[:, None] for x in ends(queries.order))
    first_key, last_key = (x[None] for x in ends(keys.order))
    sees = first_key <= last_query
    if softmax.window is not None:
        sees &= first_query - last_key < softmax.window
    if queries.segment_ids is not None and keys.segment_ids is not None:
        first_query, last_query = (x[:, None] for x in ends(queries.segment_ids))
        first_key, last_key = (x[None] for x in ends(keys.segment_ids))
        sees &= (first_key <= last_query) & (first_query <= last_key)
    return jnp.any(sees, axis=-1)


def visits(visible: Bool[Array, "tiles others"]) -> Visits:
    """Of each row of a table the tiles that it sees, first to last."""
    return Visits(
        jnp.argsort(~visible, axis=1, stable=True).astype(jnp.int32),
        jnp.sum(visible, axis=1, dtype=jnp.int32),
    )


def _mask(softmax: Softmax, queries: Places, keys: Places, groups: int) -> Array:
    """Which queries of a tile see which keys of another: `[rows 1 groups·tile tile]`."""

    def pairs(of_queries: Array, of_keys: Array) -> tuple[Array, Array]:
        return jnp.tile(of_queries, groups)[:, None, :, None], of_keys[:, None, None, :]

    mask = softmax.sees(*pairs(queries.order, keys.order))
    if queries.segment_ids is not None and keys.segment_ids is not None:
        query_segments, key_segments = pairs(queries.segment_ids, keys.segment_ids)
        mask &= query_segments == key_segments
    return mask


def _tile(tree: _Tree, index: Array) -> _Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


# The loops


def start(query: Float[Array, "tiles batch kv_heads rows head_dim"], value_dim: int) -> Running:
    """Before the first key."""
    # Not `zeros(shape)`: in a `shard_map` the type says on which devices an array differs.
    zeros = jnp.zeros_like(query[..., 0], accumulation_dtype(query))
    lowest = jnp.full_like(zeros, _lowest(zeros))
    return Running(lowest, zeros, jnp.broadcast_to(zeros[..., None], (*zeros.shape, value_dim)))


def attend(
    softmax: Softmax,
    running: Running,
    query: Float[Array, "tiles batch kv_heads rows head_dim"],
    key: Float[Array, "key_tiles batch kv_heads tile head_dim"],
    value: Float[Array, "key_tiles batch kv_heads tile value_dim"],
    queries: Places,
    keys: Places,
) -> Running:
    """Takes all queries through the keys that they see."""
    groups = query.shape[3] // queries.order.shape[-1]

    def of_queries(_: None, tile: tuple[Running, Array, Places, Visits]) -> tuple[None, Running]:
        running, query, queries, to_visit = tile

        def visit(step: Array, running: Running) -> Running:
            key_tile, value_tile, places = _tile((key, value, keys), to_visit.tiles[step])
            logits = softmax.logits(_product("bkqd,bkld->bkql", query, key_tile))
            mask = _mask(softmax, queries, places, groups)
            logits = jnp.where(mask, logits, _lowest(logits))
            max_logit = jnp.maximum(running.max_logit, jnp.max(logits, axis=-1))
            # Of keys that are masked, in a row that has seen none, this is 1: the first one that
            # it sees multiplies their sums by 0.
            weights = jnp.exp(logits - max_logit[..., None])
            rescale = jnp.exp(running.max_logit - max_logit)
            values = _product("bkql,bkld->bkqd", weights.astype(value.dtype), value_tile)
            return Running(
                max_logit,
                running.sum_exp * rescale + jnp.sum(weights, axis=-1),
                running.weighted_values * rescale[..., None] + values,
            )

        return None, lax.fori_loop(0, to_visit.num, visit, running)

    to_visit = visits(visible_tiles(softmax, queries, keys))
    return lax.scan(of_queries, None, (running, query, queries, to_visit))[1]


def finish(running: Running) -> tuple[Array, Array]:
    """The weighted means of the values, and the log-sum-exp of the logits."""
    # Positions that pad a row may see no key.
    sum_exp = jnp.where(running.sum_exp == 0, 1.0, running.sum_exp)
    return running.weighted_values / sum_exp[..., None], running.max_logit + jnp.log(sum_exp)


def attend_backward(
    softmax: Softmax,
    query_gradient: Float[Array, "tiles batch kv_heads rows head_dim"],
    query: Float[Array, "tiles batch kv_heads rows head_dim"],
    key: Float[Array, "key_tiles batch kv_heads tile head_dim"],
    value: Float[Array, "key_tiles batch kv_heads tile value_dim"],
    cotangent: Float[Array, "tiles batch kv_heads rows value_dim"],
    log_sum_exp: Float[Array, "tiles batch kv_heads rows"],
    offset: Float[Array, "tiles batch kv_heads rows"],
    queries: Places,
    keys: Places,
) -> tuple[Array, Array, Array]:
    """Pulls the cotangent of the attended values back.

    With weights w and `offset` = cotangent · attended, the logits' gradient is
    w · (cotangent · value - offset).

    **Returns:** `query_gradient` plus that of these keys, and the gradients of keys and values.
    """
    groups = query.shape[3] // queries.order.shape[-1]
    dtype = accumulation_dtype(query)

    def of_keys(
        query_gradient: Array, tile: tuple[Array, Array, Places, Visits]
    ) -> tuple[Array, tuple[Array, Array]]:
        key, value, keys, to_visit = tile

        def visit(step: Array, gradients: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            query_gradient, key_gradient, value_gradient = gradients
            index = to_visit.tiles[step]
            of_tile = _tile((query, cotangent, log_sum_exp, offset, queries), index)
            query_tile, cotangent_tile, log_sum, offset_tile, places = of_tile
            # Keys come first: two of the three gradients are then plain products of rows.
            logits = softmax.logits(_product("bkld,bkqd->bklq", key, query_tile))
            mask = jnp.swapaxes(_mask(softmax, places, keys, groups), -1, -2)
            masked = jnp.where(mask, logits, _lowest(logits))
            weights = jnp.exp(masked - log_sum[..., None, :])
            value_gradient += _product(
                "bklq,bkqd->bkld", weights.astype(value.dtype), cotangent_tile
            )
            gradient = _product("bkld,bkqd->bklq", value, cotangent_tile)
            gradient = weights * (gradient - offset_tile[..., None, :]) * softmax.slope(logits)
            gradient = gradient.astype(query.dtype)
            key_gradient += _product("bklq,bkqd->bkld", gradient, query_tile)
            of_query = _product("bklq,bkld->bkqd", gradient, key)
            return query_gradient.at[index].add(of_query), key_gradient, value_gradient

        start = query_gradient, jnp.zeros_like(key, dtype), jnp.zeros_like(value, dtype)
        query_gradient, *others = lax.fori_loop(0, to_visit.num, visit, start)
        return query_gradient, tuple(others)

    to_visit = visits(visible_tiles(softmax, queries, keys).T)
    query_gradient, (key_gradient, value_gradient) = lax.scan(
        of_keys, query_gradient, (key, value, keys, to_visit)
    )
    return query_gradient, key_gradient, value_gradient


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=accumulation_dtype(x))


def _lowest(logits: Array) -> float:
    # Half of it: differences stay finite.
    return float(jnp.finfo(logits.dtype).min) / 2
