"""Documents in files: indexed once, each process its share, and read where they are wanted."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from ._processes import exchange, is_first
from ._sources import Stream, TokenArray, open_files

_HELD_OUT = 0.05
_PART = 1 << 22
"""Tokens that are scanned at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Documents of token ids, each ended by its end-of-document id, as a sequence of arrays.

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

        **Raises:** `ValueError` if there is nothing in it, or an id is not in the vocabulary.
        """
        sources = [TokenArray(document) for document in documents if len(document)]
        return _index(Stream(sources), vocab_size, None, "in `documents`")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.starts[index]
        return self.stream.read(np.arange(start, start + self.lengths[index]))

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return int(self.lengths.sum())

    def read(self, documents: np.ndarray, within: np.ndarray) -> np.ndarray:
        """The tokens at these places within these documents."""
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
    paths: Sequence[Path], *, vocab_size: int | None = None, end_of_document: int | None = None
) -> Corpus:
    """Finds the documents of text or token ids.

    All tokens are read once, to check them and to find where documents end; in several processes,
    which all call this, each reads its own share, and they exchange what they have found. What
    stays in memory is where each document starts.

    **Arguments:**

    - `paths`: text files and directories of them, or `.npy`/`.bin` files of token ids; not both. If
        empty, the Python standard library's own source files. All processes see the same files.
    - `vocab_size`: required for token ids; text has 257, the bytes and an end-of-document id.
    - `end_of_document`: the id at which a stream of token ids is cut into documents.

    **Raises:** `FileNotFoundError` for a path that does not exist; `ValueError` for data that is
    empty, of mixed kinds, outside the vocabulary, or not the same in every process.
    """
    shown = ", ".join(str(path) for path in paths)
    problem: Exception | None = None
    try:
        stream, vocab_size = open_files(paths, vocab_size, end_of_document)
    except (ValueError, OSError) as error:
        stream, vocab_size, problem = Stream([]), vocab_size or 0, error
    return _index(stream, vocab_size, end_of_document, f"in {shown}", problem)


# The index


@dataclasses.dataclass
class _Scan:
    """What a process knows of the data, and has found in its share of it."""

    shape: str
    error: str = ""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)


def _index(
    stream: Stream,
    vocab_size: int,
    end_of_document: int | None,
    where: str,
    problem: Exception | None = None,
) -> Corpus:
    """The documents of a stream. What stops one process, its `problem` for one, stops all."""
    shape = hashlib.sha256(repr((vocab_size, end_of_document)).encode())
    for source in stream.sources:
        shape.update(f"{source.num_tokens} {source.row_length};".encode())
    mine, ends = _Scan(shape.hexdigest()), [np.zeros(0, np.int64)]
    starts = range(0, len(stream), _PART)
    parts = share_of(len(starts), jax.process_index(), jax.process_count())
    try:
        if problem is not None:
            raise problem
        if len(stream) < 2:
            raise ValueError(f"`data` is empty: there are no tokens to train on {where}.")
        for part in tqdm(parts, "reading", delay=2, unit="part", disable=not is_first()):
            stop = min(starts[part] + _PART, len(stream))
            digest, found = _scan(stream, starts[part], stop, vocab_size, end_of_document)
            mine.digests[str(part)] = digest
            ends.append(found)
    except (ValueError, OSError) as error:
        mine.error, problem = str(error), error
    scans = [_Scan(**json.loads(m)) for m in exchange(json.dumps(vars(mine)).encode())]
    if problem is not None:
        raise problem
    for process, scan in enumerate(scans):
        if scan.error:
            raise ValueError(f"process {process} cannot read its share: {scan.error}")
        if scan.shape != scans[0].shape or scan.digests["0"] != scans[0].digests["0"]:
            raise ValueError(
                "`data`, `vocab_size` and `end_of_document` must be the same in every process; "
                f"those of process {process} differ from those of the first. The default data is "
                "each machine's own: name files with --data."
            )
    everywhere = exchange(np.concatenate(ends).tobytes())
    cuts = [np.frombuffer(message, np.int64) for message in everywhere]
    cuts += [
        first + np.arange(0, source.num_tokens, source.row_length)
        for source, first in zip(stream.sources, stream.starts, strict=True)
    ]
    bounds = np.unique(np.concatenate([*cuts, [len(stream)]]))
    digests = {int(part): digest for scan in scans for part, digest in scan.digests.items()}
    for part in starts:
        shape.update(digests[part // _PART].encode())
    return Corpus(stream, bounds[:-1], np.diff(bounds), vocab_size, shape.hexdigest())


def share_of(num_parts: int, process: int, num_processes: int) -> list[int]:
    """The parts that a process reads; the first one is read by all, so that they can compare."""
    return sorted({*range(min(1, num_parts)), *range(process, num_parts, num_processes)})


def _scan(
    stream: Stream, start: int, stop: int, vocab_size: int, end_of_document: int | None
) -> tuple[str, np.ndarray]:
    """The digest of a part's tokens, and the places after an end of document."""
    digest, ends = hashlib.sha256(), [np.zeros(0, np.int64)]
    for source, first, tokens in stream.stretches(start, stop):
        low, high = tokens.min(), tokens.max()
        if not 0 <= low <= high < vocab_size:
            name = getattr(source, "path", "a document")
            raise ValueError(
                f"`data`: the token ids of {name} must lie in [0, {vocab_size}), the "
                f"`vocab_size`; got {low} … {high}."
            )
        digest.update(tokens.astype("<i4").tobytes())
        if end_of_document is not None:
            ends.append(np.flatnonzero(tokens == end_of_document) + (first + 1))
    return digest.hexdigest(), np.concatenate(ends)
