"""Finding checkpoints, and detecting corruption.

orbax writes them; it has no digests by which a user could tell a damaged file.
"""

import hashlib
import json
import shutil
from pathlib import Path

import jax

from .._whole_file import whole_file
from ._processes import all_gather

PREFIX = "step_"
INFO, STATE = "info", "state"
_DIGESTS = "digests.json"
_NO_CHECKPOINT = (
    "there is no checkpoint in {}. Give the folder of a run that has saved one, or start a new run "
    "without --resume."
)


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"{PREFIX}{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return [path for path in written(folder) if (path / _DIGESTS).is_file()]


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in a folder.

    **Raises:** `FileNotFoundError` if there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(_NO_CHECKPOINT.format(folder))
    return found[-1]


def last_undamaged_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with those after it.

    In several processes, which all call this, each reads its share of the files.

    **Raises:** `FileNotFoundError` if there is none; `ValueError` if all are damaged.
    """
    # What the first process sees counts: a folder on a network may look older to others.
    names = all_gather("\n".join(path.name for path in checkpoints(folder)).encode())[0].decode()
    if not names:
        raise FileNotFoundError(_NO_CHECKPOINT.format(folder))
    process, num_processes = jax.process_index(), jax.process_count()
    problems: list[str] = []
    for path in (folder / name for name in reversed(names.splitlines())):
        mine = find_corruption(path, process=process, num_processes=num_processes) or ""
        found = [message.decode() for message in all_gather(mine.encode()) if message]
        if not found:
            return path, problems
        problems.append(found[0])
    raise ValueError("; ".join(problems) + ". There is no other: start a new run.")


def find_corruption(
    checkpoint: Path, *, part: str = "", process: int = 0, num_processes: int = 1
) -> str | None:
    """What is wrong with a checkpoint's files, or `None` if they are as they were written.

    **Arguments:**

    - `part`: the folder of those to look at; all if empty.
    - `process`, `num_processes`: of several processes this one reads every `num_processes`-th file.
    """
    is_damaged = f"the checkpoint {checkpoint} is damaged:"
    try:
        stored = dict(json.loads((checkpoint / _DIGESTS).read_text(encoding="utf8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        return f"{is_damaged} its digests cannot be read: {error!r:.160}"
    files = _files(checkpoint)
    names = [name for name in sorted({*stored, *files}) if name.startswith(part)]
    for name in names[process::num_processes]:
        if name not in files:
            return f"{is_damaged} {name} is missing"
        try:
            found = _digest(files[name])
        except OSError as error:
            return f"{is_damaged} {name} cannot be read: {error}"
        if stored.get(name) != found:
            return f"{is_damaged} {name} differs from what was written"
    return None


# For the writer


def written(folder: Path) -> list[Path]:
    """What orbax has given its final name, oldest first."""
    found = sorted(folder.glob(f"{PREFIX}{'[0-9]' * 8}"))
    return [path for path in found if path.is_dir()]


def remove_without_digests(folder: Path) -> None:
    """Removes checkpoints without digests: their process was killed before it could write them."""
    for path in written(folder):
        if not (path / _DIGESTS).exists():
            shutil.rmtree(path)


def quarantine(folder: Path, last_step: int | None) -> None:
    """Renames the checkpoints after a step, for people to look at: the run comes there again."""
    for path in written(folder):
        if last_step is not None and int(path.name.removeprefix(PREFIX)) > last_step:
            target = folder / f"damaged-{path.name}"
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def write_digests(checkpoint: Path) -> None:
    """Writes down the digest of every file."""
    digests = {name: _digest(path) for name, path in _files(checkpoint).items()}
    with whole_file(checkpoint / _DIGESTS) as file:
        file.write(json.dumps(digests, indent=1).encode())


def _files(checkpoint: Path) -> dict[str, Path]:
    """All but the list of digests, by their names."""
    return {
        path.relative_to(checkpoint).as_posix(): path
        for path in sorted(checkpoint.rglob("*"))
        # A process that was killed may have left the beginning of one.
        if path.is_file() and not path.name.removeprefix(".").startswith(_DIGESTS)
    }


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
