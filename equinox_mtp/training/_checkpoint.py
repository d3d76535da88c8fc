"""Checkpoints by orbax: written in the background, whole or not at all, and checked when read."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from ._config import TrainConfig

_NOISE = ("Metadata file does not exist", "Requested `tracked_metric`")
logging.getLogger("absl").addFilter(
    # orbax warns of what is as it should be: no metrics at most steps, no metadata of its own.
    lambda record: not record.getMessage().startswith(_NOISE)
)

_PREFIX = "step_"
_INFO, _STATE = "info", "state"
_DIGESTS = "digests.json"


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What is stored beside the weights: enough to build them, and to find the data again."""

    step: int
    vocab_size: int
    data_fingerprint: str
    config: TrainConfig


class Checkpoints:
    """Writes the checkpoints of a run: the last `keep` stay, and the best on held-out text.

    The best is known where an evaluation and a checkpoint fall together. Each is a folder `step_N`.
    Arrays are copied when `save` is called, and written in the background; every process writes its
    own part. A folder gets its name when all is on disk, and a list of digests after that, by which
    damage is found. A process that is killed at any moment leaves the checkpoints before as they
    were.
    """

    def __init__(self, folder: Path, *, keep: int = 2, last_step: int | None = None):
        """**Arguments:**

        - `folder`: of the checkpoints; all processes see it.
        - `keep`: how many of the last stay; at least 2, as one may still be written.
        - `last_step`: where the run goes on; those after it, which are damaged, are set aside.

        **Raises:** `ValueError` if `keep` is less than 2.
        """
        if keep < 2:
            raise ValueError(
                f"`keep` must be at least 2, so that one is whole at any moment; got {keep}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.absolute()
        self._is_pending = False
        if jax.process_index() == 0:
            _remove_unsealed(self._folder)
            _set_aside(self._folder, last_step)
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                step_name_format=_NAMES,
                cleanup_tmp_directories=True,
                best_fn=_quality,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=_quality,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
            ),
        )

    def save(
        self, state: PyTree[Any], info: CheckpointInfo, *, held_out_loss: float | None = None
    ) -> None:
        """Begins to write `step_N`, once the checkpoint before it is on disk.

        **Raises:** `OSError` if that one could not be written.
        """
        self.wait()
        self._is_pending = True
        self._manager.save(
            info.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_by_name(state)),
                info=ocp.args.JsonSave(_to_json(info)),
            ),
            metrics=None if held_out_loss is None else {"held_out_loss": held_out_loss},
            force=True,
        )

    def poll(self) -> None:
        """Seals a checkpoint whose writing has ended."""
        if self._is_pending and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk.

        **Raises:** `OSError` if it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise OSError(
                f"a checkpoint could not be written to {self._folder}: {error}. Those before it "
                "are as they were; make room, and continue with --resume."
            ) from error
        if self._is_pending and jax.process_index() == 0:
            for path in _written(self._folder):
                if not (path / _DIGESTS).exists():
                    _seal(path)
        self._is_pending = False

    def close(self) -> None:
        """Waits until everything is on disk, and ends the writing."""
        try:
            self.wait()
        finally:
            self._manager.close()


def save_checkpoint(
    folder: Path, state: PyTree[Any], info: CheckpointInfo, *, keep: int = 2
) -> Path:
    """Writes one checkpoint, and returns when it is on disk."""
    writer = Checkpoints(folder, keep=keep)
    try:
        writer.save(state, info)
    finally:
        writer.close()
    return checkpoint_of(folder, info.step)


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"{_PREFIX}{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return [path for path in _written(folder) if (path / _DIGESTS).is_file()]


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


def last_undamaged_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with those after it.

    **Raises:** `FileNotFoundError` if there is none; `ValueError` if all are damaged.
    """
    problems: list[str] = []
    for path in [*reversed(checkpoints(folder))] or [last_checkpoint(folder)]:
        problem = damage(path)
        if problem is None:
            return path, problems
        problems.append(problem)
    raise ValueError("; ".join(problems) + ". There is no other: start a new run.")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or `None` if they are as they were written."""
    try:
        stored = json.loads((checkpoint / _DIGESTS).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        return f"the checkpoint {checkpoint} is damaged: its digests cannot be read: {error!r}"
    found = _digests(checkpoint)
    for name in sorted({*stored, *found}):
        if stored.get(name) != found.get(name):
            kind = "is missing" if name not in found else "differs from what was written"
            return f"the checkpoint {checkpoint} is damaged: {name} {kind}"
    return None


def load_info(checkpoint: Path) -> CheckpointInfo:
    """Reads what is stored beside the weights; `ValueError` if that is damaged."""
    try:
        stored = json.loads((checkpoint / _INFO / "metadata").read_text(encoding="utf8"))
        config = stored.pop("config")
        config["data"] = tuple(Path(path) for path in config["data"])
        config["out"] = None if config["out"] is None else Path(config["out"])
        config["mtp_scaling"] = tuple(config["mtp_scaling"])
        return CheckpointInfo(config=TrainConfig(**config), **stored)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {checkpoint} is damaged, or of another version: {error!r}. Delete "
            "this folder to continue from the checkpoint before it."
        ) from error


def load_state(checkpoint: Path, like: PyTree[Any], *, is_undamaged: bool = False) -> PyTree[Any]:
    """Reads the state into the structure of `like`; checks it, unless it `is_undamaged`.

    Its arrays may be `jax.ShapeDtypeStruct`s; those with a sharding are laid out so, on whatever
    mesh that is, the others on one device.

    **Raises:** `ValueError` if the files are damaged or do not fit.
    """
    shapes, rest = eqx.partition(like, _is_array)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
        for name, x in _by_name(shapes).items()
    }
    problem = None if is_undamaged else damage(checkpoint)
    if problem is not None:
        raise ValueError(f"{problem}. Delete this folder to continue from the one before it.")
    with ocp.StandardCheckpointer() as reader:
        path = checkpoint.absolute() / _STATE
        metadata: Any = reader.metadata(path).item_metadata
        stored = {name: tuple(x.shape) for name, x in metadata.items()}
        shape_of = {name: x.shape for name, x in wanted.items()}
        if stored != shape_of:
            names = sorted({name for name, _ in stored.items() ^ shape_of.items()})
            raise ValueError(
                f"the checkpoint {checkpoint} does not fit its configuration: "
                f"{', '.join(names)} differ(s). Delete this folder to continue from the one before."
            )
        arrays = reader.restore(path, wanted)
    loaded = jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in wanted])
    return eqx.combine(loaded, rest)


# The files


_NAMES = ocp.path.step.standard_name_format(
    step_prefix=_PREFIX.rstrip("_"), step_format_fixed_length=8
)


def _written(folder: Path) -> list[Path]:
    """What orbax has given its final name, oldest first."""
    found = sorted(folder.glob(f"{_PREFIX}{'[0-9]' * 8}"))
    return [path for path in found if (path / _STATE).is_dir() and (path / _INFO).is_dir()]


def _remove_unsealed(folder: Path) -> None:
    """A process was killed before it could say that they were whole."""
    for path in _written(folder):
        if not (path / _DIGESTS).exists():
            shutil.rmtree(path)


def _set_aside(folder: Path, last_step: int | None) -> None:
    """Renames the checkpoints after a step, for people to look at: the run comes there again."""
    for path in _written(folder):
        if last_step is not None and int(path.name.removeprefix(_PREFIX)) > last_step:
            target = folder / f"damaged-{path.name}"
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def _quality(metrics: Any) -> float:
    """The higher the better."""
    return -metrics["held_out_loss"]


def _seal(checkpoint: Path) -> None:
    """Writes down the digest of every file."""
    temporary = checkpoint / f".{_DIGESTS}.tmp"
    with temporary.open("w", encoding="utf8") as stream:
        json.dump(_digests(checkpoint), stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, checkpoint / _DIGESTS)


def _digests(checkpoint: Path) -> dict[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    digests = {}
    for path in files:
        if path.name.strip(".").removesuffix(".tmp") != _DIGESTS:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            digests[path.relative_to(checkpoint).as_posix()] = digest
    return digests


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _by_name(tree: PyTree[Any]) -> dict[str, Any]:
    """The arrays of a tree, by their dotted names."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, _is_array))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _to_json(info: CheckpointInfo) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    stored = dataclasses.asdict(info)
    stored["config"] = {name: plain(value) for name, value in stored["config"].items()}
    stored["config"]["data"] = [str(path) for path in info.config.data]
    return stored
