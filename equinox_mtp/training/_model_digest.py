"""A digest of a main model that does not train: by it a run knows what it was trained over."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

import equinox_mtp as emtp

from .._types import dotted_name

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
"""By bytes of a number: what its bits are read as; those of eight bytes are two words."""


def model_digest(decoder: emtp.AbstractDecoder) -> str:
    """The same for the same numbers and settings, wherever the folder and the devices are.

    A checksum is made of every tensor on its own devices: nothing of it moves.
    """
    tensors = jax.tree_util.tree_leaves_with_path(eqx.filter(decoder, eqx.is_array))
    checksums = jax.device_get([_checksums(x) for _, x in tensors])
    known = {
        "tensors": [
            [dotted_name(path), str(x.dtype), x.shape, *map(int, sums)]
            for (path, x), sums in zip(tensors, checksums, strict=True)
        ],
        "settings": list(_settings("", decoder)),
    }
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


@jax.jit
def _checksums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums of 32 bits over hashes of each number's bits and place.

    They are of integers, which wrap around: the order, and so the devices, do not matter.
    """
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = lax.bitcast_convert_type(bits, _WORDS[bits.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place += index * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    hashes = _mixed(bits ^ _mixed(place))
    other = _mixed(hashes + jnp.uint32(0x9E3779B9))
    return jnp.sum(hashes, dtype=jnp.uint32), jnp.sum(other, dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of 32 bits in which each bit decides about all: the end of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _settings(name: str, node: Any) -> Iterator[tuple[str, str]]:
    """What decides, beside its arrays, what a model computes: numbers, flags and names.

    Defaults are left out, so that a new field changes no digest; and functions, such as that of
    attention, which follow from the devices.
    """
    if isinstance(node, int | float | str):
        yield name, repr(node)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _settings(f"{name}.{index}", value)
    elif dataclasses.is_dataclass(node):
        yield name, type(node).__name__
        for field in dataclasses.fields(node):
            value = getattr(node, field.name, None)
            is_default = isinstance(value, int | float | str) and value == field.default
            if not is_default:
                yield from _settings(f"{name}.{field.name}", value)
