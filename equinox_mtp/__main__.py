"""`python -m equinox_mtp train`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

_USAGE = """usage: python -m equinox_mtp train [options]

  train    train a small language model with Multi-Token Prediction

`python -m equinox_mtp train --help` lists the options.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    command, *options = arguments
    if command != "train":
        print(f"there is no command {command!r}\n\n{_USAGE}", file=sys.stderr)
        return 2
    try:
        return _train(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _train(options: Sequence[str]) -> int:
    try:
        import tyro

        from .training import TrainConfig, last_checkpoint, load_info, newest_run_folder, train
    except ModuleNotFoundError as error:
        print(
            f"error: the training command needs {error.name}. Install the extra `train`, in "
            "the repository by: pip install -e '.[train]'",
            file=sys.stderr,
        )
        return 1

    prog, default = "python -m equinox_mtp train", TrainConfig()
    run = _named_run(options)
    if run.resume:
        out = run.out or newest_run_folder(with_checkpoint=True)
        if out is None:
            raise FileNotFoundError(
                "`resume`: no run under runs/ has a checkpoint. Name a run with --out."
            )
        # What is not said on the command line stays as it was in the run.
        stored = load_info(last_checkpoint(out / "checkpoints")).config
        default = dataclasses.replace(stored, out=out)
    config = tyro.cli(TrainConfig, prog=prog, args=options, default=default)
    train(config)
    return 0


def _named_run(options: Sequence[str]) -> argparse.Namespace:
    """`--resume` and `--out`, ahead of the other options, whose defaults depend on them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_known_args(options)[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
