"""The options of a run in a file of its folder, for people and for `--config`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from .._whole_file import whole_file
from ._config import TrainConfig, options

FILE_NAME = "config.json"


def write_options(folder: Path, config: TrainConfig) -> None:
    """Writes `config.json` into the folder of a run, whole or not at all."""
    with whole_file(folder / FILE_NAME) as file:
        file.write((json.dumps(to_json(config), indent=1) + "\n").encode())


def read_options(path: Path, default: TrainConfig) -> TrainConfig:
    """The options of a run: its `config.json`, or the folder that holds one.

    The folder of the run, whether it was resumed, and its devices are not taken from there.

    **Raises:** `FileNotFoundError` if there is no such file; `ValueError` if it holds something
    else.
    """
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"`config`: there is no file {path}. Name a run's folder, or its config.json."
        )
    try:
        stored = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"`config`: {path} is no JSON object. Name a run's config.json.")
    unknown = sorted(set(stored) - set(options()))
    if unknown:
        raise ValueError(
            f"`config`: {path} has options that do not exist: {', '.join(unknown)}. Take them out."
        )
    stored = {name: x for name, x in stored.items() if name not in ("out", "resume")}
    return dataclasses.replace(default, **from_json(stored))


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Options as JSON has them."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(x) for x in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(x) for name, x in vars(config).items()}


def from_json(stored: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `to_json`, for some of the options or all of them."""
    found = dict(stored)
    if isinstance(data := found.get("data"), list):
        found["data"] = tuple(Path(path) for path in data)
    for name in ("out", "tokenizer", "model", "architecture"):
        if isinstance(found.get(name), str):
            found[name] = Path(found[name])
    if isinstance(scaling := found.get("mtp_scaling"), list):
        found["mtp_scaling"] = tuple(scaling)
    return found
