"""Layers of several depths as one, stacked over a new leading axis.

JAX has one structure for what is stacked: that of the first layer. Layers that are built alike are
seldom equal as structures, because two closures are never equal in Python. Here functions are
compared by what they do: by their code, and by what they hold.
"""

import dataclasses
import functools
import itertools
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_Layer = TypeVar("_Layer", bound=eqx.Module)

_WITHOUT_MEANING = (object, itertools.count, type(threading.Lock()), type(threading.RLock()))
"""Kinds of things that tell instances apart, and do no more."""

_NAMES_OF_FUNCTIONS = frozenset(functools.WRAPPER_ASSIGNMENTS)
"""What a wrapper takes over from the function in it."""

_IS_HEAP_TYPE = 1 << 9
"""Python's flag for classes that a `class` statement makes."""


def stack_layers(layers: Sequence[_Layer]) -> _Layer | None:
    """The arrays of all layers, stacked, in the structure of the first; `None` for no layers.

    Whatever is no array must mean the same in all of them; it is the first layer's then:

    - Functions are the same if their code is, and what they close over, their defaults and their
        attributes are the same in turn. Partials, methods and objects are compared by their parts.
        What refers back to a part of its own layer is the same if that part is.
    - Arrays that a function or a static field holds are compared by value, since they cannot be
        stacked; traced ones, as in `jax.eval_shape`, have no value, and only their shapes and
        dtypes are compared. Keys of `jax.random` there do not count, nor do counters of
        `itertools`.
    - Labels do not count: an attribute `name` whose values differ in digits alone (`"layer_1"`,
        `"layer_2"`), and text and integers in the metadata of NNX variables, except their sharding
        and the tag of their random stream.

    **Raises:** `ValueError` that says what differs.
    """
    if not layers:
        return None
    first, *others = layers
    for depth, layer in enumerate(others, start=2):
        difference = _Comparison().difference(first, layer)
        if difference is not None:
            raise ValueError(
                "the layers of all depths must be alike, so that they can be stacked; depth "
                f"{depth} differs from depth 1: {difference.described(depth)}. Pass the same "
                "functions and sizes to every layer."
            )
    leaves = [jax.tree.leaves(layer) for layer in layers]
    stacked = [jnp.stack(xs) if eqx.is_array(xs[0]) else xs[0] for xs in zip(*leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(first), stacked)


class _Difference(NamedTuple):
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


class _Part(NamedTuple):
    """A part of a thing; `key` is how it is reached, in Python's notation."""

    key: str
    value: Any
    is_static: bool = True
    is_label: bool = False


class _Comparison:
    """Walks through two layers side by side, up to the first difference."""

    def __init__(self) -> None:
        # Things may hold themselves. The pairs are kept alive, as an `id` may be given anew.
        self._pairs: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._left_to_compare: list[tuple[Any, Any, str]] = []

    def difference(self, first: Any, other: Any) -> _Difference | None:
        """The arrays' shapes and dtypes come first, and then whatever is no array.

        In that order, as functions may hold a part of their own layer: the initial values of
        attention, for instance, the attention that they are for. By then it has been compared.
        """
        found = self._compare(first, other, "", is_static=False)
        while found is None and self._left_to_compare:
            x, y, path = self._left_to_compare.pop(0)
            found = self._compare(x, y, path, is_static=True)
        return found

    def _compare(self, x: Any, y: Any, path: str, *, is_static: bool) -> _Difference | None:
        """`is_static`: arrays must have the same values, not only the same shape and dtype."""
        if x is y or (id(x), id(y)) in self._pairs:
            return None
        if not is_static and not (eqx.is_array(x) or _is_node(x) or _is_node(y)):
            self._left_to_compare.append((x, y, path))
            return None
        self._pairs[id(x), id(y)] = (x, y)
        difference = _Difference(path, x, y, is_static)
        if type(x) is not type(y) and not (eqx.is_array(x) and eqx.is_array(y)):
            return difference
        if eqx.is_array(x):
            return None if _same_array(x, y, is_static=is_static) else difference
        if not _is_node(x) and _is_equal(x, y):
            return None
        if isinstance(x, types.FunctionType) and not _same_code(x, y):
            return difference
        parts, others = _parts(x, is_static=is_static), _parts(y, is_static=is_static)
        if parts is None or others is None:
            return difference
        if [part.key for part in parts] != [part.key for part in others]:
            return difference
        return self._compare_parts(parts, others, path, is_static=is_static)

    def _compare_parts(
        self, parts: list[_Part], others: list[_Part], path: str, *, is_static: bool
    ) -> _Difference | None:
        for part, other in zip(parts, others, strict=True):
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


def _parts(x: Any, *, is_static: bool) -> list[_Part] | None:
    """What a thing consists of; `None` if it cannot be looked into."""
    if isinstance(x, _WITHOUT_MEANING) and type(x) in _WITHOUT_MEANING:
        return []
    if isinstance(x, (type, types.ModuleType)):
        return None
    if isinstance(x, types.FunctionType):
        return _parts_of_function(x)
    if isinstance(x, types.MethodType):
        return [_Part(".__func__", x.__func__), _Part(".__self__", x.__self__)]
    if _is_random_state(x):
        return [] if is_static else _parts_of_node(x, is_static=is_static)
    if isinstance(x, functools.partial):
        return [
            _Part(".func", x.func),
            *(_Part(f".{name}", getattr(x, name), is_static) for name in ("args", "keywords")),
        ]
    if _is_node(x):
        return _parts_of_node(x, is_static=is_static)
    if isinstance(x, Mapping):
        return [_Part(f"[{key!r}]", value) for key, value in x.items()]
    if dataclasses.is_dataclass(x):
        names = [field.name for field in dataclasses.fields(x)]
        return [_Part(f".{name}", getattr(x, name)) for name in names if hasattr(x, name)]
    if type(x).__eq__ is not object.__eq__:
        # Its class says what is equal, and it is not.
        return None
    return _parts_of_object(x)


def _parts_of_function(function: types.FunctionType) -> list[_Part]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [
        _Part(".__defaults__", function.__defaults__),
        _Part(".__kwdefaults__", function.__kwdefaults__),
        *(_Part(f".{name}", _contents(cell)) for name, cell in cells),
        *_attributes(vars(function)),
    ]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        # It is not bound yet.
        return None


def _parts_of_node(node: Any, *, is_static: bool) -> list[_Part]:
    """The children of a pytree's node, and what its structure holds beside them."""
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    parts = [_Part(jax.tree_util.keystr(key), child, is_static) for key, child in children]
    if _is_variable(node):
        metadata = sorted(node.get_metadata().items())
        return parts + [
            _Part(f".{name}", value, is_label=_is_label_of_variable(name))
            for name, value in metadata
        ]
    names = {getattr(key[0], "name", None) for key, _ in children}
    attributes = getattr(node, "__dict__", {})
    if attributes and names <= attributes.keys():
        return parts + [
            _Part(f".{name}", value, is_label=name == "name")
            for name, value in sorted(attributes.items())
            if name not in names
        ]
    data = jax.tree.structure(node, is_leaf=lambda x: x is not node).node_data()
    return parts if data is None else [*parts, _Part(".static", data[1])]


def _parts_of_object(x: Any) -> list[_Part] | None:
    if hasattr(x, "__wrapped__"):
        # A function under `jax.jit`, for instance.
        return [_Part(".__wrapped__", x.__wrapped__), *_attributes(getattr(x, "__dict__", {}))]
    slots = [name for kind in type(x).__mro__ for name in _slots(kind) if hasattr(x, name)]
    if not _is_of_python(type(x)) or not (slots or hasattr(x, "__dict__")):
        return None
    named = {name: getattr(x, name) for name in slots} | getattr(x, "__dict__", {})
    return [_Part(f".{name}", value) for name, value in sorted(named.items())]


def _attributes(named: Mapping[str, Any]) -> list[_Part]:
    names = sorted(named.keys() - _NAMES_OF_FUNCTIONS)
    return [_Part(f".{name}", named[name]) for name in names]


def _is_of_python(kind: type) -> bool:
    """Whether a class shows all that its instances hold; one that is written in C may not."""
    return all(base.__flags__ & _IS_HEAP_TYPE for base in kind.__mro__[:-1])


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


# What is the same


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


def _same_label(part: _Part, other: _Part) -> bool:
    x, y = part.value, other.value
    if part.key != ".name":
        return type(x) is type(y) and isinstance(x, (str, int)) and not isinstance(x, bool)
    return isinstance(x, str) and isinstance(y, str) and _without_digits(x) == _without_digits(y)


def _without_digits(text: str) -> str:
    return "".join(character for character in text if not character.isdigit())


def _is_equal(x: Any, y: Any) -> bool:
    try:
        return bool(x == y) or bool(x != x and y != y)
    except Exception:
        # Whatever it is that they cannot be compared for, they are not known to be equal.
        return False


# Kinds


def _is_node(x: Any) -> bool:
    return not jax.tree_util.treedef_is_leaf(jax.tree.structure(x, is_leaf=lambda y: y is not x))


def _is_variable(x: Any) -> bool:
    """A variable of Flax's NNX, which need not be there."""
    # Of the class: an instance of `nnx.Rngs` has every attribute that it is asked for.
    return hasattr(type(x), "get_metadata") and hasattr(type(x), "set_value")


def _is_random_state(x: Any) -> bool:
    return _is_variable(x) and any(kind.__name__ == "RngState" for kind in type(x).__mro__)


def _is_label_of_variable(name: str) -> bool:
    return "sharding" not in name and name not in ("mesh", "tag")


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
