"""The leaves of a tree, as a file holds them: named, and of dtypes that the format has."""

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._safetensors import DTYPE_NAMES, METADATA
from .._types import dotted_name

Leaves = list[tuple[str, Any]]


def named_leaves(tree: Any, argument: str) -> Leaves:
    """With their names, which are all different.

    **Raises:** `ValueError` if there is an array of another dtype than the format has.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    dotted = [dotted_name(path) for path, _ in leaves]
    times = Counter([*dotted, METADATA])
    named = [
        (name if times[name] == 1 else jax.tree_util.keystr(path), x)
        for name, (path, x) in zip(dotted, leaves, strict=True)
    ]
    name, count = Counter(name for name, _ in named).most_common(1)[0] if named else ("", 1)
    if count > 1:
        raise ValueError(f"`{argument}` must have different names; got `{name}` twice.")
    for name, x in named:
        if is_array(x):
            _check_dtype(argument, name, x)
    return named


def _check_dtype(argument: str, name: str, x: Any) -> None:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    if is_key or np.dtype(x.dtype).name not in DTYPE_NAMES:
        raise ValueError(
            f"`{argument}` must hold arrays of numbers, of a dtype that safetensors has; got one "
            f"of {x.dtype} at `{name}`."
            + (" Put `jax.random.key_data(key)` in the place of a random key." if is_key else "")
        )
    is_read = argument == "like" and isinstance(x, jax.Array | jax.ShapeDtypeStruct)
    if is_read and jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise ValueError(
            f"`like` has {x.dtype} at `{name}`, which JAX would cut to 32 bits. Set "
            "`jax_enable_x64`, or put a NumPy array there."
        )


def check_savable(name: str, x: Any) -> None:
    """**Raises:** `ValueError` if there are no values here to be written."""
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            f"`tree` must hold arrays; got the shape of one at `{name}`. Was the `like` of `load` "
            "passed by mistake?"
        )
    if isinstance(x, Tracer):
        raise ValueError(f"`tree` must hold arrays; got a traced one at `{name}`, inside of `jit`.")
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(
            f"`tree` must lie on devices of this process; got parts elsewhere of `{name}`. Save it "
            "by the checkpoints of `equinox_mtp.training`."
        )
    if isinstance(x, jax.Array) and x.is_deleted():
        raise ValueError(f"`tree` must hold arrays; the one at `{name}` was deleted, or donated.")


def is_array(x: Any) -> bool:
    """Arrays and their shapes; NumPy's scalars are arrays, too."""
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic)


def number_kind(x: Any) -> str:
    """Which of Python's numbers this is; empty if none."""
    # NumPy's float64 is a float, too; and a bool is an int.
    kinds = () if is_array(x) else (bool, int, float, complex)
    return next((kind.__name__ for kind in kinds if isinstance(x, kind)), "")


def little_endian(x: Any) -> np.dtype:
    """The dtype in which an array is in the file."""
    return np.dtype(x.dtype).newbyteorder("<")


def num_bytes(x: Any) -> int:
    """What an array takes."""
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
