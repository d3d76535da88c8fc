"""Checkpoints: what is kept, what damage does, and reading them on other devices."""

import dataclasses
import json
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from equinox_mtp.sharding import make_mesh
from equinox_mtp.training import CheckpointInfo, TrainConfig, _checkpoint, _checkpoint_files
from equinox_mtp.training._checkpoint import (
    Checkpoints,
    info_of_run,
    load_info,
    load_state,
    save_checkpoint,
)
from equinox_mtp.training._checkpoint_files import (
    checkpoints,
    find_corruption,
    last_checkpoint,
    last_undamaged_checkpoint,
)

STATE = {"w": jnp.arange(300.0), "n": jnp.int32(7), "rate": 0.5}


def info_of(step: int) -> CheckpointInfo:
    config = TrainConfig(data=(Path("a"), Path("b")), out=Path("c"))
    return CheckpointInfo(step, 257, "hash", config)


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_loads(path: Path, state: Any = STATE) -> None:
    loaded = load_state(path, jax.tree.map(lambda x: x * 0, state))
    np.testing.assert_array_equal(loaded["w"], state["w"])
    assert int(loaded["n"]) == int(state["n"])


def test_round_trip_keeps_the_last(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, STATE, info_of(step), keep=2)
    assert names_of(tmp_path) == ["step_00000002", "step_00000003"]
    assert checkpoints(tmp_path) == [tmp_path / "step_00000002", tmp_path / "step_00000003"]
    newest = last_checkpoint(tmp_path)
    assert load_info(newest) == info_of(3)
    assert_loads(newest)
    # Shapes are enough; what is no array comes from there.
    shapes = {"w": jax.ShapeDtypeStruct((300,), jnp.float32), "n": jnp.int32(0), "rate": 0.25}
    loaded = load_state(newest, shapes)
    assert loaded["rate"] == 0.25
    np.testing.assert_array_equal(loaded["w"], STATE["w"])


def test_the_best_on_held_out_text_stays(tmp_path: Path) -> None:
    writer = Checkpoints(tmp_path, keep=2)
    for step, loss in enumerate((3.0, 2.0, 2.5, None, 2.2, None), start=1):
        writer.save(STATE, info_of(step), held_out_loss=loss)
    writer.close()
    assert names_of(tmp_path) == ["step_00000002", "step_00000005", "step_00000006"]
    # Also if another process goes on.
    writer = Checkpoints(tmp_path, keep=2, last_step=6)
    for step in (7, 8):
        writer.save(STATE, info_of(step), held_out_loss=2.1)
    writer.close()
    assert names_of(tmp_path) == ["step_00000002", "step_00000007", "step_00000008"]


def test_one_checkpoint_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`keep` must be at least 2"):
        Checkpoints(tmp_path, keep=1)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_not_written(value: float, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, STATE, info_of(1))
    for wrong in (
        {**STATE, "w": STATE["w"].at[299].set(value)},
        {**STATE, "v": {"w": jnp.full((2, 2), value, jnp.bfloat16)}},
    ):
        with pytest.raises(
            FloatingPointError, match=r"^1 array\(s\) .* after step 2, such as .*w\."
        ):
            save_checkpoint(tmp_path, wrong, info_of(2))
        assert names_of(tmp_path) == ["step_00000001"]
    assert_loads(last_checkpoint(tmp_path))


def test_saving_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    """The state may be given away at once, and `poll` begins the digests of what is written."""
    writer = Checkpoints(tmp_path)
    state = {"w": jnp.arange(300.0), "n": jnp.int32(7)}
    writer.save(state, info_of(1))
    for x in state.values():
        x.delete()
    deadline = time.monotonic() + 60
    while not checkpoints(tmp_path) and time.monotonic() < deadline:
        writer.poll()
    assert_loads(tmp_path / "step_00000001")
    writer.close()


def test_digests_are_made_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow_write_digests(checkpoint: Path) -> None:
        assert go_on.wait(timeout=20)
        real_write_digests(checkpoint)

    real_write_digests = _checkpoint.write_digests
    monkeypatch.setattr(_checkpoint, "write_digests", slow_write_digests)
    writer = Checkpoints(tmp_path)
    writer.save(STATE, info_of(1))
    deadline = time.monotonic() + 20
    while not (tmp_path / "step_00000001").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(20):
        writer.poll()
        time.sleep(0.01)
    assert checkpoints(tmp_path) == []
    go_on.set()
    writer.wait()
    assert names_of(tmp_path) == ["step_00000001"]
    # What goes wrong there is said at the next occasion.
    monkeypatch.setattr(
        _checkpoint, "write_digests", lambda checkpoint: (checkpoint / "no" / "no").touch()
    )
    writer.save(STATE, info_of(2))
    with pytest.raises(OSError, match="could not be written"):
        writer.wait()
    writer.close()


# Of a save that fails orbax closes the event loop, while other writes of it are still to end there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, STATE, info_of(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {**STATE, "w": jnp.asarray(np.random.default_rng(0).normal(size=300_000))}
    writer = Checkpoints(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        writer.save(large, info_of(2))
        with pytest.raises(OSError, match=r"could not be written .* make room, and continue with"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.close()
    assert last_checkpoint(tmp_path).name == "step_00000001"
    assert_loads(last_checkpoint(tmp_path))
    # And with room again it goes on.
    save_checkpoint(tmp_path, large, info_of(2))
    assert names_of(tmp_path) == ["step_00000001", "step_00000002"]
    assert_loads(tmp_path / "step_00000002", large)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("which", ["largest", "digests.json", "info/metadata"])
def test_a_damaged_checkpoint_is_refused(which: str, harm: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, STATE, info_of(step))
    path = last_checkpoint(tmp_path)
    files = [file for file in path.rglob("*") if file.is_file()]
    largest = max((f for f in files if "state" in f.parts), key=lambda file: file.stat().st_size)
    harm(largest if which == "largest" else path / which)
    if which == "digests.json" and harm is Path.unlink:
        # As if the process had been killed before it could say that all was written.
        assert last_checkpoint(tmp_path).name == "step_00000001"
    with pytest.raises(ValueError, match=r"step_00000002 is damaged: .*Delete this folder"):
        load_state(path, STATE)
    assert info_of_run(tmp_path).step == (2 if which == "largest" else 1)
    if which == "largest":
        # Several processes read a share of the files each; one of them finds it.
        found = [find_corruption(path, process=process, num_processes=3) for process in range(3)]
        assert sum(problem is not None for problem in found) == 1
        assert find_corruption(path, part="info") is None
    chosen, problems = last_undamaged_checkpoint(tmp_path)
    assert chosen.name == "step_00000001"
    assert len(problems) == (0 if which == "digests.json" and harm is Path.unlink else 1)
    assert_loads(chosen)
    flip(tmp_path / "step_00000001" / "info" / "metadata")
    with pytest.raises((ValueError, FileNotFoundError), match="There is no other"):
        last_undamaged_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "0", "null", "{", "[" * 100_000])
def test_digests_that_are_none(content: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, STATE, info_of(step))
    (tmp_path / "step_00000002" / "digests.json").write_text(content)
    chosen, problems = last_undamaged_checkpoint(tmp_path)
    assert chosen.name == "step_00000001"
    assert "its digests cannot be read" in problems[0]


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, STATE, info_of(step))
    real_digest = _checkpoint_files._digest

    def failing(path: Path) -> str:
        if "step_00000002" in str(path):
            raise OSError(5, "Input/output error")
        return real_digest(path)

    monkeypatch.setattr(_checkpoint_files, "_digest", failing)
    chosen, problems = last_undamaged_checkpoint(tmp_path)
    assert chosen.name == "step_00000001"
    assert "cannot be read: [Errno 5]" in problems[0]


@pytest.mark.parametrize("part", ["info", "state"])
def test_a_checkpoint_that_lacks_a_folder(part: str, tmp_path: Path) -> None:
    """It is named, set aside, and the run may come there again."""
    for step in (1, 2):
        save_checkpoint(tmp_path, STATE, info_of(step))
    shutil.rmtree(tmp_path / "step_00000002" / part)
    chosen, problems = last_undamaged_checkpoint(tmp_path)
    assert chosen.name == "step_00000001"
    assert f"step_00000002 is damaged: {part}/" in problems[0]
    writer = Checkpoints(tmp_path, last_step=1)
    writer.save(STATE, info_of(2))
    writer.close()
    assert_loads(tmp_path / "step_00000002")
    assert (tmp_path / "damaged-step_00000002").is_dir()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, STATE, info_of(1))
    for other in ({**STATE, "w": jnp.zeros(299)}, {**STATE, "v": jnp.zeros(1)}):
        with pytest.raises(ValueError, match=r"does not fit its configuration: [wv] differ"):
            load_state(path, other)


def test_a_configuration_of_another_version_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, STATE, info_of(1))
    metadata = path / "info" / "metadata"
    stored = json.loads(metadata.read_text())
    others: list[Any] = [{**stored, "unheard_of": 1}, "text", 3, [], {**stored, "config": 3}]
    others += [{**stored, "config": {**stored["config"], "steps": "6"}}]
    for damaged in ("{", "[" * 100_000, *map(json.dumps, others)):
        metadata.write_text(damaged)
        with pytest.raises(ValueError, match="is damaged, or of another version") as caught:
            load_info(path)
        assert len(str(caught.value)) < 400 + len(str(path))


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, STATE, info_of(1))
    (path / "digests.json").unlink()
    (tmp_path / "step_00000002.orbax-checkpoint-tmp-0").mkdir()
    save_checkpoint(tmp_path, STATE, info_of(3))
    assert names_of(tmp_path) == ["step_00000003"]


def test_no_checkpoint(tmp_path: Path) -> None:
    for find in (last_checkpoint, last_undamaged_checkpoint, info_of_run):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            find(tmp_path)


class Layer(eqx.Module):
    kernel: jax.Array
    size: int = 3


def test_reading_on_another_mesh(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    rows = NamedSharding(make_mesh({"data": 8}), P("data"))
    state = {"layers": [Layer(jax.device_put(values, rows))]}
    path = save_checkpoint(tmp_path, state, info_of(1))
    mesh = make_mesh({"data": 2, "tensor": 4})
    for sharding in (NamedSharding(mesh, P("data", "tensor")), rows, None):
        like = {"layers": [Layer(jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding))]}  # type: ignore[arg-type]
        loaded: Any = load_state(path, like)["layers"][0]
        np.testing.assert_array_equal(loaded.kernel, values)
        assert loaded.size == 3
        if sharding is None:
            assert loaded.kernel.sharding.device_set == {jax.devices()[0]}
        else:
            assert loaded.kernel.sharding == sharding


def test_every_option_survives(tmp_path: Path) -> None:
    config = TrainConfig(data=(Path("x"),), out=None, mtp_scaling=(0.5, 0.25), depths=1)
    info = dataclasses.replace(info_of(4), config=config)
    assert load_info(save_checkpoint(tmp_path, STATE, info)) == info
