"""From tensors in files to arrays where they belong, a piece at a time."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from ._array_place import Place
from ._folder import CheckpointFolder

_CHUNK = 1 << 24
"""Bytes that are read of a file at a time."""
_ALIGNMENT = 64
"""JAX takes NumPy's memory on a CPU without a copy, if it begins at a multiple of this."""


class Reader:
    """Reads places of a folder, and notes which tensors were not finite.

    **Arguments:**

    - `folder`: where the tensors are.
    - `dtype`: of all parameters; `None` keeps the stored ones.
    - `quantized_dtype`: of parameters that are stored in 8 bits.
    """

    def __init__(self, folder: CheckpointFolder, dtype: str | None, quantized_dtype: str):
        self.folder = folder
        self.dtype = dtype
        self.quantized_dtype = quantized_dtype
        self.not_finite: set[str] = set()

    def dtype_of(self, place: Place) -> np.dtype:
        """The dtype of a place's array: the widest of its tensors, unless another one is wanted."""
        if self.dtype is not None:
            return np.dtype(jnp.dtype(self.dtype))
        stored = [
            np.dtype(jnp.dtype(self.quantized_dtype))
            if self.folder.is_quantized(name)
            else self.folder.info(name).dtype
            for name in place.flat_names
        ]
        return np.dtype(functools.reduce(jnp.promote_types, stored))

    def check(self, place: Place) -> None:
        """**Raises:** `ValueError` if a tensor is missing, or has another shape or kind."""
        wanted = place.step.stored_shape(place.shape)
        for name in place.flat_names:
            info = self.folder.info(name)
            if info.shape != wanted:
                raise ValueError(
                    f"{self.folder.where(name)}: it must have shape {wanted} by config.json; got "
                    f"{info.shape!s:.80}."
                )
            if not jnp.issubdtype(info.dtype, jnp.floating):
                raise ValueError(
                    f"{self.folder.where(name)}: it must be of floating point; got {info.dtype}."
                )
            if info.dtype.itemsize == 1 and not self.folder.is_quantized(name):
                raise ValueError(
                    f"{self.folder.where(name)}: it is {info.dtype} without scales "
                    "(`…_scale_inv`), by which it could be read."
                )

    def array(self, place: Place, shape: tuple[int, ...], sharding: Any) -> jax.Array:
        """The array of a place, on the devices of a sharding: each part is read by itself."""
        dtype = self.dtype_of(place)
        parts: dict[Any, np.ndarray] = {}

        def read(index: Any) -> np.ndarray:
            # Devices that hold the same part share it.
            key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
            if key not in parts:
                sizes = [len(range(*part)) for part in key]
                parts[key] = _aligned_empty(sizes, dtype)
                self._fill(parts[key], place.names, place, index)
            return parts[key]

        if isinstance(sharding, SingleDeviceSharding):
            # Nothing writes to this memory any more: a CPU need not copy it.
            whole = read(tuple(slice(None) for _ in shape))
            return jax.device_put(whole, may_alias=True)
        return jax.make_array_from_callback(shape, sharding, read)

    def _fill(self, target: np.ndarray, names: Any, place: Place, index: Sequence[slice]) -> None:
        if isinstance(names, list):
            for part, inner in zip(target, names[index[0]], strict=True):
                self._fill(part, inner, place, index[1:])
            return
        view = place.step.view(self.folder.view(names), place.shape)[tuple(index)]
        if not _copy(target, view, lambda: self.folder.forget(names)):
            self.not_finite.add(names)


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray, forget: Callable[[], None]) -> bool:
    """Copies piece by piece along the axis that is the outer one in the file.

    **Returns:** whether all values are finite.
    """
    if source.size == 0:
        return True
    if source.ndim == 0:
        source, target = source[None], target[None]
    axis = int(np.argmax(np.abs(source.strides)))
    length = source.shape[axis]
    step = max(1, _CHUNK * length // max(source.nbytes, 1))
    all_finite = True
    for start in range(0, length, step):
        piece = (slice(None),) * axis + (slice(start, start + step),)
        target[piece] = source[piece]
        all_finite &= _is_finite(target[piece])
        forget()
    return all_finite


def _is_finite(x: np.ndarray) -> bool:
    """By the bits of the exponent: NumPy tests bfloat16 number by number."""
    exponents = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80)}
    if x.dtype.name not in exponents:
        return bool(np.isfinite(x).all())
    integer, ones = exponents[x.dtype.name]
    return not bool(((x.view(integer) & ones) == ones).any())
