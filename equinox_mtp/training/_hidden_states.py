"""A frozen main model's hidden states of every training row, kept on disk.

A row's are computed when it is first read, and read from the file in later epochs. They have one
size, and so one place in the file: which rows are there, a file of flags says. A flag is on disk
after what it stands for, so that a process that is killed at any moment leaves no wrong row.

Files are written and read, and not mapped into memory: of a mapped file a full disk would end the
process by a signal.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import equinox_mtp as emtp

from .._whole_file import whole_file
from ._losses import main_hidden_states
from ._packing import Rows

_INFO, _FLAGS, _STATES = "info.json", "present.bin", "states.bin"


@dataclasses.dataclass(frozen=True)
class HiddenStateLayout:
    """Of what the hidden states of a file are, and how they lie there: `[rows seq embed]`.

    `model` is a digest of the main model, and `data` of all documents; with `seed`, which says
    which of them are held out, and `seq_len` they decide what a row is.
    """

    model: str
    data: str
    seed: int
    num_rows: int
    seq_len: int
    embed_size: int
    dtype: str

    @property
    def row_shape(self) -> tuple[int, int]:
        """`[seq embed]`."""
        return self.seq_len, self.embed_size

    @property
    def row_bytes(self) -> int:
        """Of a row."""
        return self.seq_len * self.embed_size * np.dtype(self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        """Of all rows."""
        return self.num_rows * self.row_bytes

    def __str__(self) -> str:
        return (
            f"{size_of(self.num_bytes)} ({self.num_rows} rows x {self.seq_len} positions x "
            f"{self.embed_size} features x {np.dtype(self.dtype).itemsize} bytes)"
        )


class HiddenStateCache:
    """The hidden states of rows in a folder, which one run at a time has.

    What is there of another model, or of other rows, is made anew.
    """

    def __init__(self, folder: Path, layout: HiddenStateLayout):
        """**Raises:** `OSError` if the folder cannot be written."""
        self._folder, self._layout = folder, layout
        self.was_of_others = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = _read_info(folder)
            if found != _written(layout):
                self.was_of_others = found is not None
                _make(folder, layout)
            self._present = np.fromfile(folder / _FLAGS, np.uint8) != 0
            self._states = (folder / _STATES).open("r+b", buffering=0)
        except OSError as error:
            raise self._problem(error) from error

    def has(self, rows: np.ndarray) -> bool:
        """Whether all of these rows are there."""
        return bool(np.all(self._present[rows]))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The hidden states `[… seq embed]` of rows `[…]` that are there."""
        row_bytes = self._layout.row_bytes
        states = np.empty((*rows.shape, *self._layout.row_shape), self._layout.dtype)
        by_row: Any = states.view(np.uint8).reshape(-1, row_bytes)
        for row, target in zip(rows.flat, by_row, strict=True):
            self._states.seek(int(row) * row_bytes)
            if self._states.readinto(target) != row_bytes:
                raise self._problem(OSError(f"{_STATES} was cut meanwhile"))
        return states

    def write(self, rows: np.ndarray, states: np.ndarray) -> None:
        """Adds the hidden states `[batch seq embed]` of those of the rows `[batch]` not there yet.

        **Raises:** `OSError` if the disk is full.
        """
        for row, of_row in zip(rows, np.ascontiguousarray(states), strict=True):
            if self._present[row]:
                continue
            try:
                self._states.seek(int(row) * self._layout.row_bytes)
                view = memoryview(of_row.view(np.uint8).reshape(-1))
                while view:
                    view = view[self._states.write(view) :]
            except OSError as error:
                raise self._problem(error) from error
            self._present[row] = True

    def flush(self) -> None:
        """Lets later processes find what was written up to now.

        **Raises:** `OSError` if the disk is full.
        """
        try:
            os.fsync(self._states.fileno())
            with (self._folder / _FLAGS).open("r+b") as flags:
                flags.write(self._present.tobytes())
                flags.flush()
                os.fsync(flags.fileno())
        except OSError as error:
            raise self._problem(error) from error

    def close(self) -> None:
        """Closes the file; what was not flushed is computed again in the next run."""
        self._states.close()

    def _problem(self, error: OSError) -> OSError:
        return OSError(
            f"`cache_hidden_states`: hidden states cannot be kept in {self._folder}: "
            f"{error.strerror or error}. Make room, or continue with --resume "
            "--no-cache-hidden-states."
        )


@eqx.filter_jit
def run_main_model(decoder: emtp.AbstractDecoder, rows: Rows) -> jax.Array:
    """Its hidden states of some rows."""
    return main_hidden_states(decoder, emtp.make_batch(rows.tokens, segment_ids=rows.segment_ids))


def hidden_states_of(
    cache: HiddenStateCache, decoder: emtp.AbstractDecoder, indices: np.ndarray, rows: Rows
) -> jax.Array:
    """Those of rows `[microbatch batch …]`, whose `indices` are `[microbatch batch]`.

    The main model runs for microbatches with a row that is not there. What a step gets comes from
    the file in any case, so that it does not matter which rows were there.
    """
    for index, of_microbatch in enumerate(indices):
        if not cache.has(of_microbatch):
            one = jax.tree.map(lambda x, i=index: x[i], rows)
            cache.write(of_microbatch, np.asarray(run_main_model(decoder, one)))
    return jnp.asarray(cache.read(indices))


def hidden_state_layout(
    decoder: emtp.AbstractDecoder, *, num_rows: int, seq_len: int, **of_what: Any
) -> HiddenStateLayout:
    """How the hidden states of a main model lie in a file; nothing is computed."""
    states = eqx.filter_eval_shape(
        lambda ids: main_hidden_states(decoder, emtp.make_batch(ids)),
        jax.ShapeDtypeStruct((1, seq_len + 1), jnp.int32),
    )
    return HiddenStateLayout(
        num_rows=num_rows,
        seq_len=seq_len,
        embed_size=states.shape[-1],
        dtype=str(states.dtype),
        **of_what,
    )


def check_room(folder: Path, layout: HiddenStateLayout) -> None:
    """**Raises:** `OSError` if the disk has not as much room as all rows take."""
    states = folder / _STATES
    # Of a sparse file: what is on disk, and not how long it is.
    taken = getattr(states.stat(), "st_blocks", 0) * 512 if states.exists() else 0
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    room = taken + shutil.disk_usage(there).free
    if layout.num_bytes > room:
        raise OSError(
            f"`cache_hidden_states` needs {layout} in {folder}; the disk has room for "
            f"{size_of(room)}. Make room, choose another folder with --out, or leave it out."
        )


def size_of(num_bytes: int) -> str:
    """A number of bytes in three digits or so."""
    size, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


# The folder


def _written(layout: HiddenStateLayout) -> dict[str, Any]:
    return {"format": 1, **dataclasses.asdict(layout)}


def _read_info(folder: Path) -> dict[str, Any] | None:
    """What `info.json` says; `None` if nothing whole is there."""
    try:
        info = dict(json.loads((folder / _INFO).read_text(encoding="utf8")))
        sizes = (folder / _FLAGS).stat().st_size, (folder / _STATES).stat().st_size
        wanted = HiddenStateLayout(**{k: v for k, v in info.items() if k != "format"})
        return info if sizes == (wanted.num_rows, wanted.num_bytes) else None
    except (OSError, TypeError, ValueError, RecursionError):
        return None


def _make(folder: Path, layout: HiddenStateLayout) -> None:
    """Files without any row; `info.json` comes last, and goes first."""
    for name in (_INFO, _FLAGS, _STATES):
        (folder / name).unlink(missing_ok=True)
    (folder / _FLAGS).write_bytes(bytes(layout.num_rows))
    with (folder / _STATES).open("wb") as states:
        states.truncate(layout.num_bytes)
    with whole_file(folder / _INFO) as file:
        file.write((json.dumps(_written(layout), indent=1) + "\n").encode())
