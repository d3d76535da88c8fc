"""Nested dictionaries of arrays, and the names of a pytree's arrays in them."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import dtypes
from jaxtyping import Array

Path: TypeAlias = tuple[str, ...]
"""The keys from the root of a nested dictionary to an array."""


def unboxed(leaf: Any) -> Any:
    """The array in one of Flax's boxes: a partitioned one, or a variable of NNX."""
    if callable(unbox := getattr(leaf, "unbox", None)):
        return unbox()
    if callable(get_value := getattr(leaf, "get_value", None)):
        return get_value()
    return leaf


def joined(path: Path) -> str:
    """A path as it is written."""
    return "/".join(path)


def is_array_or_shape(x: Any) -> bool:
    """Whether a leaf is an array, or stands for one."""
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


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


def check_entries(
    given: Mapping[Path, Any], wanted: Mapping[Path, tuple[int, ...]], *, partial: bool = False
) -> None:
    """**Raises:** `ValueError` that names every unknown, missing or misshapen entry."""
    problems = [f"{joined(path)}: not known" for path in given if path not in wanted]
    if not partial:
        problems += [f"{joined(path)}: missing" for path in wanted if path not in given]
    for path, shape in wanted.items():
        if path not in given:
            continue
        actual = getattr(given[path], "shape", None)
        if actual is None:
            problems.append(f"{joined(path)}: not an array but a `{type(given[path]).__name__}`")
        elif tuple(actual) != shape:
            problems.append(f"{joined(path)}: of shape {tuple(actual)}, not {shape}")
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(
            f"`params` must hold the arrays of the block, no more and no less; got\n  {listed}"
        )


def as_exact_array(path: Path, leaf: Any) -> Array:
    """**Raises:** `ValueError` if JAX would round the values."""
    dtype = dtypes.canonicalize_dtype(leaf.dtype)
    if dtype != leaf.dtype:
        raise ValueError(
            f"`params` must hold values that JAX keeps as they are; {joined(path)} is "
            f"{leaf.dtype}, and would be rounded to {dtype}. Cast it yourself, or enable "
            "`jax_enable_x64`."
        )
    return jnp.asarray(leaf)


def map_arrays(function: Callable[[Path, Any], Any], tree: Any) -> Any:
    """`function(path, array)` in place of every array of a pytree, or of what stands for one."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(names_of(path), leaf) if is_array_or_shape(leaf) else leaf,
        tree,
    )
