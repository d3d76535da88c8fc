"""The axis words that every annotation and docstring of the library uses.

| word | meaning |
|---|---|
| `batch` | rows of a batch |
| `seq` | positions in a row |
| `embed` | features of a hidden state |
| `vocab` | token ids |
| `depth` | prediction depths 1 … D of Multi-Token Prediction, always the leading axis |
| `heads` | query heads of attention |
| `kv_heads` | key and value heads of attention |
| `head_dim` | features of one head |
| `mlp` | features inside the feed-forward network |
| `query_rank` | features of the latent that queries are projected from |
| `kv_rank` | features of the latent that keys and values are projected from |
| `experts` | networks of a mixture of experts |
| `width` | positions that a short convolution sees |
"""

import functools
import re
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import numpy as np
from beartype import beartype
from jax.core import Tracer
from jaxtyping import Array, Float, Integer, TypeCheckError, jaxtyped

AXIS_WORDS = frozenset(
    (
        *("batch", "seq", "embed", "vocab", "depth", "heads", "kv_heads", "head_dim", "mlp"),
        *("query_rank", "kv_rank", "experts", "width"),
    )
)
"""Those of the table above."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def checked(function: _Function) -> _Function:
    """Checks the annotated shapes, dtypes and types of every call; free inside a cached jit.

    **Raises:** `jaxtyping.TypeCheckError`, in a few lines that begin with the argument: jaxtyping's
    own prints every argument, and with it a whole model.
    """
    inner: Any = jaxtyped(typechecker=beartype)(function)
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except TypeCheckError as error:
            message = _first_lines(str(error), name)
            if message is None:
                raise
        raise TypeCheckError(message)

    return call  # pyright: ignore[reportReturnType]


_OURS = ("equinox_mtp", "jaxtyping", "beartype")


def warn_caller(message: str) -> None:
    """A warning about the line that called this library.

    The checks of types add frames of their own, more or fewer by version and settings.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _package_of(frame) in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


_PROBLEM = re.compile(
    r"whilst checking the (?P<what>parameters|return value) of (?P<name>[^\n]*?)\.\n"
    r"(?:The problem arose whilst typechecking parameter '(?P<argument>\w+)'\.\n)?"
    r"(?:Actual value: (?P<value>.*?)\nExpected type: (?P<type>.*?)\.?\n)?",
    re.DOTALL,
)


def _first_lines(message: str, name: str) -> str | None:
    """A check's message, shortened; `None` if it is about another function than `name`."""
    problem = _PROBLEM.search(message)
    if problem is None or problem["name"] != name:
        return None
    what = f"`{problem['argument']}`" if problem["argument"] else f"the {problem['what']}"
    value = " ".join((problem["value"] or "another value").split())
    wanted = " ".join((problem["type"] or "of the types and shapes in its signature").split())
    wanted = _plain_type(wanted)
    _, _, axes = message.partition("The current values for each jaxtyping axis")
    axes = ", ".join(axes.splitlines()[1:])
    axes = f"\nAxes so far: {_cut(axes, 100)}." if axes else ""
    return (
        f"{what} must be {_cut(wanted, 120)}; got {_cut(value, 80)}.\n"
        f"In a call of `{_public_name(name)}`.{axes}"
    )


_MODULES = (
    r"\bjaxlib\._jax\.",
    r"\bjax\._src\.(\w+\.)*",
    r"\bequinox_mtp\.",
    r"\b_\w+\.",
    r"\b(jaxtyping|collections\.abc|typing)\.",
)
"""Modules without which annotations are shown: private ones, and those that go without saying."""


def _plain_type(text: str) -> str:
    """As annotations name it: `Integer[Array, 'batch seq']`, `'pooled' or 'mean_of_depths'`."""
    for written in (r"<class '", r"'>", *_MODULES):
        text = re.sub(written, "", text)
    if optional := re.fullmatch(r"Optional\[(.*)\]", text):
        text = f"{optional[1]} | None"
    if union := re.fullmatch(r"Union\[(.*)\]", text):
        text = re.sub(r"(\]|\w), (?=[A-Za-z])", r"\1 | ", union[1])
    text = re.sub(r"Literal\[([^]]*)\]", lambda found: found[1].replace(", ", " | "), text)
    return text.replace(" | ", " or ").replace("NoneType", "None")


def _public_name(name: str) -> str:
    """Without the files that users do not import from."""
    _, *parts = name.split(".")
    return ".".join(part for part in parts if not part.startswith("_") or part.startswith("__"))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


HostOrDeviceArray: TypeAlias = Array | np.ndarray
"""Integer batches come from data pipelines, where they are often NumPy arrays still."""

Scalar: TypeAlias = float | int | np.floating | np.integer | Float[Array, ""] | Integer[Array, ""]
"""A number of Python, of NumPy, or an array without axes, which may be traced."""


def at_hand(array: Any) -> Any:
    """A number or an array as one of NumPy, if its values can be read; itself otherwise."""
    if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True):
        return array
    return np.asarray(array)


def on_host(array: Any) -> np.ndarray | None:
    """A number or an array as one of NumPy, if its values can be read; `None` otherwise."""
    values = at_hand(array)
    return values if isinstance(values, np.ndarray) else None


OutputHead: TypeAlias = Float[Array, "vocab embed"] | Callable[[Array], Array]
"""From final hidden states to logits: a matrix, a `LinearHead`, or a callable
`[batch seq embed] -> [batch seq vocab]`."""

MakeLayer: TypeAlias = Callable[..., Any]
"""`make_layer(key=key)` builds a fresh `AbstractDecoderLayer`."""


def is_array_or_shape(x: Any) -> bool:
    """Whether a leaf is an array of JAX or NumPy, or the shape of one."""
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def dotted_name(path: Any) -> str:
    """The name of a leaf in a tree, as `"decoder.layers.attention.query_kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


_Module = TypeVar("_Module")


def module_of(cls: type[_Module], **fields: Any) -> _Module:
    """A frozen dataclass of these fields, without its `__init__`: as unflattening builds it."""
    module = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    return module
