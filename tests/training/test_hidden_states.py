"""A frozen main model's hidden states, kept on disk by row."""

import collections
import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import checkpoints as released
import equinox as eqx
import jax
import numpy as np
import pytest
from helpers import assert_close, assert_equal

from equinox_mtp.training import (
    Interrupted,
    TrainConfig,
    _hidden_states,
    _train as train_module,
    load_model,
    train,
)
from equinox_mtp.training._config import options
from equinox_mtp.training._hidden_states import HiddenStateCache, HiddenStateLayout

FOLDER = released.FOLDER / "qwen3"
ROWS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Three epochs, of which the second begins within a step."""
    root = tmp_path_factory.mktemp("hidden")
    tokens = np.random.default_rng(0).integers(1, 320, ROWS * 24 + 10)
    tokens[::17] = 0
    np.save(root / "tokens.npy", tokens)
    return TrainConfig(
        data=(root / "tokens.npy",),
        vocab_size=320,
        end_of_document=0,
        model=FOLDER,
        freeze_model=True,
        cache_hidden_states=True,
        objective="total_variation",
        depths=2,
        preset="fast_mtp",
        steps=8,
        warmup_steps=1,
        batch_size=3,
        seq_len=24,
        eval_rows=2,
        eval_every=100,
        checkpoint_every=2,
        compare_prompts=0,
        out=root / "run",
    )


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> Path:
    return train(config)


@pytest.fixture
def num_runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the main model has run for the cache."""
    counts = collections.Counter()
    real = _hidden_states.run_main_model

    def counting(*arguments: Any) -> Any:
        counts["main model"] += 1
        return real(*arguments)

    monkeypatch.setattr(_hidden_states, "run_main_model", counting)
    return counts


def arrays(tree: Any) -> list[Any]:
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def losses(out: Path) -> list[list[float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["mtp_losses"] for record in lines if record["split"] == "train"]


def assert_same_run(one: Path, other: Path) -> None:
    """To the bit."""
    assert losses(one) == losses(other)
    for x, y in zip(arrays(load_model(one)[0]), arrays(load_model(other)[0]), strict=True):
        assert_equal(x, y)


def layout(**changes: Any) -> HiddenStateLayout:
    values: dict[str, Any] = {
        "model": "a",
        "data": "b",
        "seed": 0,
        "num_rows": 5,
        "seq_len": 3,
        "embed_size": 2,
        "dtype": "float32",
    }
    return HiddenStateLayout(**(values | changes))


# --- the run


def test_rows_are_as_many_as_the_tests_think(run: Path) -> None:
    info = json.loads((run / "hidden_states" / "info.json").read_text())
    assert info["num_rows"] == ROWS
    present = np.fromfile(run / "hidden_states" / "present.bin", np.uint8)
    assert present.tolist() == [1] * ROWS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "accumulate", "num_microbatches"),
    [("total_variation", 1, 3), ("cross_entropy", 3, ROWS)],
)
def test_the_same_run_as_without(
    objective: Any,
    accumulate: int,
    num_microbatches: int,
    config: TrainConfig,
    tmp_path: Path,
    num_runs: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the main model runs in the first epoch alone, once for each row."""
    config = dataclasses.replace(config, objective=objective, accumulate=accumulate)
    kept = train(dataclasses.replace(config, out=tmp_path / "kept"))
    assert num_runs["main model"] == num_microbatches
    assert (
        "hidden states of the main model: 49.2 kB (8 rows x 24 positions x 64 features x 4 bytes), "
        "written in the first of 3 epoch(s)\n"
    ) in capsys.readouterr().out
    plain = train(dataclasses.replace(config, out=tmp_path / "plain", cache_hidden_states=False))
    assert not (plain / "hidden_states").exists()
    assert_close(losses(kept), losses(plain), rtol=1e-6)
    for x, y in zip(arrays(load_model(kept)[0]), arrays(load_model(plain)[0]), strict=True):
        # Adam divides small gradients by their own size: rounding shows up enlarged.
        assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on(
    run: Path,
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_runs: dict[str, int],
) -> None:
    """From its last checkpoint, with the rows that were there at that time."""
    config = dataclasses.replace(config, out=tmp_path / "run")
    real_step = train_module.train_step

    def die(inputs: Any, state: Any) -> Any:
        if int(state.step) == 2:
            raise RuntimeError("power cut")
        return real_step(inputs, state)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "train_step", die)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    present = np.fromfile(tmp_path / "run" / "hidden_states" / "present.bin", np.uint8)
    assert present.sum() == 6
    num_runs.clear()
    train(dataclasses.replace(config, resume=True))
    assert num_runs["main model"] == 1
    assert_same_run(tmp_path / "run", run)


def test_an_interrupted_run_goes_on(
    run: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch; without the cache from there on if that is said."""
    config = dataclasses.replace(config, out=tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(train_module, "interruptible", lambda: _Stopping(after=5))
        with pytest.raises(Interrupted):
            train(config)
    train(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "run", run)
    assert options()["cache_hidden_states"].may_change


class _Stopping:
    def __init__(self, after: int):
        self.after = after

    def __enter__(self) -> Any:
        return lambda step: step == self.after

    def __exit__(self, *_: Any) -> None:
        pass


def test_too_little_room(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 40_000))
    with pytest.raises(OSError, match="`cache_hidden_states` needs") as caught:
        train(dataclasses.replace(config, out=tmp_path / "new" / "run"))
    assert str(caught.value) == (
        "`cache_hidden_states` needs 49.2 kB (8 rows x 24 positions x 64 features x 4 bytes) in "
        f"{tmp_path}/new/run/hidden_states; the disk has room for 40 kB. Make room, choose another "
        "folder with --out, or leave it out."
    )
    assert not (tmp_path / "new").exists()


def test_what_is_taken_is_room(config: TrainConfig, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run") / "hidden_states"
    info = json.loads((folder / "info.json").read_text())
    info.pop("format")
    free = shutil.disk_usage(folder).free
    more = dataclasses.replace(HiddenStateLayout(**info), num_rows=free // (24 * 64 * 4) + 1)
    _hidden_states.check_room(folder, more)
    with pytest.raises(OSError, match="`cache_hidden_states` needs"):
        _hidden_states.check_room(folder, dataclasses.replace(more, num_rows=2 * more.num_rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_model": False}, "`cache_hidden_states` keeps what a frozen model makes"),
        ({"mesh": "data=2"}, "`cache_hidden_states` is for one device; got `mesh=data=2`"),
        ({"distributed": True}, "`cache_hidden_states` is for one device"),
    ],
)
def test_bad_options(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


# --- the files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_come_back_to_the_bit(dtype: str, tmp_path: Path) -> None:
    states = np.asarray(jax.random.normal(jax.random.key(0), (3, 3, 2), dtype))
    cache = HiddenStateCache(tmp_path, layout(dtype=dtype))
    rows = np.asarray([4, 0, 2])
    assert not cache.has(rows)
    cache.write(rows, states)
    assert cache.has(rows)
    assert not cache.has(np.asarray([0, 1]))
    assert_equal(cache.read(np.asarray([[0, 0], [4, 2]])), states[[[1, 1], [0, 2]]])
    # Those that are there stay as they are.
    cache.write(np.asarray([0, 1, 2]), np.zeros_like(states))
    assert_equal(cache.read(np.asarray([0, 1])), np.stack([states[1], np.zeros((3, 2), dtype)]))
    cache.flush()
    cache.close()
    again = HiddenStateCache(tmp_path, layout(dtype=dtype))
    assert_equal(again.read(rows), states * np.asarray([1, 1, 1], dtype)[:, None, None])
    assert (tmp_path / "states.bin").stat().st_size == layout(dtype=dtype).num_bytes
    again.close()


def test_flags_follow_what_they_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is not flushed is not there for the next process."""
    cache = HiddenStateCache(tmp_path, layout())
    cache.write(np.asarray([1]), np.ones((1, 3, 2), np.float32))
    cache.flush()
    cache.write(np.asarray([2]), np.ones((1, 3, 2), np.float32))
    order, real_sync = list[str](), os.fsync

    def sync(number: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        real_sync(number)

    other = HiddenStateCache(tmp_path, layout())
    assert [other.has(np.asarray([row])) for row in range(5)] == [False, True, False, False, False]
    other.close()
    if Path("/proc/self/fd").exists():
        monkeypatch.setattr(os, "fsync", sync)
        cache.flush()
        assert order == ["states.bin", "present.bin"]
    cache.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"data": "other"},
        {"seed": 1},
        {"num_rows": 6},
        {"seq_len": 4},
        {"dtype": "bfloat16"},
    ],
)
def test_rows_of_others_are_made_anew(changes: dict[str, Any], tmp_path: Path) -> None:
    cache = HiddenStateCache(tmp_path, layout())
    assert not cache.was_of_others
    cache.write(np.arange(5), np.ones((5, 3, 2), np.float32))
    cache.flush()
    cache.close()
    other = HiddenStateCache(tmp_path, layout(**changes))
    assert other.was_of_others
    assert not any(other.has(np.asarray([row])) for row in range(5))
    other.close()


@pytest.mark.parametrize("name", ["info.json", "present.bin", "states.bin"])
def test_damaged_files_are_made_anew(name: str, tmp_path: Path) -> None:
    cache = HiddenStateCache(tmp_path, layout())
    cache.write(np.arange(5), np.ones((5, 3, 2), np.float32))
    cache.flush()
    cache.close()
    os.truncate(tmp_path / name, 3)
    again = HiddenStateCache(tmp_path, layout())
    assert not again.has(np.asarray([0]))
    assert (tmp_path / "states.bin").stat().st_size == layout().num_bytes
    again.close()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    class Full:
        seek = close = staticmethod(lambda *_: None)

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="`cache_hidden_states`: hidden states cannot be kept in"):
        HiddenStateCache(tmp_path / "file", layout())
    cache = HiddenStateCache(tmp_path, layout())
    real, full = cache._states, Full()
    cache._states = full  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(OSError, match=r"kept in .*: No space left on device\. Make room, or"):
        cache.write(np.asarray([0]), np.ones((1, 3, 2), np.float32))
    assert not cache.has(np.asarray([0]))
    cache._states = real
    os.truncate(tmp_path / "states.bin", 3)
    with pytest.raises(OSError, match=r"states\.bin was cut meanwhile"):
        cache.read(np.asarray([0]))
    cache.close()
