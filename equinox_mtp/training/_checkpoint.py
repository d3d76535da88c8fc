"""Checkpoints by orbax: written in the background, whole or not at all, and checked when read."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from .._checks import check_integer
from ._checkpoint_files import (
    INFO,
    PREFIX,
    STATE,
    checkpoint_of,
    checkpoints,
    find_corruption,
    last_checkpoint,
    quarantine,
    remove_without_digests,
    write_digests,
)
from ._config import TrainConfig
from ._processes import is_first
from ._stored_options import from_json, to_json

_NOISE = ("Metadata file does not exist", "Requested `tracked_metric`")
logging.getLogger("absl").addFilter(
    # orbax warns of normal states: no metrics at most steps, no metadata of its own.
    lambda record: not record.getMessage().startswith(_NOISE)
)


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What is stored beside the weights: enough to build them, and to find the data again.

    `model_digest` is of the frozen main model that the depths are trained over; `None` where all
    of a model trains, and in checkpoints of earlier versions. `architecture` is the
    configuration, as JSON, of a model that is described by one.
    """

    step: int
    vocab_size: int
    data_fingerprint: str
    config: TrainConfig
    model_digest: str | None = None
    architecture: str | None = None


class Checkpoints:
    """Writes the checkpoints of a run: the last `keep` stay, and the best on held-out text.

    The best is known where an evaluation and a checkpoint fall together. Each is a folder `step_N`.
    Arrays are copied when `save` is called, and written in the background; every process writes its
    own part. A folder gets its name when all is on disk, and a list of digests after that, in the
    background too, by which damage is found. A process that is killed at any moment leaves the
    checkpoints before as they were.
    """

    def __init__(self, folder: Path, *, keep: int = 2, last_step: int | None = None):
        """**Arguments:**

        - `folder`: of the checkpoints; all processes see it.
        - `keep`: how many of the last stay; at least 2, as one may still be written.
        - `last_step`: where the run goes on; those after it, which are damaged, are renamed.

        **Raises:** `ValueError` if `keep` is less than 2.
        """
        # One may still be written, and one is whole at any moment.
        keep = check_integer("keep", keep, at_least=2)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.absolute()
        self._without_digests: Path | None = None
        self._digests_written: Future[None] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1)
        if is_first():
            remove_without_digests(self._folder)
            quarantine(self._folder, last_step)
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

        **Raises:** `OSError` if that one could not be written; `FloatingPointError` if a number in
        the state is not finite: such a checkpoint is not written.
        """
        self.wait()
        _check_finite(state, info.step)
        self._without_digests = checkpoint_of(self._folder, info.step)
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
        """Begins the digests of a checkpoint whose writing has ended.

        **Raises:** `OSError` if it could not be written.
        """
        if self._without_digests and not self._manager.is_saving_in_progress():
            self._begin_digests()

    def wait(self) -> None:
        """Waits until everything is on disk.

        **Raises:** `OSError` if it could not be written.
        """
        self._begin_digests()
        written, self._digests_written = self._digests_written, None
        if written is not None:
            with self._as_os_error():
                written.result()

    def close(self) -> None:
        """Waits until everything is on disk, and ends the writing."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._manager.close()

    def _begin_digests(self) -> None:
        """Waits for the writing to end, and begins the digests."""
        checkpoint, self._without_digests = self._without_digests, None
        with self._as_os_error():
            self._manager.wait_until_finished()
        if checkpoint is not None and is_first():
            self._digests_written = self._pool.submit(write_digests, checkpoint)

    @contextlib.contextmanager
    def _as_os_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # The storage library names each file and folder on the way; the reason comes last.
            reason = str(error)
            reason = reason if len(reason) <= 120 else f"… {reason[-120:]}"
            raise OSError(
                f"a checkpoint could not be written to {self._folder}: {reason}. Those before it "
                "are as they were; make room, and continue with --resume."
            ) from error


def save_checkpoint(
    folder: Path, state: PyTree[Any], info: CheckpointInfo, *, keep: int = 2
) -> Path:
    """Writes one checkpoint, and returns when it is on disk.

    **Raises:** `OSError` if it could not be written; `FloatingPointError` if a number in the state
    is not finite.
    """
    writer = Checkpoints(folder, keep=keep)
    try:
        writer.save(state, info)
    finally:
        writer.close()
    return checkpoint_of(folder, info.step)


def info_of_run(folder: Path) -> CheckpointInfo:
    """What the newest checkpoint says of its run, skipping those that are damaged.

    No weights are read.

    **Raises:** `FileNotFoundError` if there is no checkpoint; `ValueError` if all are damaged.
    """
    problem = None
    for path in [*reversed(checkpoints(folder))] or [last_checkpoint(folder)]:
        problem = find_corruption(path, part=INFO)
        if problem is None:
            return load_info(path)
    raise ValueError(f"{problem}. There is no other: start a new run.")


def load_info(checkpoint: Path) -> CheckpointInfo:
    """Reads what is stored beside the weights; `ValueError` if that is damaged."""
    try:
        stored = dict(json.loads((checkpoint / INFO / "metadata").read_text(encoding="utf8")))
        config = stored.pop("config")
        return CheckpointInfo(config=TrainConfig(**from_json(config)), **stored)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the checkpoint {checkpoint} is damaged, or of another version: {error!r:.160}. "
            "Delete this folder to continue from the checkpoint before it."
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
    problem = None if is_undamaged else find_corruption(checkpoint)
    if problem is not None:
        raise ValueError(f"{problem}. Delete this folder to continue from the one before it.")
    with ocp.StandardCheckpointer() as reader:
        path = checkpoint.absolute() / STATE
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


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays]))


def _check_finite(state: PyTree[Any], step: int) -> None:
    """Once a checkpoint, and not at every step: a step's loss shows what the one before has done.

    Where the loss does not, as for a token that no text has, this does.
    """
    arrays = jax.tree.leaves(eqx.filter(state, eqx.is_inexact_array))
    if arrays and not _all_finite(arrays):
        named = _by_name(eqx.filter(state, eqx.is_inexact_array))
        bad = [name for name, x in named.items() if not _all_finite([x])]
        raise FloatingPointError(
            f"{len(bad)} array(s) of the state are not finite after step {step}, such as {bad[0]}. "
            "No checkpoint of it is written; those before are of finite steps. Try a lower "
            "--learning-rate or more --warmup-steps."
        )


# Adapters to orbax


_NAMES = ocp.path.step.standard_name_format(
    step_prefix=PREFIX.rstrip("_"), step_format_fixed_length=8
)


def _quality(metrics: Any) -> float:
    """The higher the better."""
    return -metrics["held_out_loss"]


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _by_name(tree: PyTree[Any]) -> dict[str, Any]:
    """The arrays of a tree, by their dotted names."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, _is_array))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _to_json(info: CheckpointInfo) -> dict[str, Any]:
    return {**dataclasses.asdict(info), "config": to_json(info.config)}
