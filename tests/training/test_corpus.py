"""Documents in files: what several processes read of them, and what they make of it."""

import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from equinox_mtp.training import Corpus, PackedRows, _corpus, held_out_prompts, load_corpus
from equinox_mtp.training._sources import TokenFile

VOCAB, END = 50, 7


def make_streams(seed: int = 0) -> list[np.ndarray]:
    """A stream that ends in mid-document, rows, and a stream of ends alone."""
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 20, 61),
        rng.integers(0, 20, (4, 9)),
        np.full(3, END),
    ]


def documents_oracle(streams: list[np.ndarray]) -> list[list[int]]:
    documents: list[list[int]] = []
    for stream in streams:
        for row in np.atleast_2d(stream):
            document: list[int] = []
            for token in row.tolist():
                document.append(token)
                if token == END:
                    documents.append(document)
                    document = []
            if document:
                documents.append(document)
    return documents


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, stream in zip(paths, make_streams(), strict=True):
        np.save(path, np.asfortranarray(stream))
    return paths


class Process(threading.Thread):
    """A thread that takes itself for one of several processes."""

    def __init__(self, index: int, function: Callable[[int], Any]):
        super().__init__()
        self.index, self.function = index, function
        self.result: Any = None
        self.read: list[int] = []

    def run(self) -> None:
        try:
            self.result = self.function(self.index)
        except Exception as error:
            self.result = error


def me() -> Process:
    process = threading.current_thread()
    assert isinstance(process, Process)
    return process


def in_processes(
    count: int, function: Callable[[int], Any], patched: pytest.MonkeyPatch
) -> list[Process]:
    """What each process returns or raises, and which tokens of a single file it has read."""
    barrier, messages = threading.Barrier(count, timeout=20), [b""] * count
    real_read = TokenFile.read

    def all_gather(message: bytes) -> list[bytes]:
        messages[me().index] = message
        barrier.wait()
        found = list(messages)
        barrier.wait()
        return found

    def read(file: TokenFile, where: Any) -> np.ndarray:
        process = threading.current_thread()
        if isinstance(where, slice) and isinstance(process, Process):
            process.read += range(where.start, where.stop)
        return real_read(file, where)

    patched.setattr(jax, "process_index", lambda: me().index)
    patched.setattr(jax, "process_count", lambda: count)
    patched.setattr(_corpus, "all_gather", all_gather)
    patched.setattr(_corpus, "_PART", 10)
    patched.setattr(TokenFile, "read", read)
    processes = [Process(index, function) for index in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return processes


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_every_process_finds_all_documents(
    count: int, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = documents_oracle(make_streams())
    monkeypatch.setattr(_corpus, "_PART", 10)
    alone = load_corpus(paths, vocab_size=VOCAB, end_of_document=END)
    for process in in_processes(
        count,
        lambda _: load_corpus(paths, vocab_size=VOCAB, end_of_document=END),
        monkeypatch,
    ):
        corpus = process.result
        assert isinstance(corpus, Corpus), corpus
        assert [document.tolist() for document in corpus] == expected
        assert corpus.fingerprint == alone.fingerprint


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_process_reads_its_share(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 93 tokens each is read once, but the first ten, by which processes compare."""
    np.save(tmp_path / "a.npy", np.arange(93) % VOCAB)
    processes = in_processes(
        count, lambda _: load_corpus([tmp_path / "a.npy"], vocab_size=VOCAB), monkeypatch
    )
    times = np.zeros(93, int)
    for process in processes:
        times[process.read] += 1
    assert times.tolist() == [count] * 10 + [1] * 83
    assert max(len(process.read) for process in processes) <= 10 * (-(-10 // count) + 1)


def test_fingerprints_tell_what_changed(paths: list[Path]) -> None:
    found = {load_corpus(paths, vocab_size=VOCAB, end_of_document=END).fingerprint}
    found.add(load_corpus(paths, vocab_size=VOCAB).fingerprint)
    found.add(load_corpus(paths, vocab_size=VOCAB + 1).fingerprint)
    found.add(load_corpus(paths[:2], vocab_size=VOCAB).fingerprint)
    streams = make_streams()
    np.save(paths[1], streams[1].reshape(9, 4))  # the same tokens in other documents
    found.add(load_corpus(paths, vocab_size=VOCAB).fingerprint)
    streams[1][3, 8] += 1
    np.save(paths[1], streams[1])
    found.add(load_corpus(paths, vocab_size=VOCAB).fingerprint)
    assert len(found) == 6
    np.save(paths[1], streams[1].astype(np.int16))  # the same tokens in another dtype
    assert load_corpus(paths, vocab_size=VOCAB).fingerprint in found


def test_what_stops_one_process_stops_all(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(function: Callable[[int], Any]) -> list[Exception]:
        with monkeypatch.context() as patched:
            return [process.result for process in in_processes(2, function, patched)]

    def load(paths: list[Path], **options: Any) -> Corpus:
        return load_corpus(paths, **{"vocab_size": VOCAB, **options})

    found = results(lambda index: load([*paths[: 3 - index], tmp_path / "3.npy"][:3]))
    assert str(found[0]).startswith("process 1 cannot read its data: `data`: there is no file")
    assert isinstance(found[1], FileNotFoundError)

    found = results(lambda index: load(paths[: 3 - index]))
    assert all("`data`, `vocab_size` and `end_of_document` must be the" in str(e) for e in found)
    found = results(lambda index: load(paths, end_of_document=index))
    assert all("those of process " in str(e) for e in found)
    other = tmp_path / "other.npy"
    np.save(other, make_streams(seed=1)[0])
    found = results(lambda index: load([[paths[0], other][index], *paths[1:]]))
    assert all("those of process " in str(e) for e in found)

    stream = make_streams()[0]
    stream[15] = VOCAB  # in the second part, which the second process reads
    np.save(paths[0], stream)
    found = results(lambda index: load(paths))
    assert f"process 1 cannot read its data: `data`: the token ids of {paths[0]}" in str(found[0])
    assert str(found[1]).startswith(f"`data`: the token ids of {paths[0]} must lie in [0, 50)")


def test_rows_read_what_they_hold(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row opens each of its files once, and maps no more."""
    corpus = load_corpus(paths, vocab_size=VOCAB, end_of_document=END)
    rows = PackedRows(corpus, seq_len=16)
    flat = np.concatenate(list(corpus))
    read: list[tuple[str, int]] = []
    real_read = TokenFile.read

    def counting(file: TokenFile, where: Any) -> np.ndarray:
        read.append((file.path.name, len(where)))
        return real_read(file, where)

    monkeypatch.setattr(TokenFile, "read", counting)
    batch = rows.read(np.array([[3], [0]]))
    assert batch.tokens[0, 0].tolist() == flat[48:65].tolist()
    assert batch.tokens[1, 0].tolist() == flat[:17].tolist()
    assert read == [("0.npy", 13 + 17), ("1.npy", 4)]
    # And so do prompts.
    read.clear()
    prompts = held_out_prompts(corpus, num_prompts=1, length=5)
    assert read == [("0.npy", 5)]
    assert prompts[0].tolist() == flat[:5].tolist()
    assert rows.read(np.zeros((2, 0), int)).tokens.shape == (2, 0, 17)


@pytest.mark.parametrize("name", ["a.npy", "a.bin", "a.txt"])
def test_files_that_change_under_a_run(name: str, tmp_path: Path) -> None:
    path = tmp_path / name

    def write(tokens: np.ndarray) -> None:
        if name == "a.npy":
            np.save(path, tokens)
        else:
            tokens.astype(np.uint16 if name == "a.bin" else np.uint8).tofile(path)

    write(np.arange(20))
    rows = PackedRows(load_corpus([path], vocab_size=None if name == "a.txt" else 30), seq_len=8)
    assert rows.read(np.array([1])).tokens[0, 0] == 8
    for tokens in (np.arange(19), np.arange(0)):
        write(tokens)
        with pytest.raises(ValueError, match=r"a\.\w+ was changed while a run reads it: 20 tokens"):
            rows.read(np.array([1]))


def test_columns_first_are_mapped_too(tmp_path: Path) -> None:
    """Arrays in Fortran's order, of which only what is wanted is read."""
    array = np.asfortranarray(np.random.default_rng(0).integers(0, VOCAB, (300_000, 7), np.int16))
    np.save(tmp_path / "a.npy", array)
    corpus = load_corpus([tmp_path / "a.npy"], vocab_size=VOCAB)
    assert (len(corpus), set(corpus.lengths.tolist())) == (300_000, {7})
    rows = PackedRows(corpus, seq_len=20)
    tracemalloc.start()
    batch = rows.read(np.array([5, 100_000]))
    assert tracemalloc.get_traced_memory()[1] < array.nbytes / 4 + 16 * len(corpus)
    tracemalloc.stop()
    flat = np.ascontiguousarray(array).reshape(-1)
    assert batch.tokens[0].tolist() == flat[100:121].tolist()
    assert batch.tokens[1].tolist() == flat[2_000_000:2_000_021].tolist()


def test_documents_in_memory() -> None:
    documents = [np.array([1, 2, 3]), np.array([], int), np.array([4])]
    corpus = Corpus.of_documents(documents, 5)
    assert [document.tolist() for document in corpus] == [[1, 2, 3], [4]]
    assert corpus.lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"of a document must lie in \[0, 4\)"):
        Corpus.of_documents(documents, 4)
    with pytest.raises(ValueError, match="no tokens to train on in `documents`"):
        Corpus.of_documents(documents[1:2], 4)
    with pytest.raises(ValueError, match=r"arrays of integers; got one of float64 and shape \(2,"):
        Corpus.of_documents([np.array([0.5, 1.5])], 4)
