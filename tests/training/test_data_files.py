"""JSONL and Parquet files of texts, and the cache of their tokens."""

import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from checkpoints import FOLDER

from equinox_mtp.__main__ import main
from equinox_mtp.training import Corpus, PackedRows, _documents, _lock, _token_cache, load_corpus
from equinox_mtp.training._text import ByteText, TokenizerText, read_text

TEXTS = ["the dog and the fox", "", "to be\nor not", "é 我 🦊", " " * 400, "z\u2028", "the end"]
QWEN3 = FOLDER / "qwen3"
KINDS = ("a.jsonl", "a.jsonl.gz", "a.parquet")
Writer = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EQUINOX_MTP_CACHE", str(folder))
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes texts in the format that a name says, with ids beside them."""

    def write(name: str, texts: list[str] = TEXTS, field: str = "text") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        records = [{"id": i, field: text} for i, text in enumerate(texts)]
        if path.suffix == ".parquet":
            table = pyarrow.Table.from_pylist(records)
            pyarrow.parquet.write_table(table, path, row_group_size=3)
        else:
            lines = "".join(f"{json.dumps(record)}\n" for record in records).encode()
            path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
        return path

    return write


def documents(corpus: Corpus) -> list[list[int]]:
    return [document.tolist() for document in corpus]


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def expected_tokens() -> list[list[int | None]]:
    """By a loop over texts, without any of what is tested."""
    tokenizer = tokenizers.Tokenizer.from_file(str(QWEN3 / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    return [[*tokenizer.encode(text).ids, end] for text in TEXTS if text]


# What is read


@pytest.mark.parametrize("batch", [1, 1000, 1 << 21])
@pytest.mark.parametrize("name", KINDS)
def test_documents_of_a_file(
    name: str, batch: int, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_documents, "_BATCH", batch)
    monkeypatch.setattr(_documents, "_ROWS", 2)
    path = write(name, field="content")
    corpus = load_corpus([path], text=read_text(QWEN3), text_field="content")
    assert documents(corpus) == expected_tokens()
    assert corpus.vocab_size == 300
    corpus = load_corpus([path], text_field="content")
    assert documents(corpus) == [[*text.encode(), 256] for text in TEXTS if text]
    assert corpus.vocab_size == 257


@pytest.mark.parametrize("tokenizer", [None, QWEN3])
def test_one_text_is_one_corpus_in_any_format(
    tokenizer: Path | None, write: Writer, tmp_path: Path
) -> None:
    """A run knows its data by the tokens, and goes on with them in another kind of file."""
    text = None if tokenizer is None else read_text(tokenizer)
    (tmp_path / "files").mkdir()
    for i, one in enumerate(TEXTS):
        (tmp_path / "files" / f"{i}.txt").write_bytes(one.encode())
    paths = [tmp_path / "files", *(write(name) for name in KINDS)]
    corpora = [load_corpus([path], text=text) for path in paths]
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert len(corpora[0]) == len(TEXTS) - 1
    rows = [PackedRows(corpus.split(seed=1)[0], 16).read(np.arange(4)) for corpus in corpora]
    for other in rows[1:]:
        np.testing.assert_array_equal(other.tokens, rows[0].tokens)
        np.testing.assert_array_equal(other.segment_ids, rows[0].segment_ids)


@pytest.mark.parametrize("text", [None, read_text(QWEN3)])
def test_folders_mix_texts_of_all_kinds_in_the_order_of_names(
    text: TokenizerText | None, write: Writer, tmp_path: Path
) -> None:
    for name, one in zip(("b.jsonl", "d.parquet", "e.jsonl.gz"), "bde", strict=True):
        write(f"data/{name}", [one, one + "x"])
    for name in "acf":
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    (tmp_path / "data" / "image.png").write_bytes(b"\0")
    (tmp_path / "data" / "other.json.gz").write_bytes(gzip.compress(b"{}\0"))
    encoder = text or ByteText()
    found = documents(load_corpus([tmp_path / "data"], text=text))
    order = ["a", "b", "bx", "c", "d", "dx", "e", "ex", "f"]
    assert found == [[*encoder.encode(one), encoder.end_id] for one in order]
    np.save(tmp_path / "data" / "ids.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"`data` must hold text .*ids\.npy"):
        load_corpus([tmp_path / "data"], text=text, vocab_size=None if text else 9)


def test_lines_that_editors_leave(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert documents(load_corpus([path])) == [[97, 256], [98, 256]]


def test_large_vocabularies_have_four_bytes(write: Writer) -> None:
    words = {"a": 0, "b": 70_000, "c": 5}  # with gaps
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a"))
    text = TokenizerText(tokenizer, [70_000])
    corpus = load_corpus([write("a.jsonl", ["b", "c"])], text=text)
    assert corpus.vocab_size == 70_001
    assert documents(corpus) == [[70_000, 70_000], [5, 70_000]]


# The cache


def refuse(*_: Any) -> Any:
    raise AssertionError("tokenized again")


@pytest.mark.parametrize("name", [*KINDS, "a.txt"])
def test_texts_are_tokenized_once(
    name: str, write: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = write(name), read_text(QWEN3)
    first = load_corpus([path], text=text)
    (entry,) = entries(cache)
    with monkeypatch.context() as patched:
        patched.setattr(TokenizerText, "encode_all", refuse)
        moved = path.rename(path.with_name(f"moved-{name}"))
        again = load_corpus([moved], text=read_text(QWEN3))
        assert documents(again) == documents(first)
        assert again.fingerprint == first.fingerprint
        write(f"moved-{name}", [*TEXTS[:-1], "the enD"])  # a byte
        with pytest.raises(AssertionError, match="tokenized again"):
            load_corpus([moved], text=text)
    assert entries(cache) == [entry]
    assert documents(load_corpus([moved], text=text)) != documents(first)
    assert len(entries(cache)) == 2


def test_what_an_entry_depends_on(write: Writer, cache: Path, tmp_path: Path) -> None:
    path = write("a.jsonl", [*TEXTS, "the dog!"])
    text = read_text(QWEN3)
    path.write_bytes(path.read_bytes().replace(b'"id"', b'"other": "b", "id"'))
    load_corpus([path], text=text)
    load_corpus([path], text=text, end_of_document=1)
    load_corpus([path], text=text, text_field="other")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    load_corpus([path], text=TokenizerText(words, [0]))
    load_corpus([path])
    changed = path.read_bytes().replace(b"dog!", b"dot!")
    path.write_bytes(changed)
    load_corpus([path], text=text)
    (tmp_path / "a.txt").write_bytes(changed)
    load_corpus([tmp_path / "a.txt"], text=text)
    assert len(entries(cache)) == 7


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from equinox_mtp.training import _documents, load_corpus
    from equinox_mtp.training._text import TokenizerText, read_text

    real, batches = TokenizerText.encode_all, []

    def encode_all(text, texts):
        batches.append(texts)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(text, texts)

    _documents._BATCH, TokenizerText.encode_all = 1, encode_all
    load_corpus([Path(sys.argv[1])], text=read_text(Path(sys.argv[2])))
"""


def test_a_killed_writer_leaves_no_entry(write: Writer, cache: Path) -> None:
    path = write("a.jsonl")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), str(QWEN3)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == -signal.SIGKILL
    (unfinished,) = (entry for entry in entries(cache) if entry.suffix == ".tmp")
    assert documents(load_corpus([path], text=read_text(QWEN3))) == expected_tokens()
    assert unfinished in entries(cache)  # its writer may go on
    for left in (unfinished, *unfinished.iterdir()):
        os.utime(left, (1, 1))
    load_corpus([write("b.jsonl", ["b"])])
    assert len(entries(cache)) == 2
    assert unfinished not in entries(cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_writer_leaves_nothing(
    error: type[BaseException], write: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_all(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(TokenizerText, "encode_all", encode_all)
    with pytest.raises(error):
        load_corpus([write("a.jsonl")], text=read_text(QWEN3))
    assert entries(cache) == []


@pytest.mark.parametrize("locks", [True, False])
def test_processes_may_race(
    locks: bool, write: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, times = write("a.jsonl"), TokenizerText.encode_all, list[int]()
    meet = threading.Barrier(2, timeout=20)

    def encode_all(text: TokenizerText, texts: list[str]) -> list[np.ndarray]:
        times.append(len(texts))
        if not locks:
            meet.wait()
        return real(text, texts)

    monkeypatch.setattr(TokenizerText, "encode_all", encode_all)
    if not locks:
        monkeypatch.setattr(_lock, "fcntl", None)
    found: list[Any] = [None, None]

    def load(index: int) -> None:
        found[index] = documents(load_corpus([path], text=read_text(QWEN3)))

    threads = [threading.Thread(target=load, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected_tokens()] * 2
    assert times == [6] * (1 if locks else 2)
    assert len(entries(cache)) == 1


def test_a_damaged_entry_is_made_again(write: Writer, cache: Path) -> None:
    path = write("a.jsonl")
    for name in ("tokens.bin", "ends.npy"):
        load_corpus([path])
        (entry,) = entries(cache)
        os.truncate(entry / name, 10)
        assert documents(load_corpus([path])) == [[*t.encode(), 256] for t in TEXTS if t]


def test_an_entry_that_is_deleted_under_a_run(write: Writer, cache: Path) -> None:
    corpus = load_corpus([write("a.jsonl")])
    (entry,) = entries(cache)
    (entry / "tokens.bin").unlink()
    with pytest.raises(ValueError, match=r"tokens\.bin were deleted while a run reads them"):
        corpus[0]


def test_a_file_that_changes_meanwhile(
    write: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = write("a.jsonl"), ByteText.encode_all

    def encode_all(text: ByteText, texts: list[str]) -> list[np.ndarray]:
        with path.open("ab") as stream:
            stream.write(b'{"text": "more"}\n')
        return real(text, texts)

    monkeypatch.setattr(ByteText, "encode_all", encode_all)
    with pytest.raises(ValueError, match=r"a\.jsonl was changed while it was tokenized"):
        load_corpus([path])
    assert entries(cache) == []


def test_small_text_files_share_an_entry(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    for i in range(9):
        (tmp_path / "files" / f"{i}.txt").write_text("the dog")
    text = read_text(QWEN3)
    found = load_corpus([tmp_path / "files"], text=text)
    assert len(entries(cache)) == 1
    monkeypatch.setattr(_token_cache, "_GROUP", 20)  # two of seven bytes, and one that is beyond
    assert load_corpus([tmp_path / "files"], text=text).fingerprint == found.fingerprint
    assert len(entries(cache)) == 2


def test_where_the_cache_is(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _token_cache.cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("EQUINOX_MTP_CACHE", str(write("file.jsonl")))
    with pytest.raises(OSError, match=r"^`data`: its tokens cannot be written .*EQUINOX_MTP_CACHE"):
        load_corpus([write("a.jsonl")])
    monkeypatch.delenv("EQUINOX_MTP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _token_cache.cache_folder() == tmp_path / "xdg" / "equinox_mtp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _token_cache.cache_folder() == tmp_path / ".cache" / "equinox_mtp"


@pytest.mark.parametrize("name", KINDS)
def test_memory_does_not_grow_with_the_file(
    name: str, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen MB of text, by a sixteenth of them at a time; the scan of tokens included."""
    monkeypatch.setattr(_documents, "_BATCH", 1 << 18)
    monkeypatch.setattr(_documents, "_ROWS", 16)
    monkeypatch.setattr("equinox_mtp.training._corpus._PART", 1 << 18)
    letters = np.random.default_rng(0).integers(97, 123, 1 << 24, np.uint8).tobytes().decode()
    texts = [letters[first : first + (1 << 12)] for first in range(0, len(letters), 1 << 12)]
    path = write(name, texts)
    tracemalloc.start()
    corpus = load_corpus([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.num_tokens == (1 << 24) + len(texts)
    assert peak < 1 << 23


# What cannot be read


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


GOOD = line(text="the dog")
LATIN = '{"text": "é"}\n'.encode("latin1")
COMPRESSED = gzip.compress(b"".join(line(text=str(i) * 50) for i in range(4000)), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": "a" "b"}\n', "line 2 of {file} is not JSON: Expecting ','"),
        ("a.jsonl", GOOD + b"\n" + b"[1]\n", "line 3 of {file} must be a JSON object with the f"),
        ("a.jsonl", b"[" * 100_000, "line 1 of {file} cannot be read: maximum recursion depth"),
        ("a.jsonl", b"1" * 5000, "line 1 of {file} cannot be read: Exceeds the limit"),
        ("a.jsonl", b"3", "must be a JSON object with the field 'text'; got a number. Write one"),
        ("a.jsonl", GOOD + line(content="x", id=3), "line 2 of {file} has no field 'text'; it has"),
        ("a.jsonl", line(content="x", id=3), "it has 'content', 'id'. Name the field of the text"),
        ("a.jsonl", line(), "line 1 of {file} has no field 'text'; it has none."),
        ("a.jsonl", GOOD + line(text=None), "'text' must be a string; in line 2 of {file} it is n"),
        ("a.jsonl", line(text=["a"]), "must be a string; in line 1 of {file} it is an array."),
        ("a.jsonl", GOOD + LATIN, "line 2 of {file} must be UTF-8; byte 11 of the line is 0xe9"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "line 1 of {file} holds half of a surrogate pair"),
        ("a.jsonl", b"", "`data` is empty: there are no tokens to train on in {file}"),
        ("a.jsonl", line(text="") * 3, "`data` is empty: there are no tokens to train on in"),
        ("a.jsonl.gz", b"", "`data` is empty: there are no tokens to train on in {file}"),
        ("a.jsonl.gz", GOOD, "{file} is a damaged gzip file, after line 0: Not a gzipped file"),
        ("a.jsonl.gz", COMPRESSED[:-50], "{file} is a damaged gzip file, after line "),
        ("a.jsonl.gz", COMPRESSED[:99] + b"\xff" * 99, "{file} is a damaged gzip file, after line"),
        ("a.parquet", b"", "{file} is not a readable Parquet file: Parquet file size is 0 bytes"),
        ("a.parquet", GOOD * 9, "{file} is not a readable Parquet file: Parquet magic bytes not f"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    name: str,
    content: bytes,
    message: str,
    tmp_path: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert main(["train", "--data", str(path), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(("error: `data`", "error: `text_field`: "))
    assert message.format(file=path) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    left = entries(cache) if cache.exists() else []
    assert len(left) == ("is empty" in message)  # which is known, then


def test_parquet_files_that_do_not_fit(write: Writer, tmp_path: Path) -> None:
    path = write("a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'body'; it has 'id', 'text'\."):
        load_corpus([path], text_field="body")
    with pytest.raises(ValueError, match=r"'id' must be a string; in row 1 of .* it is a number"):
        load_corpus([path], text_field="id")
    table = pyarrow.table({"text": ["a", "b", None]})
    pyarrow.parquet.write_table(table, tmp_path / "null.parquet")
    with pytest.raises(ValueError, match=r"'text' must be a string; in row 3 of .* it is null"):
        load_corpus([tmp_path / "null.parquet"])
    latin = pyarrow.array([b"a", "é".encode("latin1")], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "latin.parquet")
    with pytest.raises(ValueError, match=r"row 2 of .* must be UTF-8; byte 1 of the text is 0xe9"):
        load_corpus([tmp_path / "latin.parquet"])
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56  # of the first page; the footer is at the end
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable Parquet file: .*again\.$"):
        load_corpus([path])


def test_only_the_column_of_the_text_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    other = pyarrow.array([rng.bytes(1000) for _ in range(20)])
    texts = pyarrow.array([f"text {i}" for i in range(20)]).dictionary_encode()
    path = tmp_path / "a.parquet"
    columns = {"other": other, "text": texts}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:10_000] = bytes(9_996)
    path.write_bytes(content)
    assert documents(load_corpus([path])) == [[*f"text {i}".encode(), 256] for i in range(20)]


def test_the_extra_is_named(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package pyarrow.*-e '\.\[data\]'"):
        load_corpus([path])
    assert load_corpus([write("a.jsonl")]).vocab_size == 257


def test_ids_outside_of_the_tokenizers_vocabulary(write: Writer, cache: Path) -> None:
    tokenizer = read_text(QWEN3)._tokenizer
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 999)]
    )
    message = r"`tokenizer` must give ids in \[0, 300\), its vocabulary; got 999 for text of .*a\.j"
    with pytest.raises(ValueError, match=message):
        load_corpus([write("a.jsonl")], text=TokenizerText(tokenizer, [0]))
    assert entries(cache) == []


# Runs


@pytest.mark.slow
def test_a_run_goes_on_with_its_texts_in_another_file(
    write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [text + " to be or not to be" * 4 for text in TEXTS]
    sizes = {"embed-size": 16, "num-layers": 1, "num-heads": 2, "mlp-size": 16, "depths": 1}
    sizes |= {"steps": 2, "batch-size": 2, "seq-len": 16, "eval-rows": 2, "compare-prompts": 0}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    out = ["--out", str(tmp_path / "run")]
    data = ["--data", str(write("a.jsonl.gz", texts, "content")), "--text-field", "content"]
    assert main(["train", *data, *options, *out]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["text_field"] == "content"
    (tmp_path / "a.jsonl.gz").unlink()
    moved = ["--data", str(write("b.parquet", texts, "body")), "--text-field", "body"]
    assert main(["train", "--resume", *out, *moved]) == 0
    assert "the run has ended, at step 2 of 2" in capsys.readouterr().out
    other = ["--data", str(write("c.jsonl", texts[1:], "content"))]
    assert main(["train", "--resume", *out, *other]) == 1
    assert "`data` is not what the run in" in capsys.readouterr().err
