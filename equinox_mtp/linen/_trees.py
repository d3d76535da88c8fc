"""Nested dictionaries of arrays, and the names of a pytree's arrays in them."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import dtypes
from jaxtyping import Array

from .._types import is_array_or_shape

Path: TypeAlias = tuple[str, ...]
"""The keys from the root of a nested dictionary to an array."""


def unboxed(leaf: Any) -> Any:
    """The array in one of Flax's boxes: a partitioned one, or a variable of NNX."""
    if hasattr(type(leaf), "unbox"):
        return leaf.unbox()
    return leaf.get_value() if is_nnx_variable(leaf) else leaf


def joined(path: Path) -> str:
    """A path as it is written."""
    return "/".join(path)


def is_parameter(x: Any) -> bool:
    """Whether a leaf is an array that can be trained, or stands for one."""
    return bool(is_array_or_shape(x) and jnp.issubdtype(x.dtype, jnp.inexact))


def names_of(path: Iterable[Any]) -> Path:
    """The attributes, keys and indices of a path of `jax.tree_util`."""
    return tuple(
        str(next(getattr(key, name) for name in ("name", "key", "idx") if hasattr(key, name)))
        for key in path
    )


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """The arrays of a nested mapping by path; keys may be paths too, joined by `/` or `.`.

    **Raises:** `ValueError` if two entries have the same path.
    """
    flat: dict[Path, Any] = {}
    duplicates: list[str] = []

    def visit(entry: Any, path: Path) -> None:
        if isinstance(entry, Mapping):
            for key, child in entry.items():
                visit(child, (*path, *re.split(r"[/.]", str(key))))
        elif path in flat:
            duplicates.append(joined(path))
        else:
            flat[path] = unboxed(entry)

    visit(tree, ())
    if duplicates:
        raise ValueError(
            f"`params` must hold each entry once; twice in it: {', '.join(duplicates)}. A nested "
            "and a joined key may name the same entry."
        )
    return flat


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


def without_prefix(flat: Mapping[Path, Any], key: str) -> dict[Path, Any]:
    """Takes a key off all paths, if all of them begin with it."""
    if flat and all(path[0] == key for path in flat):
        return {path[1:]: leaf for path, leaf in flat.items()}
    return dict(flat)


def problems_of(
    given: Mapping[Path, Any], wanted: Mapping[Path, tuple[int, ...]], *, prefix: Path = ()
) -> list[str]:
    """What is unknown or misshapen among the given entries, a line each."""
    problems = [f"{joined((*prefix, *path))}: not known" for path in given if path not in wanted]
    for path, shape in wanted.items():
        if path not in given:
            continue
        where, actual = joined((*prefix, *path)), getattr(given[path], "shape", None)
        if actual is None:
            problems.append(f"{where}: not an array but a `{type(given[path]).__name__}`")
        elif tuple(actual) != shape:
            problems.append(f"{where}: of shape {tuple(actual)}, not {shape}")
    return problems


def as_exact_array(path: Path, leaf: Any) -> Array:
    """**Raises:** `ValueError` for what is no number, or if JAX would round the values."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ValueError(
            f"`params` must hold floating-point arrays; {joined(path)} is {leaf.dtype}."
        )
    dtype = dtypes.canonicalize_dtype(leaf.dtype)
    if dtype != leaf.dtype:
        raise ValueError(
            f"`params` must hold values that JAX keeps as they are; {joined(path)} is "
            f"{leaf.dtype}, and would be rounded to {dtype}. Cast it yourself, or enable "
            "`jax_enable_x64`."
        )
    return jnp.asarray(leaf)


def map_parameters(function: Callable[[Path, Any], Any], tree: Any) -> Any:
    """`function(path, array)` in place of every parameter of a pytree; the rest stays as it is."""

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
        # A variable of NNX is a pytree itself; its name is its attribute's.
        names = names_of(path)
        return jax.tree.map(lambda x: function(names, x) if is_parameter(x) else x, leaf)

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_nnx_variable)


def is_nnx_variable(x: Any) -> bool:
    # Of the class: an instance of `nnx.Rngs` has every attribute that it is asked for.
    return hasattr(type(x), "get_value") and hasattr(type(x), "set_value")
