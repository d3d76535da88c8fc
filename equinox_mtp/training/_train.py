"""The training loop: read it from top to bottom, and copy what you need."""

import contextlib
import dataclasses
import hashlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import equinox as eqx
import jax
import optax
from jax.experimental import multihost_utils
from tqdm import tqdm

import equinox_mtp as emtp

from ._checkpoint import (
    CheckpointInfo,
    Checkpoints,
    load_info,
    load_state,
)
from ._checkpoint_files import checkpoints, last_undamaged_checkpoint
from ._compare import Comparison, compare, held_out_prompts
from ._config import TrainConfig
from ._corpus import Corpus, load_corpus
from ._packing import PackedRows
from ._placement import Placement
from ._processes import agree, is_first, say
from ._report import MetricsFile, plot_curves, summary
from ._step import (
    Evaluation,
    StepMetrics,
    TrainState,
    evaluate,
    make_model,
    make_optimizer,
    make_state,
    train_step,
)

RUNS = Path("runs")
# On other devices the same run goes on.
DEFAULT = TrainConfig()
WHERE_IT_RUNS = {
    *("mesh", "distributed", "coordinator", "num_processes", "process_id", "heartbeat_timeout"),
}
FREE_TO_CHANGE = {
    *("out", "resume", "eval_every", "eval_rows", "checkpoint_every", "compare_prompts"),
    *WHERE_IT_RUNS,
}


class Interrupted(KeyboardInterrupt):
    """A run was told to stop before its end, and has saved what it had."""


def train(config: TrainConfig) -> Path:
    """Trains, evaluates and saves as `config` says; returns the folder of the run.

    In several processes each calls this; `jax.distributed.initialize` comes before.

    **Raises:** `ValueError`, `FileNotFoundError` or `FileExistsError` for options, data, devices or
    a folder that do not fit, before anything is compiled; `FloatingPointError` if a loss is not
    finite; `OSError` if a checkpoint cannot be written; `Interrupted` once all is saved, after
    Ctrl-C or SIGTERM.
    """
    started = time.perf_counter()
    corpus = load_corpus(
        config.data, vocab_size=config.vocab_size, end_of_document=config.end_of_document
    )
    train_corpus, held_out_corpus = corpus.split(config.seed)
    train_rows = PackedRows(train_corpus, config.seq_len)
    held_out_rows = PackedRows(held_out_corpus, config.seq_len)
    optimizer = make_optimizer(config)
    placement = Placement.of(config, corpus.vocab_size)
    out = config.out or new_run_folder()
    # Where a run goes on is said anew.
    here = {name: getattr(DEFAULT, name) for name in WHERE_IT_RUNS}
    anywhere = dataclasses.replace(config, **here)
    info = CheckpointInfo(0, corpus.vocab_size, corpus.fingerprint, anywhere)
    check_agreement(info)
    with placement.active():
        state = start_or_resume(out, info, optimizer, placement)
        first_step = int(state.step)
        metrics = MetricsFile(out / "metrics.jsonl", last_step=first_step, writes=is_first())
        say(
            f"{corpus.num_tokens:,} tokens in {len(corpus):,} documents, "
            f"{held_out_corpus.num_tokens:,} of them held out\n"
            f"{count_parameters(state.model):,} parameters, {config.depths} prediction depth(s)\n"
            f"writing to {out}"
        )
        tokens_per_step = config.batch_size * config.seq_len
        step_seconds: list[float] = []
        with (
            contextlib.closing(metrics),
            contextlib.closing(Checkpoints(out / "checkpoints", last_step=first_step)) as writer,
            progress_bar(config.steps, first_step) as bar,
            interruptible() as interrupted,
        ):
            for step in range(first_step + 1, config.steps + 1):
                step_started = time.perf_counter()
                rows = train_rows.of_step(step - 1, config.batch_size, config.seed)
                batch = placement.load(train_rows, rows.reshape(config.accumulate, -1))
                state, step_metrics = train_step((batch, config, optimizer, placement), state)
                record = train_record(step, step_metrics)
                step_seconds.append(time.perf_counter() - step_started)
                metrics.write({**record, "tokens_per_second": tokens_per_step / step_seconds[-1]})
                bar.set_postfix_str(describe(record))
                bar.update()
                writer.poll()
                last, stop, held_out_loss = step == config.steps, interrupted(step), None
                if last or step % config.eval_every == 0:
                    evaluation = evaluate(
                        state.model,
                        held_out_rows,
                        config.batch_size,
                        config.eval_rows * (4 if last else 1),
                        placement,
                    )
                    held_out_loss = record_evaluation(step, evaluation, metrics, out)
                if last or stop or step % config.checkpoint_every == 0:
                    saved = dataclasses.replace(info, step=step)
                    writer.save(state, saved, held_out_loss=held_out_loss)
                if stop and not last:
                    writer.wait()
                    mesh = "" if config.mesh is None else f" --mesh {config.mesh}"
                    say(f"interrupted at step {step}; continue with --resume --out {out}{mesh}")
                    raise Interrupted
        comparisons = compare_on_held_out(state.model, held_out_corpus, config, placement)

    if is_first():
        # The first step of a process compiles.
        seconds = statistics.median(step_seconds[1:]) if len(step_seconds) > 1 else None
        print(
            summary(
                metrics.of("held_out")[-1],
                comparisons,
                time.perf_counter() - started,
                None if seconds is None else tokens_per_step / seconds,
                out,
            )
        )
    return out


def start_or_resume(
    out: Path,
    info: CheckpointInfo,
    optimizer: optax.GradientTransformation,
    placement: Placement,
) -> TrainState:
    """A fresh state, or with `--resume` that of the folder's last checkpoint."""
    folder, config = out / "checkpoints", info.config
    if not config.resume:
        if agree((out / "metrics.jsonl").exists() or bool(checkpoints(folder))):
            raise FileExistsError(
                f"`out`: {out} holds a run already. Continue it with --resume, or choose another "
                "folder."
            )
        state = make_state(config, info.vocab_size, optimizer, placement)
        out.mkdir(parents=True, exist_ok=True)
        return state
    checkpoint, problems = last_undamaged_checkpoint(folder)
    for problem in problems:
        say(f"note: {problem}; continuing from {checkpoint.name}")
    stored = load_info(checkpoint)
    for field in dataclasses.fields(TrainConfig):
        was, is_now = getattr(stored.config, field.name), getattr(config, field.name)
        if was != is_now and field.name not in FREE_TO_CHANGE:
            raise ValueError(
                f"`{field.name}` was {was!r} in the run to resume, and is {is_now!r} now. Leave it "
                "as it was, or start a new run."
            )
    if stored.data_fingerprint != info.data_fingerprint:
        raise ValueError(
            f"`data` is not what the run in {out} was trained on: its tokens differ. Restore it, "
            "or start a new run."
        )
    like = eqx.filter_eval_shape(make_state, config, info.vocab_size, optimizer, placement)
    return load_state(checkpoint, placement.place(like), is_undamaged=True)


def check_agreement(info: CheckpointInfo) -> None:
    """**Raises:** `ValueError` if processes have other options, or read other data."""
    text = f"{info.data_fingerprint} {dataclasses.replace(info.config, out=None)}"
    number = int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)
    if agree(number) != number:
        raise ValueError(
            "`data` and all options must be the same in every process; they differ from those of "
            "the first. The default data is each machine's own: name files with --data."
        )


def new_run_folder() -> Path:
    """The next free of runs/0001, runs/0002, …"""
    last = newest_run_folder()
    number = agree(1 if last is None else int(last.name) + 1)
    return RUNS / f"{number:04d}"


def newest_run_folder(*, with_checkpoint: bool = False) -> Path | None:
    """The last of runs/0001, runs/0002, …, if there is one."""
    found = sorted(path for path in RUNS.glob("[0-9]" * 4) if path.is_dir())
    if with_checkpoint:
        found = [path for path in found if checkpoints(path / "checkpoints")]
    return found[-1] if found else None


def count_parameters(model: emtp.MTPModel) -> int:
    """The number of trainable numbers."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def train_record(step: int, metrics: StepMetrics) -> dict[str, Any]:
    """One line of metrics; raises `FloatingPointError` if the loss is not finite."""
    main_loss, mtp_losses = float(metrics.main.mean), metrics.mtp.mean.tolist()
    grad_norm = float(metrics.grad_norm)
    if not all(math.isfinite(x) for x in (main_loss, grad_norm, *mtp_losses)):
        raise FloatingPointError(
            f"the loss or its gradient is not finite at step {step}: main loss {main_loss}, depths "
            f"{mtp_losses}, gradient norm {grad_norm}. Checkpoints are of earlier, finite steps. "
            "Try a lower --learning-rate or more --warmup-steps."
        )
    return {
        "split": "train",
        "step": step,
        "main_loss": main_loss,
        "mtp_losses": mtp_losses,
        "grad_norm": grad_norm,
        "scaling_factor": float(metrics.scaling_factor),
    }


def held_out_record(step: int, evaluation: Evaluation) -> dict[str, Any]:
    """One line of metrics on held-out text."""
    main_model, ground_truth = evaluation.main_model, evaluation.ground_truth
    return {
        "split": "held_out",
        "step": step,
        "tokens": int(evaluation.main.weight),
        "main_loss": float(evaluation.main.mean),
        "mtp_losses": evaluation.mtp.mean.tolist(),
        "acceptance": main_model.independent.tolist(),
        "joint_acceptance": main_model.joint.tolist(),
        "conditional_acceptance": main_model.conditional.tolist(),
        "ground_truth_acceptance": ground_truth.independent.tolist(),
        "expected_accepted_length": float(main_model.expected_accepted_length),
    }


def compare_on_held_out(
    model: emtp.MTPModel, held_out: Corpus, config: TrainConfig, placement: Placement
) -> list[Comparison]:
    """Continues held-out text with and without drafts, within the length of training rows.

    With one draft a step, and with one of each depth. In every process, each on one device.
    """
    length = config.seq_len // 2
    prompts = held_out_prompts(held_out, num_prompts=config.compare_prompts, length=length)
    if not prompts or not config.depths:
        return []
    shapes = eqx.filter_eval_shape(make_model, config, held_out.vocab_size)
    model = placement.on_one_device(model, shapes)
    return [
        compare(model, prompts, max_new_tokens=config.seq_len - length, num_drafts=num_drafts)
        for num_drafts in sorted({1, config.depths})
    ]


def record_evaluation(step: int, evaluation: Evaluation, metrics: MetricsFile, out: Path) -> float:
    """Writes an evaluation down, and draws the curves anew; returns the main model's loss."""
    record = held_out_record(step, evaluation)
    metrics.write(record)
    if is_first():
        plot_curves(metrics, out / "curves.png")
    return record["main_loss"]


def describe(record: dict[str, Any]) -> str:
    """A few words for the progress bar."""
    depths = ", ".join(f"{loss:.3f}" for loss in record["mtp_losses"])
    return f"main {record['main_loss']:.3f}" + (f", depths {depths}" if depths else "")


def progress_bar(steps: int, first_step: int) -> tqdm:
    """A bar on standard error."""
    return tqdm(
        total=steps,
        initial=first_step,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not is_first(),
    )


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[int], bool]]:
    """Lets the step in flight end, and be saved, at the first Ctrl-C or SIGTERM.

    A second one stops at once. Of several processes one that gets a SIGTERM, as clusters send it
    ahead of time, stops all of them after the same step; a Ctrl-C they would not all hear in the
    same step, and it ends the run as a kill does. Yields a function that says of a step that is
    done whether it was the last.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: False  # only the main thread hears signals
        return
    seen: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(signal_number: int, frame: FrameType | None) -> None:
        seen.append(signal_number)
        restore()

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield lambda _: bool(seen)
    finally:
        restore()
