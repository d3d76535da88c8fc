"""Documents, packed into rows."""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import equinox as eqx
import numpy as np
from jaxtyping import Int32

from .._types import HostOrDeviceArray

TEXT_END = 256
"""The id after the bytes, which ends a document of text."""
TEXT_VOCAB = 257
_TOKEN_SUFFIXES = (".npy", ".bin")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo"}
_HELD_OUT = 0.05


class Batch(eqx.Module):
    """Packed rows: one token more than positions, so that every position has a target."""

    tokens: Int32[HostOrDeviceArray, "*microbatch batch tokens"]
    segment_ids: Int32[HostOrDeviceArray, "*microbatch batch tokens"]
    position_ids: Int32[HostOrDeviceArray, "*microbatch batch seq"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents as arrays of token ids, each ended by its end-of-document id."""

    documents: Sequence[np.ndarray]
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return sum(len(document) for document in self.documents)

    def fingerprint(self) -> str:
        """A hash of every token, to tell whether data is still the same."""
        digest = hashlib.sha256(str(self.vocab_size).encode())
        for document in self.documents:
            digest.update(document.astype("<i4").tobytes())
            digest.update(b"/")
        return digest.hexdigest()

    def split(self, seed: int) -> tuple["Corpus", "Corpus"]:
        """Training and held-out documents; a single document is cut in two instead."""
        documents = list(self.documents)
        if len(documents) == 1:
            cut = max(1, round(len(documents[0]) * (1 - _HELD_OUT)))
            documents = [documents[0][:cut], documents[0][cut:]]
            order = np.array([1, 0])
        else:
            order = np.random.default_rng(seed).permutation(len(documents))
        held_out = max(1, round(_HELD_OUT * len(documents)))
        parts = order[held_out:], order[:held_out]
        train, evaluation = (
            Corpus([documents[i] for i in part], self.vocab_size) for part in parts
        )
        if min(train.num_tokens, evaluation.num_tokens) < 2:
            raise ValueError(
                f"`data` is too short to hold a part of it out: {self.num_tokens} tokens in "
                f"{len(self.documents)} document(s). Give more."
            )
        return train, evaluation


def load_corpus(
    paths: Sequence[Path], *, vocab_size: int | None = None, end_of_document: int | None = None
) -> Corpus:
    """Reads text or token ids.

    **Arguments:**

    - `paths`: text files and directories of them, or `.npy`/`.bin` files of token ids; not both. If
        empty, the Python standard library's own source files.
    - `vocab_size`: required for token ids; text has 257, the bytes and an end-of-document id.
    - `end_of_document`: the id at which a stream of token ids is cut into documents.

    **Raises:** `FileNotFoundError` for a path that does not exist; `ValueError` for data that is
    empty, of mixed kinds, or outside the vocabulary.
    """
    files = [file for path in paths for file in _files_of(path)] if paths else _library_files()
    token_files = [file for file in files if file.suffix in _TOKEN_SUFFIXES]
    if not token_files:
        if vocab_size not in (None, TEXT_VOCAB) or end_of_document not in (None, TEXT_END):
            raise ValueError(
                f"`vocab_size` and `end_of_document` are for token ids; text is read as bytes, "
                f"with a vocabulary of {TEXT_VOCAB}. Leave them out."
            )
        documents, vocab_size = [_read_text(file) for file in files], TEXT_VOCAB
    elif len(token_files) == len(files):
        if vocab_size is None:
            raise ValueError("`vocab_size` must be given for token ids; got none.")
        if end_of_document is not None and not 0 <= end_of_document < vocab_size:
            raise ValueError(
                f"`end_of_document` must lie in [0, {vocab_size}), the `vocab_size`; got "
                f"{end_of_document}."
            )
        streams = [stream for file in files for stream in _read_tokens(file, vocab_size)]
        documents = [part for stream in streams for part in _cut(stream, end_of_document)]
    else:
        raise ValueError(
            f"`data` must hold text or token ids, not both; got {token_files[0]} among text files."
        )
    corpus = Corpus([document for document in documents if len(document)], vocab_size)
    if corpus.num_tokens < 2:
        shown = ", ".join(str(path) for path in paths)
        raise ValueError(f"`data` is empty: there are no tokens to train on in {shown}.")
    return corpus


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"`data`: there is no file or directory {path}.")
    inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
    hidden = [file for file in inside if any(p[0] == "." for p in file.relative_to(path).parts)]
    return [file for file in inside if file not in set(hidden) and not _is_binary(file)]


def _is_binary(file: Path) -> bool:
    if file.suffix in _TOKEN_SUFFIXES:
        return False
    with file.open("rb") as stream:
        return b"\0" in stream.read(4096)


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    library = [file for file in files if not _NOT_LIBRARY & set(file.relative_to(root).parts)]
    return [file for file in library if file.is_file()]


def _read_text(file: Path) -> np.ndarray:
    text = np.frombuffer(file.read_bytes(), np.uint8).astype(np.int32)
    return np.append(text, np.int32(TEXT_END)) if len(text) else text


def _read_tokens(file: Path, vocab_size: int) -> list[np.ndarray]:
    if file.suffix == ".npy":
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"`data`: {file} is not a readable .npy file: {error}") from error
    else:
        if file.stat().st_size % 2:
            raise ValueError(f"`data`: {file} must hold uint16 token ids; it has an odd size.")
        array = np.fromfile(file, np.uint16)
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"`data`: {file} must hold integer token ids, as one stream or one document a row; got "
            f"{array.dtype} of shape {array.shape}."
        )
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        raise ValueError(
            f"`data`: the token ids of {file} must lie in [0, {vocab_size}), the `vocab_size`; got "
            f"{array.min()} … {array.max()}."
        )
    return list(np.atleast_2d(array).astype(np.int32))


def _cut(stream: np.ndarray, end_of_document: int | None) -> list[np.ndarray]:
    if end_of_document is None:
        return [stream]
    return np.split(stream, np.flatnonzero(stream == end_of_document) + 1)


class PackedRows:
    """Documents laid end to end and cut into rows; each row remembers what belongs together.

    A row's last token is the next row's first, so that every pair of neighbours is in one row.
    Segment ids count the documents of a row from 1; 0 is the padding of the last row. Positions
    start anew with each document, and with each row.
    """

    def __init__(self, corpus: Corpus, seq_len: int):
        """**Arguments:**

        - `corpus`: the documents, packed in their order.
        - `seq_len`: positions in a row.
        """
        lengths = [len(document) for document in corpus.documents]
        self._tokens = np.concatenate(corpus.documents)
        self._document_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self._seq_len = seq_len

    def __len__(self) -> int:
        return max(1, -(-(len(self._tokens) - 1) // self._seq_len))

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows of these indices `[… batch]`, on the host.

        Tokens and segment ids are `[… batch seq+1]`, positions `[… batch seq]`.
        """
        columns = np.arange(self._seq_len + 1)
        where = rows[..., None] * self._seq_len + columns
        exists = where < len(self._tokens)
        where = np.minimum(where, len(self._tokens) - 1)
        documents = self._document_ids[where]
        starts = np.diff(documents, axis=-1, prepend=documents[..., :1]) != 0
        segment_ids = np.where(exists, 1 + np.cumsum(starts, axis=-1), 0)
        segment_starts = np.maximum.accumulate(np.where(starts, columns, 0), axis=-1)
        return Batch(
            tokens=np.where(exists, self._tokens[where], 0).astype(np.int32),
            segment_ids=segment_ids.astype(np.int32),
            position_ids=(columns - segment_starts)[..., :-1].astype(np.int32),
        )

    def in_order(self, batch_size: int, max_rows: int) -> Iterator[np.ndarray]:
        """The indices of the first rows, in full batches; a short one ends in padding."""
        num_rows = min(len(self), max_rows)
        for start in range(0, num_rows, batch_size):
            # Rows beyond the end are nothing but padding.
            rows = np.arange(start, start + batch_size)
            yield np.where(rows < num_rows, rows, len(self) + 1)

    def of_step(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """The indices of a step's rows; epochs are shuffled, and all follows from the arguments."""
        indices = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, within = np.divmod(indices, len(self))
        rows = np.empty_like(indices)
        for epoch in np.unique(epochs):
            order = np.random.default_rng((seed, int(epoch))).permutation(len(self))
            rows[epochs == epoch] = order[within[epochs == epoch]]
        return rows
