"""The commands of `python -m equinox_mtp`, from their options on."""

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from ._checkpoint import info_of_run
from ._command_line import parse_train_options
from ._config import TrainConfig
from ._export import ExportConfig, export_run
from ._generate import GenerateConfig, generate_text
from ._interrupt import Interrupted
from ._prepare import newest_run_folder
from ._quiet import quiet_failed_saves
from ._stored_options import read_options
from ._train import train


def train_command(options: Sequence[str]) -> None:
    """`python -m equinox_mtp train` with these options."""
    _check_not_empty(options)
    quiet_failed_saves()
    default = TrainConfig()
    run, options = _named_run(options)
    if run.config is not None:
        default = read_options(run.config, default)
    if run.resume:
        out = run.out or newest_run_folder(with_checkpoint=True)
        if out is None:
            raise FileNotFoundError(
                "`resume`: no run under runs/ has a checkpoint. Name a run with --out."
            )
        # What is not said on the command line stays as it was in the run.
        stored = info_of_run(out / "checkpoints").config
        default = dataclasses.replace(stored, out=out)
    config = parse_train_options(options, default)
    try:
        if config.distributed:
            _train_in_several_processes(config)
        else:
            train(config)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            "there is not enough memory for a step. Lower --seq-len or --batch-size, or raise "
            "--accumulate."
        ) from None


def _train_in_several_processes(config: TrainConfig) -> None:
    """The part of this process; it ends at once if it fails."""
    if config.coordinator:
        waits = f"process {config.process_id} of {config.num_processes} looks for the others at"
        print(f"{waits} {config.coordinator}", file=sys.stderr, flush=True)
    jax.distributed.initialize(
        config.coordinator,
        config.num_processes,
        config.process_id,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
    )
    try:
        train(config)
    except Interrupted:
        raise
    except BaseException as error:
        # The others wait for this process: only its end tells them, and it must not wait for them.
        shown = (
            str(error)
            if isinstance(error, ValueError | OSError | FloatingPointError)
            else repr(error)
        )
        if isinstance(error, jax.errors.JaxRuntimeError):
            shown += "\nIf another process has ended, its output says why; start all again with "
            shown += "--resume."
        print(f"error: {shown}", file=sys.stderr, flush=True)
        os._exit(1)


def generate_command(options: Sequence[str]) -> None:
    """`python -m equinox_mtp generate` with these options."""
    prog = "python -m equinox_mtp generate"
    generate_text(tyro.cli(GenerateConfig, prog=prog, args=options))


def export_command(options: Sequence[str]) -> None:
    """`python -m equinox_mtp export` with these options."""
    _check_not_empty(options)
    prog = "python -m equinox_mtp export"
    export_run(tyro.cli(ExportConfig, prog=prog, args=options))


def _check_not_empty(options: Sequence[str]) -> None:
    """An empty name of a folder would be the current one: the value of a variable that is not set.

    **Raises:** `ValueError` if an option has an empty value.
    """
    for before, option in itertools.pairwise(["", *options]):
        name, equals, value = option.partition("=")
        if not option or (name.startswith("--") and equals and not value):
            named = name.removeprefix("--") or before.removeprefix("--") or "run"
            raise ValueError(f"`{named}` must not be empty. Give a value, or leave the option out.")


def _named_run(options: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`--config`, `--resume` and `--out`, on which the defaults of the others depend.

    **Returns:** these, and the options without `--config`.
    """
    prog = "python -m equinox_mtp train"
    early = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    run, rest = early.parse_known_args(options)
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_known_args(rest, run)[0], rest
