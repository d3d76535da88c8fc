"""Documents in files: indexed once, each process its share, and read on demand.

Two running sums and files that are mapped into memory do it; a data source of grain's would be one
more layer over them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from ._processes import all_gather, is_first
from ._sources import Source, Stream, TokenArray, layout_of, starts_of
from ._text import AbstractText
from ._token_cache import open_data

_HELD_OUT = 0.05
_PART = 1 << 22
"""Tokens that are scanned at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Documents of token ids, each ended by its end-of-document id, as a sequence of arrays.

    >>> corpus = training.Corpus.of_documents([np.arange(5), np.arange(8)], vocab_size=32)
    >>> len(corpus), corpus.num_tokens, corpus[0]
    (2, 13, array([0, 1, 2, 3, 4], dtype=int32))

    **Fields:**

    - `stream`: the tokens, which are read from their files when they are asked for: the files must
        stay as they are.
    - `starts`, `lengths`: of each document `[documents]`, in `stream`.
    - `vocab_size`: the size of the vocabulary.
    - `fingerprint`: a hash of every token, to tell whether data is still the same.
    """

    stream: Stream
    starts: np.ndarray
    lengths: np.ndarray
    vocab_size: int
    fingerprint: str

    @classmethod
    def of_documents(cls, documents: Sequence[np.ndarray], vocab_size: int) -> "Corpus":
        """A corpus in memory.

        **Arguments:**

        - `documents`: integers `[length]` each.
        - `vocab_size`: they lie in `[0, vocab_size)`.

        **Raises:** `ValueError` if there is nothing in it, or an id is not in the vocabulary.
        """
        for document in documents:
            if document.ndim != 1 or not np.issubdtype(document.dtype, np.integer):
                raise ValueError(
                    "`documents` must be one-dimensional arrays of integers; got one of "
                    f"{document.dtype} and shape {document.shape}."
                )
        stream = Stream([TokenArray(document) for document in documents if len(document)])
        _check_not_empty(stream, "`documents`")
        layout = _Layout.of(stream, vocab_size, None)
        return layout.corpus([layout.scan(stream, range(layout.num_parts))], stream)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self.starts[index])
        parts = self.stream.chunks(start, start + int(self.lengths[index]))
        return np.concatenate([tokens.astype(np.int32) for _, _, tokens in parts])

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return int(self.lengths.sum())

    def read(self, documents: np.ndarray, within: np.ndarray) -> np.ndarray:
        """The tokens at these positions of these documents."""
        return self.stream.read(self.starts[documents] + within)

    def split(self, seed: int) -> tuple["Corpus", "Corpus"]:
        """Training and held-out documents; a single document is cut in two instead."""
        if len(self) == 1:
            length = int(self.lengths[0])
            cut = max(1, round(length * (1 - _HELD_OUT)))
            starts, lengths = self.starts[0] + np.array([0, cut]), np.array([cut, length - cut])
            order, held_out = np.array([1, 0]), 1
        else:
            starts, lengths = self.starts, self.lengths
            order = np.random.default_rng(seed).permutation(len(self))
            held_out = max(1, round(_HELD_OUT * len(self)))
        train, evaluation = (
            dataclasses.replace(self, starts=starts[part], lengths=lengths[part])
            for part in (order[held_out:], order[:held_out])
        )
        if min(train.num_tokens, evaluation.num_tokens) < 2:
            raise ValueError(
                f"`data` is too short to hold a part of it out: {self.num_tokens} tokens in "
                f"{len(self)} document(s). Give more."
            )
        return train, evaluation


def load_corpus(
    paths: Sequence[Path],
    *,
    vocab_size: int | None = None,
    end_of_document: int | None = None,
    text: AbstractText | None = None,
    text_field: str = "text",
) -> Corpus:
    """Finds the documents of text or token ids.

    >>> from pathlib import Path
    >>> Path("text.txt").write_text("to be")
    5
    >>> training.load_corpus([Path("text.txt")])[0]  # the bytes, and an end of document
    array([116, 111,  32,  98, 101, 256], dtype=int32)

    All tokens are read once, to check them and to find where documents end; in several processes,
    which all call this, each reads its own share, and they exchange what they have found. What
    stays in memory is where each document starts. The tokens of a tokenizer, and those of JSONL and
    Parquet files in any case, are written to a cache the first time, and read from there.

    **Arguments:**

    - `paths`: text files, `.jsonl`, `.jsonl.gz` and `.parquet` files of texts, and directories of
        them, or `.npy`/`.bin` files of token ids; not both. If empty, the Python standard library's
        own source files. All processes see the same files.
    - `vocab_size`: required for token ids; text has 257, the bytes and an end-of-document id.
    - `end_of_document`: the id at which a stream of token ids is cut into documents.
    - `text`: reads text by a tokenizer; as bytes if `None`.
    - `text_field`: of a JSONL line, or the column of a Parquet file, that holds the text.

    **Raises:** `FileNotFoundError` for a path that does not exist; `ValueError` for data that is
    empty, damaged, of mixed kinds, outside the vocabulary, or not the same in every process;
    `OSError` for a cache that cannot be written; `ModuleNotFoundError` for Parquet files without
    the extra `data`.
    """
    problem: Exception | None = None
    stream = Stream([])
    try:
        stream, vocab_size = open_data(paths, text, text_field, vocab_size, end_of_document)
        _check_not_empty(stream, ", ".join(str(path) for path in paths))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        problem = error
    # Documents of text are apart already.
    cut_at = end_of_document if text is None else None
    layout = _Layout.of(stream, vocab_size or 0, cut_at)
    # Before the scan, which takes longer than the first communication may wait.
    for process, digest in enumerate(_all_gather_or_raise(layout.digest, problem)):
        if digest != layout.digest:
            raise _differs(process)
    found, problem = _Found(), None
    try:
        parts = share_of(layout.num_parts, jax.process_index(), jax.process_count())
        found = layout.scan(stream, parts)
    except (ValueError, OSError) as error:
        problem = error
    digests = [json.loads(m) for m in _all_gather_or_raise(json.dumps(found.digests), problem)]
    ends = [np.frombuffer(message, np.int64) for message in all_gather(found.ends.tobytes())]
    for process, of_process in enumerate(digests):
        if of_process["0"] != found.digests["0"]:
            raise _differs(process)
    return layout.corpus(list(map(_Found, digests, ends)), stream)


# The index


@dataclasses.dataclass(frozen=True)
class _Found:
    """The results of a scan: each part's digest, and the positions after an end of document."""

    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    ends: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What is known of the data before any token is read, with a digest."""

    vocab_size: int
    end_of_document: int | None
    num_parts: int
    digest: str

    @classmethod
    def of(cls, stream: Stream, vocab_size: int, end_of_document: int | None) -> "_Layout":
        digest = hashlib.sha256(repr((vocab_size, end_of_document)).encode())
        for source in stream.sources:
            for part in layout_of(source):
                digest.update(part)
        num_parts = -(-len(stream) // _PART)
        return cls(vocab_size, end_of_document, num_parts, digest.hexdigest())

    def scan(self, stream: Stream, parts: Sequence[int]) -> _Found:
        """Reads some parts, and checks their tokens."""
        digests, ends = {}, [np.zeros(0, np.int64)]
        for part in tqdm(parts, "reading", delay=2, unit="part", disable=not is_first()):
            digest = hashlib.sha256()
            start, stop = part * _PART, min((part + 1) * _PART, len(stream))
            for source, first, tokens in stream.chunks(start, stop):
                _check_ids(source, tokens, self.vocab_size)
                digest.update(tokens.astype("<i4").tobytes())
                if self.end_of_document is not None:
                    ends.append(np.flatnonzero(tokens == self.end_of_document) + (first + 1))
            digests[str(part)] = digest.hexdigest()
        return _Found(digests, np.concatenate(ends))

    def corpus(self, found: Sequence[_Found], stream: Stream) -> Corpus:
        """The documents between all ends, of files and of documents."""
        cuts = [one.ends for one in found]
        cuts += [
            first + starts_of(source)
            for source, first in zip(stream.sources, stream.starts, strict=True)
        ]
        bounds = np.unique(np.concatenate([*cuts, [len(stream)]]))
        digests = {part: digest for one in found for part, digest in one.digests.items()}
        fingerprint = hashlib.sha256(self.digest.encode())
        for part in range(self.num_parts):
            fingerprint.update(digests[str(part)].encode())
        return Corpus(
            stream, bounds[:-1], np.diff(bounds), self.vocab_size, fingerprint.hexdigest()
        )


def share_of(num_parts: int, process: int, num_processes: int) -> list[int]:
    """The parts that a process reads; the first one is read by all, so that they can compare."""
    return sorted({0, *range(process, num_parts, num_processes)})


def _all_gather_or_raise(text: str, problem: Exception | None) -> list[str]:
    """Every process's text.

    **Raises:** in all processes, the `problem` of one of them; in the one itself as it is.
    """
    message = {"text": text, "problem": None if problem is None else str(problem)}
    messages = [json.loads(m) for m in all_gather(json.dumps(message).encode())]
    if problem is not None:
        raise problem
    for process, of_process in enumerate(messages):
        if of_process["problem"] is not None:
            raise ValueError(f"process {process} cannot read its data: {of_process['problem']}")
    return [of_process["text"] for of_process in messages]


def _differs(process: int) -> ValueError:
    return ValueError(
        "`data`, `vocab_size` and `end_of_document` must be the same in every process; those of "
        f"process {process} differ from those of another. The default data is each machine's own: "
        "name files with --data."
    )


def _check_not_empty(stream: Stream, where: str) -> None:
    if len(stream) < 2:
        raise ValueError(f"`data` is empty: there are no tokens to train on in {where}.")


def _check_ids(source: Source, tokens: np.ndarray, vocab_size: int) -> None:
    low, high = tokens.min(), tokens.max()
    if not 0 <= low <= high < vocab_size:
        raise ValueError(
            f"`data`: the token ids of {getattr(source, 'path', 'a document')} must lie in "
            f"[0, {vocab_size}), the `vocab_size`; got {low} … {high}."
        )
