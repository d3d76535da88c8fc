"""Checks of arguments: each returns a plain value, or raises an error that says what is wrong.

They take what is unambiguous, such as NumPy's scalars, and nothing else: no `True` for 1, and no
1.5 for an integer.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_MAX_ID = 2**31 - 1


def check_integer(
    name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None
) -> int:
    """**Raises:** `ValueError` if it is no integer, or not in `at_least … at_most`."""
    limits = _limits(at_least, at_most)
    if isinstance(value, bool | np.bool):
        raise ValueError(f"`{name}` must be an integer{limits}; got {value!r}.")
    try:
        integer = operator.index(value)
    except TypeError:
        raise ValueError(f"`{name}` must be an integer{limits}; got {_short(value)}.") from None
    if (at_least is not None and integer < at_least) or (at_most is not None and integer > at_most):
        raise ValueError(f"`{name}` must be{limits}; got {integer}.")
    return integer


def check_number(
    name: str,
    value: Any,
    *,
    at_least: int | float | None = None,
    at_most: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
) -> float:
    """**Raises:** `ValueError` if it is no finite number, or outside of its limits."""
    limits = _limits(at_least, at_most, above, below)
    is_number = isinstance(value, int | float | np.integer | np.floating)
    if not is_number or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a number{limits}; got {_short(value)}.")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite{limits and ', and' + limits}; got {number}.")
    if (
        (at_least is not None and number < at_least)
        or (at_most is not None and number > at_most)
        or (above is not None and number <= above)
        or (below is not None and number >= below)
    ):
        raise ValueError(f"`{name}` must be{limits}; got {number:g}.")
    return number


def check_flag(name: str, value: Any) -> bool:
    """**Raises:** `ValueError` if it is neither True nor False."""
    if not isinstance(value, bool | np.bool):
        raise ValueError(f"`{name}` must be True or False; got {_short(value)}.")
    return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """**Raises:** `ValueError` if it is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        wanted = " or ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be {wanted}; got {_short(value)}.")
    return value


def check_checkpoint_policy(policy: Any) -> None:
    """**Raises:** `ValueError` if it is neither a function nor `None`."""
    if not (policy is None or callable(policy)):
        raise ValueError(
            "`checkpoint_policy` must be a function, such as one of "
            f"`jax.checkpoint_policies`, or `None`; got {_short(policy)}."
        )


def check_draft_ids(ids: np.ndarray, vocab_size: int) -> None:
    """**Raises:** `ValueError` for a `draft_vocab` on the host that is empty, names an id twice, or
    one outside of the vocabulary."""
    if ids.size == 0:
        raise ValueError(
            "`draft_vocab` must hold at least one token id; got none. Leave it out to draft from "
            "all ids."
        )
    check_ids("draft_vocab", ids, vocab_size)
    if len(np.unique(ids)) < ids.size:
        raise ValueError(
            f"`draft_vocab` must hold each token id once; got {ids.size} ids, "
            f"{len(np.unique(ids))} of them different. Pass it through `np.unique`."
        )


def check_ids(name: str, ids: Any, vocab_size: int | None = None, where: Any = None) -> Any:
    """Token ids, or other ids, as integers that JAX does not cut.

    Ids on the host, in lists or NumPy arrays, must fit 32 bits and, where `where` is true or
    `None`, lie in the vocabulary. Arrays of JAX stay as they are: to read them would wait for the
    device, and they may be traced.

    **Raises:** `ValueError` for ids that do not, or rows of several lengths; `TypeError` if they
    are no integers.
    """
    if isinstance(ids, jax.Array):
        return ids
    try:
        array = np.asarray(ids)
    except ValueError:
        raise ValueError(
            f"`{name}` must have rows of one length; got lists of several. Pad them at their ends."
        ) from None
    if array.size == 0 and not isinstance(ids, np.ndarray):
        array = array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"`{name}` must be an array of integers; got one of {array.dtype}.")
    counted = array
    if where is not None and not isinstance(where, jax.Array):
        counted = array[np.broadcast_to(np.asarray(where) != 0, array.shape)]
    elif where is not None:
        vocab_size = None
    _check_range(name, array, -(2**31), _MAX_ID, "32 bits: ids are int32 on the device")
    if vocab_size is not None:
        _check_range(name, counted, 0, vocab_size - 1, f"a vocabulary of {vocab_size} ids")
    return (
        array.astype(np.int32) if array.dtype.itemsize == 8 or array.dtype == np.uint32 else array
    )


def _check_range(name: str, array: np.ndarray, low: int, high: int, of_what: str) -> None:
    if array.size == 0:
        return
    least, greatest = int(array.min()), int(array.max())
    if least < low or greatest > high:
        raise ValueError(
            f"`{name}` must lie in {low} … {high}, {of_what}; got {least} … {greatest}."
        )


def _limits(
    at_least: int | float | None,
    at_most: int | float | None,
    above: int | float | None = None,
    below: int | float | None = None,
) -> str:
    words = [
        f"{word} {limit:g}" if isinstance(limit, float) else f"{word} {limit}"
        for word, limit in (
            ("at least", at_least),
            ("above", above),
            ("at most", at_most),
            ("below", below),
        )
        if limit is not None
    ]
    return " " + " and ".join(words) if words else ""


def _short(value: Any) -> str:
    """A value in a few words, whatever it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"a `{type(value).__name__}`"
