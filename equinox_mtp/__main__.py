"""`python -m equinox_mtp train`, `… generate` and `… export`."""

import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence

_USAGE = """usage: python -m equinox_mtp COMMAND [options]

  train      train a small language model with Multi-Token Prediction
  generate   continue a text with a trained or a released model, drafting by its prediction depths
  export     write a trained model as a folder for transformers, vLLM or SGLang

`python -m equinox_mtp COMMAND --help` lists the options, and `--version` tells the version.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    try:
        try:
            return _run(arguments)
        finally:
            # A pipe that was closed, as by `head`, says so here, and not when Python ends.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe. Nothing more is written, not even when Python exits.
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
    if command not in ("train", "generate", "export"):
        print(f"there is no command {command!r}\n\n{_USAGE}", file=sys.stderr)
        return 2
    try:
        from .training import export_command, generate_command, train_command
    except ModuleNotFoundError as error:
        print(
            f"error: the command `{command}` needs {error.name}. Install the extra `train`, in the "
            "repository by: pip install -e '.[train]'",
            file=sys.stderr,
        )
        return 1
    try:
        commands = {"train": train_command, "generate": generate_command, "export": export_command}
        commands[command](options)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
