"""A model in a single file, in the format of safetensors."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ._file_leaves import (
    DTYPES,
    METADATA,
    Leaves,
    check_savable,
    is_array,
    little_endian,
    named_leaves,
    num_bytes,
    number_kind,
)
from ._types import checked

Tree = TypeVar("Tree")

_NAMES = {theirs: ours for ours, theirs in DTYPES.items()}
_VERSION, _DIGEST, _NUMBERS = "equinox_mtp", "sha256", "numbers"
_NO_DIGEST = "0" * 64
_DIGEST_ENTRY = re.compile(rb'"sha256": "([0-9a-f]{64})"')
_BEFORE_SAFETENSORS = b'{"format": "equinox_mtp'
_HEADER_LIMIT = 1 << 20
"""Bytes of a header that are read of any file; more only if `like` has as much to say."""


@checked
def save(path: str | Path, tree: Any) -> None:
    """Writes a model, or any pytree, into a single file of the format safetensors.

    The file gets its name when all is on disk: one that was there before is replaced, or stays as
    it was. Arrays have the dotted names of their places in the tree; names that occur twice are
    written as JAX writes them, `['a']['b']`. The metadata hold `equinox_mtp`, the version that
    wrote the file; `sha256`, the digest of the whole file with zeros in the digest's own place; and
    `numbers`, Python's numbers, as JSON. There is no code in it. What else there is in a tree, such
    as functions, is not written.

    **Arguments:**

    - `path`: the file's name, in a folder that exists.
    - `tree`: a pytree of arrays of any values, those that are not finite included. All parts of its
        arrays are on devices of this process, split over them or not. For larger ones, and for
        those of a training run, see the checkpoints of `equinox_mtp.training`.

    **Raises:** `ValueError`, before anything is written, if there are shapes in the place of
    arrays, random keys, or dtypes that the format lacks; `FileNotFoundError` if there is no such
    folder; `OSError` if the file cannot be written.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must name a file in a folder that exists; got {path}. Make the folder first."
        )
    leaves = named_leaves(tree, "tree")
    for name, x in leaves:
        check_savable(name, x)
    header = _header(leaves)
    with _replacing(path) as file:
        digest = hashlib.sha256(header)
        file.write(header)
        for _, x in _in_file_order(leaves):
            data = np.ascontiguousarray(x, little_endian(x)).reshape(-1).view(np.uint8).data
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(header.replace(_NO_DIGEST.encode(), digest.hexdigest().encode(), 1))


@checked
def load(path: str | Path, like: Tree) -> Tree:
    """Reads what `save` has written.

        model = load("model.safetensors", eqx.filter_eval_shape(make_model))

    **Arguments:**

    - `path`: the file's name.
    - `like`: a tree of the same names, dtypes and shapes. Its arrays may be
        `jax.ShapeDtypeStruct`s; those with a sharding are put there, the others on one device.

    **Returns:** `like`, with the file's arrays and numbers in it. Arrays of NumPy stay on the host.

    **Raises:** `FileNotFoundError` if there is no such file; `ValueError` if it is not one of
    `save`'s, is damaged, or does not fit `like`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"`path` must name a file; {path} is a folder or a device.")
    leaves = named_leaves(like, "like")
    with path.open("rb") as file:
        header = _read_header(path, file, limit=max(_HEADER_LIMIT, 2 * len(_header(leaves))))
        _check_fit(path, header, leaves, size=path.stat().st_size - file.tell())
        numbers = _read_numbers(path, header, leaves)
        arrays = {name: _read_array(path, file, x) for name, x in _in_file_order(leaves)}
    values = [arrays[name] if name in arrays else numbers.get(name, x) for name, x in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), values)


# Writing


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the name when all is well, and is gone otherwise."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _header(leaves: Leaves) -> bytes:
    """Everything ahead of the arrays, with zeros in the digest's place."""
    numbers = [[name, number_kind(x), _plain(x)] for name, x in leaves if number_kind(x)]
    metadata = {
        # The first, so that it is the first to be found.
        _DIGEST: _NO_DIGEST,
        _VERSION: _version(),
        _NUMBERS: json.dumps(numbers),
    }
    text = json.dumps({METADATA: metadata, **_entries(leaves)}).encode()
    # Spaces, so that arrays begin at a multiple of eight.
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _plain(x: Any) -> Any:
    return [x.real, x.imag] if isinstance(x, complex) else x


def _version() -> str:
    try:
        return importlib.metadata.version("equinox-mtp")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _entries(leaves: Leaves) -> dict[str, dict[str, Any]]:
    """What the header says of each array: it follows from the tree alone."""
    entries, start = {}, 0
    for name, x in _in_file_order(leaves):
        end = start + num_bytes(x)
        entries[name] = {
            "dtype": DTYPES[np.dtype(x.dtype).name],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
        start = end
    return entries


def _in_file_order(leaves: Leaves) -> Leaves:
    """The arrays, those of larger numbers first: so each begins at a multiple of its own."""
    arrays = [(name, x) for name, x in leaves if is_array(x)]
    return sorted(arrays, key=lambda leaf: -np.dtype(leaf[1].dtype).itemsize)


# Reading


def _read_header(path: Path, file: BinaryIO, limit: int) -> dict[str, Any]:
    """What a file that is as it was written says of itself; leaves it at the first array."""
    start = file.read(len(_BEFORE_SAFETENSORS))
    if start == _BEFORE_SAFETENSORS:
        raise ValueError(
            f"{path} is of the format that `save` had before safetensors. Load it with the version "
            "of equinox_mtp that wrote it, or with 0.1, and save it again with this one."
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > path.stat().st_size - 8:
        raise ValueError(
            f"{path} was not written by `save`, or is cut short: its header would be longer than "
            "the file."
        )
    if length > limit:
        raise ValueError(
            f"`like` does not fit {path}: its header takes {length} bytes, where that of `like` "
            f"takes no more than {limit}."
        )
    file.seek(8)
    text = file.read(length)
    _check_digest(path, file, text)
    header: Any = None
    # Nested deeply enough, JSON is a `RecursionError`.
    with contextlib.suppress(ValueError, RecursionError):
        header = json.loads(text)
    if not isinstance(header, dict) or not isinstance(header.get(METADATA), dict):
        raise _is_damaged(path, "its header is no JSON object with metadata")
    return header


def _check_digest(path: Path, file: BinaryIO, text: bytes) -> None:
    """Compares the digest with the file's bytes; leaves it at the first array."""
    found = _DIGEST_ENTRY.search(text)
    if found is None:
        raise ValueError(
            f"{path} was not written by `save`: there is no digest in its metadata. The library "
            "safetensors reads files of others."
        )
    without = text[: found.start(1)] + _NO_DIGEST.encode() + text[found.end(1) :]
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + without)
    start = file.tell()
    while block := file.read(1 << 20):
        digest.update(block)
    if found[1] != digest.hexdigest().encode():
        raise _is_damaged(path, "it differs from what was written")
    file.seek(start)


def _check_fit(path: Path, header: dict[str, Any], leaves: Leaves, size: int) -> None:
    """All but the values is known from `like`: what the header says is compared, never used."""
    wanted = _entries(leaves)
    stored = {name: entry for name, entry in header.items() if name != METADATA}
    if stored and not wanted:
        raise ValueError(
            f"`like` must be a tree with arrays, or with their shapes, as that in {path}; got "
            "none. `eqx.filter_eval_shape(make_model)` makes one."
        )
    for name in [*wanted, *stored]:
        one, other = _shown(wanted.get(name)), _shown(stored.get(name))
        if one != other:
            raise _does_not_fit(path, name, one, other)
    if stored != wanted:
        raise _is_damaged(path, "its header puts arrays in other places than `save` does")
    expected = sum(num_bytes(x) for _, x in _in_file_order(leaves))
    if size != expected:
        raise _is_damaged(path, f"its arrays take {size} bytes, where {expected} are needed")


def _read_numbers(path: Path, header: dict[str, Any], leaves: Leaves) -> dict[str, Any]:
    """Python's numbers, by name."""
    numbers: Any = None
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        numbers = json.loads(header[METADATA].get(_NUMBERS))
    if not isinstance(numbers, list) or not all(map(_is_stored_number, numbers)):
        raise _is_damaged(path, "its metadata lack Python's numbers")
    stored = {name: (kind, value) for name, kind, value in numbers}
    wanted = {name: number_kind(x) for name, x in leaves if number_kind(x)}
    for name in [*wanted, *stored]:
        one, other = wanted.get(name, "nothing"), stored.get(name, ("nothing",))[0]
        if one != other:
            raise _does_not_fit(path, name, one, other)
    return {
        name: complex(*value) if kind == "complex" else value
        for name, (kind, value) in stored.items()
    }


def _read_array(path: Path, file: io.BufferedReader, x: Any) -> Any:
    """The next array, on the host or where it belongs."""
    array = np.empty(x.shape, little_endian(x))
    if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise _is_damaged(path, "it was changed while it was read")
    if isinstance(x, np.ndarray | np.generic):
        array = array.astype(x.dtype, copy=False)
        return array if isinstance(x, np.ndarray) else array[()]
    sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _is_stored_number(stored: Any) -> bool:
    if not isinstance(stored, list) or len(stored) != 3 or not isinstance(stored[0], str):
        return False
    _, kind, value = stored
    if kind == "complex":
        return isinstance(value, list) and [type(x) for x in value] == [float, float]
    return kind == type(value).__name__ and kind in ("bool", "int", "float")


def _is_damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}. Use another copy.")


def _does_not_fit(path: Path, name: str, one: str, other: str) -> ValueError:
    return ValueError(
        f"`like` does not fit {path}: at `{name[:80]}` it has {one} where the file has {other}. "
        "Build it as the model was built that was saved."
    )


def _shown(entry: Any) -> str:
    """An array as the header describes it, whatever that is."""
    if entry is None:
        return "nothing"
    try:
        dtype = _NAMES.get(entry["dtype"], entry["dtype"])
        return f"{dtype}[{','.join(map(str, entry['shape']))}]"[:80]
    except (TypeError, KeyError):
        return "no description of an array"
