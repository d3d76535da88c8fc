"""Runs on many devices and in several processes, and what becomes of them when one dies."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
import optax
import pytest
from golden import quick_jit
from sharded_step import loss_fn, make_model, make_rows

import equinox_mtp.training._train as train_module
from equinox_mtp.__main__ import main
from equinox_mtp.training import Interrupted, TrainConfig, train
from equinox_mtp.training._checkpoint_files import checkpoints, last_checkpoint
from equinox_mtp.training._lock import only_run
from equinox_mtp.training._placement import parse_mesh

STEPS = 10
CONFIG = TrainConfig(
    vocab_size=8,
    end_of_document=3,
    embed_size=16,
    num_layers=1,
    num_heads=4,
    mlp_size=32,
    steps=STEPS,
    batch_size=8,
    seq_len=16,
    eval_every=3,
    eval_rows=8,
    checkpoint_every=2,
    compare_prompts=0,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.integers(0, 5, 4000) % rng.integers(1, 5, 4000))
    return path


@pytest.fixture(scope="module")
def whole(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one device."""
    return train(dataclasses.replace(CONFIG, data=(tokens,), out=tmp_path_factory.mktemp("one")))


def losses(folder: Path) -> list[list[float]]:
    """Step, and all losses and rates, of every record."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        values = [record["step"], record["main_loss"], *record["mtp_losses"]]
        found.append(values + record.get("joint_acceptance", []))
    return found


def assert_same_losses(folder: Path, expected: Path) -> None:
    found, wanted = losses(folder), losses(expected)
    assert [f[0] for f in found] == [w[0] for w in wanted]
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


# One process


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tokens: Path, whole: Path, tmp_path: Path) -> None:
    """Each step is that on one device, however many microbatches it is split into."""
    config = dataclasses.replace(CONFIG, data=(tokens,), out=tmp_path, accumulate=2)
    config = dataclasses.replace(config, mesh="fsdp=4,tensor=2")
    stop_after(2, config)
    assert last_checkpoint(tmp_path / "checkpoints").name == "step_00000002"
    stop_after(4, dataclasses.replace(config, resume=True, mesh="data=2,context=4"))
    train(dataclasses.replace(config, resume=True, mesh=None))
    assert_same_losses(tmp_path, whole)
    # Another run with these options may be on other devices.
    assert json.loads((tmp_path / "config.json").read_text())["mesh"] is None


def stop_after(step: int, config: TrainConfig) -> None:
    """Runs to a step, as if interrupted there."""
    real_step = train_module.train_step

    def stopping_step(inputs: Any, state: Any) -> Any:
        if int(state.step) == step - 1:
            signal.raise_signal(signal.SIGINT)
        return real_step(inputs, state)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_module, "train_step", stopping_step)
        with pytest.raises(Interrupted):
            train(config)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["state", "info"])
def test_a_run_goes_on_from_before_a_damaged_checkpoint(
    damaged: str, tokens: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(4, dataclasses.replace(CONFIG, data=(tokens,), out=tmp_path))
    newest = last_checkpoint(tmp_path / "checkpoints")
    for file in (newest / damaged).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes().replace(b"e", b"f") + b" ")
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert "step_00000004 is damaged: " in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "damaged-step_00000004").is_dir()
    assert last_checkpoint(tmp_path / "checkpoints").name == f"step_{STEPS:08d}"
    assert_same_losses(tmp_path, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "data"}, "`mesh` must name each axis once with its size"),
        ({"mesh": "data=2,data=4"}, "`mesh` must name each axis once with its size"),
        ({"mesh": "data=3"}, r"`mesh` data=3 does not fit: .*must multiply to the 8 device\(s\)"),
        ({"mesh": "model=8"}, "an axis 'model' that no rule"),
        ({"mesh": "data=8", "batch_size": 12}, "`batch_size` must be a multiple of `accumulate`"),
        ({"mesh": "context=8", "seq_len": 24}, "`seq_len` must be a multiple of twice the 8"),
        ({"mesh": "tensor=8"}, r"kernel` cannot be split by the rule 'heads'"),
    ],
)
def test_meshes_that_do_not_fit(
    options: dict[str, Any], message: str, tokens: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, data=(tokens,), out=tmp_path / "run", **options)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_flags_of_bare_machines_go_together() -> None:
    with pytest.raises(ValueError, match="`process_id` go together, with `distributed`; got num_"):
        TrainConfig(num_processes=2, distributed=True)


def test_parse_mesh() -> None:
    assert parse_mesh("data=2, fsdp=4") == {"data": 2, "fsdp": 4}


# Several processes


def command(tokens: Path, out: Path) -> list[str]:
    options = [sys.executable, "-m", "equinox_mtp", "train"]
    for field in dataclasses.fields(TrainConfig):
        value = getattr(CONFIG, field.name)
        if value != field.default and field.name not in ("data", "out"):
            options += [f"--{field.name.replace('_', '-')}", str(value)]
    return [*options, "--data", str(tokens), "--out", str(out)]


class Processes:
    """Two of a command, with two devices each, on this machine."""

    def __init__(
        self, options: list[str], *, of_last: Sequence[str] = (), path: Path | None = None
    ) -> None:
        count = 2
        # Otherwise those of the tests, and without optimisations where those have them.
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
        flags = flags.replace("optimization_level=2", "optimization_level=0")
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
        if path is not None:
            environment["PYTHONPATH"] = f"{path}:{environment.get('PYTHONPATH', '')}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        bare = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
        own = [[]] * (count - 1) + [[*of_last]]
        self.all = [
            subprocess.Popen(
                [*options, "--distributed", *bare, "--process-id", str(index), *own[index]],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(count)
        ]

    def finish(self, timeout: float = 240) -> list[str]:
        """The output of each, all of which end well."""
        outputs = [process.communicate(timeout=timeout)[0] for process in self.all]
        for process, output in zip(self.all, outputs, strict=True):
            assert process.returncode == 0, output
        return outputs

    def kill(self) -> None:
        for process in self.all:
            process.kill()
            process.communicate()


@pytest.fixture
def started() -> Iterator[list[Processes]]:
    """Whatever is put here is ended with the test."""
    everything: list[Processes] = []
    yield everything
    for processes in everything:
        processes.kill()


# The same in all tests: only the first of them compiles.
MESH_OF_TWO = "fsdp=2,context=2"
# In seconds: the one that is left waits so long for the other, and does not sleep.
HEARTBEAT_TIMEOUT = "5"


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_stop(
    tokens: Path, whole: Path, tmp_path: Path, started: list[Processes]
) -> None:
    """Both save and stop after the same step, and go on.

    Both see the same run, with parameters and rows over both; one of them writes.
    """
    out = tmp_path / "two"
    mesh = ["--mesh", MESH_OF_TWO]
    options = [*command(tokens, out), *mesh]
    started.append(Processes(options))
    first, second = started[-1].all
    wait_for_checkpoint(out, first)
    second.send_signal(signal.SIGINT)  # which is a SIGTERM for all
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [130, 130], "\n".join(outputs)
    stopped = re.search(r"interrupted at step (\d+); continue with --resume", outputs[0])
    assert stopped, outputs[0]
    assert int(stopped[1]) < STEPS
    assert last_checkpoint(out / "checkpoints").name == f"step_{int(stopped[1]):08d}"

    started.append(Processes([*options[:4], "--resume", "--out", str(out), *mesh]))
    outputs = started[-1].finish()
    assert_same_losses(out, whole)
    assert "expected accepted length" in outputs[0]
    assert "expected accepted length" not in outputs[1]


@pytest.mark.slow
def test_one_of_two_processes_fails(
    tokens: Path, whole: Path, tmp_path: Path, started: list[Processes]
) -> None:
    """It says why, and the other ends too; the run goes on from the last checkpoint, here in one.

    A process that is killed is gone in the same way: without a word to the other.
    """
    out = tmp_path / "two"
    options = [*command(tokens, out), "--mesh", MESH_OF_TWO]
    options[1:3] = ["-c", FAILING]
    started.append(Processes([*options, "--heartbeat-timeout", HEARTBEAT_TIMEOUT]))
    first, second = started[-1].all
    assert "error: RuntimeError('boom')" in second.communicate(timeout=120)[0]
    assert second.returncode == 1
    output = first.communicate(timeout=120)[0]
    assert first.returncode not in (0, 130), output
    assert last_checkpoint(out / "checkpoints").name in ("step_00000002", "step_00000004")
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert_same_losses(out, whole)


FAILING = """
import sys
import jax
from equinox_mtp.__main__ import main
from equinox_mtp.training import _train
real_step = _train.train_step
def failing(inputs, state):
    if int(state.step) == 5 and jax.process_index() == 1:
        raise RuntimeError("boom")
    return real_step(inputs, state)
_train.train_step = failing
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_with_other_options(
    tokens: Path, tmp_path: Path, started: list[Processes]
) -> None:
    """Both say which it is."""
    started.append(
        Processes(
            [*command(tokens, tmp_path / "two"), "--mesh", "data=4"], of_last=["--mesh", "fsdp=4"]
        )
    )
    for process in started[-1].all:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 1
        assert (
            "error: `mesh` must be the same in every process; it is data=4 in the first, and "
            "fsdp=4 in process 1." in output
        )


@pytest.mark.slow
def test_two_processes_in_a_folder_of_another_run(
    tokens: Path, tmp_path: Path, started: list[Processes]
) -> None:
    """One asks for the lock, and both are refused."""
    options = [*command(tokens, tmp_path / "two"), "--mesh", "data=4"]
    with only_run(tmp_path / "two"):
        started.append(Processes(options))
        for process in started[-1].all:
            output = process.communicate(timeout=120)[0]
            assert process.returncode == 1, output
            assert f"a run is going on in {tmp_path / 'two'}, by process {os.getpid()}" in output


LOSS_OF_TESTS = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[3], int(sys.argv[5]), int(sys.argv[7]))
import equinox as eqx
import optax
from sharded_step import loss_fn, make_model, make_rows
from equinox_mtp import sharding
mesh = sharding.make_mesh({"context": 2, "fsdp": 2})
model = sharding.shard_model(make_model(), mesh)
with jax.set_mesh(mesh), sharding.use_rules():
    loss, _ = eqx.filter_jit(loss_fn)(model, sharding.shard_batch(make_rows(), mesh))
    norm = eqx.filter_jit(optax.tree.norm)(eqx.filter(model, eqx.is_array))
print(json.dumps([float(loss), float(norm)]))
"""


@pytest.mark.slow
def test_a_loss_of_two_processes(started: list[Processes]) -> None:
    """`shard_model` and `shard_batch`, of the same values in each, which has half of each row."""
    started.append(Processes([sys.executable, "-c", LOSS_OF_TESTS], path=Path(__file__).parents[1]))
    model = make_model()
    loss, _ = quick_jit(loss_fn)(model, make_rows())
    expected = [float(loss), float(optax.tree.norm(eqx.filter(model, eqx.is_array)))]
    for output in started[-1].finish():
        found = json.loads(output.splitlines()[-1])
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], after: str = "") -> None:
    def names() -> list[str]:
        return [path.name for path in checkpoints(folder / "checkpoints")]

    deadline = time.monotonic() + 120
    while max(names(), default="") <= after and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


# Kill -9


@pytest.mark.slow
def test_killed_at_any_moment(
    tokens: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In mid-save and in mid-step: the losses of the run that nobody stopped."""
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    options = [*command(tokens, out), "--checkpoint-every", "1"]
    resume = [*options[:4], "--resume", "--out", str(out)]
    reached = []
    # Seconds after the next checkpoint has begun to be written, once there is a whole one.
    for delay in (0, 0.02, 0.05):
        process = subprocess.Popen(
            resume if reached else options,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        begun = {path.name[:13] for path in out.glob("checkpoints/step_*")}
        first = max(begun, default="step_00000000")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            now = {path.name[:13] for path in out.glob("checkpoints/step_*")}
            if any(name > first for name in now) and checkpoints(out / "checkpoints"):
                break
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.communicate()
        reached.append(last_checkpoint(out / "checkpoints").name)
    assert len(set(reached)) > 1
    assert reached[-1] < f"step_{STEPS:08d}"
    assert main(resume[3:]) == 0
    assert "expected accepted length" in capsys.readouterr().out
    assert_same_losses(out, whole)
