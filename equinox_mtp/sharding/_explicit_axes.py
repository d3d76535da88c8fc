"""Meshes whose axes are in the arrays' types."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from .._types import checked

_CLOSURE_NOTE = (
    "On a mesh of explicit axes a function must not close over arrays: make it an `equinox.Module` "
    "that holds them, or pass them as arguments. An output head may be a `LinearHead`."
)


@checked
def automatic(function: Callable[..., Any], out_shardings: Any) -> Callable[..., Any]:
    """A training step, or any function, for a mesh of `Explicit` axes.

    Inside, partitioning is left to XLA, as it is on a mesh of `Auto` axes: the library's modules do
    not say of every product how its result is split. On other meshes the function is called as it
    stands.

    A training step that returns a model and a loss:
    `automatic(train_step, (parameter_shardings(model, mesh), jax.P()))`.

    >>> mesh = jax.make_mesh((2, 4), ("data", "fsdp"))  # of `Explicit` axes
    >>> double = emtp.sharding.automatic(lambda x: 2 * x, jax.P("data"))
    >>> with jax.set_mesh(mesh):
    ...     doubled = jax.jit(double)(jnp.ones(8))
    >>> doubled.sharding.spec == jax.P("data")
    True

    **Arguments:**

    - `function`: of and to pytrees with arrays in them; call it within `jax.set_mesh(mesh)`, and in
        `jit`.
    - `out_shardings`: for each output, or each tree of outputs, its sharding or partition spec.

    **Returns:** a function of the same arguments.
    """

    def run(*arguments: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.explicit_axes:
            return function(*arguments)
        arrays, rest = eqx.partition(arguments, eqx.is_array)
        others: list[Any] = []

        def on_arrays(arrays: Any) -> Any:
            out, other = eqx.partition(function(*eqx.combine(arrays, rest)), eqx.is_array)
            others.append(other)
            return out

        shardings = jax.tree.map(
            lambda spec: NamedSharding(
                mesh, spec.spec if isinstance(spec, NamedSharding) else spec
            ),
            out_shardings,
            is_leaf=lambda x: isinstance(x, P),
        )
        out = jax.sharding.auto_axes(on_arrays, out_sharding=shardings)(arrays)
        return eqx.combine(out, others[-1])

    return run


def with_auto_axes(
    function: Callable[..., Any], out_specs: Callable[[P], Any], tokens: Array
) -> Callable[..., Any]:
    """`function` under automatic partitioning, whatever the axes of the mesh.

    For loops over tiles of arrays, in modules of one's own: explicit axes are in the arrays' types,
    where tiles of split axes have none. Inside a `shard_map` all arguments are marked as different
    on the devices where one of them is, so that loops may carry them together. A gradient gets the
    type of its parameter.

    >>> ones = jnp.ones((8, 4))
    >>> double = emtp.sharding.with_auto_axes(lambda x: 2 * x, lambda spec: spec, ones)
    >>> float(double(ones)[0, 0])
    2.0

    **Arguments:**

    - `function`: of pytrees with arrays in them.
    - `out_specs`: makes the outputs' partition specs from the one of `tokens`.
    - `tokens`: the array whose partition spec tells those of the outputs.
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
