"""Stopping a run before its end."""

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

    A second one stops at once. Of several processes one that gets a SIGTERM, as clusters send it
    ahead of time, stops all of them after the same step; a Ctrl-C they would not all hear in the
    same step, and it ends the run as a kill does. Yields a function that says of a step that is
    done whether it was the last.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: False  # only the main thread hears signals
        return
    seen: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(signal_number: int, frame: FrameType | None) -> None:
        seen.append(signal_number)
        restore()

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield lambda _: bool(seen)
    finally:
        restore()
