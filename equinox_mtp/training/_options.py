"""What is known of an option beside its type and default, and how its value is checked."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from .._checks import check_integer, check_number

USUAL_TEMPERATURE = 1.0
"""Of a model's own texts."""
LARGEST = 2**31 - 1
"""JAX counts in 32 bits."""
SMALLEST_RATE = float(np.finfo(np.float32).tiny)
"""Rates are used in float32: less is 0 there."""
_LARGEST_NUMBER = float(np.finfo(np.float32).max)

DATA, MODEL, DEPTHS, OPTIMISATION, DEVICES, OUTPUT = GROUPS = (
    "data",
    "model",
    "prediction depths",
    "optimisation",
    "devices",
    "output",
)


class Option(NamedTuple):
    """What is known of a field of `TrainConfig`, beside its type and default.

    **Fields:**

    - `group`: one of `GROUPS`.
    - `help`: a sentence or two.
    - `is_common`: whether it stands among the first in the command's help.
    - `may_change`: whether a run may go on with another value.
    - `may_differ`: whether the processes of a run may have different values.
    - `kind`, `at_least`, `at_most`: of a number, `int` or `float`, and its range.
    - `choices`: of anything else, the values that it can have; empty for any.
    """

    group: str
    help: str
    is_common: bool = False
    may_change: bool = False
    may_differ: bool = False
    kind: type | None = None
    at_least: int | float = 0
    at_most: int | float = 0
    choices: tuple[Any, ...] = ()

    def check(self, name: str, value: Any, default: Any) -> Any:
        """The value, with NumPy's numbers as Python's.

        **Raises:** `ValueError` if it cannot be this option's.
        """
        if value is None and default is None:
            return None
        if self.kind is int:
            check_integer(name, value, at_least=int(self.at_least))
            return check_integer(name, value, at_most=int(self.at_most))
        if self.kind is float:
            return check_finite(name, value, at_least=self.at_least, at_most=self.at_most)
        # By its type, too: 1 is equal to `True`.
        choices = [(type(choice), choice) for choice in self.choices]
        if choices and (type(value), value) not in choices:
            wanted = " or ".join(repr(choice) for _, choice in choices)
            raise ValueError(f"`{name}` must be {wanted}; got {shorten(value)}.")
        return value


def check_finite(
    name: str, value: Any, *, at_least: int | float, at_most: int | float = _LARGEST_NUMBER
) -> float:
    """**Raises:** `ValueError` if it is no number, or outside of its range in float32."""
    # One limit at a time: the message names the one that matters.
    check_number(name, value, at_least=at_least)
    return check_number(name, value, at_most=at_most)


def shorten(value: Any) -> str:
    """A value in an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# The fields of `TrainConfig`


def option(default: Any, group: str, help: str, **rest: Any) -> Any:
    """A field of any type."""
    return dataclasses.field(default=default, metadata={"option": Option(group, help, **rest)})


def integer(
    default: int | None,
    group: str,
    help: str,
    *,
    at_least: int = 0,
    at_most: int = LARGEST,
    **rest: Any,
) -> Any:
    """A field that is an integer."""
    return option(default, group, help, kind=int, at_least=at_least, at_most=at_most, **rest)


def number(
    default: float | None,
    group: str,
    help: str,
    *,
    at_least: int | float = 0,
    at_most: int | float = _LARGEST_NUMBER,
    **rest: Any,
) -> Any:
    """A field that is a finite number."""
    return option(default, group, help, kind=float, at_least=at_least, at_most=at_most, **rest)


def choice(default: Any, group: str, help: str, choices: tuple[Any, ...], **rest: Any) -> Any:
    """A field that is one of some values."""
    return option(default, group, help, choices=choices, **rest)
