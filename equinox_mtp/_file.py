"""A model in a single file."""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ._types import checked

Tree = TypeVar("Tree")

_FORMAT = "equinox_mtp 1"
_DIGEST_LENGTH = 64


@checked
def save(path: str | Path, tree: Any) -> None:
    """Writes a model, or any pytree, into a single file.

    The file gets its name when all is on disk: one that was there before is replaced, or stays as
    it was. It holds the names, dtypes, shapes and bytes of arrays, the values of Python's numbers,
    and a digest; no code. What else there is in a tree, such as functions, is not written.

    **Arguments:**

    - `path`: the file's name, in a folder that exists.
    - `tree`: a pytree; all parts of its arrays are on devices of this process, split over them or
        not. For larger ones, and for those of a training run, see the checkpoints of
        `equinox_mtp.training`.

    **Raises:** `ValueError` if there are random keys or Python objects in its arrays;
    `FileNotFoundError` if there is no such folder; `OSError` if the file cannot be written.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must name a file in a folder that exists; got {path}. Make the folder first."
        )
    leaves = _leaves(tree)
    header = {
        "format": _FORMAT,
        "arrays": _described(leaves, "tree"),
        "numbers": [[name, type(x).__name__, _plain(x)] for name, x in leaves if _is_number(x)],
    }
    with _replacing(path) as file:
        digest = hashlib.sha256()

        def write(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        write(json.dumps(header).encode() + b"\n")
        for _, x in leaves:
            if _is_array(x):
                write(np.asarray(x).tobytes())
        file.write(digest.hexdigest().encode())


@checked
def load(path: str | Path, like: Tree) -> Tree:
    """Reads what `save` has written.

        model = load("model.mtp", eqx.filter_eval_shape(make_model))

    **Arguments:**

    - `path`: the file's name.
    - `like`: a tree of the same structure, dtypes and shapes. Its arrays may be
        `jax.ShapeDtypeStruct`s; those with a sharding are put there, the others on one device.

    **Returns:** `like`, with the file's arrays and numbers in it. Arrays of NumPy stay on the host.

    **Raises:** `FileNotFoundError` if there is no such file; `ValueError` if it is not one of
    `save`'s, is damaged, or does not fit `like`.
    """
    path = Path(path)
    with path.open("rb") as file:
        header = _read_header(path, file)
        leaves = _leaves(like)
        _check_fit(path, header, leaves)
        numbers = iter(header["numbers"])

        def read(x: Any) -> Any:
            if _is_number(x):
                value = next(numbers)[2]
                return complex(*value) if isinstance(x, complex) else value
            if not _is_array(x):
                return x
            dtype = np.dtype(x.dtype)
            data = file.read(math.prod(x.shape) * dtype.itemsize)
            array = np.frombuffer(data, dtype).reshape(x.shape).copy()
            if isinstance(x, np.ndarray | np.generic):
                return array if isinstance(x, np.ndarray) else array[()]
            sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
            return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)

        return jax.tree.map(read, like)


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


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    """What the file says that it holds; leaves the file at the first array."""
    header: Any = None
    with contextlib.suppress(ValueError):
        header = json.loads(file.readline(1 << 26))
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by `save`: its first line does not say so.")
    start = file.tell()
    remaining = file.seek(-_DIGEST_LENGTH, io.SEEK_END) if path.stat().st_size > start else 0
    file.seek(0)
    digest = hashlib.sha256()
    while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
        digest.update(block)
        remaining -= len(block)
    if file.read() != digest.hexdigest().encode():
        raise ValueError(f"{path} is damaged: it differs from what was written. Use another copy.")
    file.seek(start)
    return header


def _check_fit(path: Path, header: dict[str, Any], leaves: list[tuple[str, Any]]) -> None:
    arrays = _described(leaves, "like")
    if header["arrays"] and not arrays:
        raise ValueError(
            f"`like` must be a tree with arrays, or with their shapes, as that in {path}; got "
            "none. `eqx.filter_eval_shape(make_model)` makes one."
        )
    numbers = [[name, type(x).__name__, []] for name, x in leaves if _is_number(x)]
    stored = [[name, kind, []] for name, kind, _ in header["numbers"]]
    for wanted, found in ((arrays, header["arrays"]), (numbers, stored)):
        for one, other in itertools.zip_longest(wanted, found):
            if one != other:
                raise ValueError(
                    f"`like` does not fit {path}: it has {_shown(one)} where the file has "
                    f"{_shown(other)}. Build it as the model was built that was saved."
                )


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """With their dotted names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in leaves]


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic)


def _is_number(x: Any) -> bool:
    # NumPy's float64 is a float, too.
    return isinstance(x, bool | int | float | complex) and not _is_array(x)


def _plain(x: Any) -> Any:
    return [x.real, x.imag] if isinstance(x, complex) else x


def _described(leaves: list[tuple[str, Any]], argument: str) -> list[list[Any]]:
    """Name, dtype and shape of all arrays."""
    found = []
    for name, x in leaves:
        if not _is_array(x):
            continue
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.dtype == object:
            raise ValueError(
                f"`{argument}` must hold arrays of numbers; got one of {x.dtype} at `{name}`. Put "
                "`jax.random.key_data(key)` in the place of a random key."
            )
        found.append([name, str(x.dtype), list(x.shape)])
    return found


def _shown(described: list[Any] | None) -> str:
    if described is None:
        return "nothing more"
    name, dtype, shape = described
    return f"`{name}`, {dtype}[{','.join(map(str, shape))}]"
