"""The training loop: read it from top to bottom, and copy what you need."""

import contextlib
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import equinox as eqx
from tqdm.auto import tqdm

import equinox_mtp as emtp

from ._architecture import differences
from ._checkpoint import (
    Checkpoints,
    load_info,
    load_state,
)
from ._checkpoint_files import checkpoints, last_undamaged_checkpoint
from ._compare import Comparison, compare, held_out_prompts
from ._config import TrainConfig, options, without_output
from ._fit_depths import with_fitted_depths
from ._hidden_states import HiddenStateCache, hidden_states_of
from ._interrupt import Interrupted, interruptible
from ._lock import only_run
from ._packing import PackedRows
from ._placement import on_no_mesh
from ._prepare import Run, prepare, with_hidden_states
from ._processes import broadcast, is_first, print_once
from ._released import check_same_model
from ._report import (
    MetricsFile,
    describe,
    describe_corpus,
    held_out_record,
    plot_curves,
    summary,
    train_record,
)
from ._self_generate import OwnTexts, describe_texts
from ._sources import holds_tokens
from ._step import (
    StepInputs,
    TrainState,
    evaluate,
    make_state,
    state_of,
    train_step,
)
from ._stored_options import write_options
from ._text import keep_tokenizer
from ._token_counts import keep_token_counts
from ._utilization import full_speed, utilization


def train(config: TrainConfig) -> Path:
    """Trains, evaluates and saves as `config` says; returns the folder of the run.

    In several processes each calls this; `jax.distributed.initialize` comes before.

    **Raises:** `ValueError`, `FileNotFoundError` or `FileExistsError` for options, data, devices or
    a folder that do not fit, before anything is compiled; `BlockingIOError` if another run is going
    on in the folder; `FloatingPointError` if a loss, an evaluation or a parameter is not finite;
    `OSError` if a checkpoint cannot be written; `Interrupted` once all is saved, after Ctrl-C or
    SIGTERM.
    """
    started = time.perf_counter()
    run = prepare(config)
    with run.placement.active(), contextlib.ExitStack() as stack:
        # A model that cannot be built, or nothing to resume, leaves no folder.
        like = eqx.filter_eval_shape(fresh_state, run)
        if not config.resume or broadcast(run.out.is_dir()):
            stack.enter_context(only_run(run.out))
        state = start_or_resume(run, like)
        first_step, own_texts = int(state.step), open_own_texts(run, state)
        if is_first() and not config.resume:
            write_options(run.out, run.info.config)
            keep_token_counts(run.corpus, run.out)
            tokenizer = config.tokenizer or config.model
            if tokenizer is not None and not holds_tokens(config.data):
                keep_tokenizer(tokenizer, run.out)
        print_once(describe_start(run, state))
        if own_texts is not None:
            run = with_own_texts(run, state, own_texts)
        if config.initial_depths == "trunk" and not config.resume:
            state = with_fitted_depths(run, state)
        metrics = stack.enter_context(
            contextlib.closing(
                MetricsFile(
                    run.out / "metrics.jsonl",
                    last_step=first_step,
                    depths=config.depths,
                    writes=is_first(),
                )
            )
        )
        writer = stack.enter_context(
            contextlib.closing(Checkpoints(run.out / "checkpoints", last_step=first_step))
        )
        cache, best_speed = open_cache(run, stack), full_speed(config, run.placement, like.model)
        state, step_seconds = run_steps(run, state, metrics, writer, cache, best_speed)
        if not metrics.of("held_out"):
            # The run had ended, and its metrics were lost.
            record_evaluation(run, state, metrics)
        comparisons = compare_on_held_out(run, state.combined(run.frozen))
    # The first step of a process compiles.
    speed = tokens_per_second(config, step_seconds[1:])
    seconds = time.perf_counter() - started
    record, used = metrics.of("held_out")[-1], utilization(speed, best_speed)
    print_once(summary(record, comparisons, seconds, speed, used, run.out))
    return run.out


def fresh_state(run: Run) -> TrainState:
    """The state before the first step."""
    if run.released is not None:
        return state_of(run.released, run.optimizer, run.placement)
    info = run.info
    options = without_output(run.config)
    return make_state(options, info.vocab_size, run.optimizer, run.placement, info.architecture)


def open_own_texts(run: Run, state: TrainState) -> OwnTexts | None:
    """The model's own texts, if they are asked for; none is made before the run is written."""
    if run.config.self_generate is None:
        return None
    model = run.placement.on_one_device(state.combined(run.frozen))
    return OwnTexts.open(run.config, run.info, run.train_corpus, model, run.out)


def with_own_texts(run: Run, state: TrainState, own_texts: OwnTexts) -> Run:
    """The same run, over the model's own texts."""
    model = run.placement.on_one_device(state.combined(run.frozen))
    with on_no_mesh():
        texts = own_texts.corpus(model)
    print_once(describe_texts(texts, run.train_corpus, run.config.seq_len))
    run = dataclasses.replace(run, train_rows=PackedRows(texts, run.config.seq_len))
    run = with_hidden_states(run, texts.fingerprint)
    if run.hidden_states is not None:
        print_once(describe_hidden_states(run))
    return run


def describe_start(run: Run, state: TrainState) -> str:
    """The first lines that a run prints."""
    first_step, steps = int(state.step), run.config.steps
    start = f", from step {first_step} on" if first_step else ""
    if first_step == steps:
        start = f": the run has ended, at step {first_step} of {steps}"
    kept = "" if run.hidden_states is None else f"{describe_hidden_states(run)}\n"
    return (
        f"{describe_corpus(run.corpus, run.held_out_corpus, run.config.depths)}\n"
        f"{describe_parameters(run, state)}, "
        f"{run.config.depths} prediction depth(s)\n"
        f"{kept}writing to {run.out}{start}"
    )


def describe_hidden_states(run: Run) -> str:
    """What is kept of them on disk."""
    assert run.hidden_states is not None
    epochs = run.config.steps * run.config.batch_size / run.hidden_states.num_rows
    return (
        f"hidden states of the main model: {run.hidden_states}, written in the first of "
        f"{epochs:.3g} epoch(s)"
    )


def describe_parameters(run: Run, state: TrainState) -> str:
    """How many there are, and how many of them train."""
    trained = emtp.count_parameters(state.model)
    if run.frozen is None:
        return f"{trained:,} parameters"
    return f"{emtp.count_parameters(state.combined(run.frozen)):,} parameters, {trained:,} trained"


def tokens_per_second(config: TrainConfig, step_seconds: list[float]) -> float | None:
    """Of the median step; `None` without steps."""
    if not step_seconds:
        return None
    return config.batch_size * config.seq_len / statistics.median(step_seconds)


def open_cache(run: Run, stack: contextlib.ExitStack) -> HiddenStateCache | None:
    """The main model's hidden states on disk, if they are kept there."""
    if run.hidden_states is None:
        return None
    cache = HiddenStateCache(run.hidden_states_folder, run.hidden_states)
    if cache.was_of_others:
        print_once(f"note: {run.hidden_states_folder} was of another model or rows; made anew")
    return stack.enter_context(contextlib.closing(cache))


def step_inputs(run: Run, step: int, cache: HiddenStateCache | None) -> StepInputs:
    """What a step reads, of which the first has the number 1."""
    config, frozen = run.config, run.frozen
    indices = run.train_rows.of_step(step - 1, config.batch_size, config.seed)
    indices = indices.reshape(config.accumulate, -1)
    rows, hidden_states = run.placement.load(run.train_rows, indices), None
    if cache is not None:
        assert frozen is not None
        hidden_states = hidden_states_of(cache, frozen.decoder, indices, rows)
    return StepInputs(
        rows,
        without_output(config),
        run.optimizer,
        run.placement,
        frozen,
        run.draft_vocab,
        hidden_states,
    )


def run_steps(
    run: Run,
    state: TrainState,
    metrics: MetricsFile,
    writer: Checkpoints,
    cache: HiddenStateCache | None,
    best_speed: float | None,
) -> tuple[TrainState, list[float]]:
    """Runs the remaining steps; returns the last state and the seconds of each step.

    **Raises:** `Interrupted` once all is saved, if the run is told to stop; `FloatingPointError` if
    something is not finite: the last checkpoint is from before.
    """
    config, first_step, step_seconds = run.config, int(state.step), []
    with progress_bar(config.steps, first_step) as bar, interruptible() as interrupted:
        for step in range(first_step + 1, config.steps + 1):
            step_started = time.perf_counter()
            state, step_metrics = train_step(step_inputs(run, step, cache), state)
            record = train_record(step, step_metrics)
            step_seconds.append(time.perf_counter() - step_started)
            speed = tokens_per_second(config, step_seconds[-1:])
            used = utilization(speed, best_speed)
            of_speed = {"tokens_per_second": speed, "model_flops_utilization": used}
            metrics.write({**record, **{name: x for name, x in of_speed.items() if x is not None}})
            bar.set_postfix_str(describe(record))
            bar.update()
            writer.poll()
            last, stop, held_out_loss = step == config.steps, interrupted(step), None
            if last or step % config.eval_every == 0:
                held_out_loss = record_evaluation(run, state, metrics)
            if last or stop or step % config.checkpoint_every == 0:
                saved = dataclasses.replace(run.info, step=step)
                writer.save(state, saved, held_out_loss=held_out_loss)
                if cache is not None:
                    cache.flush()
            if stop and not last:
                writer.wait()
                bar.close()
                print_once(describe_interruption(run, step))
                raise Interrupted
    return state, step_seconds


def describe_interruption(run: Run, step: int) -> str:
    """Says how to continue."""
    mesh = "" if run.config.mesh is None else f" --mesh {run.config.mesh}"
    flags = f"{mesh} --distributed …" if run.config.distributed else mesh
    return f"interrupted at step {step}; continue with --resume --out {run.out}{flags}"


def start_or_resume(run: Run, like: TrainState) -> TrainState:
    """A fresh state, or with `--resume` the state in the folder's last checkpoint."""
    folder, config, info = run.out / "checkpoints", run.info.config, run.info
    if not config.resume:
        if broadcast((run.out / "metrics.jsonl").exists() or bool(checkpoints(folder))):
            raise FileExistsError(
                f"`out`: {run.out} holds a run already. Continue it with --resume, or choose "
                "another folder."
            )
        return fresh_state(run)
    checkpoint, problems = last_undamaged_checkpoint(folder)
    for problem in problems:
        print_once(f"note: {problem}; continuing from {checkpoint.name}")
    stored = load_info(checkpoint)
    for field in dataclasses.fields(TrainConfig):
        was, is_now = getattr(stored.config, field.name), getattr(config, field.name)
        if was != is_now and not options()[field.name].may_change:
            raise ValueError(
                f"`{field.name}` was {was!r} in the run to resume, and is {is_now!r} now. Leave it "
                "as it was, or start a new run."
            )
    if stored.data_fingerprint != info.data_fingerprint:
        raise ValueError(
            f"`data` is not what the run in {run.out} was trained on: its tokens differ. Restore "
            "it, or start a new run."
        )
    if changed := differences(stored.architecture, info.architecture):
        raise ValueError(
            f"`architecture` is not what the run in {run.out} trains: it differs in "
            f"{', '.join(changed)}. Leave it as it was, or start a new run."
        )
    check_same_model(stored, info.model_digest, config.model)
    return load_state(checkpoint, run.placement.place(like), is_undamaged=True)


def compare_on_held_out(run: Run, model: emtp.MTPModel) -> list[Comparison]:
    """Continues held-out text with and without drafts, within the length of training rows.

    With one draft a step, and with one of each depth; to the end of the document, if the data have
    an id for it. In every process, each on one device.
    """
    config, length = run.config, run.config.seq_len // 2
    prompts = held_out_prompts(
        run.held_out_corpus, num_prompts=config.compare_prompts, length=length
    )
    if not prompts or not config.depths:
        return []
    model = run.placement.on_one_device(model)
    with on_no_mesh():
        return [
            compare(
                model,
                prompts,
                max_new_tokens=config.seq_len - length,
                num_drafts=num_drafts,
                draft_vocab=run.draft_vocab,
                # Drafts are trained on what stands before it, not on what a model says after.
                eos_id=run.info.config.end_of_document,
            )
            for num_drafts in sorted({1, config.depths})
        ]


def record_evaluation(run: Run, state: TrainState, metrics: MetricsFile) -> float:
    """Evaluates, records the result, and redraws the curves; returns the main model's loss."""
    step, config = int(state.step), run.config
    evaluation = evaluate(
        state.combined(run.frozen),
        run.held_out_rows,
        config.batch_size,
        config.eval_rows * (4 if step == config.steps else 1),
        run.placement,
    )
    record = held_out_record(step, evaluation)
    metrics.write(record)
    if is_first():
        plot_curves(metrics, run.out / "curves.png")
    return record["main_loss"]


def progress_bar(steps: int, first_step: int) -> tqdm:
    """A bar on standard error, or in a notebook a widget; TQDM_DISABLE=1 leaves it out."""
    # What is not passed comes from the environment.
    options: dict[str, Any] = {} if is_first() else {"disable": True}
    return tqdm(
        total=steps,
        initial=first_step,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
        **options,
    )
