"""The format safetensors, as `serialization` and `pretrained` read and write it.

    8 bytes   the length of the header, little-endian
    header    JSON: of each array dtype, shape and place; text of the writer under `__metadata__`
    arrays    little-endian, one behind the other, without gaps

What is in a header nothing here trusts: the readers check it, each against what it knows.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

METADATA = "__metadata__"
"""The one name in a header that is no array's."""

LENGTH_BYTES = 8
"""What the length takes ahead of the header."""

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "U8": np.uint8,
        "U16": np.uint16,
        "U32": np.uint32,
        "U64": np.uint64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}
"""The dtypes that the format has, by its names for them."""

DTYPE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
"""The format's names, by those of NumPy."""


def array_entries(
    arrays: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
) -> dict[str, dict[str, Any]]:
    """What a header says of arrays that lie behind it in this order."""
    entries, start = {}, 0
    for name, dtype, shape in arrays:
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    return entries


def header_bytes(header: dict[str, Any]) -> bytes:
    """All that a file has ahead of its arrays."""
    text = json.dumps(header).encode()
    # Spaces, so that arrays begin at a multiple of eight.
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(start: bytes, size: int) -> int | None:
    """How long the header is, by the first bytes of a file of a size; `None` if it is cut short."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    return None if len(start) < LENGTH_BYTES or length > size - LENGTH_BYTES else length


def parse_header(text: bytes) -> dict[str, Any] | None:
    """A header as a dictionary; `None` if it is no JSON object, or has a name twice."""
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):  # the latter for JSON that is nested deeply enough
        return None
    return header if isinstance(header, dict) else None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found
