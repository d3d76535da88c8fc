"""Stopping a run before its end.

orbax tells several processes of a preemption; a Ctrl-C, and a run of one process, need this.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupted(KeyboardInterrupt):
    """A run was told to stop before its end, and has saved what it had."""


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[int], bool]]:
    """Lets the step in flight end, and be saved, at the first Ctrl-C or SIGTERM.

    Of several processes one that is told to stop tells the others, and all stop after the same
    step. A second Ctrl-C stops at once, and in a single process a second SIGTERM. Yields a function
    that tells of a finished step whether it was the last.
    """
    several = jax.process_count() > 1
    seen: list[int] = []

    def on_signal(signal_number: int, frame: FrameType | None) -> None:
        seen.append(signal_number)
        restore()
        if several:
            # JAX listens for this one, by which clusters announce that they take a machine away.
            signal.raise_signal(signal.SIGTERM)

    ours = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        ours = ()  # only the main thread hears signals
    previous = {number: signal.getsignal(number) for number in ours}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in ours:
        signal.signal(number, on_signal)
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda _: bool(seen)
    finally:
        restore()
        if several and ours:
            # JAX goes on listening, but nobody asks it any more.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
