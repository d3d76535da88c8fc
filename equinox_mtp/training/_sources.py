"""Files of text or token ids, concatenated, and read on demand."""

import dataclasses
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

TEXT_END = 256
"""The id after the bytes, which ends a document of text."""
TEXT_VOCAB = 257
TOKEN_SUFFIXES = (".npy", ".bin")
DOCUMENT_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""Of files of texts, one a line or row."""
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo"}


@dataclasses.dataclass(frozen=True)
class TextFile:
    """The bytes of a file, and `TEXT_END`."""

    path: Path
    num_tokens: int

    @property
    def row_length(self) -> int:
        """A file is a document."""
        return self.num_tokens

    def read(self, where: slice | np.ndarray) -> np.ndarray:
        """Maps the file, for no longer than it is read."""
        text = _unchanged(self.path, _map_raw(self.path, np.uint8), self.num_tokens - 1)
        if isinstance(where, slice):
            part = text[where].astype(np.int32)
            return part if where.stop < self.num_tokens else np.append(part, np.int32(TEXT_END))
        last = self.num_tokens - 1
        return np.where(where < last, text[np.minimum(where, last - 1)], np.int32(TEXT_END))


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """An array of integers in a `.npy` file, or of uint16 in any other."""

    path: Path
    num_tokens: int
    row_length: int

    def read(self, where: slice | np.ndarray) -> np.ndarray:
        """Maps the file, for no longer than it is read."""
        array = _map(self.path)
        if array.flags.c_contiguous:
            return _unchanged(self.path, array.reshape(-1), self.num_tokens)[where]
        # `reshape` would copy all of it.
        _unchanged(self.path, array, self.num_tokens // self.row_length)
        positions = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        return array[np.divmod(positions, self.row_length)]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenArray:
    """A document in memory."""

    array: np.ndarray

    @property
    def num_tokens(self) -> int:
        """The length of the array."""
        return len(self.array)

    @property
    def row_length(self) -> int:
        """An array is a document."""
        return len(self.array)

    def read(self, where: slice | np.ndarray) -> np.ndarray:
        """Indexes the array."""
        return self.array[where]


@dataclasses.dataclass(frozen=True, eq=False)
class CachedTokens:
    """The tokens of texts, in a file of the cache.

    **Fields:**

    - `path`: raw integers of `dtype`.
    - `ends`: of the documents, increasing.
    """

    path: Path
    dtype: np.dtype
    ends: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Those of all documents."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, where: slice | np.ndarray) -> np.ndarray:
        """Maps the file, for no longer than it is read."""
        if not self.path.is_file():
            raise ValueError(
                f"`data`: the cached tokens {self.path} were deleted while a run reads them. They "
                "are made again by --resume."
            )
        return _unchanged(self.path, _map_raw(self.path, self.dtype), self.num_tokens)[where]


Source = TextFile | TokenFile | TokenArray | CachedTokens
"""Token ids; unless it is `CachedTokens`, in documents of `row_length` of them."""


def starts_of(source: Source) -> np.ndarray:
    """Where its documents start; an end-of-document id may cut them further."""
    if isinstance(source, CachedTokens):
        return np.append(0, source.ends[:-1])
    return np.arange(0, source.num_tokens, source.row_length)


def layout_of(source: Source) -> Iterator[bytes]:
    """Its documents' lengths, in parts; the same whatever kind of file texts come from."""
    if not isinstance(source, CachedTokens):
        yield f"{source.num_tokens} {source.row_length};".encode()
        return
    lengths = np.diff(source.ends, prepend=0)
    for first in range(0, len(lengths), 1 << 16):
        part = lengths[first : first + (1 << 16)].tolist()
        yield "".join(f"{length} {length};" for length in part).encode()


class Stream:
    """Sources, concatenated; positions count from 0."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        lengths = np.array([source.num_tokens for source in self.sources], np.int64)
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, positions: np.ndarray) -> np.ndarray:
        """The tokens at these positions; each source is opened once."""
        flat = positions.reshape(-1)
        source_of = np.searchsorted(self.ends, flat, side="right")
        order = np.argsort(source_of, kind="stable")
        indices, first = np.unique(source_of[order], return_index=True)
        tokens = np.empty(len(flat), np.int32)
        for index, mine in zip(indices, np.split(order, first)[1:], strict=True):
            tokens[mine] = self.sources[index].read(flat[mine] - self.starts[index])
        return tokens.reshape(positions.shape)

    def chunks(self, start: int, stop: int) -> Iterator[tuple[Source, int, np.ndarray]]:
        """The parts between two positions: each source, its part's start, and its tokens."""
        index = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            source, offset = self.sources[index], int(self.starts[index])
            end = min(stop, int(self.ends[index]))
            yield source, start, source.read(slice(start - offset, end - offset))
            start, index = end, index + 1


# Finding files


def open_token_files(
    files: Sequence[Path], vocab_size: int | None, end_of_document: int | None
) -> tuple[Stream, int]:
    """Files of token ids, none of them read."""
    token_files = [file for file in files if file.suffix in TOKEN_SUFFIXES]
    if len(token_files) < len(files):
        raise ValueError(
            f"`data` must hold text or token ids, not both; got {token_files[0]} among text files."
        )
    if vocab_size is None:
        raise ValueError("`vocab_size` must be given for token ids; got none.")
    if end_of_document is not None and not 0 <= end_of_document < vocab_size:
        raise ValueError(
            f"`end_of_document` must lie in [0, {vocab_size}), the `vocab_size`; got "
            f"{end_of_document}."
        )
    opened = [_token_file(file) for file in files]
    return Stream([file for file in opened if file.num_tokens]), vocab_size


def holds_tokens(paths: Sequence[Path]) -> bool:
    """Whether the data is token ids, by the names of the files."""
    return any(file.suffix in TOKEN_SUFFIXES for file in find_files(paths))


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Those named, and those in directories; the Python standard library's own if none are."""
    return [file for path in paths for file in _files_of(path)] if paths else _library_files()


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"`data`: there is no file or directory {path}.")
    inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
    hidden = [file for file in inside if any(p[0] == "." for p in file.relative_to(path).parts)]
    return [file for file in inside if file not in set(hidden) and not _is_binary(file)]


def _is_binary(file: Path) -> bool:
    if file.name.endswith((*TOKEN_SUFFIXES, *DOCUMENT_SUFFIXES)):
        return False
    with file.open("rb") as stream:
        return b"\0" in stream.read(4096)


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    library = [file for file in files if not _NOT_LIBRARY & set(file.relative_to(root).parts)]
    return [file for file in library if file.is_file()]


def _token_file(path: Path) -> TokenFile:
    array = _map(path)
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"`data`: {path} must hold integer token ids, as one stream or one document a row; got "
            f"{array.dtype} of shape {array.shape}."
        )
    return TokenFile(path, array.size, array.shape[-1])


def _map(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        try:
            return np.lib.format.open_memmap(path, "r")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"`data`: {path} is not a readable .npy file: {error}") from error
    if path.stat().st_size % 2:
        raise ValueError(f"`data`: {path} must hold uint16 token ids; it has an odd size.")
    return _map_raw(path, np.uint16)


def _map_raw(path: Path, dtype: DTypeLike) -> np.ndarray:
    # There is no map of nothing.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _unchanged(path: Path, array: np.ndarray, size: int) -> np.ndarray:
    if len(array) != size:
        raise ValueError(
            f"`data`: {path} was changed while a run reads it: {size} tokens or bytes have become "
            f"{len(array)}. Restore it, and continue with --resume."
        )
    return array
