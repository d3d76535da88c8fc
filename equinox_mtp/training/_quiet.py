"""Keeps the logs of a failed save out of the command's output."""

import functools
import logging
import sys
from typing import Any


@functools.cache
def quiet_failed_saves() -> None:
    """Lets the command say in a line why a checkpoint could not be written.

    orbax logs the same failure once a thread, with a traceback each, and its writes that end after
    it find their event loop closed. All of that is in the error that `Checkpoints` raises.
    """
    logging.getLogger("absl").addFilter(_is_news)
    # Only orbax uses asyncio here. What a write leaves behind as a future nobody asks has an error
    # of the storage library's own threads, without a traceback to know it by.
    logging.getLogger("asyncio").addFilter(lambda record: not record.exc_info)
    shown = sys.unraisablehook

    def show(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            shown(unraisable)

    sys.unraisablehook = show


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return True
    where, is_of_orbax = error.__traceback__, "/orbax/" in record.pathname.replace("\\", "/")
    while where is not None and not is_of_orbax:
        is_of_orbax = "orbax" in where.tb_frame.f_code.co_filename
        where = where.tb_next
    return not is_of_orbax
