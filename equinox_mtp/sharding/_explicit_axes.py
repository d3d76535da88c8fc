"""Meshes whose axes are in the arrays' types."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import NamedSharding, PartitionSpec as P

from .._types import checked


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
