"""A model in a single file."""

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import equinox as eqx
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
    it was. It holds the names, dtypes and shapes of arrays and numbers, the leaves as Equinox
    writes them, and a digest; no code.

    **Arguments:**

    - `path`: the file's name, in a folder that exists.
    - `tree`: a pytree whose arrays are all on devices of this process. For larger ones, and for
        those of a training run, see the checkpoints of `equinox_mtp.training`.

    **Raises:** `ValueError` if there is a random key in the tree; `OSError` if the file cannot be
    written.
    """
    header = json.dumps({"format": _FORMAT, "leaves": _describe(tree, "tree")})
    with _replacing(Path(path)) as file:
        writer = _Hashing(file)
        writer.write(header.encode() + b"\n")
        eqx.tree_serialise_leaves(writer, tree)
        file.write(writer.digest.hexdigest().encode())


@checked
def load(path: str | Path, like: Tree) -> Tree:
    """Reads what `save` has written.

        model = load("model.mtp", eqx.filter_eval_shape(make_model))

    **Arguments:**

    - `path`: the file's name.
    - `like`: a tree of the same structure, dtypes and shapes. Its arrays may be
        `jax.ShapeDtypeStruct`s; those with a sharding are put there.

    **Returns:** `like`, with the file's arrays and numbers in it.

    **Raises:** `FileNotFoundError` if there is no such file; `ValueError` if it is not one of
    `save`'s, is damaged, or does not fit `like`.
    """
    path = Path(path)
    with path.open("rb") as file:
        stored = _read_header(path, file)
        wanted = _describe(like, "like")
        for name in [*wanted, *stored]:
            if stored.get(name) != wanted.get(name):
                raise ValueError(
                    f"`like` does not fit {path}: `{name}` is {_shown(wanted, name)} there, and "
                    f"{_shown(stored, name)} in the file. Build it as the model was built that was "
                    "saved."
                )
        tree = eqx.tree_deserialise_leaves(file, like)

    def place(x: Any, like: Any) -> Any:
        sharding = like.sharding if isinstance(like, jax.ShapeDtypeStruct) else None
        return x if sharding is None else jax.device_put(x, sharding)

    return jax.tree.map(place, tree, like)


class _Hashing:
    """A file that is written to, and hashed."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the name when all is well, and is gone otherwise."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    """What the file says that it holds; leaves the file at the first leaf."""
    header: Any = None
    with contextlib.suppress(ValueError):
        header = json.loads(file.readline(1 << 26))
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by `save`: its first line does not say so.")
    start = file.tell()
    file.seek(0, io.SEEK_END)
    remaining = file.tell() - _DIGEST_LENGTH
    file.seek(0)
    digest = hashlib.sha256()
    while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
        digest.update(block)
        remaining -= len(block)
    if file.read() != digest.hexdigest().encode():
        raise ValueError(f"{path} is damaged: it differs from what was written. Use another copy.")
    file.seek(start)
    return header["leaves"]


def _describe(tree: Any, argument: str) -> dict[str, Any]:
    """Kind and shape of all arrays and numbers, by their dotted names."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct | np.ndarray):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise ValueError(
                    f"`{argument}` must hold no random keys; got one at `{name}`. Put "
                    "`jax.random.key_data(key)` in its place."
                )
            found[name] = [str(leaf.dtype), list(leaf.shape)]
        elif isinstance(leaf, bool | int | float | complex | np.generic):
            found[name] = [type(leaf).__name__, []]
    return found


def _shown(described: dict[str, Any], name: str) -> str:
    if name not in described:
        return "missing"
    dtype, shape = described[name]
    return f"{dtype}[{','.join(map(str, shape))}]"
