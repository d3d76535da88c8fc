"""Whether what a folder would say of a model is that model."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._types import is_array_or_shape

_OF_TRAINING = ("attention", "dtype", "checkpoint_policy", "dropout")
"""Fields that are no part of a checkpoint: functions that compute the same, and how to train."""


def difference(model: Any, described: Any) -> str | None:
    """Where two trees of modules differ in shapes or settings, in words; `None` if they do not."""
    one, other = dict(_parts(model)), dict(_parts(described))
    for name in [*one, *other]:
        ours, theirs = one.get(name), other.get(name)
        if ours != theirs:
            return f"`{name}` is {_shown(ours)}, and would be {_shown(theirs)}"
    return None


def _shown(value: Any) -> str:
    return "not there" if value is None else f"{value!s:.100}"


def _parts(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if is_array_or_shape(tree):
        yield name, tuple(tree.shape)
    elif isinstance(tree, eqx.Module):
        for field in dataclasses.fields(tree):
            value = getattr(tree, field.name)
            path = f"{name}.{field.name}".strip(".")
            if field.name == "scale" and not is_array_or_shape(value):
                value = _plain_scale(tree, value)
            if isinstance(value, eqx.Module) or is_array_or_shape(value):
                if field.name != "dropout":
                    yield from _parts(value, path)
            elif field.name not in _OF_TRAINING and value is not None:
                yield path, value


def _plain_scale(attention: Any, scale: float | None) -> float | None:
    """`None` for the scale that attention has by default."""
    head_dim = attention.query_kernel.shape[-1]
    is_default = scale is None or math.isclose(scale, 1 / math.sqrt(head_dim))
    return None if is_default else scale


def layers_of(decoder: Any) -> list[Any]:
    """Each layer's shapes, however they are stacked."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32) if is_array_or_shape(x) else x, decoder
    )
    return [
        eqx.filter_eval_shape(lambda decoder, i=index: decoder.layer(i), shapes)
        for index in range(decoder.num_layers)
    ]
