"""Communication between the processes of a run; with one process, nothing."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints, once."""
    if is_first():
        print(text)


def broadcast(number: int) -> int:
    """The first process's number, in all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def all_gather(message: bytes) -> list[bytes]:
    """Every process's message, in all of them and in the order of the processes."""
    if jax.process_count() == 1:
        return [message]
    # Bytes throughout: without 64-bit types JAX would cut lengths and ids to 32 bits.
    length = np.frombuffer(len(message).to_bytes(8, "little"), np.uint8)
    lengths = [
        int.from_bytes(row.tobytes(), "little")
        for row in np.asarray(multihost_utils.process_allgather(length))
    ]
    padded = np.frombuffer(message.ljust(max(lengths), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row.tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]
