"""Checkpoints in one folder each, written whole or not at all."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from ._config import TrainConfig

_PREFIX = "step-"
_CONFIG = "config.json"
_STATE = "state.eqx"


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What is stored beside the weights: enough to build them, and to find the data again."""

    step: int
    vocab_size: int
    data_fingerprint: str
    config: TrainConfig


def save_checkpoint(
    folder: Path, state: PyTree[Any], info: CheckpointInfo, *, keep: int = 2
) -> Path:
    """Writes the new folder `folder/step-N` atomically, and deletes all but the last `keep`.

    Everything is written to a temporary folder, flushed to disk, and renamed; a process killed at
    any moment leaves the last complete checkpoint as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_PREFIX}{info.step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    for leftover in folder.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(leftover)  # of a process that was killed
    temporary.mkdir()
    try:
        with (temporary / _STATE).open("wb") as stream:
            eqx.tree_serialise_leaves(stream, state)
            _flush(stream)
        with (temporary / _CONFIG).open("w", encoding="utf8") as stream:
            json.dump(_to_json(info), stream, indent=2)
            _flush(stream)
        _flush_folder(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush_folder(folder)
    for old in checkpoints(folder)[:-keep]:
        # Renamed first: a folder that is deleted halfway must not pass for a checkpoint.
        shutil.rmtree(old.rename(folder / f".{old.name}.old.tmp"))
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / _CONFIG).is_file())


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in a folder.

    **Raises:** `FileNotFoundError` if there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(
            f"there is no checkpoint in {folder}. Give the folder of a run that has saved one, or "
            "start a new run without --resume."
        )
    return found[-1]


def load_info(checkpoint: Path) -> CheckpointInfo:
    """Reads what is stored beside the weights; `ValueError` if that is damaged."""
    try:
        stored = json.loads((checkpoint / _CONFIG).read_text(encoding="utf8"))
        config = stored.pop("config")
        config["data"] = tuple(Path(path) for path in config["data"])
        config["out"] = None if config["out"] is None else Path(config["out"])
        config["mtp_scaling"] = tuple(config["mtp_scaling"])
        return CheckpointInfo(config=TrainConfig(**config), **stored)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{checkpoint / _CONFIG} is damaged, or of another version: {error!r}. Delete this "
            "folder to continue from the checkpoint before it."
        ) from error


def load_state(checkpoint: Path, like: PyTree[Any]) -> PyTree[Any]:
    """Reads the state into the structure of `like`, of which only shapes and dtypes matter.

    **Raises:** `ValueError` if the file is damaged or does not fit.
    """
    try:
        return eqx.tree_deserialise_leaves(checkpoint / _STATE, like)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {checkpoint} is damaged or does not fit its configuration: {error}. "
            "Delete this folder to continue from the one before it."
        ) from error


def _to_json(info: CheckpointInfo) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    stored = dataclasses.asdict(info)
    stored["config"] = {name: plain(value) for name, value in stored["config"].items()}
    stored["config"]["data"] = [str(path) for path in info.config.data]
    return stored


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
