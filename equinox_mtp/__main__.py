"""`python -m equinox_mtp train`."""

import dataclasses
import sys
from collections.abc import Sequence

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
            f"error: the training command needs {error.name}. Install the extra `train`: "
            "pip install 'equinox-mtp[train]'",
            file=sys.stderr,
        )
        return 1

    def parse(default: TrainConfig) -> TrainConfig:
        return tyro.cli(
            TrainConfig, prog="python -m equinox_mtp train", args=options, default=default
        )

    config = parse(default=TrainConfig())
    if config.resume:
        out = config.out or newest_run_folder()
        if out is None:
            raise FileNotFoundError("`resume`: there is no run under runs/. Name one with --out.")
        # What is not said on the command line stays as it was in the run.
        stored = load_info(last_checkpoint(out / "checkpoints")).config
        config = dataclasses.replace(parse(default=stored), out=out, resume=True)
    train(config)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
