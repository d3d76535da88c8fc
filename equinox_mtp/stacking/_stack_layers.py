"""Layers of several depths as one, stacked over a new leading axis."""

from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._types import is_array_or_shape
from ._comparison import Comparison

_Layer = TypeVar("_Layer", bound=eqx.Module)


def are_alike(first: eqx.Module, other: eqx.Module) -> bool:
    """Whether `stack_layers` can stack two layers."""
    return Comparison().difference(first, other) is None


def layer_shapes(layers: _Layer) -> _Layer:
    """One of stacked layers, with shapes in place of arrays: those without the leading axis."""

    def without_axis(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if is_array_or_shape(x) else x

    return jax.tree.map(without_axis, layers)


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
    - Labels do not count: an attribute `name`, unless of an Equinox module, whose values differ in
        the digits of their numbers alone (`"layer_1"`, `"layer_2"`), and text and integers in the
        metadata of NNX variables, except their sharding and the tag of their random stream.

    **Raises:** `ValueError` that says what differs.
    """
    if not layers:
        return None
    first, *others = layers
    for depth, layer in enumerate(others, start=2):
        difference = Comparison().difference(first, layer)
        if difference is not None:
            raise ValueError(
                "the layers of all depths must be alike, so that they can be stacked; depth "
                f"{depth} differs from depth 1: {difference.described(depth)}. Pass the same "
                "functions and sizes to every layer."
            )
    leaves = [jax.tree.leaves(layer) for layer in layers]
    stacked = [jnp.stack(xs) if eqx.is_array(xs[0]) else xs[0] for xs in zip(*leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(first), stacked)
