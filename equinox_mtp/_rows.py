"""Products with a few rows at a time, as decoding has them."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_FEW = 4


def row_by_row(product: Callable[[Array], Array], x: Array, *, num_axes: int = 1) -> Array:
    """`product(x)`, where `product` acts on each row of `x` by itself.

    A row is the last `num_axes` axes. On a CPU a few rows are multiplied one by one: XLA reads a
    matrix for a single row as fast as memory gives it, and takes several times as long for two.
    It also drops the rows that nobody needs, then. Elsewhere, and for many rows, all at once.
    """
    batch = x.shape[: x.ndim - num_axes]
    num_rows = math.prod(batch)
    if not 1 < num_rows <= _FEW:
        return product(x)

    def one_by_one(x: Array) -> Array:
        rows = x.reshape(num_rows, 1, *x.shape[len(batch) :])
        return jnp.concatenate([product(row) for row in rows])

    def at_once(x: Array) -> Array:
        return product(x.reshape(num_rows, *x.shape[len(batch) :]))

    y = lax.platform_dependent(x, cpu=one_by_one, default=at_once)
    return y.reshape(*batch, *y.shape[1:])
