"""A loop over tiles of tokens that leaves sharded arrays where they are.

A tile holds every n-th position, not a run of them. With 12 positions on two devices, and three
tiles, the digits say to which tile a position belongs:

    device 0: 0 1 2 0 1 2 | device 1: 0 1 2 0 1 2

So each device has an equal part of each tile, and works on its own part alone. Were tiles runs of
positions, the first would lie on device 0 only, and XLA would move it to all others.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._partitioning import shards_of

Visit: TypeAlias = Callable[[Any, Any, Array], tuple[Any, Any]]
PadWith: TypeAlias = Literal["zeros", "last_token"]


class _Tiling(NamedTuple):
    """At each depth, `num_tiles` tiles of `size` positions in each of a row's `shards` parts."""

    depth: int
    batch: int
    shards: int
    shard_seq: int
    size: int
    num_tiles: int

    @property
    def split_shape(self) -> tuple[int, ...]:
        return (self.depth, self.batch, self.shards, self.size, self.num_tiles)


def scan_tiles(
    visit: Visit, carry: Any, inputs: Any, *, tokens: int, pad_with: PadWith = "zeros"
) -> tuple[Any, Any]:
    """Scans `visit(carry, tile, depth) -> (carry, outputs)` over tiles of about `tokens` tokens.

    Tiles are strided along `seq`: of n tiles, tile j holds the positions j, j + n, … of each part
    that a device may hold. A device that holds a part of the batch, or of the sequence, then holds
    a part of every tile, and padding adds to each part, at its end.

    **Arguments:**

    - `visit`: given the inputs at a tile's tokens, `[batch tile …]`, and their depth, from 0. Its
        outputs have the same two leading axes.
    - `inputs`: a pytree of arrays `[depth batch seq …]`.
    - `tokens`: how many tokens a tile should hold.
    - `pad_with`: what tokens are added where no tile size divides `seq`: zeros, or copies of each
        row's last token. Their outputs are left out.

    **Returns:** the last carry, and the outputs `[depth batch seq …]`.
    """
    first = jax.tree.leaves(inputs)[0]
    if math.prod(first.shape[:3]) == 0:
        return carry, _empty_outputs(visit, carry, inputs)
    tiling = _tiling(first.shape, tokens)
    split = jax.tree.map(lambda x: _split(x, tiling, pad_with), inputs)
    tile_shapes = jax.eval_shape(partial(_read, tiling=tiling), split, jnp.int32(0))
    _, output_shapes = eqx.filter_eval_shape(visit, carry, tile_shapes, jnp.int32(0))

    def step(state: tuple[Any, Any], index: Array) -> tuple[tuple[Any, Any], None]:
        carry, written = state
        carry, outputs = visit(carry, _read(split, index, tiling), index // tiling.num_tiles)
        return (carry, _write(written, outputs, index, tiling)), None

    # Outputs go to their places in one buffer: stacked by tile, they would have to be transposed.
    buffers = jax.tree.map(
        lambda s: jnp.zeros_like(first, s.dtype, shape=(*tiling.split_shape, *s.shape[2:])),
        output_shapes,
    )
    indices = jnp.arange(tiling.depth * tiling.num_tiles, dtype=jnp.int32)
    (carry, written), _ = lax.scan(step, (carry, buffers), indices)
    return carry, jax.tree.map(lambda x: _join(x, tiling), written)


def _tiling(shape: tuple[int, ...], tokens: int) -> _Tiling:
    depth, batch, seq = shape[:3]
    shards = shards_of(seq, batch=batch, tokens=tokens)
    shard_seq = seq // shards
    num_tiles = min(shard_seq, math.ceil(batch * seq / tokens))
    return _Tiling(depth, batch, shards, shard_seq, -(-shard_seq // num_tiles), num_tiles)


def _split(x: Array, tiling: _Tiling, pad_with: PadWith) -> Array:
    """`[depth batch seq …]` to `[depth batch shards size num_tiles …]`."""
    x = x.reshape(tiling.depth, tiling.batch, tiling.shards, tiling.shard_seq, *x.shape[3:])
    padding = tiling.size * tiling.num_tiles - tiling.shard_seq
    if padding:
        mode = "constant" if pad_with == "zeros" else "edge"
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, padding)] + [(0, 0)] * (x.ndim - 4), mode=mode)
    return x.reshape(*tiling.split_shape, *x.shape[4:])


def _join(x: Array, tiling: _Tiling) -> Array:
    """The inverse of `_split`."""
    x = x.reshape(*x.shape[:3], tiling.size * tiling.num_tiles, *x.shape[5:])
    x = x[:, :, :, : tiling.shard_seq]
    return x.reshape(tiling.depth, tiling.batch, tiling.shards * tiling.shard_seq, *x.shape[4:])


def _starts(index: Array, ndim: int, tiling: _Tiling) -> tuple[Any, ...]:
    zero = jnp.zeros_like(index)  # All of one dtype, which Python's 0 is not under x64.
    depth, tile = index // tiling.num_tiles, index % tiling.num_tiles
    return (depth, zero, zero, zero, tile, *[zero] * (ndim - 5))


def _read(split: Any, index: Array, tiling: _Tiling) -> Any:
    def read(x: Array) -> Array:
        sizes = (1, *tiling.split_shape[1:4], 1, *x.shape[5:])
        tile = lax.dynamic_slice(x, _starts(index, x.ndim, tiling), sizes)
        return tile.reshape(tiling.batch, tiling.shards * tiling.size, *x.shape[5:])

    return jax.tree.map(read, split)


def _write(written: Any, outputs: Any, index: Array, tiling: _Tiling) -> Any:
    def write(x: Array, tile: Array) -> Array:
        tile = tile.reshape(1, *tiling.split_shape[1:4], 1, *tile.shape[2:])
        return lax.dynamic_update_slice(x, tile, _starts(index, x.ndim, tiling))

    return jax.tree.map(write, written, outputs)


def _empty_outputs(visit: Visit, carry: Any, inputs: Any) -> Any:
    outer = jax.tree.leaves(inputs)[0].shape[:3]
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 1, *x.shape[3:]), x.dtype), inputs)
    _, shapes = eqx.filter_eval_shape(visit, carry, one, jnp.int32(0))
    return jax.tree.map(lambda s: jnp.zeros((*outer, *s.shape[2:]), s.dtype), shapes)
