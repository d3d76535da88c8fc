"""Products with a matrix whose outputs are its first axes."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._platform import default_platform

# As a right factor XLA on a CPU packs the matrix anew in each product. For 2 to 64 rows that takes
# 1.1 to 2 times as long as the matrix as a left factor, which is read as it lies; a single row
# takes as long both ways. Rows of a `vmap` are not counted: there the result may be transposed
# needlessly.
_FEW_ROWS = 64


def rows_times(
    x: Array, matrix: Array, *, num_inputs: int = 1, preferred_element_type: Any = None
) -> Array:
    """The last axes of `x` times those of a matrix: `[*batch *inputs]` by `[*outputs *inputs]`.

    **Arguments:**

    - `x`, `matrix`: of one dtype.
    - `num_inputs`: how many axes are contracted.
    - `preferred_element_type`: see `jax.lax.dot_general`.

    **Returns:** `[*batch *outputs]`.
    """
    num_rows_axes = x.ndim - num_inputs
    of_x = tuple(range(num_rows_axes, x.ndim))
    of_matrix = tuple(range(matrix.ndim - num_inputs, matrix.ndim))
    is_few = math.prod(x.shape[:num_rows_axes]) <= _FEW_ROWS
    if not (is_few and default_platform() == "cpu"):
        return lax.dot_general(
            x,
            matrix,
            ((of_x, of_matrix), ((), ())),
            preferred_element_type=preferred_element_type,
        )
    out = lax.dot_general(
        matrix, x, ((of_matrix, of_x), ((), ())), preferred_element_type=preferred_element_type
    )
    # XLA turns a transposed product into the product of the transposed factors.
    out = lax.optimization_barrier(out)
    rows = tuple(range(out.ndim - num_rows_axes, out.ndim))
    return jnp.moveaxis(out, rows, tuple(range(num_rows_axes)))
