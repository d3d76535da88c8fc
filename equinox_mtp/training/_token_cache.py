"""Texts are tokenized once: their tokens are in a cache, and mapped into memory from there.

An entry is a folder, named by a digest of all that its tokens depend on: `tokens.bin`, which holds
raw integers, and `ends.npy`, where each document ends. It is written under another name.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ._documents import progress_bar, tokenized
from ._lock import waiting_lock
from ._sources import (
    DOCUMENT_SUFFIXES,
    TEXT_END,
    TEXT_VOCAB,
    TOKEN_SUFFIXES,
    CachedTokens,
    Source,
    Stream,
    TextFile,
    find_files,
    open_token_files,
)
from ._text import AbstractText, ByteText

VARIABLE = "EQUINOX_MTP_CACHE"
"""The environment variable that names the folder of the cache."""
_FORMAT = 1
_TOKENS, _ENDS = "tokens.bin", "ends.npy"
_GROUP = 1 << 28
"""Bytes of text files that share an entry: for a folder of small files there are few."""
_ABANDONED = 24 * 3600
"""Seconds after which an entry that nobody has written to will not be completed."""


def open_data(
    paths: Sequence[Path],
    text: AbstractText | None,
    text_field: str,
    vocab_size: int | None,
    end_of_document: int | None,
) -> tuple[Stream, int]:
    """All files as tokens, and the size of their vocabulary; see `load_corpus`."""
    files = find_files(paths)
    token_files = [file for file in files if file.suffix in TOKEN_SUFFIXES]
    if text is None and token_files:
        return open_token_files(files, vocab_size, end_of_document)
    if token_files:
        raise ValueError(f"`data` must hold text for a tokenizer; got {token_files[0]}.")
    if text is None:
        _check_bytes(vocab_size, end_of_document)
        sources = _open_as_bytes(files, text_field)
        return Stream([source for source in sources if source.num_tokens]), TEXT_VOCAB
    end = _checked_end(text, vocab_size, end_of_document)
    opened = [tokens_of(group, text_field, text, end) for group in _groups(files)]
    return Stream([source for source in opened if source.num_tokens]), text.vocab_size


def _check_bytes(vocab_size: int | None, end_of_document: int | None) -> None:
    if vocab_size not in (None, TEXT_VOCAB) or end_of_document not in (None, TEXT_END):
        raise ValueError(
            f"`vocab_size` and `end_of_document` are for token ids; text is read as bytes, "
            f"with a vocabulary of {TEXT_VOCAB}. Leave them out."
        )


def _checked_end(text: AbstractText, vocab_size: int | None, end_of_document: int | None) -> int:
    """The id that ends a document."""
    if vocab_size not in (None, text.vocab_size):
        raise ValueError(
            f"`vocab_size` is the tokenizer's, {text.vocab_size}; got {vocab_size}. Leave it out."
        )
    end = text.end_id if end_of_document is None else end_of_document
    if end is None or not 0 <= end < text.vocab_size:
        raise ValueError(
            f"`end_of_document` must be given, in [0, {text.vocab_size}): the tokenizer's folder "
            f"names no id that ends a text; got {end}."
        )
    return end


def _open_as_bytes(files: Sequence[Path], field: str) -> Iterator[Source]:
    """Text files are their own tokens, and need no cache."""
    for file in files:
        if _holds_documents(file):
            yield tokens_of([file], field, ByteText(), TEXT_END)
        elif size := file.stat().st_size:
            yield TextFile(file, size + 1)


def _holds_documents(file: Path) -> bool:
    return file.name.endswith(DOCUMENT_SUFFIXES)


def _groups(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Files that share an entry, in their order: one of many documents, or some text files."""
    group, size = list[Path](), 0
    for file in files:
        if group and (_holds_documents(file) or _holds_documents(group[-1]) or size > _GROUP):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.stat().st_size
    if group:
        yield group


# The cache


def cache_folder() -> Path:
    """`EQUINOX_MTP_CACHE`, or `equinox_mtp` in the user's folder of caches."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise OSError(
            f"`data`: there is no home folder to keep its tokens in: {error} Name another folder "
            f"by the environment variable {VARIABLE}."
        ) from None
    return caches / "equinox_mtp"


def tokens_of(files: Sequence[Path], field: str, text: AbstractText, end: int) -> CachedTokens:
    """The tokens of all documents in some files, each with the id that ends it.

    **Raises:** as `documents_of` does; `ValueError` if an id is not in the tokenizer's vocabulary,
    or a file changes meanwhile; `OSError` if the cache cannot be written.
    """
    dtype = np.dtype("<u2" if text.vocab_size <= 1 << 16 else "<u4")
    before = _states(files)
    entry = cache_folder() / _key(files, field, text, end)
    if (found := _open_entry(entry, dtype)) is not None:
        return found
    with contextlib.ExitStack() as stack:
        with _named_cache(entry.parent):
            entry.parent.mkdir(parents=True, exist_ok=True)
            # Of several processes on a machine one tokenizes, and the others wait for it.
            stack.enter_context(waiting_lock(entry.with_suffix(".lock")))
        if (found := _open_entry(entry, dtype)) is not None:
            return found
        folder = stack.enter_context(_unfinished(entry))
        _write(folder, tokenized(files, field, text, end), dtype)
        for file, was, is_now in zip(files, before, _states(files), strict=True):
            if was != is_now:
                raise ValueError(
                    f"`data`: {file} was changed while it was tokenized. Start again once it stays "
                    "as it is."
                )
        return _publish(folder, entry, dtype)


def _states(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files)]


def _key(files: Sequence[Path], field: str, text: AbstractText, end: int) -> str:
    """A digest of all that tokens depend on: where the files are does not matter."""
    kind = next((x for x in DOCUMENT_SUFFIXES if files[0].name.endswith(x)), "text")
    with progress_bar("hashing", files) as bar:
        contents = [_digest(file, bar) for file in files]
    known = {
        "format": _FORMAT,
        "kind": kind,
        "field": None if kind == "text" else field,
        "text": text.digest,
        "end": end,
        "contents": contents,
    }
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _digest(file: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
            bar.update(len(part))
    return digest.hexdigest()


def _open_entry(entry: Path, dtype: np.dtype) -> CachedTokens | None:
    """`None` if there is none, or a part of it is missing, as after a loss of power."""
    path = entry / _TOKENS
    try:
        found = CachedTokens(path, dtype, np.load(entry / _ENDS))
        return found if path.stat().st_size == found.num_tokens * dtype.itemsize else None
    except (OSError, ValueError, EOFError):
        return None


@contextlib.contextmanager
def _unfinished(entry: Path) -> Iterator[Path]:
    """A folder to write an entry in; it is gone at the end of the context."""
    folder = entry.with_suffix(f".{uuid.uuid4().hex}.tmp")
    with _named_cache(entry.parent):
        _remove_abandoned(entry.parent)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, entry: Path, dtype: np.dtype) -> CachedTokens:
    """Gives a finished folder the name of the entry."""
    with _named_cache(entry.parent):
        # Where files cannot be locked, another process may have made the same one.
        if _open_entry(entry, dtype) is None:
            shutil.rmtree(entry, ignore_errors=True)
            try:
                folder.rename(entry)
            except OSError:
                if _open_entry(entry, dtype) is None:
                    raise
        found = _open_entry(entry, dtype)
        if found is None:
            raise OSError(f"{entry.name} was damaged at once")
        return found


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes have left."""
    for path in folder.glob("*.tmp"):
        newest = max((p.stat().st_mtime for p in (path, *path.glob("*"))), default=0.0)
        if time.time() - newest > _ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _named_cache(folder: Path) -> Iterator[None]:
    """**Raises:** `OSError` of one line that says which folder it is about."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"`data`: its tokens cannot be written to {folder}: {error.strerror or error}. Name "
            f"another folder by the environment variable {VARIABLE}."
        ) from error


def _write(folder: Path, batches: Iterable[Sequence[np.ndarray]], dtype: np.dtype) -> None:
    """Writes the tokens of documents as they come, and then where each one ends."""
    lengths = [np.zeros(0, np.int64)]
    with _named_cache(folder.parent):
        stream = (folder / _TOKENS).open("wb")
    with stream:
        for documents in batches:
            lengths.append(np.array([len(tokens) for tokens in documents]))
            with _named_cache(folder.parent):
                stream.write(np.concatenate(documents).astype(dtype).tobytes())
        with _named_cache(folder.parent):
            stream.flush()
            # A loss of power must not leave the name of an entry without its tokens.
            os.fsync(stream.fileno())
            np.save(folder / _ENDS, np.cumsum(np.concatenate(lengths)))
