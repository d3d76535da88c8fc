"""Kernels, and how they lie in memory."""

from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._parameters import matrix_axes
from .._platform import default_platform
from .._products import rows_times

_Tree = TypeVar("_Tree")


class OutputsFirst(eqx.Module):
    """A kernel `[*inputs *outputs]` that lies in memory as `[*outputs *inputs]`.

    **Fields:**

    - `array`: with the outputs' axes first.
    - `num_inputs`: how many axes are inputs.
    """

    array: Float[Array, "..."]
    num_inputs: int = eqx.field(static=True)

    @classmethod
    def of(cls, kernel: Array, num_inputs: int) -> "OutputsFirst":
        """A kernel, copied."""
        inputs = tuple(range(num_inputs))
        return cls(jnp.moveaxis(kernel, inputs, tuple(i - num_inputs for i in inputs)), num_inputs)

    @property
    def dtype(self) -> Any:
        """That of its numbers."""
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel: inputs, then outputs."""
        outputs = self.array.ndim - self.num_inputs
        return self.array.shape[outputs:] + self.array.shape[:outputs]


Kernel: TypeAlias = Array | OutputsFirst


def multiply(x: Array, kernel: Kernel, *, num_inputs: int = 1) -> Array:
    """The last axes of `x` times the first ones of a kernel, in the dtype of `x`."""
    if isinstance(kernel, OutputsFirst):
        return rows_times(x, kernel.array.astype(x.dtype), num_inputs=num_inputs)
    kernel = kernel.astype(x.dtype)
    if num_inputs > 1:
        # As one matrix: a product over two axes would transpose the kernel, in every step.
        kernel = kernel.reshape(-1, *kernel.shape[num_inputs:])
        x = x.reshape(*x.shape[:-num_inputs], len(kernel))
    return jnp.tensordot(x, kernel, axes=1)


def outputs_first(tree: _Tree) -> _Tree:
    """The same modules, with kernels laid out for steps of a few rows, on a CPU.

    There a product of 2 to 64 rows takes 1.1 to 1.4 times as long if the inputs of the kernel come
    first in memory, and one of a single row 1.0 to 1.1 times as long if the outputs do. It is for
    kernels of `Linear` and of the attentions of this package, wherever they are in `tree`, and
    copies them; such a field is then to be multiplied by, and is no plain array. On other platforms
    `tree` itself.

    >>> layer = emtp.nn.outputs_first(decoder.layer(0))
    >>> layer.attention.query_kernel.array.shape, layer.attention.query_kernel.shape
    ((2, 8, 16), (16, 2, 8))

    **Raises:** `ValueError` for layers that are stacked.
    """
    return _outputs_first(tree) if default_platform() == "cpu" else tree


def _outputs_first(tree: Any) -> Any:
    def is_inner(x: Any) -> bool:
        return x is not tree and isinstance(x, eqx.Module) and bool(_kernels_of(x))

    tree = jax.tree.map(lambda x: _outputs_first(x) if is_inner(x) else x, tree, is_leaf=is_inner)
    for name in _kernels_of(tree):
        kernel = getattr(tree, name)
        if not eqx.is_array(kernel):
            continue
        num_inputs, num_outputs = matrix_axes(type(tree), name)
        if kernel.ndim != num_inputs + num_outputs:
            raise ValueError(
                f"`tree` must hold single layers; got a `{type(tree).__name__}` whose `{name}` is "
                f"stacked, of shape {kernel.shape}. Take a layer, as by `decoder.layer(0)`, or lay "
                "out a whole decoder by `decoder.for_decoding()`."
            )
        laid_out = OutputsFirst.of(kernel, num_inputs)
        tree = eqx.tree_at(lambda module, name=name: getattr(module, name), tree, laid_out)
    return tree


def _kernels_of(module: Any) -> tuple[str, ...]:
    """The fields of a module that it multiplies by with `multiply`."""
    return getattr(type(module), "_kernels", ())


def cast_matrices(tree: _Tree, dtype: DTypeLike) -> _Tree:
    """A module whose kernels and embeddings are of `dtype`; norms and biases stay as they are.

    For modules that cast these parameters to the dtype of their input anyway: their results do not
    change, and less memory is read. Floating-point arrays of two axes and more are cast.

    >>> layer = emtp.nn.cast_matrices(decoder.layer(0), jnp.bfloat16)
    >>> print(layer.attention.query_kernel.dtype, layer.attention_norm.scale.dtype)
    bfloat16 float32
    """

    def cast(x: Any) -> Any:
        return x.astype(dtype) if eqx.is_inexact_array(x) and x.ndim >= 2 else x

    return jax.tree.map(cast, tree)
