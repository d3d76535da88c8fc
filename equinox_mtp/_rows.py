"""Products with a few rows at a time, as decoding has them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_FEW = 4


def row_by_row(product: Callable[[Array], Array], x: Array, *, num_axes: int = 1) -> Array:
    """`product(x)`, where `product` acts on each row of `x` by itself.

    A row is the last `num_axes` axes. On a CPU a few rows are multiplied one by one: for several at
    once XLA packs the matrix anew in every call, which takes longer. It also drops the rows that
    nobody needs, then. Elsewhere, for many rows, and for rows that an explicit mesh has split over
    devices, all at once.
    """
    batch = x.shape[: x.ndim - num_axes]
    num_rows = math.prod(batch)
    is_split = any(axis is not None for axis in jax.typeof(x).sharding.spec[: len(batch)])
    if is_split or not 1 < num_rows <= _FEW:
        return product(x)

    def one_by_one(x: Array) -> Array:
        rows = x.reshape(num_rows, 1, *x.shape[len(batch) :])
        y = jnp.concatenate([product(row) for row in rows])
        return y.reshape(*batch, *y.shape[1:])

    return lax.platform_dependent(x, cpu=one_by_one, default=product)
