"""Reading a file that may be damaged, or made to mislead: nothing in it is trusted."""

import contextlib
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from .._safetensors import DTYPES, LENGTH_BYTES, METADATA, header_length, parse_header
from ._header import NO_DIGEST, NUMBERS, array_entries, in_file_order
from ._leaves import Leaves, little_endian, num_bytes, number_kind

_DIGEST_ENTRY = re.compile(rb'"sha256": "([0-9a-f]{64})"')
_BEFORE_SAFETENSORS = b'{"format": "equinox_mtp'


def read_header(path: Path, file: BinaryIO, limit: int) -> dict[str, Any]:
    """What a file that is as it was written says of itself; leaves it at the first array."""
    start = file.read(len(_BEFORE_SAFETENSORS))
    if start == _BEFORE_SAFETENSORS:
        raise ValueError(
            f"{path} is of the format that `save` had before safetensors. Load it with the version "
            "of equinox_mtp that wrote it, or with 0.1, and save it again with this one."
        )
    length = header_length(start, path.stat().st_size)
    if length is None:
        raise ValueError(
            f"{path} was not written by `save`, or is cut short: its header would be longer than "
            "the file."
        )
    if length > limit:
        raise ValueError(
            f"`like` does not fit {path}: its header takes {length} bytes, where the header "
            f"of `like` takes at most {limit}."
        )
    file.seek(LENGTH_BYTES)
    text = file.read(length)
    _check_digest(path, file, text)
    header = parse_header(text)
    if header is None or not isinstance(header.get(METADATA), dict):
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
    without = text[: found.start(1)] + NO_DIGEST.encode() + text[found.end(1) :]
    digest = hashlib.sha256(len(text).to_bytes(LENGTH_BYTES, "little") + without)
    start = file.tell()
    while block := file.read(1 << 20):
        digest.update(block)
    if found[1] != digest.hexdigest().encode():
        raise _is_damaged(path, "it differs from what was written")
    file.seek(start)


def check_fit(path: Path, header: dict[str, Any], leaves: Leaves, size: int) -> None:
    """All but the values is known from `like`: what the header says is compared, never used."""
    wanted = array_entries(leaves)
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
    expected = sum(num_bytes(x) for _, x in in_file_order(leaves))
    if size != expected:
        raise _is_damaged(path, f"its arrays take {size} bytes, where {expected} are needed")


def read_numbers(path: Path, header: dict[str, Any], leaves: Leaves) -> dict[str, Any]:
    """Python's numbers, by name."""
    numbers: Any = None
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        numbers = json.loads(header[METADATA].get(NUMBERS))
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


def read_array(path: Path, file: io.BufferedReader, x: Any) -> Any:
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
        dtype = DTYPES.get(entry["dtype"], entry["dtype"])
        return f"{dtype}[{','.join(map(str, entry['shape']))}]"[:80]
    except (TypeError, KeyError):
        return "no description of an array"
