"""What a thing that is no array consists of, as far as it has a meaning."""

import dataclasses
import functools
import itertools
import threading
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax

_WITHOUT_MEANING = (object, itertools.count, type(threading.Lock()), type(threading.RLock()))
"""Kinds of things that tell instances apart, and do no more."""

_NAMES_OF_FUNCTIONS = frozenset(functools.WRAPPER_ASSIGNMENTS)
"""What a wrapper takes over from the function in it."""

_IS_HEAP_TYPE = 1 << 9
"""Python's flag for classes that a `class` statement makes."""


class Part(NamedTuple):
    """A part of a thing; `key` is how it is reached, in Python's notation."""

    key: str
    value: Any
    is_static: bool = True
    is_label: bool = False


def parts(x: Any, *, is_static: bool) -> list[Part] | None:
    """What a thing consists of; `None` if it cannot be looked into."""
    if isinstance(x, _WITHOUT_MEANING) and type(x) in _WITHOUT_MEANING:
        return []
    if isinstance(x, (type, types.ModuleType)):
        return None
    if isinstance(x, types.FunctionType):
        return _parts_of_function(x)
    if isinstance(x, types.MethodType):
        return [Part(".__func__", x.__func__), Part(".__self__", x.__self__)]
    if _is_random_state(x):
        return [] if is_static else _parts_of_node(x, is_static=is_static)
    if isinstance(x, functools.partial):
        return [
            Part(".func", x.func),
            *(Part(f".{name}", getattr(x, name), is_static) for name in ("args", "keywords")),
        ]
    if is_node(x):
        return _parts_of_node(x, is_static=is_static)
    if isinstance(x, Mapping):
        return [Part(f"[{key!r}]", value) for key, value in x.items()]
    if dataclasses.is_dataclass(x):
        names = [field.name for field in dataclasses.fields(x)]
        return [Part(f".{name}", getattr(x, name)) for name in names if hasattr(x, name)]
    if type(x).__eq__ is not object.__eq__:
        # Its class says what is equal, and it is not.
        return None
    return _parts_of_object(x)


def _parts_of_function(function: types.FunctionType) -> list[Part]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [
        Part(".__defaults__", function.__defaults__),
        Part(".__kwdefaults__", function.__kwdefaults__),
        *(Part(f".{name}", _contents(cell)) for name, cell in cells),
        *_attributes(vars(function)),
    ]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        # It is not bound yet.
        return None


def _parts_of_node(node: Any, *, is_static: bool) -> list[Part]:
    """The children of a pytree's node, and what its structure holds besides."""
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    parts = [Part(jax.tree_util.keystr(key), child, is_static) for key, child in children]
    if _is_variable(node):
        metadata = sorted(node.get_metadata().items())
        return parts + [
            Part(f".{name}", value, is_label=_is_label_of_variable(name))
            for name, value in metadata
        ]
    names = {getattr(key[0], "name", None) for key, _ in children}
    attributes = getattr(node, "__dict__", {})
    if attributes and names <= attributes.keys():
        return parts + [
            # Equinox gives its modules no names: there it is a field like others.
            Part(f".{name}", value, is_label=name == "name" and not isinstance(node, eqx.Module))
            for name, value in sorted(attributes.items())
            if name not in names
        ]
    data = jax.tree.structure(node, is_leaf=lambda x: x is not node).node_data()
    return parts if data is None else [*parts, Part(".static", data[1])]


def _parts_of_object(x: Any) -> list[Part] | None:
    if hasattr(x, "__wrapped__"):
        # A function under `jax.jit`, for instance.
        return [Part(".__wrapped__", x.__wrapped__), *_attributes(getattr(x, "__dict__", {}))]
    slots = [name for kind in type(x).__mro__ for name in _slots(kind) if hasattr(x, name)]
    if not _is_of_python(type(x)) or not (slots or hasattr(x, "__dict__")):
        return None
    named = {name: getattr(x, name) for name in slots} | getattr(x, "__dict__", {})
    return [Part(f".{name}", value) for name, value in sorted(named.items())]


def _attributes(named: Mapping[str, Any]) -> list[Part]:
    names = sorted(named.keys() - _NAMES_OF_FUNCTIONS)
    return [Part(f".{name}", named[name]) for name in names]


def _is_of_python(kind: type) -> bool:
    """Whether a class shows all that its instances hold; one that is written in C may not."""
    return all(base.__flags__ & _IS_HEAP_TYPE for base in kind.__mro__[:-1])


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def is_node(x: Any) -> bool:
    return not jax.tree_util.treedef_is_leaf(jax.tree.structure(x, is_leaf=lambda y: y is not x))


def _is_variable(x: Any) -> bool:
    """A variable of Flax's NNX, which need not be there."""
    # Of the class: an instance of `nnx.Rngs` has every attribute that it is asked for.
    return hasattr(type(x), "get_metadata") and hasattr(type(x), "set_value")


def _is_random_state(x: Any) -> bool:
    return _is_variable(x) and any(kind.__name__ == "RngState" for kind in type(x).__mro__)


def _is_label_of_variable(name: str) -> bool:
    return "sharding" not in name and name not in ("mesh", "tag")
