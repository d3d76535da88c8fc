"""A loop over tiles of tokens that leaves sharded arrays where they are."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Visit: TypeAlias = Callable[[Any, Any, Array], tuple[Any, Any]]
PadWith: TypeAlias = Literal["zeros", "last_token"]


class _Tiling(NamedTuple):
    """At each depth, `num_tiles` tiles of `size` positions in each of `batch` rows."""

    depth: int
    batch: int
    seq: int
    size: int
    num_tiles: int


def scan_tiles(
    visit: Visit, carry: Any, inputs: Any, *, tokens: int, pad_with: PadWith = "zeros"
) -> tuple[Any, Any]:
    """Scans `visit(carry, tile, depth) -> (carry, outputs)` over tiles of about `tokens` tokens.

    Tiles are strided along `seq`: of n tiles, tile j holds the positions j, j + n, … A device that
    holds a part of the batch, or of the sequence, then holds a part of every tile.

    **Arguments:**

    - `visit`: given the inputs at a tile's tokens, `[batch tile …]`, and their depth, from 0. Its
        outputs have the same two leading axes.
    - `inputs`: a pytree of arrays `[depth batch seq …]`.
    - `tokens`: how many tokens a tile should hold.
    - `pad_with`: what tokens are added where no tile size divides `seq`: zeros, or copies of each
        row's last token. Their outputs are left out.

    **Returns:** the last carry, and the outputs `[depth batch seq …]`.
    """
    depth, batch, seq = jax.tree.leaves(inputs)[0].shape[:3]
    if depth * batch * seq == 0:
        return carry, _empty_outputs(visit, carry, inputs)
    num_tiles = min(seq, math.ceil(batch * seq / tokens))
    tiling = _Tiling(depth, batch, seq, size=-(-seq // num_tiles), num_tiles=num_tiles)
    split = jax.tree.map(lambda x: _split(x, tiling, pad_with), inputs)
    tile_shapes = jax.eval_shape(partial(_read, tiling=tiling), split, jnp.int32(0))
    _, output_shapes = eqx.filter_eval_shape(visit, carry, tile_shapes, jnp.int32(0))

    def step(state: tuple[Any, Any], index: Array) -> tuple[tuple[Any, Any], None]:
        carry, written = state
        carry, outputs = visit(carry, _read(split, index, tiling), index // num_tiles)
        return (carry, _write(written, outputs, index, tiling)), None

    # Outputs go to their places in one buffer: stacked by tile, they would have to be transposed.
    buffers = jax.tree.map(
        lambda s: jnp.zeros((depth, batch, tiling.size, num_tiles, *s.shape[2:]), s.dtype),
        output_shapes,
    )
    (carry, written), _ = lax.scan(
        step, (carry, buffers), jnp.arange(depth * num_tiles, dtype=jnp.int32)
    )
    return carry, jax.tree.map(lambda x: _join(x, tiling), written)


def _split(x: Array, tiling: _Tiling, pad_with: PadWith) -> Array:
    """`[depth batch seq …]` to `[depth batch size num_tiles …]`."""
    padding = tiling.size * tiling.num_tiles - tiling.seq
    if padding:
        mode = "constant" if pad_with == "zeros" else "edge"
        x = jnp.pad(x, [(0, 0), (0, 0), (0, padding), *[(0, 0)] * (x.ndim - 3)], mode=mode)
    return x.reshape(*x.shape[:2], tiling.size, tiling.num_tiles, *x.shape[3:])


def _join(x: Array, tiling: _Tiling) -> Array:
    """The inverse of `_split`."""
    x = x.reshape(*x.shape[:2], tiling.size * tiling.num_tiles, *x.shape[4:])
    return x[:, :, : tiling.seq]


def _starts(index: Array, ndim: int, tiling: _Tiling) -> tuple[Any, ...]:
    return (index // tiling.num_tiles, 0, 0, index % tiling.num_tiles, *[0] * (ndim - 4))


def _read(split: Any, index: Array, tiling: _Tiling) -> Any:
    def read(x: Array) -> Array:
        sizes = (1, tiling.batch, tiling.size, 1, *x.shape[4:])
        tile = lax.dynamic_slice(x, _starts(index, x.ndim, tiling), sizes)
        return tile.reshape(tiling.batch, tiling.size, *x.shape[4:])

    return jax.tree.map(read, split)


def _write(written: Any, outputs: Any, index: Array, tiling: _Tiling) -> Any:
    def write(x: Array, tile: Array) -> Array:
        return lax.dynamic_update_slice(x, tile[None, :, :, None], _starts(index, x.ndim, tiling))

    return jax.tree.map(write, written, outputs)


def _empty_outputs(visit: Visit, carry: Any, inputs: Any) -> Any:
    outer = jax.tree.leaves(inputs)[0].shape[:3]
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 1, *x.shape[3:]), x.dtype), inputs)
    _, shapes = eqx.filter_eval_shape(visit, carry, one, jnp.int32(0))
    return jax.tree.map(lambda s: jnp.zeros((*outer, *s.shape[2:]), s.dtype), shapes)
