"""Whether two layers mean the same, part by part.

Layers that are built alike are seldom equal as structures, because two closures are never equal in
Python. Here functions are compared by what they do: by their code, and by what they hold.
"""

import re
import types
from pathlib import PurePath
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._parts import Part, is_node, parts

_NUMBER = re.compile(r"\d+")


class Difference(NamedTuple):
    path: str
    first: Any
    other: Any
    is_static: bool

    def described(self, depth: int) -> str:
        path = self.path if len(self.path) <= 100 else "…" + self.path[-99:]
        first, other = _description(self.first), _description(self.other)
        if first == other:
            other = "another one"
        static = " (static)" if self.is_static else ""
        return f"`{path}`{static} is {first} at depth 1, and {other} at depth {depth}"


class Comparison:
    """Walks through two layers side by side, up to the first difference."""

    def __init__(self) -> None:
        # Things may hold themselves. The pairs are kept alive, as an `id` may be used again.
        self._pairs: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._left_to_compare: list[tuple[Any, Any, str]] = []

    def difference(self, first: Any, other: Any) -> Difference | None:
        """The arrays' shapes and dtypes come first, and then whatever is no array.

        In that order, as functions may hold a part of their own layer: the initial values of
        attention, for instance, the attention that they are for. By then it has been compared.
        """
        found = self._compare(first, other, "", is_static=False)
        while found is None and self._left_to_compare:
            x, y, path = self._left_to_compare.pop(0)
            found = self._compare(x, y, path, is_static=True)
        return found

    def _compare(self, x: Any, y: Any, path: str, *, is_static: bool) -> Difference | None:
        """`is_static`: arrays must have the same values, not only the same shape and dtype."""
        if x is y or (id(x), id(y)) in self._pairs:
            return None
        if not is_static and not (eqx.is_array(x) or is_node(x) or is_node(y)):
            self._left_to_compare.append((x, y, path))
            return None
        self._pairs[id(x), id(y)] = (x, y)
        difference = Difference(path, x, y, is_static)
        if type(x) is not type(y) and not (eqx.is_array(x) and eqx.is_array(y)):
            return difference
        if eqx.is_array(x):
            return None if _same_array(x, y, is_static=is_static) else difference
        if not is_node(x) and _is_equal(x, y):
            return None
        if isinstance(x, types.FunctionType) and not _same_code(x, y):
            return difference
        mine, others = parts(x, is_static=is_static), parts(y, is_static=is_static)
        if mine is None or others is None:
            return difference
        if [part.key for part in mine] != [part.key for part in others]:
            return difference
        return self._compare_parts(mine, others, path, is_static=is_static)

    def _compare_parts(
        self, mine: list[Part], others: list[Part], path: str, *, is_static: bool
    ) -> Difference | None:
        for part, other in zip(mine, others, strict=True):
            where = path + part.key
            if part.is_label and _same_label(part, other):
                continue
            if part.is_static and not is_static:
                self._left_to_compare.append((part.value, other.value, where))
                continue
            found = self._compare(part.value, other.value, where, is_static=part.is_static)
            if found is not None:
                return found
        return None


def _same_array(x: Any, y: Any, *, is_static: bool) -> bool:
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return False
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    if not is_static:
        return True
    if isinstance(x, Tracer) or isinstance(y, Tracer):
        return isinstance(x, Tracer) and isinstance(y, Tracer)
    return bool(np.array_equal(np.asarray(x), np.asarray(y)))


def _same_code(x: types.FunctionType, y: types.FunctionType) -> bool:
    return x.__code__ == y.__code__ and x.__globals__ is y.__globals__


def _same_label(part: Part, other: Part) -> bool:
    x, y = part.value, other.value
    if part.key != ".name":
        return type(x) is type(y) and isinstance(x, (str, int)) and not isinstance(x, bool)
    # "relu" and "relu6" are no labels: one of them has no number.
    return isinstance(x, str) and isinstance(y, str) and _NUMBER.sub("0", x) == _NUMBER.sub("0", y)


def _is_equal(x: Any, y: Any) -> bool:
    try:
        return bool(x == y) or bool(x != x and y != y)
    except Exception:
        # Whatever it is that they cannot be compared for, they are not known to be equal.
        return False


def _description(x: Any) -> str:
    """A value in at most 60 characters."""
    if isinstance(x, types.FunctionType):
        code = x.__code__
        text = f"`{x.__qualname__}` ({PurePath(code.co_filename).name}:{code.co_firstlineno})"
    elif eqx.is_array(x):
        text = eqx.tree_pformat(x)
    else:
        text = " ".join(eqx.tree_pformat(x).split())
    return text if len(text) <= 60 else text[:59] + "…"
