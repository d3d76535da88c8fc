"""The header of a file: what it says of the arrays behind it, and of Python's numbers."""

import importlib.metadata
import json
from typing import Any

import numpy as np

from ._leaves import DTYPES, METADATA, Leaves, is_array, num_bytes, number_kind

_VERSION, _DIGEST, NUMBERS = "equinox_mtp", "sha256", "numbers"
NO_DIGEST = "0" * 64


def header_bytes(leaves: Leaves) -> bytes:
    """Everything ahead of the arrays, with zeros in the digest's place."""
    numbers = [[name, number_kind(x), _plain(x)] for name, x in leaves if number_kind(x)]
    metadata = {
        # The first, so that it is the first to be found.
        _DIGEST: NO_DIGEST,
        _VERSION: _version(),
        NUMBERS: json.dumps(numbers),
    }
    text = json.dumps({METADATA: metadata, **array_entries(leaves)}).encode()
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


def array_entries(leaves: Leaves) -> dict[str, dict[str, Any]]:
    """What the header says of each array: it follows from the tree alone."""
    entries, start = {}, 0
    for name, x in in_file_order(leaves):
        end = start + num_bytes(x)
        entries[name] = {
            "dtype": DTYPES[np.dtype(x.dtype).name],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
        start = end
    return entries


def in_file_order(leaves: Leaves) -> Leaves:
    """The arrays, wider dtypes first: each begins at a multiple of its item size."""
    arrays = [(name, x) for name, x in leaves if is_array(x)]
    return sorted(arrays, key=lambda leaf: -np.dtype(leaf[1].dtype).itemsize)
