"""One run at a time in a folder, and one process at a time that makes something."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ._processes import all_gather, is_first

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

_LOCK = ".lock"


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if there is none.

    The first of several processes holds the lock, for all of them. It ends with its process,
    however that ends; the file stays.

    **Raises:** in all processes, `BlockingIOError` if another run has the folder, and `OSError` if
    it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        problem: OSError | None = None
        if is_first():
            try:
                out.mkdir(parents=True, exist_ok=True)
                _lock(stack.enter_context((out / _LOCK).open("a+", encoding="utf8")), out)
            except OSError as error:
                problem = error
        said = all_gather(("" if problem is None else str(problem)).encode())[0].decode()
        if problem is not None:
            raise problem
        if said:
            raise BlockingIOError(said)
        yield


def _lock(file: IO[str], out: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.readline(200).strip() or "another process"
        raise BlockingIOError(
            f"`out`: a run is going on in {out}, by {owner}. Wait until it has ended, or choose "
            "another folder."
        ) from error
    except OSError:
        return  # some file systems have no locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock; its file is gone afterwards.

    It saves work, and guards nothing: some file systems have no locks.

    **Raises:** `OSError` if the file cannot be made.
    """
    with path.open("a", encoding="utf8") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Not where open files have to stay, as on Windows.
            with contextlib.suppress(OSError):
                path.unlink()
