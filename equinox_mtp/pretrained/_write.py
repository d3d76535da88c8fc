"""Tensors into safetensors files: in shards, with an index, and whole or not at all."""

import contextlib
import functools
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._safetensors import DTYPE_NAMES, METADATA, array_entries, header_bytes
from .._types import is_array_or_shape
from ._array_place import Place, Rows
from ._folder import INDEX_FILE
from ._steps import Shape


class StoredTensor(NamedTuple):
    """A tensor to be written; its values are made when its turn comes.

    `start` is where the values lie in each group of the tensor, if they are a part of it.
    """

    name: str
    dtype: np.dtype
    shape: Shape
    values: Callable[[], np.ndarray]
    start: int | None = None

    @property
    def num_bytes(self) -> int:
        """What it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_tensors(tree: Any, places: Sequence[Place]) -> list[StoredTensor]:
    """The tensors of a tree's arrays.

    **Raises:** `ValueError` for a dtype that no layout has.
    """
    leaves = [x for x in jax.tree.leaves(tree) if is_array_or_shape(x)]
    found: list[StoredTensor] = []
    for x, place in zip(leaves, places, strict=True):
        dtype = np.dtype(x.dtype)
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.name not in DTYPE_NAMES:
            raise ValueError(
                f"`model` must hold numbers of floating point for a released layout; got {dtype} "
                f"at `{place.leaf}`. `equinox_mtp.save` writes any array."
            )
        found += _parts(x, place.names, place, dtype)
    by_name: dict[str, list[StoredTensor]] = {}
    for tensor in found:
        by_name.setdefault(tensor.name, []).append(tensor)
    return [parts[0] if parts[0].start is None else _joined(parts) for parts in by_name.values()]


def _joined(parts: list[StoredTensor]) -> StoredTensor:
    """The tensor of which these are the parts, in the widest of their dtypes."""
    parts = sorted(parts, key=lambda part: part.start or 0)
    dtype = np.dtype(functools.reduce(jnp.promote_types, [part.dtype for part in parts]))

    def values() -> np.ndarray:
        rows = np.concatenate([part.values().astype(dtype) for part in parts], axis=1)
        return rows.reshape(parts[0].shape)

    return StoredTensor(parts[0].name, dtype, parts[0].shape, values)


def _parts(x: Any, names: Any, place: Place, dtype: np.dtype) -> Iterator[StoredTensor]:
    if isinstance(names, list):
        for index, inner in enumerate(names):
            yield from _parts(_Part(x, index), inner, place, dtype)
        return

    def values() -> np.ndarray:
        array = np.asarray(x.take() if isinstance(x, _Part) else x)
        return np.ascontiguousarray(place.step.stored(array))

    start = place.step.start if isinstance(place.step, Rows) else None
    yield StoredTensor(names, dtype, place.step.stored_shape(place.shape), values, start)


class _Part(NamedTuple):
    """An entry of an array's first axis, not taken yet."""

    whole: Any
    entry: int

    def take(self) -> Any:
        whole = self.whole.take() if isinstance(self.whole, _Part) else self.whole
        return whole[self.entry]


def write_tensors(folder: Path, tensors: Sequence[StoredTensor], max_bytes: int) -> None:
    """`model.safetensors`, or shards of at most `max_bytes` (or one tensor) and their index."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0])
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        files |= {tensor.name: name for tensor in shard}
    write_index(folder, files, sum(tensor.num_bytes for tensor in tensors))


def write_index(folder: Path, files: dict[str, str], total_size: int) -> None:
    """Which file has which tensor."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))}
    write_json(folder / INDEX_FILE, index)


def write_file(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """One file."""
    # Wider numbers first: each tensor begins at a multiple of its item size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    entries = array_entries((tensor.name, tensor.dtype, tensor.shape) for tensor in ordered)
    with path.open("xb") as file:
        file.write(header_bytes({METADATA: {"format": "pt"}, **entries}))
        for tensor in ordered:
            file.write(tensor.values().reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, as people read it."""
    with path.open("x", encoding="utf8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that gets its name when all is in it, and is gone otherwise.

    **Raises:** `FileExistsError` if there is something of this name.
    """
    path = path.absolute()
    if path.is_symlink():
        raise FileExistsError(f"`folder`: {path} is a link. Name the folder itself.")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(
            f"`folder`: {path} exists, and is not empty. Name a new folder, or remove it first."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`folder`: there is no folder {path.parent} to put it in.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
