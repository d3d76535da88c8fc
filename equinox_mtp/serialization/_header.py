"""The header of a file: what it says of the arrays behind it, and of Python's numbers."""

import importlib.metadata
import json
from typing import Any

import numpy as np

from .. import _safetensors
from ._leaves import Leaves, is_array, number_kind

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
    return _safetensors.header_bytes({_safetensors.METADATA: metadata, **array_entries(leaves)})


def _plain(x: Any) -> Any:
    return [x.real, x.imag] if isinstance(x, complex) else x


def _version() -> str:
    try:
        return importlib.metadata.version("equinox-mtp")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def array_entries(leaves: Leaves) -> dict[str, dict[str, Any]]:
    """What the header says of each array: it follows from the tree alone."""
    return _safetensors.array_entries(
        (name, np.dtype(x.dtype), x.shape) for name, x in in_file_order(leaves)
    )


def in_file_order(leaves: Leaves) -> Leaves:
    """The arrays, wider dtypes first: each begins at a multiple of its item size."""
    arrays = [(name, x) for name, x in leaves if is_array(x)]
    return sorted(arrays, key=lambda leaf: -np.dtype(leaf[1].dtype).itemsize)
