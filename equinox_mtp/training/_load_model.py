"""The model of a run, from its checkpoint."""

import dataclasses
from pathlib import Path

import equinox as eqx

import equinox_mtp as emtp

from ._checkpoint import CheckpointInfo, checkpoints, load_info, load_state
from ._config import without_output
from ._placement import ONE_DEVICE
from ._released import check_same_model, digest_of_frozen, released_model, split_model
from ._step import make_optimizer, make_state, state_of


def load_model(
    path: str | Path, *, model: str | Path | None = None
) -> tuple[emtp.MTPModel, CheckpointInfo]:
    """The model in a checkpoint, or in a run's last one, on one device.

    A run over a released model takes that from the folder it was trained with, or from `model`.

    **Raises:** `FileNotFoundError` if there is none, or no folder of the released model;
    `ValueError` if it is damaged, or the model is another one than a run has trained depths over.
    """
    checkpoint = newest_checkpoint(path)
    info = load_info(checkpoint)
    config = info.config
    if model is not None:
        if config.model is None:
            raise ValueError(
                f"`model`: {path} was not trained over a released model, but is one of its own. "
                "Leave it out; in `generate` name the run with --checkpoint."
            )
        config = dataclasses.replace(config, model=Path(model))
    if config.model is not None and not config.model.is_dir():
        raise FileNotFoundError(
            f"`model`: {path} was trained over a released model, and there is no folder "
            f"{config.model}. Say where it is: `model=`, or --model FOLDER (in `generate` with "
            "--heads, not --checkpoint)."
        )
    optimizer = make_optimizer(config)
    if config.model is None:
        options = without_output(config)
        like = eqx.filter_eval_shape(
            make_state, options, info.vocab_size, optimizer, architecture=info.architecture
        )
        return load_state(checkpoint, like).model, info
    trained, frozen = split_model(released_model(config, ONE_DEVICE), config)
    check_same_model(info, digest_of_frozen(frozen), config.model)
    like = eqx.filter_eval_shape(state_of, trained, optimizer)
    return load_state(checkpoint, like).combined(frozen), info


def newest_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path names, or the last one of the run.

    **Raises:** `FileNotFoundError` if there is none.
    """
    path = Path(path)
    itself = [path] if path in checkpoints(path.parent) else []
    found = checkpoints(path / "checkpoints") or checkpoints(path) or itself
    if not found:
        raise FileNotFoundError(
            f"`checkpoint`: there is none in {path}. Give the folder of a run of `train`, such as "
            "runs/0001, or of one of its checkpoints. Exported heads are a `--model` by themselves."
        )
    return found[-1]
