"""The training command's parts: data, checkpoints, the step, the loop, the command line."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equinox_mtp as emtp
import equinox_mtp.training._prepare as prepare_module
import equinox_mtp.training._train as train_module
from equinox_mtp.__main__ import main
from equinox_mtp.training import (
    CheckpointInfo,
    Corpus,
    Interrupted,
    PackedRows,
    TrainConfig,
    load_corpus,
    train,
)
from equinox_mtp.training._checkpoint import load_info, save_checkpoint
from equinox_mtp.training._checkpoint_files import checkpoints, last_checkpoint
from equinox_mtp.training._config import without_output
from equinox_mtp.training._lock import only_run
from equinox_mtp.training._options import GROUPS
from equinox_mtp.training._placement import ONE_DEVICE
from equinox_mtp.training._prepare import prepare
from equinox_mtp.training._report import MetricsFile, describe_corpus
from equinox_mtp.training._step import (
    StepInputs,
    make_optimizer,
    make_state,
    scaling_switch_step,
    train_step,
)
from equinox_mtp.training._stored_options import read_options
from equinox_mtp.training._train import step_inputs

TINY = TrainConfig(
    embed_size=16,
    num_layers=1,
    num_heads=2,
    mlp_size=32,
    seq_len=24,
    batch_size=4,
    steps=6,
    warmup_steps=2,
    eval_every=3,
    eval_rows=4,
    checkpoint_every=2,
    compare_prompts=0,
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        words = rng.choice(["def f(x):\n", "    return x\n", "import jax\n", "y = 1\n"], 12)
        (folder / f"{i:02d}.py").write_text("".join(words))
    return folder


def records(out: Path, split: str) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["split"] == split]


def losses(out: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r["main_loss"], *r["mtp_losses"]) for r in records(out, "train")]


# --- data


def test_text_is_bytes_with_an_end_of_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("é\n".encode())
    (tmp_path / "a.txt").write_bytes(b"ab")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_bytes(b"no")
    corpus = load_corpus([tmp_path])
    assert corpus.vocab_size == 257
    assert [d.tolist() for d in corpus] == [[97, 98, 256], [0xC3, 0xA9, 10, 256]]


def test_default_data_is_the_standard_library() -> None:
    corpus = load_corpus([])
    text = bytes(b for i in range(50) for b in corpus[i].tolist() if b < 256)
    assert b"import" in text
    assert corpus.num_tokens > 3_000_000


def test_token_ids_from_npy_and_bin(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    np.array([7, 0, 8, 9, 0], np.uint16).tofile(tmp_path / "stream.bin")
    corpus = load_corpus(
        [tmp_path / "rows.npy", tmp_path / "stream.bin"], vocab_size=10, end_of_document=0
    )
    assert [d.tolist() for d in corpus] == [[1, 2, 3], [4, 5, 6], [7, 0], [8, 9, 0]]
    assert corpus.vocab_size == 10


@pytest.mark.parametrize(
    ("files", "vocab_size", "message"),
    [
        ({}, None, "no file or directory"),
        ({"a.txt": b""}, None, "`data` is empty"),
        ({"a.npy": np.array([1, 2])}, None, "`vocab_size` must be given"),
        ({"a.npy": np.array([1, 12])}, 10, r"\[0, 10\).*got 1 … 12"),
        ({"a.npy": np.array([-1, 2])}, 10, "got -1 … 2"),
        ({"a.npy": np.array([0.5])}, 10, "integer token ids.*float64"),
        ({"a.npy": np.zeros((1, 1, 1), int)}, 10, r"\(1, 1, 1\)"),
        ({"a.npy": np.array([{}], dtype=object)}, 10, "not a readable"),
        ({"a.npy": b"nonsense"}, 10, "not a readable"),
        ({"a.npy": b"PK\3\4 and so on"}, 10, "not a readable"),
        ({"a.npy": np.array([1, 2]), "b.txt": b"text"}, 10, "not both"),
        ({"a.txt": b"text"}, 10, "`vocab_size` and `end_of_document` are for token ids"),
    ],
)
def test_bad_data_is_named(
    tmp_path: Path, files: dict[str, Any], vocab_size: int | None, message: str
) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            np.save(tmp_path / name, content, allow_pickle=True)
    paths = [tmp_path / name for name in files] or [tmp_path / "missing"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_corpus(paths, vocab_size=vocab_size)


def test_bad_token_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"odd\.bin must hold uint16.*odd size"):
        load_corpus([tmp_path / "odd.bin"], vocab_size=10)
    np.save(tmp_path / "a.npy", np.arange(9))
    with pytest.raises(ValueError, match=r"`end_of_document` must lie in \[0, 10\)"):
        load_corpus([tmp_path / "a.npy"], vocab_size=10, end_of_document=10)


def test_documents_too_short_for_the_depths_are_said() -> None:
    """A wrong dtype looks like that: every other id is 0, and may end a document."""
    corpus = Corpus.of_documents([np.zeros(n, np.int32) for n in (4, 3, 3, 20)], 1)
    held_out = Corpus.of_documents([np.zeros(4, np.int32)], 1)
    first, *note = describe_corpus(corpus, held_out, depths=2).splitlines()
    assert first == "30 tokens in 4 document(s), 4 of them held out"
    assert note[0].startswith("note: 50% of the documents have no target at depth 2: they")
    assert "note" not in describe_corpus(corpus, held_out, depths=1)


def test_split_holds_documents_out() -> None:
    documents = [np.full(4, i, np.int32) for i in range(40)]
    train_part, held_out = Corpus.of_documents(documents, 40).split(seed=1)
    ids = [[int(d[0]) for d in part] for part in (train_part, held_out)]
    assert sorted(ids[0] + ids[1]) == list(range(40))
    assert len(ids[1]) == 2
    one = np.arange(100, dtype=np.int32)
    train_part, held_out = Corpus.of_documents([one], 100).split(seed=1)
    assert train_part[0].tolist() == list(range(95))
    assert held_out[0].tolist() == list(range(95, 100))
    with pytest.raises(ValueError, match="too short"):
        Corpus.of_documents([one[:2]], 100).split(seed=1)


def test_rows_hold_every_pair_of_neighbours_once() -> None:
    rng = np.random.default_rng(3)
    lengths = [5, 1, 17, 2, 9]
    documents = [rng.integers(0, 1000, n).astype(np.int32) for n in lengths]
    rows = PackedRows(Corpus.of_documents(documents, 1000), seq_len=8)
    batch = rows.read(np.arange(len(rows)))
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segment_ids)
    expected = [(a, b) for d in documents for a, b in itertools.pairwise(d)]
    found = []
    for row, segment in zip(tokens, segments, strict=True):
        for i in range(8):
            if segment[i] == segment[i + 1] != 0:
                found.append((row[i], row[i + 1]))
    assert found == expected
    positions = emtp.make_batch(batch.tokens, segment_ids=batch.segment_ids).position_ids
    for segment, position in zip(segments, np.asarray(positions), strict=True):
        count = 0
        for i in range(8):
            count = count + 1 if i and segment[i] == segment[i - 1] else 0
            if segment[i]:
                assert position[i] == count
    assert segments.max() > 1
    assert segments[-1, -1] == 0


def test_training_batches_shuffle_every_epoch() -> None:
    rows = PackedRows(Corpus.of_documents([np.arange(81, dtype=np.int32)], 81), seq_len=8)
    firsts = [
        int(t) for step in range(5) for t in rows.read(rows.of_step(step, 4, seed=7)).tokens[:, 0]
    ]
    every_row = list(range(0, 80, 8))
    assert sorted(firsts[:10]) == sorted(firsts[10:20]) == every_row
    assert firsts[:10] != firsts[10:20]
    again = rows.read(rows.of_step(2, 4, seed=7))
    assert np.asarray(again.tokens[:, 0]).tolist() == firsts[8:12]


def test_evaluation_batches_pad_the_last() -> None:
    rows = PackedRows(Corpus.of_documents([np.arange(41, dtype=np.int32)], 41), seq_len=8)
    batches = [rows.read(indices) for indices in rows.in_order(batch_size=4, max_rows=100)]
    assert [b.tokens.shape for b in batches] == [(4, 9), (4, 9)]
    scored = sum(int(jnp.sum(b.segment_ids[:, 1:] != 0)) for b in batches)
    assert scored == 40


@pytest.mark.parametrize("seq_len", [-3, 0, 1.5, True])
def test_rows_have_positions(seq_len: Any) -> None:
    corpus = Corpus.of_documents([np.arange(9, dtype=np.int32)], 9)
    # Without the tests' import hook, which users do not have.
    init = getattr(PackedRows.__init__, "__wrapped__", PackedRows.__init__)
    with pytest.raises(ValueError, match=r"`seq_len` must be (an integer )?at least 1; got"):
        init(object.__new__(PackedRows), corpus, seq_len)


# --- options


def with_options(**options: Any) -> TrainConfig:
    """As users have it: the tests' import hook would find some types before the class does."""
    config = object.__new__(TrainConfig)
    for name, value in {**dataclasses.asdict(TINY), **options}.items():
        object.__setattr__(config, name, value)
    config.__post_init__()
    return config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "`steps` must be at least 1; got 0"),
        ("steps", 1.5, "`steps` must be an integer at least 1; got 1.5"),
        ("steps", True, "`steps` must be an integer at least 1; got True"),
        ("steps", 2**31, "`steps` must be at most 2147483647; got 2147483648"),
        ("steps", None, "`steps` must be an integer at least 1; got None"),
        ("steps", "6", "`steps` must be an integer at least 1; got '6'"),
        ("depths", -1, "`depths` must be at least 0; got -1"),
        ("embed_size", 0, "`embed_size`"),
        ("num_layers", 0, "`num_layers`"),
        ("num_kv_heads", -2, "`num_kv_heads`"),
        ("vocab_size", 0, "`vocab_size`"),
        ("end_of_document", -1, "`end_of_document`"),
        ("seed", -1, "`seed` must be at least 0; got -1"),
        ("seed", 2**32, "`seed` must be at most 4294967295; got 4294967296"),
        ("seed", 2**70, "`seed`"),
        ("seq_len", 2, "`seq_len` must be more than `depths`"),
        ("accumulate", 3, "`accumulate` must divide `batch_size`"),
        ("learning_rate", 0.0, "`learning_rate` must be at least 1.17549e-38; got 0"),
        ("learning_rate", float("inf"), "`learning_rate` must be finite"),
        ("learning_rate", 1e39, "`learning_rate` must be at most 3.4"),
        ("learning_rate", 1e-46, "`learning_rate` must be at least 1.17549e-38"),
        ("weight_decay", float("nan"), "`weight_decay` must be finite"),
        ("weight_decay", -0.1, "`weight_decay` must be at least 0; got -0.1"),
        ("max_grad_norm", float("nan"), "`max_grad_norm`"),
        ("dropout_rate", 1.5, "`dropout_rate` must be at most 1; got 1.5"),
        ("mtp_scaling", (0.3, float("nan")), "`mtp_scaling` must be finite"),
        ("mtp_scaling", (0.3, -1.0), "`mtp_scaling` must be at least 0"),
        ("mtp_scaling", 0.3, "`mtp_scaling` must be a pair of numbers"),
        ("mtp_scaling_switch", 1.5, "`mtp_scaling_switch`"),
        ("dtype", "int8", "`dtype` must be 'float32' or 'bfloat16'; got 'int8'"),
        ("preset", "my own", "`preset` must be 'paper' or "),
        ("resume", 1, "`resume` must be True or False; got 1"),
        ("data", "tokens.npy", "`data` must be a tuple of `pathlib.Path`s; got 'tokens.npy'"),
        ("out", "", "`out` must be a `pathlib.Path`, or `None`; got ''"),
        ("steps", "6" * 1000, "`steps`"),
    ],
)
def test_bad_options_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        with_options(**{field: value})
    assert len(str(caught.value)) < 400


def test_every_numeric_option_has_a_range() -> None:
    """Each refuses NaN, infinity, booleans and text; an option that is forgotten would not."""
    numeric = [
        field.name
        for field in dataclasses.fields(TrainConfig)
        if re.search("int|float", str(field.type)) and "tuple" not in str(field.type)
    ]
    assert len(numeric) == 34
    for name in numeric:
        for value in (float("nan"), float("inf"), -float("inf"), -1, True, "1", 2**200):
            with pytest.raises(ValueError, match=f"`{name}` must be "):
                with_options(**{name: value})


def test_numbers_of_numpy_are_options() -> None:
    config = with_options(steps=np.int64(6), learning_rate=np.float32(0.5))
    assert (type(config.steps), config.steps) == (int, 6)
    assert (type(config.learning_rate), config.learning_rate) == (float, 0.5)
    pair = with_options(mtp_scaling=(np.float32(0.5), 0)).mtp_scaling
    assert [(type(x), x) for x in pair] == [(float, 0.5), (float, 0.0)]


def test_processes_are_counted_from_zero() -> None:
    options = {"distributed": True, "coordinator": "a:1", "num_processes": 2}
    assert TrainConfig(process_id=1, **options).process_id == 1
    with pytest.raises(ValueError, match="`process_id` must be less than `num_processes`"):
        TrainConfig(process_id=2, **options)


# --- the step


@pytest.mark.slow
def test_accumulation_is_exact(text: Path) -> None:
    corpus = load_corpus([text])
    rows = PackedRows(corpus, TINY.seq_len)
    batch = rows.read(np.array([0, 3, len(rows) - 1, 5]))  # the last row is mostly padding
    params = []
    for accumulate in (1, 4):
        config = dataclasses.replace(TINY, accumulate=accumulate)
        optimizer = make_optimizer(config)
        state = make_state(config, corpus.vocab_size, optimizer)
        split = jax.tree.map(lambda x, n=accumulate: x.reshape(n, -1, x.shape[1]), batch)
        inputs = StepInputs(split, config, optimizer, ONE_DEVICE)
        state, _ = train_step(inputs, state)
        state, metrics = train_step(inputs, state)
        params.append((eqx.filter(state.model, eqx.is_array), metrics))
    for other in params[1:]:
        # AdamW divides small gradients by their own size: rounding shows up enlarged.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), params[0], other
        )


def test_runs_in_other_folders_share_a_compiled_step(text: Path, tmp_path: Path) -> None:
    """It is compiled for what of its inputs is no array."""

    def compiled_for(**changes: Any) -> Any:
        run = prepare(dataclasses.replace(TINY, data=(text,), **changes))
        return eqx.filter(step_inputs(run, 1, None), eqx.is_array, inverse=True)

    here = compiled_for(out=tmp_path / "here")
    assert here == compiled_for(out=tmp_path / "there", resume=True, checkpoint_every=1)
    assert here != compiled_for(out=tmp_path / "here", learning_rate=0.5)
    there = dataclasses.replace(TINY, out=tmp_path, resume=True, checkpoint_every=1)
    assert without_output(there) == without_output(TINY)
    assert make_optimizer(there) == make_optimizer(TINY)
    for change in ({"learning_rate": 0.5}, {"steps": 7}, {"seed": 1}):
        other = dataclasses.replace(TINY, **change)
        assert without_output(other) != without_output(TINY)
    assert make_optimizer(dataclasses.replace(TINY, learning_rate=0.5)) != make_optimizer(TINY)


# --- the loop


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig]:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 5, 2000) % rng.integers(1, 5, 2000)
    np.save(folder / "tokens.npy", stream)
    config = dataclasses.replace(
        TINY,
        data=(folder / "tokens.npy",),
        vocab_size=8,
        end_of_document=3,
        out=folder / "whole",
        dropout_rate=0.1,
    )
    return train(config), config


def test_run_writes_what_it_promises(run: tuple[Path, TrainConfig]) -> None:
    out, config = run
    assert [r["step"] for r in records(out, "train")] == [1, 2, 3, 4, 5, 6]
    assert [r["scaling_factor"] for r in records(out, "train")] == pytest.approx(
        [0.3, 0.3, 0.3, 0.3, 0.1, 0.1]
    )
    held_out = records(out, "held_out")
    assert [r["step"] for r in held_out] == [3, 6]
    joint = held_out[-1]["joint_acceptance"]
    assert held_out[-1]["expected_accepted_length"] == pytest.approx(1 + sum(joint), abs=1e-6)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step_00000004", "step_00000006"]
    assert load_info(last_checkpoint(out / "checkpoints")).config == config


def test_resumed_run_has_the_same_losses(
    run: tuple[Path, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = run
    config = dataclasses.replace(config, out=tmp_path / "resumed")
    real_step = train_module.train_step

    def die_at_step_6(inputs: Any, state: Any) -> Any:
        if int(state.step) == 5:
            raise RuntimeError("power cut")
        return real_step(inputs, state)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "train_step", die_at_step_6)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    assert len(losses(tmp_path / "resumed")) == 5
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as stream:
        stream.write('{"split": "tra')  # a line cut short by the power cut
    train(dataclasses.replace(config, resume=True))
    assert losses(tmp_path / "resumed") == losses(whole)
    last = [records(out, "held_out")[-1] for out in (tmp_path / "resumed", whole)]
    assert last[0] == last[1]


def test_interrupt_saves_and_stops(
    run: tuple[Path, TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By either signal, of which the second meets a run that goes on after the first."""
    whole, config = run
    out = tmp_path / "interrupted"
    config = dataclasses.replace(config, out=out)
    real_step = train_module.train_step
    for step, number in ((3, signal.SIGINT), (5, signal.SIGTERM)):

        def interrupt(inputs: Any, state: Any, step: int = step, number: int = number) -> Any:
            if int(state.step) == step - 1:
                signal.raise_signal(number)
            return real_step(inputs, state)

        with monkeypatch.context() as patched:
            patched.setattr(train_module, "train_step", interrupt)
            with pytest.raises(Interrupted):
                train(config)
        assert f"interrupted at step {step}; continue with --resume" in capsys.readouterr().out
        assert last_checkpoint(out / "checkpoints").name == f"step_{step:08d}"
        config = dataclasses.replace(config, resume=True)
    train(config)
    assert losses(out) == losses(whole)


def test_finished_run_resumes_to_its_summary(
    run: tuple[Path, TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = run
    before = losses(out)
    train(dataclasses.replace(config, resume=True))
    assert "expected accepted length" in capsys.readouterr().out
    assert losses(out) == before


def test_data_may_move(run: tuple[Path, TrainConfig], tmp_path: Path) -> None:
    """A run knows its data by the tokens, not by the path."""
    out, config = run
    elsewhere = tmp_path / "moved.npy"
    elsewhere.write_bytes(config.data[0].read_bytes())
    assert train(dataclasses.replace(config, resume=True, data=(elsewhere,))) == out


def test_resume_refuses_another_run(run: tuple[Path, TrainConfig], tmp_path: Path) -> None:
    out, config = run
    with pytest.raises(FileExistsError, match=r"`out`.*holds a run already"):
        train(config)
    resumed = dataclasses.replace(config, resume=True)
    with pytest.raises(ValueError, match=r"`learning_rate` was 0\.004"):
        train(dataclasses.replace(resumed, learning_rate=1.0))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(dataclasses.replace(resumed, out=tmp_path))
    tokens = config.data[0]
    stream = np.load(tokens)
    try:
        np.save(tokens, stream[::-1])
        with pytest.raises(ValueError, match="`data` is not what the run"):
            train(resumed)
    finally:
        np.save(tokens, stream)
    assert (out / "metrics.jsonl").exists()


def test_loss_that_is_not_finite_stops_the_run(
    run: tuple[Path, TrainConfig], tmp_path: Path
) -> None:
    config = dataclasses.replace(
        run[1], out=tmp_path / "hot", learning_rate=1e30, warmup_steps=0, checkpoint_every=1
    )
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        train(config)
    state = last_checkpoint(tmp_path / "hot" / "checkpoints")
    assert state.name == "step_00000001"


def test_parameters_that_are_not_finite_are_not_saved(
    run: tuple[Path, TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also those of an id that no text has, which no loss shows."""
    config = dataclasses.replace(run[1], out=tmp_path / "run", eval_every=100)
    real_step = train_module.train_step

    def spoil_step_4(inputs: Any, state: Any) -> Any:
        state, metrics = real_step(inputs, state)
        if int(state.step) == 4:
            spoilt = state.model.decoder.embedding.at[7].set(jnp.nan)
            state = eqx.tree_at(lambda s: s.model.decoder.embedding, state, spoilt)
        return state, metrics

    monkeypatch.setattr(train_module, "train_step", spoil_step_4)
    # As the command does.
    monkeypatch.setattr("equinox_mtp.training._commands.train", lambda _: train(config))
    assert main(["train"]) == 1
    assert "1 array(s) of the state are not finite after step 4" in capsys.readouterr().err
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]


def test_evaluations_that_are_not_finite_stop_the_run(
    run: tuple[Path, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(run[1], out=tmp_path / "run")
    real_evaluate = train_module.evaluate

    def spoilt(*arguments: Any) -> Any:
        return eqx.tree_at(lambda e: e.mtp.losses, real_evaluate(*arguments), jnp.full(2, jnp.inf))

    monkeypatch.setattr(train_module, "evaluate", spoilt)
    with pytest.raises(FloatingPointError, match="held-out text is not finite after step 3"):
        train(config)
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]
    assert records(tmp_path / "run", "held_out") == []


def test_a_second_run_in_a_folder_is_refused(
    run: tuple[Path, TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = run
    before = losses(out)
    with only_run(out):
        assert main(["train", "--resume", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: `out`: a run is going on in {out}, by process {os.getpid()} on "
    )
    assert said.count("\n") == 1
    assert losses(out) == before
    with only_run(tmp_path / "new"), pytest.raises(BlockingIOError, match="a run is going on in"):
        train(dataclasses.replace(config, out=tmp_path / "new"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    train(dataclasses.replace(config, resume=True))


HOLDING = """
import sys, time
from pathlib import Path
from equinox_mtp.training._lock import only_run
with only_run(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(100)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with (
            pytest.raises(BlockingIOError, match=f"by process {process.pid} on"),
            only_run(tmp_path),
        ):
            pass
        process.kill()
    with only_run(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


GOOD = {"split": "train", "step": 1, "main_loss": 1.5, "mtp_losses": [1.5, 2.5]}


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"",
        b"\x93NUMPY\xff\x00",
        b"[1]",
        b"3",
        b"null",
        b"[" * 100_000,
        json.dumps({**GOOD, "step": "1"}).encode(),
        json.dumps({**GOOD, "split": "other"}).encode(),
        json.dumps({**GOOD, "split": [1]}).encode(),
        json.dumps({**GOOD, "main_loss": None}).encode(),
        json.dumps({**GOOD, "mtp_losses": [1.5]}).encode(),
        json.dumps({**GOOD, "mtp_losses": [1.5, "2"]}).encode(),
        json.dumps({**GOOD, "split": "held_out"}).encode(),
        json.dumps({"split": "train", "step": 1}).encode(),
    ],
)
def test_damaged_metrics_are_set_aside(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good = tmp_path / "metrics.jsonl", json.dumps(GOOD).encode()
    damaged = good + b"\n" + line + b"\n" + good + b"\n" + b'{"split'
    path.write_bytes(damaged)
    metrics = MetricsFile(path, last_step=1, depths=2)
    metrics.close()
    assert metrics.records == [GOOD, GOOD]
    assert path.read_bytes() == good + b"\n" + good + b"\n"
    assert (tmp_path / "damaged-metrics.jsonl").read_bytes() == damaged
    assert "note: 1 line(s) of" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n\x80" * 99, b"[1]\n3\n"])
def test_a_run_whose_metrics_are_lost_resumes(
    content: bytes, run: tuple[Path, TrainConfig], tmp_path: Path
) -> None:
    whole, _ = run
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "metrics.jsonl").write_bytes(content)
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert records(out, "held_out") == records(whole, "held_out")[-1:]


# --- the command line


def test_command_line_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "usage: python -m equinox_mtp COMMAND" in capsys.readouterr().out
    assert main(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err
    assert main(["train", "--data", str(tmp_path / "nowhere")]) == 1
    assert "error: `data`: there is no file or directory" in capsys.readouterr().err
    assert main(["train", "--seq-len", "1"]) == 1
    assert "error: `seq_len` must be more than `depths`" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("equinox-mtp")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume"]) == 1
    assert "`resume`: no run under runs/ has a checkpoint" in capsys.readouterr().err


def test_help_lists_common_options_first_and_then_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["train", "--help"])
    assert exit_status.value.code == 0
    printed = capsys.readouterr().out
    titles = re.findall(r"^\W*([\w-]+) options\b", printed, flags=re.MULTILINE)
    assert titles == ["common", *(group.replace(" ", "-") for group in GROUPS)]
    common = printed[printed.index("common options") : printed.index("data options")]
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)}
    named = re.findall(r"^\W* --([\w-]+)", common, flags=re.MULTILINE)
    assert len(fields & set(named)) == 12
    assert {"data", "out", "resume", "steps", "depths"} <= set(named)
    assert fields <= set(re.findall(r"--([\w-]+)", printed))


def test_options_of_a_run_are_read_back(
    run: tuple[Path, TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = run
    for path in (folder, folder / "config.json"):
        found = read_options(path, TrainConfig())
        assert found == dataclasses.replace(config, out=None, resume=False)
    # The command line has the last word, here by an option that does not fit the others.
    assert main(["train", "--config", str(folder), "--seq-len", "1"]) == 1
    assert "`seq_len` must be more than `depths`" in capsys.readouterr().err
    for content, message in (
        ("[1]", "is no JSON object"),
        ("{", "is no JSON object"),
        ("[" * 100_000, "is no JSON object"),
        ('{"stepz": 3}', "has options that do not exist: stepz"),
        ('{"steps": 0}', "`steps` must be at least 1"),
    ):
        (tmp_path / "c.json").write_text(content)
        assert main(["train", "--config", str(tmp_path / "c.json")]) == 1
        assert message in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path)]) == 1
    assert "`config`: there is no file" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--out", ""], ["--out="], ["--data", ""], ["--mesh="]])
def test_an_empty_option_is_not_the_current_folder(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = options[0].strip("-=")
    assert main(["train", "--steps", "3", *options]) == 1
    assert f"error: `{name}` must not be empty." in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--help"], ["train", "--help"]])
def test_a_closed_pipe_is_no_error(options: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "equinox_mtp", *options],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE)


WITHOUT_ROOM = """
import resource, sys
from equinox_mtp.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line(run: tuple[Path, TrainConfig], tmp_path: Path) -> None:
    options = ["--data", str(run[1].data[0]), "--vocab-size", "8", "--out", str(tmp_path)]
    options += ["--embed-size", "64", "--num-layers", "1", "--seq-len", "16", "--steps", "3"]
    options += ["--checkpoint-every", "1", "--compare-prompts", "0", "--eval-rows", "4"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM, "train", *options],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]
    assert len(said) == 1, done.stderr
    assert "error: a checkpoint could not be written to " in done.stderr
    assert len(said[0]) <= 400 + len(str(tmp_path))


@pytest.mark.slow
def test_a_failed_write_that_nobody_waits_for_says_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    quiet = """
import asyncio, gc
from equinox_mtp.training._quiet import quiet_failed_saves
quiet_failed_saves()
loop = asyncio.new_event_loop()
loop.create_future().set_exception(ValueError("OUT_OF_RANGE: Failed to write"))
gc.collect()
loop.close()
"""
    subprocess.run([sys.executable, "-c", quiet], check=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["tyro", "tqdm", "matplotlib"])
def test_missing_extra_is_named(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.startswith(("equinox_mtp.training", f"{name}."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train"]) == 1
    assert "pip install -e '.[train]'" in capsys.readouterr().err


def test_bad_model_leaves_no_folder(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", str(text), "--num-heads", "3"]) == 1
    assert "`num_heads` must divide `embed_size`" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_options_to_resume_default_to_those_of_the_run(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 3 divides the 12 rows of this run's batches, and not the 8 of a default run's.
    config = dataclasses.replace(TINY, data=(text,), batch_size=12)
    save_checkpoint(
        tmp_path / "checkpoints", {"w": jnp.zeros(1)}, CheckpointInfo(1, 257, "hash", config)
    )
    assert main(["train", "--resume", "--out", str(tmp_path), "--accumulate", "3"]) == 1
    assert "`accumulate` was 1 in the run to resume, and is 3 now" in capsys.readouterr().err


def test_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare_module.newest_run_folder() is None
    assert prepare_module.new_run_folder() == Path("runs/0001")
    (tmp_path / "runs" / "0009").mkdir(parents=True)
    assert prepare_module.new_run_folder() == Path("runs/0010")
    info = CheckpointInfo(1, 257, "hash", TINY)
    save_checkpoint(tmp_path / "runs" / "0003" / "checkpoints", {"w": jnp.zeros(1)}, info)
    assert prepare_module.newest_run_folder(with_checkpoint=True) == Path("runs/0003")


@pytest.mark.parametrize(
    ("switch", "steps", "step"), [(0.29, 100, 29), (0.5, 5, 2), (0.67, 300, 201)]
)
def test_the_step_of_the_second_scaling_factor(switch: float, steps: int, step: int) -> None:
    config = TrainConfig(mtp_scaling_switch=switch, steps=steps)
    assert scaling_switch_step(config) == step


def test_rows_longer_than_the_text_are_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["--data", str(text), "--seq-len", "1000000", "--out", str(out)]
    assert main(["train", *options]) == 1
    assert "`seq_len` must be at most the " in capsys.readouterr().err
    assert not out.exists()


def test_too_little_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(config: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr("equinox_mtp.training._commands.train", exhausted)
    assert main(["train"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is not enough memory for a step. Lower --seq-len")
    assert error.count("\n") == 1
