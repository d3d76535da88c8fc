"""The loss on one device, on several, or in the user's own `shard_map`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from ..sharding import HeadSharding

_CLOSURE_NOTE = (
    "On a mesh of explicit axes `head` must not close over arrays: make it an `equinox.Module` "
    "that holds them, or a `LinearHead`."
)


# The mesh


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


# The types that JAX gives to sharded arrays


def with_auto_axes(
    function: Callable[..., Any], out_specs: Callable[[P], Any], tokens: Array
) -> Callable[..., Any]:
    """`function` under automatic partitioning, whatever the axes of the mesh.

    Explicit axes are in the arrays' types, where tiles of split axes have none. `out_specs` makes
    the outputs' partition specs from the one of `tokens`; a gradient gets the type of its
    parameter.
    """

    def run(*arguments: Any) -> Any:
        arrays, rest = eqx.partition(arguments, eqx.is_array)

        def on_arrays(arrays: Any) -> Any:
            return function(*_vary_together(eqx.combine(arrays, rest)))

        mesh = _explicit_mesh(arrays)
        if mesh is None:
            return on_arrays(arrays)
        out_sharding = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            out_specs(jax.typeof(tokens).sharding.spec),
            is_leaf=lambda spec: isinstance(spec, P),
        )
        axes = mesh.explicit_axes
        mapped: Any = jax.sharding.auto_axes(on_arrays, axes=axes, out_sharding=out_sharding)
        if jax.sharding.get_abstract_mesh().empty:
            # Outside of `jit` nothing else says on which devices to run.
            mapped = jax.jit(mapped)
        try:
            return mapped(arrays)
        except ValueError as error:
            if "context mesh" in str(error):
                error.add_note(_CLOSURE_NOTE)
            raise

    return run


def _explicit_mesh(arrays: Any) -> AbstractMesh | None:
    """The mesh with explicit axes that is set, or on which one of the arrays lies by its type."""
    meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arrays)]
    current = jax.sharding.get_abstract_mesh()
    return next((mesh for mesh in (current, *meshes) if mesh.explicit_axes), None)


def _vary_together(arguments: Any) -> Any:
    """In a `shard_map`, marks all arrays as different on the devices where one of them is.

    So loops may carry them together, and a gradient is summed over devices once, at the end, where
    the array itself is the same on all.
    """
    axes = set().union(*map(_varying_axes, filter(eqx.is_array, jax.tree.leaves(arguments))))

    def vary(x: Any) -> Any:
        missing = tuple(axes - _varying_axes(x)) if eqx.is_array(x) else ()
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arguments)


def _varying_axes(array: Array) -> frozenset[str]:
    return jax.typeof(array).mat.varying
