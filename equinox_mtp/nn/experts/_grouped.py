"""Networks for rows that lie in groups, each group with matrices of its own.

`jax.lax.ragged_dot` is a product of such rows. On a CPU it is compiled to an array of all rows for
every group: 8,192 rows of 256 features in 64 groups took 2.2 s and 528 MiB, where one matrix for
all rows takes 14 ms (JAX 0.10.2). XLA expands it so on GPUs too, where cuDNN does not take it. Here
loops over tiles of rows do the work of the rows that there are, and take no more memory than their
results. Each tile passes the whole network while it is in the caches.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..._platform import accumulation_dtype
from ...sharding import with_auto_axes

_SIZES = (0.5, 0.875, 1.0, 1.125, 1.25, 2.0)
"""Rows of a tile, in mean numbers of rows of a group. With a size that is little above a group's
own number few rows are computed for nothing: most groups have about the mean. Each size is a loop
of its own to compile."""


class Groups(NamedTuple):
    """Which rows belong together: `sizes` of each group, one behind the other from `first_row` on.

    Rows before, and behind the last group, have no group.
    """

    sizes: Array
    first_row: Array


class Matrices(NamedTuple):
    """Of all groups: `gate` and `up` `[groups embed mlp]`, `down` `[groups mlp embed]`."""

    gate: Array
    up: Array
    down: Array


class _Tiles(NamedTuple):
    """Tiles that cover the rows of all groups, those of the smallest size first.

    `group`, `row` and `length` say for each tile whose rows it has, the first of them, and how
    many. Tiles `first[i] … first[i + 1] - 1` are for products of `sizes[i]` rows.
    """

    group: Array
    row: Array
    length: Array
    first: Array
    sizes: tuple[int, ...]


def grouped_swiglu(rows: Array, weights: Array, matrices: Matrices, groups: Groups) -> Array:
    """`weights[i] · (silu(rows[i]·gate) * (rows[i]·up)) · down` with the matrices of row i's group.

    0 for rows of no group. `rows` are `[rows embed]`, and `weights` float32.
    """
    if len(rows) == 0:
        return jnp.zeros_like(rows)
    network = with_auto_axes(_network, lambda spec: spec, rows)
    return network(rows, weights, matrices, groups)


@jax.custom_vjp
def _network(rows: Array, weights: Array, matrices: Matrices, groups: Groups) -> Array:
    return _run(rows, weights, matrices, groups, keeps_inner=False)[0]


def _forward(
    rows: Array, weights: Array, matrices: Matrices, groups: Groups
) -> tuple[Array, tuple[Any, ...]]:
    output, *inner = _run(rows, weights, matrices, groups, keeps_inner=True)
    return output, (rows, weights, matrices, groups, *inner)


def _inner(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _run(
    rows: Array, weights: Array, matrices: Matrices, groups: Groups, *, keeps_inner: bool
) -> tuple[Array, ...]:
    """The output, and what comes of `gate` and `up` if it is to be kept."""
    tiles = _tiles(len(rows), groups)
    wide = accumulation_dtype(rows)
    shape = (len(rows), matrices.gate.shape[2])
    results = (jnp.zeros_like(rows),) + keeps_inner * 2 * (jnp.zeros(shape, rows.dtype),)

    def run_tile(index: Array, results: tuple[Array, ...], *, size: int) -> tuple[Array, ...]:
        tile = _Tile(tiles, index, len(rows), size)
        gate_matrix, up_matrix, down_matrix = (tile.matrix(x) for x in matrices)
        x = tile.take(rows)
        gate, up = x @ gate_matrix, x @ up_matrix
        out = jnp.matmul(_inner(gate, up), down_matrix, preferred_element_type=wide)
        out = (tile.take(weights)[:, None] * out).astype(rows.dtype)
        return tuple(map(tile.put, results, (out, gate, up)[: len(results)]))

    return _for_all(tiles, run_tile, _vary_like(results, rows, weights, *matrices, *groups))


def _backward(residuals: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    rows, weights, matrices, groups, gates, ups = residuals
    tiles = _tiles(len(rows), groups)
    wide = accumulation_dtype(rows)
    results = (
        jnp.zeros_like(rows),
        jnp.zeros_like(weights),
        *(jnp.zeros(x.shape, wide) for x in matrices),
    )

    def run_tile(index: Array, results: tuple[Array, ...], *, size: int) -> tuple[Array, ...]:
        tile = _Tile(tiles, index, len(rows), size)
        of_rows, of_weights, *of_matrices = results
        gate_matrix, up_matrix, down_matrix = (tile.matrix(x) for x in matrices)
        x, weight = tile.take(rows), tile.take(weights)[:, None].astype(wide)
        # What is not this tile's adds nothing to the sums.
        of_out = jnp.where(tile.is_own[:, None], tile.take(cotangent), 0)
        inner, pull = jax.vjp(_inner, tile.take(gates), tile.take(ups))
        of_inner = jnp.matmul(of_out, down_matrix.T, preferred_element_type=wide)
        of_weight = jnp.sum(inner.astype(wide) * of_inner, axis=1)
        of_gate, of_up = pull((weight * of_inner).astype(rows.dtype))
        of_x = of_gate @ gate_matrix.T + of_up @ up_matrix.T
        of_out = (weight * of_out.astype(wide)).astype(rows.dtype)
        sums = ((x, of_gate), (x, of_up), (inner, of_out))
        return (
            tile.put(of_rows, of_x),
            tile.put(of_weights, of_weight.astype(weights.dtype)),
            *(tile.add(total, *pair) for total, pair in zip(of_matrices, sums, strict=True)),
        )

    arrays = (rows, weights, *matrices, *groups, cotangent)
    results = _for_all(tiles, run_tile, _vary_like(results, *arrays))
    of_rows, of_weights, *totals = results
    of_matrices = (x.astype(y.dtype) for x, y in zip(totals, matrices, strict=True))
    return of_rows, of_weights, Matrices(*of_matrices), None


_network.defvjp(_forward, _backward)


class _Tile:
    """A slice of `size` rows with a tile's own in it; it must not reach beyond the last row."""

    def __init__(self, tiles: _Tiles, index: Array, num_rows: int, size: int):
        row = tiles.row[index]
        self.group, self.size = tiles.group[index], size
        self.start = jnp.minimum(row, num_rows - size)
        place = self.start + jnp.arange(size)
        self.is_own = (place >= row) & (place < row + tiles.length[index])

    def matrix(self, matrices: Array) -> Array:
        """The group's."""
        return lax.dynamic_index_in_dim(matrices, self.group, keepdims=False)

    def take(self, rows: Array) -> Array:
        """The slice."""
        return lax.dynamic_slice_in_dim(rows, self.start, self.size)

    def put(self, rows: Array, values: Array) -> Array:
        """With the tile's own rows replaced; the others are another tile's."""
        is_own = self.is_own.reshape(-1, *[1] * (rows.ndim - 1))
        values = jnp.where(is_own, values, self.take(rows))
        return lax.dynamic_update_slice_in_dim(rows, values, self.start, 0)

    def add(self, totals: Array, left: Array, right: Array) -> Array:
        """With `leftᵀ · right` added to the group's total."""
        new = jnp.matmul(left.T, right, preferred_element_type=totals.dtype)
        return lax.dynamic_update_index_in_dim(totals, self.matrix(totals) + new, self.group, 0)


def _tile_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Multiples of 8, from 8 to 512, and none above the number of rows."""
    mean = min(num_rows / num_groups, 256)
    sizes = (max(1, math.ceil(part * mean / 8)) * 8 for part in _SIZES)
    return tuple(dict.fromkeys(min(size, num_rows) for size in sizes))


def _tiles(num_rows: int, groups: Groups) -> _Tiles:
    group_sizes, num_groups = groups.sizes, len(groups.sizes)
    sizes = _tile_sizes(num_rows, num_groups)
    largest = sizes[-1]
    starts = groups.first_row + jnp.cumsum(group_sizes) - group_sizes
    num_tiles = -(-group_sizes // largest)
    ends = jnp.cumsum(num_tiles)
    number = jnp.arange(num_rows // largest + min(num_rows, num_groups), dtype=jnp.int32)
    group = jnp.searchsorted(ends, number, side="right", method="compare_all")
    group = jnp.minimum(group, num_groups - 1)
    done = (number - (ends - num_tiles)[group]) * largest
    length = jnp.minimum(group_sizes[group] - done, largest)
    kind = jnp.searchsorted(jnp.asarray(sizes), length, method="compare_all")
    kind = jnp.where(number < ends[-1], kind, len(sizes))
    order = jnp.argsort(kind)
    first = jnp.searchsorted(kind[order], jnp.arange(len(sizes) + 1), method="compare_all")
    return _Tiles(group[order], (starts[group] + done)[order], length[order], first, sizes)


def _for_all(tiles: _Tiles, run_tile: Any, results: Any) -> Any:
    """A loop for each size of tiles, of as many steps as there are such tiles."""
    for kind, size in enumerate(tiles.sizes):
        bounds = tiles.first[kind], tiles.first[kind + 1]
        results = lax.fori_loop(*bounds, partial(run_tile, size=size), results)
    return results


def _vary_like(results: Any, *arrays: Array) -> Any:
    """Results that differ on the devices of a `shard_map` where one of the arrays does."""
    axes = frozenset[str]().union(*(jax.typeof(x).mat.varying for x in arrays))

    def vary(x: Array) -> Array:
        missing = tuple(axes - jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, results)
