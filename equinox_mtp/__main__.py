"""`python -m equinox_mtp train` and `… generate`."""

import argparse
import dataclasses
import importlib
import importlib.metadata
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_USAGE = """usage: python -m equinox_mtp COMMAND [options]

  train      train a small language model with Multi-Token Prediction
  generate   continue a text with a trained model, drafting by its prediction depths

`python -m equinox_mtp COMMAND --help` lists the options, and `--version` tells the version.
"""

_EXPECTED = (ValueError, OSError, FloatingPointError)
"""Errors that say themselves what to do."""


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    try:
        try:
            return _run(arguments)
        finally:
            # A pipe that was closed, as by `head`, says so here, and not when Python ends.
            sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has what they wanted. Nothing more is written, not by Python's end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        try:
            print(importlib.metadata.version("equinox-mtp"))
        except importlib.metadata.PackageNotFoundError:
            print("not installed")
        return 0
    command, *options = arguments
    commands: dict[str, Callable[[Sequence[str]], None]] = {"train": _train, "generate": _generate}
    if command not in commands:
        print(f"there is no command {command!r}\n\n{_USAGE}", file=sys.stderr)
        return 2
    try:
        for module in ("tyro", "equinox_mtp.training"):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(
            f"error: the command `{command}` needs {error.name}. Install the extra `train`, in the "
            "repository by: pip install -e '.[train]'",
            file=sys.stderr,
        )
        return 1
    try:
        commands[command](options)
    except BrokenPipeError:
        raise
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _train(options: Sequence[str]) -> None:
    from .training import (
        TrainConfig,
        info_of_run,
        newest_run_folder,
        parse_train_options,
        quiet_failed_saves,
        read_options,
        train,
    )

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
    if config.distributed:
        _train_in_several_processes(config)
    else:
        train(config)


def _train_in_several_processes(config: Any) -> None:
    """The part of this process; it ends at once if it fails."""
    import jax

    from .training import Interrupted, train

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
        shown = str(error) if isinstance(error, _EXPECTED) else repr(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            shown += "\nIf another process has ended, its output says why; start all again with "
            shown += "--resume."
        print(f"error: {shown}", file=sys.stderr, flush=True)
        os._exit(1)


def _generate(options: Sequence[str]) -> None:
    import tyro

    from .training import GenerateConfig, generate_text

    prog = "python -m equinox_mtp generate"
    generate_text(tyro.cli(GenerateConfig, prog=prog, args=options))


def _check_not_empty(options: Sequence[str]) -> None:
    """An empty name of a folder would be the current one: the value of a variable that is not set.

    **Raises:** `ValueError` if an option has an empty value.
    """
    for before, option in itertools.pairwise(["", *options]):
        name, equals, value = option.partition("=")
        if not option or (name.startswith("--") and equals and not value):
            named = name.removeprefix("--") or before.removeprefix("--")
            raise ValueError(f"`{named}` must not be empty. Give a value, or leave the option out.")


def _named_run(options: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`--config`, `--resume` and `--out`, on which the defaults of the others depend.

    **Returns:** these, and the options without `--config`.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    run, rest = early.parse_known_args(options)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_known_args(rest, run)[0], rest


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
