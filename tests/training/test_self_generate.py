"""Depths that are trained on texts of the model itself."""

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import FOLDER, changed
from helpers import assert_equal

import equinox_mtp.training._train as train_module
from equinox_mtp import pretrained
from equinox_mtp.__main__ import main
from equinox_mtp.speculative import generate
from equinox_mtp.training import (
    Corpus,
    Interrupted,
    PackedRows,
    TrainConfig,
    _self_generate as self_generate,
    train,
)
from equinox_mtp.training._prepare import Run, prepare
from equinox_mtp.training._self_generate import OwnTexts, check_self_generate, describe_texts
from equinox_mtp.training._train import fresh_state, open_own_texts, with_own_texts

QWEN3 = FOLDER / "qwen3"
LENGTHS = (60, 70, 1, 80, 3, 90)
"""Words in a document: with its end, some are shorter than a prompt, which has six tokens."""


@pytest.fixture(scope="module", autouse=True)
def as_many_texts_as_rows() -> Iterator[None]:
    """Several batches of few texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_generate, "_TOKENS_AT_ONCE", 0)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Nine texts of five training documents, in batches of four, four and one."""
    root = tmp_path_factory.mktemp("self_generate")
    (root / "text").mkdir()
    for index, length in enumerate(LENGTHS):
        words = np.random.default_rng(index).choice(["to", "be", "or", "not", "sea"], length)
        (root / "text" / f"{index}.txt").write_text(" ".join(words))
    return TrainConfig(
        data=(root / "text",),
        model=QWEN3,
        freeze_model=True,
        self_generate=9,
        depths=1,
        preset="fast_mtp",
        steps=6,
        warmup_steps=1,
        learning_rate=0.02,
        batch_size=4,
        seq_len=24,
        eval_rows=2,
        eval_every=6,
        checkpoint_every=3,
        compare_prompts=0,
        out=root / "run",
    )


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> Iterator[tuple[Path, list[np.ndarray]]]:
    """An uninterrupted run, and the rows that it was trained on."""
    rows, real_step = [], train_module.train_step

    def record(inputs: Any, state: Any) -> Any:
        rows.extend(np.asarray(inputs[0].tokens[0]))
        return real_step(inputs, state)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_module, "train_step", record)
        yield train(config), rows


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that are generated from now on."""
    batches, real = [], OwnTexts.generate

    def record(texts: OwnTexts, batch: int, model: Any) -> np.ndarray:
        batches.append(batch)
        return real(texts, batch, model)

    monkeypatch.setattr(OwnTexts, "generate", record)
    return batches


def prepared(config: TrainConfig, **changes: Any) -> tuple[Run, Callable[[], Run]]:
    """A run that has not begun, and what puts its own texts into it."""
    run = prepare(dataclasses.replace(config, **changes))
    assert config.out is not None
    run.out.mkdir(exist_ok=True)
    state = fresh_state(run)

    def with_texts() -> Run:
        texts = open_own_texts(run, state)
        assert texts is not None
        return with_own_texts(run, state, texts)

    return run, with_texts


def documents(rows: PackedRows) -> list[list[int]]:
    return [document.tolist() for document in rows._corpus]


def stored(out: Path) -> list[np.ndarray]:
    return [np.load(path) for path in sorted((out / "self_generated").glob("batch_*.npy"))]


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    return [record["mtp_losses"][0] for record in records]


# The texts


def by_plain_decoding(folder: Path, corpus: Corpus, num_texts: int, end: int) -> list[list[int]]:
    """One text after the other, each a batch of its own."""
    model, _ = pretrained.load(folder, num_depths=0, tokenizer=False)
    texts = []
    for document in list(corpus)[:num_texts]:
        assert document[-1] == end
        prompt = document[:-1][:6]
        longest = 24 - len(prompt)
        text = generate(model, prompt[None], max_new_tokens=longest, num_drafts=0, eos_id=end)
        texts.append(text.tokens[0, : text.lengths[0]].tolist())
    return texts


def test_greedy_texts_are_plain_decoding(config: TrainConfig, tmp_path: Path) -> None:
    greedy = {"self_generate_temperature": 0.0, "self_generate": 5}
    run, with_texts = prepared(config, **greedy, out=tmp_path / "run")
    lengths = run.train_corpus.lengths
    assert min(lengths) < 6 < max(lengths)
    end = run.info.config.end_of_document
    assert end is not None
    expected = by_plain_decoding(QWEN3, run.train_corpus, 5, end)
    assert documents(with_texts().train_rows) == expected
    assert {len(text) for text in expected} == {24}
    held_out = [document.tolist() for document in run.held_out_corpus]
    assert documents(with_texts().held_out_rows) == held_out


def test_an_end_token_ends_a_text(config: TrainConfig, tmp_path: Path) -> None:
    """Any that the model's configuration names; one that it has no logits of counts for nothing."""
    greedy = {"self_generate_temperature": 0.0, "self_generate": 5}
    _, with_texts = prepared(config, **greedy, out=tmp_path / "run")
    whole = documents(with_texts().train_rows)
    longest = max(whole, key=lambda text: len(set(text[6:])))
    end = next(token for token in longest[8:] if token not in longest[:8])
    model = changed("qwen3", tmp_path / "model")
    settings = {"eos_token_id": [5000, 0, end]}
    (model / "generation_config.json").write_text(json.dumps(settings))
    changes = {**greedy, "model": model, "end_of_document": 1, "out": tmp_path / "other"}
    run, with_texts = prepared(config, **changes)
    texts = documents(with_texts().train_rows)
    for text, document in zip(texts, run.train_corpus, strict=True):
        before = whole[texts.index(text)]
        begins = min(6, len(document) - 1)
        ends = [i for i in range(begins, 24) if before[i] in (0, 1, end)]
        assert text == before[: ends[0] + 1 if ends else 24]
    assert texts[whole.index(longest)][-1] == end
    origin = json.loads((tmp_path / "other" / "self_generated" / "origin.json").read_text())
    assert origin["end_of_document"] == sorted({0, 1, end})


@pytest.mark.slow
def test_draws(config: TrainConfig, run: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    """A document's second text begins as its first, and is another."""
    first, second, last = stored(run[0])
    assert (first.shape, second.shape, last.shape) == ((4, 24), (4, 24), (1, 24))
    texts = [text[text >= 0].tolist() for text in np.concatenate([first, second, last])]
    prompts = [document[:-1][:6].tolist() for document in prepare(config).train_corpus]
    for text, prompt in zip(texts, [*prompts, *prompts[:4]], strict=True):
        assert text[: len(prompt)] == prompt
    assert all(texts[i] != texts[i + 5] for i in range(4))
    _, with_texts = prepared(config, seed=1, out=tmp_path / "other")
    assert not set(map(tuple, documents(with_texts().train_rows))) & set(map(tuple, texts))


def test_short_rows_have_a_prompt_of_one_token(config: TrainConfig, tmp_path: Path) -> None:
    run, with_texts = prepared(config, seq_len=3, out=tmp_path / "run")
    texts = documents(with_texts().train_rows)
    begins = [int(document[0]) for document in run.train_corpus]
    assert [text[0] for text in texts] == [*begins, *begins[:4]]
    assert {len(text) for text in texts} <= {2, 3}


# Training on them


def test_a_run_is_trained_on_its_texts(
    run: tuple[Path, list[np.ndarray]], config: TrainConfig
) -> None:
    out, rows = run
    texts = [text[text >= 0] for text in np.concatenate(stored(out))]
    packed = PackedRows(Corpus.of_documents(texts, 320), config.seq_len)
    known = {tuple(row) for row in packed.read(np.arange(len(packed))).tokens.tolist()}
    assert {tuple(row) for row in np.asarray(rows).tolist()} == known
    found = losses(out)
    assert np.mean(found[-2:]) < found[0] - 0.2


@pytest.mark.slow
def test_a_run_on_a_mesh_has_the_same_texts(
    run: tuple[Path, list[np.ndarray]],
    config: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They, and the comparison at its end, are made on one device."""
    changes = {"mesh": "fsdp=4,tensor=2", "steps": 1, "compare_prompts": 1}
    out = train(dataclasses.replace(config, **changes, out=tmp_path / "run"))
    for x, y in zip(stored(out), stored(run[0]), strict=True):
        assert_equal(x, y)
    assert losses(out) == pytest.approx(losses(run[0])[:1], rel=1e-5)
    assert "held-out prompts continued greedily" in capsys.readouterr().out


def test_resumed_run_reads_its_texts(
    run: tuple[Path, list[np.ndarray]], made: list[int], tmp_path: Path
) -> None:
    other = shutil.copytree(run[0], tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "step_00000006")
    assert main(["train", "--resume", "--out", str(other)]) == 0
    assert losses(other) == losses(run[0])
    assert made == []


def first_id(value: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:128] + np.int32(value).tobytes() + content[132:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-5],
        lambda content: b"",
        lambda content: content.replace(b"}", b" "),
        lambda content: content.replace(b"<i4", b"<f4"),
        lambda content: content.replace(b"(4, 24)", b"(3, 24)"),
        first_id(320),
        first_id(-2),
    ],
)
def test_texts_that_are_lost_are_made_again(
    damage: Callable[[bytes], bytes],
    run: tuple[Path, list[np.ndarray]],
    config: TrainConfig,
    made: list[int],
    tmp_path: Path,
) -> None:
    """The same ones."""
    folder = shutil.copytree(run[0] / "self_generated", tmp_path / "self_generated")
    (folder / "batch_00002.npy").unlink()
    path = folder / "batch_00000.npy"
    path.write_bytes(damage(path.read_bytes()))
    prepared(config, out=tmp_path)[1]()
    assert made == [0, 2]
    for x, y in zip(stored(tmp_path), stored(run[0]), strict=True):
        assert_equal(x, y)


# Interruptions


def test_an_interrupted_run_goes_on_with_the_next_batch(
    run: tuple[Path, list[np.ndarray]],
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the command that it prints."""
    out, real, batches = tmp_path / "run", OwnTexts.generate, list[int]()

    def interrupt(texts: OwnTexts, batch: int, model: Any) -> np.ndarray:
        batches.append(batch)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(texts, batch, model)

    monkeypatch.setattr(OwnTexts, "generate", interrupt)
    with pytest.raises(Interrupted):
        train(dataclasses.replace(config, out=out))
    said = capsys.readouterr().out
    (command,) = re.findall("interrupted after 8 of 9 texts; continue with (.*)\n", said)
    assert len(stored(out)) == 2
    assert main(["train", *command.split()]) == 0
    assert batches == [0, 1, 2]
    for x, y in zip(stored(out), stored(run[0]), strict=True):
        assert_equal(x, y)
    assert losses(out) == losses(run[0])
    assert "9 texts by the model itself" in capsys.readouterr().out


def test_a_killed_run_leaves_whole_batches(
    run: tuple[Path, list[np.ndarray]],
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it was writing."""
    _, with_texts = prepared(config, out=tmp_path / "run")
    with monkeypatch.context() as patched:

        def cut(source: Path, target: Path) -> None:
            if target.name == "batch_00001.npy":
                raise RuntimeError("power cut")
            source.rename(target)

        patched.setattr("equinox_mtp._whole_file.os.replace", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            with_texts()
    assert len(stored(tmp_path / "run")) == 1
    with_texts()
    for x, y in zip(stored(tmp_path / "run"), stored(run[0]), strict=True):
        assert_equal(x, y)


def test_many_texts_are_made_at_once(
    run: tuple[Path, list[np.ndarray]], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step reads all parameters, for however many texts; but not for any number of tokens."""
    texts = OwnTexts(config, prepare(config).corpus, (), 320, run[0])
    assert texts.num_rows == 4
    for tokens_at_once, num_rows in ((5 * 24 + 23, 5), (100 * 24, 9)):
        monkeypatch.setattr(self_generate, "_TOKENS_AT_ONCE", tokens_at_once)
        assert texts.num_rows == num_rows


# What does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "`seed` of the texts in {folder} was 0, and is 1 now. Leave it as it was"),
        ({"self_generate": 8}, "`self_generate` of the texts in {folder} was 9, and is 8 now"),
        ({"self_generate_temperature": 0.5}, "`self_generate_temperature` of the texts in "),
        ({"seq_len": 20}, "`seq_len` of the texts in {folder} was 24, and is 20 now"),
        ({"batch_size": 6}, "`texts_at_once` of the texts in {folder} was 4, and is 6 now"),
        ({"accumulate": 2}, "`texts_at_once` of the texts in {folder} was 4, and is 2 now"),
        ({"end_of_document": 7}, "`data` of the texts in {folder} was '"),
        ({"model": "weights"}, "`model` of the texts in {folder} was '"),
        ({"model": "config"}, "`model` of the texts in {folder} was '"),
        ({"data": "words"}, "`data` of the texts in {folder} was '"),
    ],
)
def test_texts_of_other_options_are_noticed(
    run: tuple[Path, list[np.ndarray]],
    config: TrainConfig,
    changes: dict[str, Any],
    message: str,
    made: list[int],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run[0] / "self_generated", out / "self_generated")
    before = (out / "self_generated" / "origin.json").read_bytes()
    if changes.get("model") == "weights":

        def spoil(tensors: dict[str, np.ndarray]) -> None:
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.001)

        changes = {"model": changed("qwen3", tmp_path / "model", tensors=spoil)}
    elif changes.get("model") == "config":
        theta = {"rope_theta": 999_999}
        changes = {"model": changed("qwen3", tmp_path / "model", config=lambda c: c.update(theta))}
    elif changes.get("data") == "words":
        text = shutil.copytree(config.data[0], tmp_path / "text")
        (text / "1.txt").write_text("the sea " * 40)
        changes = {"data": (text,)}
    with pytest.raises(ValueError, match=re.escape(message.format(folder=out / "self_generated"))):
        train(dataclasses.replace(config, out=out, **changes))
    assert made == []
    # Nothing of the folder was overwritten: the run that had these options goes on.
    assert not (out / "config.json").exists()
    assert (out / "self_generated" / "origin.json").read_bytes() == before
    if "data" not in changes:
        moved = {"model": shutil.copytree(QWEN3, tmp_path / "moved")}
        prepared(config, out=out, **moved)[1]()
        assert made == []


@pytest.mark.parametrize("origin", [None, b"[1]", b"{}"])
def test_texts_that_nothing_is_known_of(
    origin: bytes | None, run: tuple[Path, list[np.ndarray]], config: TrainConfig, tmp_path: Path
) -> None:
    folder = shutil.copytree(run[0] / "self_generated", tmp_path / "run" / "self_generated")
    (folder / "origin.json").unlink()
    if origin is not None:
        (folder / "origin.json").write_bytes(origin)
    _, with_texts = prepared(config, out=tmp_path / "run")
    message = "`model` of the texts in .* was 'unknown', and is '.*delete that folder"
    with pytest.raises(ValueError, match=message):
        with_texts()
    for path in folder.glob("batch_*.npy"):
        path.unlink()
    with_texts()
    assert len(stored(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"self_generate": 0}, "`self_generate` must be at least 1; got 0"),
        ({"freeze_model": False}, "`self_generate` takes the texts of a released model that stays"),
        (
            {"freeze_model": False, "model": None},
            "got `model=None` and `freeze_model=False`. Name its folder with --model, and add",
        ),
        (
            {"self_generate": None, "self_generate_temperature": 0.5},
            "`self_generate_temperature` is of the texts of `self_generate`; got 0.5 without it",
        ),
        ({"self_generate_temperature": -1.0}, "`self_generate_temperature` must be at least 0"),
    ],
)
def test_bad_options(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(config, **changes)


def test_greedy_texts_are_one_a_document(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    greedy = dataclasses.replace(config, self_generate_temperature=0.0, out=out)
    with pytest.raises(ValueError, match=r"`self_generate` must be at most 5, .*; got 9\. Ask for"):
        train(greedy)
    assert not out.exists()


def test_several_processes_are_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus.of_documents([np.arange(9)], 9)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"`self_generate` works in one process; got 2\. Leave --"):
        check_self_generate(config, corpus)
    check_self_generate(dataclasses.replace(config, self_generate=None), corpus)


def test_a_folder_that_cannot_be_written_is_one_line(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "self_generated").write_bytes(b"")
    with pytest.raises(OSError, match=r"^`self_generate`: .*origin\.json cannot be written: File"):
        train(dataclasses.replace(config, out=tmp_path))
    assert capsys.readouterr().out == ""


def test_texts_are_described() -> None:
    texts = Corpus.of_documents([np.arange(n) for n in (4, 8, 8, 2)], 8)
    assert describe_texts(texts, texts, seq_len=8) == (
        "4 texts by the model itself, 22 tokens; 50% ended before a row did"
    )
    one = Corpus.of_documents([np.arange(8)], 8)
    _, note = describe_texts(texts, one, seq_len=8).splitlines()
    assert note == "note: some begin alike, as there are 1 training document(s)"
