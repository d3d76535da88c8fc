"""One safetensors file, mapped into memory: what its header says is checked before it is used."""

import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._safetensors import DTYPES, LENGTH_BYTES, METADATA, header_length, parse_header

_LONGEST_HEADER = 100_000_000
"""The format's own limit, in bytes."""


class TensorInfo(NamedTuple):
    """Where a tensor lies in its file, behind the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """Tensors of a file, by name; only what is read of them is in memory.

    **Raises:** `ValueError` that names the file, and the tensor, if its header is not right.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path} is missing, or no file. Copy the checkpoint again.")
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(LENGTH_BYTES), size)
            if length is None:
                raise self._error("it is cut short: its header would be longer than the file")
            if length > _LONGEST_HEADER:
                raise self._error(f"its header would take {length} bytes")
            header = parse_header(file.read(length))
            if header is None:
                raise self._error("its header is no JSON object")
            header.pop(METADATA, None)
            self._start = LENGTH_BYTES + length
            self.tensors = self._checked(header, size - self._start)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def view(self, name: str) -> np.ndarray:
        """A tensor, read when it is indexed."""
        dtype, shape, start, _ = self.tensors[name]
        count = math.prod(shape)
        flat = np.frombuffer(self._map, dtype, count, self._start + start) if count else np.empty(0)
        return flat.astype(dtype, copy=False).reshape(shape)

    def forget(self) -> None:
        """Lets the pages go that were read: they would count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _checked(self, header: dict[str, Any], size: int) -> dict[str, TensorInfo]:
        tensors = {name: self._info(name, entry, size) for name, entry in header.items()}
        end = 0
        for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if info.start != end:
                where = "lies over another tensor" if info.start < end else "leaves a gap before it"
                raise self._error(f"it {where}", name)
            end = info.stop
        if end != size:
            raise self._error(f"its tensors end at byte {end} of {size}")
        return tensors

    def _info(self, name: str, entry: Any, size: int) -> TensorInfo:
        entry = entry if isinstance(entry, dict) else {}
        dtype = DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise self._error(f"unknown dtype {str(entry.get('dtype'))[:40]!r}", name)
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and len(shape) < 9):
            raise self._error("its shape and offsets must be lists of integers", name)
        start, stop = offsets
        if not start <= stop <= size:
            raise self._error(
                f"it would lie at bytes {start} … {stop} of {size}: the file is cut short", name
            )
        num_bytes = math.prod(shape) * dtype.itemsize
        if stop - start != num_bytes:
            raise self._error(
                f"shape {shape} needs {num_bytes} bytes; it has {stop - start}"[:200], name
            )
        return TensorInfo(dtype, tuple(shape), start, stop)

    def _error(self, why: str, tensor: str | None = None) -> ValueError:
        of_what = "" if tensor is None else f"tensor `{shown(tensor)}`: "
        return ValueError(f"{self.path}: {of_what}{why}. Copy the checkpoint again.")


def shown(name: str) -> str:
    """A name in a message: in one line, and cut."""
    return name.encode("unicode_escape").decode()[:120]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and 0 <= x < 2**60 for x in values)
