"""The loss on one device, on several, or in the user's own `shard_map`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec as P

from ..sharding import HeadSharding


def on_devices(
    sharding: HeadSharding | None, function: Callable[..., Any], words: Any, out_words: Any
) -> Callable[..., Any]:
    """Runs `function` on each device's part of arrays with these axis words.

    `words` and `out_words` hold the axis words of each array, in the structure of the arguments and
    of the results: `"depth batch seq"`, or a `LinearHead` of such words. They may stand for several
    arrays with the same axes, and for `None`.

    No gradient is taken through this: each strategy maps its forward and its backward pass.
    """
    if sharding is None:
        return lambda *arrays: _gather_heads(function(*_gather_heads(arrays, words)), out_words)

    def check(mesh: Mesh | AbstractMesh, words: str, arrays: Any) -> None:
        for array in jax.tree.leaves(arrays):
            sharding.check_sizes(mesh, dict(zip(words.split(), array.shape, strict=True)))

    def on_mesh(*arrays: Any) -> Any:
        mesh = _mesh(sharding)
        jax.tree.map(partial(check, mesh), words, arrays)
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=jax.tree.map(sharding.spec, words),
            out_specs=jax.tree.map(sharding.spec, out_words),
            check_vma=False,
        )(*arrays)

    return on_mesh


def _gather_heads(arrays: Any, words: Any) -> Any:
    """Puts the parts of a head together, where the mesh is known.

    Once, outside of the loops: XLA would do so for every tile. Outside of `jit` arrays stay where
    they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return arrays

    def gather(words: str, arrays: Any) -> Any:
        if isinstance(arrays, Tracer) and "vocab" in words:
            return jax.lax.with_sharding_constraint(arrays, P())
        return arrays

    return jax.tree.map(gather, words, arrays)


def _mesh(sharding: HeadSharding) -> Mesh | AbstractMesh:
    """The mesh for a `shard_map`, with automatic axes."""
    mesh, current = sharding.mesh, jax.sharding.get_abstract_mesh()
    if current.empty:
        if mesh is None:
            raise ValueError(
                "`sharding` of the head names axes of a mesh, and no mesh is set; got `mesh=None`, "
                "as from `ShardingRules.head_sharding`. Run the loss, or the model, in "
                "`with jax.set_mesh(mesh):`, or pass `HeadSharding(mesh, ...)`."
            )
        return _with_auto_axes(mesh)
    sharding.check_current_mesh(current)
    if current.manual_axes:
        raise ValueError(
            f"`sharding` of the head does not go with a `shard_map` around the loss; got "
            f"{sharding} where {current.manual_axes} are mapped already. Leave `sharding` out, and "
            "sum losses over those axes."
        )
    return current


def _with_auto_axes(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """Explicit axes would ask that all arrays lie on the mesh as the loss wants them."""
    if isinstance(mesh, AbstractMesh):
        return mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Auto))
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def tokens_on_all_devices(tokens: int) -> int:
    """The size of a tile that has `tokens` tokens on each device.

    Under automatic partitioning an array has the shape of all devices' parts together; in a
    `shard_map` it has the shape of one part.
    """
    return tokens * (_num_devices() or 1)


def shards_of(seq: int, *, batch: int, tokens: int) -> int:
    """Into how many equal parts `seq` positions may be split over devices, at most.

    If no mesh is set it may be over all devices; this is left out of account where `tokens` tokens
    would not be enough for one in each part.
    """
    devices = _num_devices()
    if devices is None:
        devices = jax.device_count()
        if batch * math.gcd(seq, devices) > tokens:
            return 1
    return math.gcd(seq, devices)


def _num_devices() -> int | None:
    """Of how many devices arrays have the shapes here; `None` if no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    return math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes)
