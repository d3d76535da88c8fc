"""A model in a single file, in the format of safetensors."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from .._types import checked
from .._whole_file import whole_file
from ._header import NO_DIGEST, header_bytes, in_file_order
from ._leaves import check_savable, little_endian, named_leaves
from ._reading import check_fit, read_array, read_header, read_numbers

Tree = TypeVar("Tree")

HEADER_LIMIT = 1 << 20
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

    >>> emtp.save("model.safetensors", model)
    >>> loaded = emtp.load("model.safetensors", eqx.filter_eval_shape(lambda: model))
    >>> np.array_equal(loaded.decoder.embedding, model.decoder.embedding)
    True

    **Arguments:**

    - `path`: the file's name, in a folder that exists.
    - `tree`: a pytree of arrays of any values, those that are not finite included. All parts of its
        arrays are on devices of this process, split over them or not. For larger ones, and for
        training runs, see the checkpoints of `equinox_mtp.training`.

    **Raises:** `ValueError`, before anything is written, if there are shapes in place of
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
    header = header_bytes(leaves)
    with whole_file(path) as file:
        digest = hashlib.sha256(header)
        file.write(header)
        for _, x in in_file_order(leaves):
            data = np.ascontiguousarray(x, little_endian(x)).reshape(-1).view(np.uint8).data
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(header.replace(NO_DIGEST.encode(), digest.hexdigest().encode(), 1))


@checked
def load(path: str | Path, like: Tree) -> Tree:
    """Reads what `save` has written.

    >>> emtp.save("embedding.safetensors", {"embedding": jnp.eye(2)})
    >>> like = {"embedding": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    >>> print(emtp.load("embedding.safetensors", like)["embedding"])
    [[1. 0.]
     [0. 1.]]

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
        header = read_header(path, file, limit=max(HEADER_LIMIT, 2 * len(header_bytes(leaves))))
        check_fit(path, header, leaves, size=path.stat().st_size - file.tell())
        numbers = read_numbers(path, header, leaves)
        arrays = {name: read_array(path, file, x) for name, x in in_file_order(leaves)}
    values = [arrays[name] if name in arrays else numbers.get(name, x) for name, x in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), values)
