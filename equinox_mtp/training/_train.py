"""The training loop: read it from top to bottom, and copy what you need."""

import contextlib
import dataclasses
import functools
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
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, PyTree
from tqdm import tqdm

import equinox_mtp as emtp

from ._checkpoint import (
    CheckpointInfo,
    checkpoints,
    last_checkpoint,
    load_info,
    load_state,
    save_checkpoint,
)
from ._config import TrainConfig
from ._data import Batch, PackedRows, load_corpus
from ._report import MetricsFile, plot_curves, summary

RUNS = Path("runs")
FREE_TO_CHANGE = {"out", "resume", "eval_every", "eval_rows", "checkpoint_every"}


class TrainState(eqx.Module):
    """What a step changes, and a checkpoint holds."""

    model: emtp.MTPModel
    optimizer_state: PyTree[Any]
    step: Int32[Array, ""]


class StepMetrics(eqx.Module):
    """Sums and counts of one step, over all microbatches."""

    main: emtp.TokenLoss
    mtp: emtp.MTPLosses
    grad_norm: Float32[Array, ""]
    scaling_factor: Float32[Array, ""]


class Evaluation(eqx.Module):
    """Sums and counts over held-out text."""

    main: emtp.TokenLoss
    mtp: emtp.MTPLosses
    main_model: emtp.MTPAcceptanceRate
    ground_truth: emtp.MTPAcceptanceRate

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return jax.tree.map(jnp.add, self, other)


def make_model(config: TrainConfig, vocab_size: int) -> emtp.MTPModel:
    """The model that a configuration describes, with fresh parameters."""
    transformer = config.transformer(vocab_size)
    decoder_key, block_key = jax.random.split(jax.random.key(config.seed))
    return emtp.MTPModel(
        decoder=emtp.nn.TransformerDecoder(transformer, key=decoder_key),
        block=emtp.MultiTokenPredictionBlock(
            config.mtp(),
            functools.partial(emtp.nn.TransformerDecoderLayer, transformer),
            embed_size=transformer.embed_size,
            key=block_key,
        ),
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and clipping."""
    warmup = min(config.warmup_steps, config.steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=config.steps,
        end_value=0.1 * config.learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


@eqx.filter_jit
def make_state(
    config: TrainConfig, vocab_size: int, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    model = make_model(config, vocab_size)
    optimizer_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return TrainState(model, optimizer_state, jnp.zeros((), jnp.int32))


def run_model(
    model: emtp.MTPModel, batch: Batch, *, key: Array | None = None, inference: bool = False
) -> emtp.ModelOutput:
    """Runs the model on packed rows."""
    input_ids, target_ids, target_mask = emtp.inputs_and_targets(
        batch.tokens, segment_ids=batch.segment_ids
    )
    return model(
        input_ids,
        target_ids,
        target_mask,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids[:, :-1],
        key=key,
        inference=inference,
    )


def count_targets(batch: Batch, num_depths: int) -> tuple[Float32[Array, ""], Array]:
    """Scored tokens of all microbatches: of the main model, and `[depth]` of the MTP layers."""

    def count(microbatch: Batch) -> tuple[Array, Array]:
        tokens, segment_ids = microbatch.tokens, microbatch.segment_ids
        input_ids, target_ids, target_mask = emtp.inputs_and_targets(
            tokens, segment_ids=segment_ids
        )
        targets = emtp.align_targets(
            input_ids,
            target_ids,
            target_mask,
            num_depths=num_depths,
            segment_ids=segment_ids[:, :-1],
        )
        return jnp.sum(target_mask), jnp.sum(targets.mask, axis=(1, 2))

    main, mtp = jax.vmap(count)(batch)
    return jnp.sum(main).astype(jnp.float32), jnp.sum(mtp, axis=0).astype(jnp.float32)


@eqx.filter_jit(donate="all-except-first")
def train_step(
    inputs: tuple[Batch, TrainConfig, optax.GradientTransformation], state: TrainState
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step over microbatches `[microbatch batch …]`.

    The gradient is that of the whole batch, however many microbatches it is split into: every
    microbatch's sums are divided by the counts of all.
    """
    batch, config, optimizer = inputs
    first, then = config.mtp_scaling
    switch_step = math.floor(config.mtp_scaling_switch * config.steps)
    scaling_factor = jnp.where(state.step < switch_step, first, then).astype(jnp.float32)
    main_count, mtp_counts = count_targets(batch, config.depths)
    step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def loss_fn(model: emtp.MTPModel, microbatch: Batch, key: Array):
        output = run_model(model, microbatch, key=key)
        mtp_loss = emtp.calculate_mtp_loss(
            output.mtp.losses, scaling_factor=scaling_factor, total_weights=mtp_counts
        )
        main_loss = output.main.loss / jnp.maximum(main_count, 1)
        return main_loss + mtp_loss, (output.main, output.mtp.losses)

    def run_microbatch(total: PyTree[Any], inputs: tuple[Batch, Array]):
        (_, losses), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(state.model, *inputs)
        return jax.tree.map(jnp.add, total, (losses, grads)), None

    params = eqx.filter(state.model, eqx.is_inexact_array)
    none = emtp.MTPLosses(jnp.zeros(config.depths), jnp.zeros(config.depths))
    zeros = (
        (emtp.TokenLoss(jnp.zeros(()), jnp.zeros(())), none),
        jax.tree.map(jnp.zeros_like, params),
    )
    keys = jax.random.split(step_key, config.accumulate)
    ((main, mtp), grads), _ = jax.lax.scan(run_microbatch, zeros, (batch, keys))

    updates, optimizer_state = optimizer.update(grads, state.optimizer_state, params)
    model = eqx.apply_updates(state.model, updates)
    metrics = StepMetrics(main, mtp, optax.tree.norm(grads), scaling_factor)
    return TrainState(model, optimizer_state, state.step + 1), metrics


@eqx.filter_jit
def evaluate_batch(model: emtp.MTPModel, batch: Batch) -> Evaluation:
    """Losses and acceptance on one batch."""
    output = run_model(model, batch, inference=True)
    acceptance = output.mtp.acceptance
    return Evaluation(
        main=output.main,
        mtp=output.mtp.losses,
        main_model=emtp.calculate_mtp_acceptance_rate(acceptance, output.predictions),
        ground_truth=emtp.calculate_mtp_acceptance_rate(acceptance, None),
    )


def evaluate(model: emtp.MTPModel, rows: PackedRows, batch_size: int, max_rows: int) -> Evaluation:
    """Losses and acceptance on the first `max_rows` held-out rows."""
    evaluations = [
        evaluate_batch(model, batch) for batch in rows.batches(min(batch_size, len(rows)), max_rows)
    ]
    return functools.reduce(lambda x, y: x + y, evaluations)


def train(config: TrainConfig) -> Path:
    """Trains, evaluates and saves as `config` says; returns the folder of the run.

    **Raises:** `ValueError`, `FileNotFoundError` or `FileExistsError` for options, data or a folder
    that do not fit, before anything is compiled; `FloatingPointError` if a loss is not finite.
    """
    started = time.perf_counter()
    corpus = load_corpus(
        config.data, vocab_size=config.vocab_size, end_of_document=config.end_of_document
    )
    train_corpus, held_out_corpus = corpus.split(config.seed)
    train_rows = PackedRows(train_corpus, config.seq_len)
    held_out_rows = PackedRows(held_out_corpus, config.seq_len)
    optimizer = make_optimizer(config)
    out = config.out or new_run_folder()
    info = CheckpointInfo(0, corpus.vocab_size, corpus.fingerprint(), config)
    state = start_or_resume(out, info, optimizer)
    first_step = last_saved = int(state.step)
    metrics = MetricsFile(out / "metrics.jsonl", last_step=first_step)
    print(
        f"{corpus.num_tokens:,} tokens in {len(corpus.documents):,} documents, "
        f"{held_out_corpus.num_tokens:,} of them held out\n"
        f"{count_parameters(state.model):,} parameters, {config.depths} prediction depth(s)\n"
        f"writing to {out}"
    )

    tokens_per_step = config.batch_size * config.seq_len
    step_seconds: list[float] = []
    with (
        contextlib.closing(metrics),
        progress_bar(config.steps, first_step) as bar,
        interruptible() as interrupted,
    ):
        for step in range(first_step + 1, config.steps + 1):
            step_started = time.perf_counter()
            batch = train_rows.training_batch(step - 1, config.batch_size, config.seed)
            batch = jax.tree.map(lambda x: x.reshape(config.accumulate, -1, x.shape[1]), batch)
            state, step_metrics = train_step((batch, config, optimizer), state)
            record = train_record(step, step_metrics)
            step_seconds.append(time.perf_counter() - step_started)
            metrics.write({**record, "tokens_per_second": tokens_per_step / step_seconds[-1]})
            bar.set_postfix_str(describe(record))
            bar.update()
            last = step == config.steps
            if last or step % config.eval_every == 0:
                max_rows = config.eval_rows * (4 if last else 1)
                evaluation = evaluate(state.model, held_out_rows, config.batch_size, max_rows)
                metrics.write(held_out_record(step, evaluation))
                plot_curves(metrics, out / "curves.png")
            if last or interrupted() or step % config.checkpoint_every == 0:
                save_checkpoint(out / "checkpoints", state, dataclasses.replace(info, step=step))
                last_saved = step
            if interrupted():
                break

    if last_saved < config.steps:
        print(f"interrupted at step {last_saved}; continue with --resume --out {out}")
    else:
        # The first step of a process compiles.
        seconds = statistics.median(step_seconds[1:] or step_seconds or [math.inf])
        seconds_in_all = time.perf_counter() - started
        record = metrics.of("held_out")[-1]
        print(summary(record, seconds_in_all, tokens_per_step / seconds, out))
    return out


def start_or_resume(
    out: Path, info: CheckpointInfo, optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state, or with `--resume` that of the folder's last checkpoint."""
    folder, config = out / "checkpoints", info.config
    if not config.resume:
        if (out / "metrics.jsonl").exists() or checkpoints(folder):
            raise FileExistsError(
                f"`out`: {out} holds a run already. Continue it with --resume, or choose another "
                "folder."
            )
        out.mkdir(parents=True, exist_ok=True)
        return make_state(config, info.vocab_size, optimizer)
    checkpoint = last_checkpoint(folder)
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
    like = eqx.filter_eval_shape(make_state, config, info.vocab_size, optimizer)
    return load_state(checkpoint, like)


def new_run_folder() -> Path:
    """The next free of runs/0001, runs/0002, …"""
    last = newest_run_folder()
    return RUNS / f"{1 if last is None else int(last.name) + 1:04d}"


def newest_run_folder() -> Path | None:
    """The last of runs/0001, runs/0002, …, if there is one."""
    found = sorted(path for path in RUNS.glob("[0-9]" * 4) if path.is_dir())
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


def describe(record: dict[str, Any]) -> str:
    """A few words for the progress bar."""
    depths = ", ".join(f"{loss:.3f}" for loss in record["mtp_losses"])
    return f"main {record['main_loss']:.3f}" + (f", depths {depths}" if depths else "")


def progress_bar(steps: int, first_step: int) -> tqdm:
    """A bar on standard error."""
    return tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=0.5)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Lets the step in flight end, and be saved, at the first Ctrl-C; a second one stops at once.

    Yields a function that says whether there was one.
    """
    seen: list[int] = []

    def on_interrupt(signal_number: int, frame: FrameType | None) -> None:
        seen.append(signal_number)
        signal.signal(signal.SIGINT, previous)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread hears signals
        return
    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)
