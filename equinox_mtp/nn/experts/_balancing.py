"""All routers of a model at once, from what it returned beside hidden states."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..._types import Scalar, checked
from ._router import Router
from ._statistics import RouterStatistics, update_router_bias

Tree = TypeVar("Tree", bound=PyTree[Any])


@checked
def router_statistics_in(auxiliary: PyTree[Any]) -> tuple[RouterStatistics, ...]:
    """The statistics among a model's auxiliary outputs, in the order of its layers.

    They are stacked over layers, of which those that are alike are one entry; see
    `TransformerDecoder`.

    >>> router = emtp.nn.Router(16, 8, top_k=2, key=jax.random.key(0))
    >>> statistics = emtp.nn.router_statistics(router(jnp.zeros((2, 3, 16))))
    >>> found = emtp.nn.router_statistics_in({"layers": (statistics, None), "other": 3.0})
    >>> len(found), found[0] is statistics
    (1, True)
    """
    leaves = jax.tree.leaves(auxiliary, is_leaf=_is_statistics)
    return tuple(leaf for leaf in leaves if _is_statistics(leaf))


@checked
def update_router_biases(tree: Tree, auxiliary: PyTree[Any], rate: Scalar) -> Tree:
    """A decoder, or a block of depths, with the biases of its routers after a step.

    See `update_router_bias`. Routers without a bias stay as they are. One that several depths share
    (`MTPConfig.repeated_layer`) gets the sum of their loads: a stack of one router takes statistics
    of any number of layers, in one stack.

    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> mixture = emtp.nn.MixtureOfExperts(
    ...     emtp.nn.Router(16, 3, top_k=1, bias=True, key=keys[0]),
    ...     emtp.nn.Experts(3, 16, 32, key=keys[1]),
    ... )
    >>> y, statistics = eqx.filter_jit(mixture)(jnp.zeros((2, 3, 16)))
    >>> mixture = emtp.nn.update_router_biases(mixture, statistics, 0.001)
    >>> print(mixture.router.bias)
    [-0.001  0.001  0.001]

    In a loop of one's own, once the optimizer has done its part:

        decoder = emtp.nn.update_router_biases(model.decoder, output.auxiliary, 0.001)
        block = emtp.nn.update_router_biases(model.block, output.mtp.auxiliary, 0.001)
        model = emtp.MTPModel(decoder, block)

    **Arguments:**

    - `tree`: whatever holds the routers, in the order of its layers.
    - `auxiliary`: what it returned beside hidden states, of all devices and microbatches of the
        step.
    - `rate`: how far a step goes; DeepSeek-V3 took 0.001, and 0 towards the end.

    **Raises:** `ValueError` if there are not as many statistics as routers.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_router)
    routers = [leaf for leaf in leaves if _is_router(leaf)]
    loads = _loads(auxiliary)
    counts = [jnp.size(router.kernel) // _size_of_one(router) for router in routers]
    is_shared = sum(counts) == 1 and routers[0].kernel.ndim > 2
    if is_shared and len(router_statistics_in(auxiliary)) == 1:
        loads = [sum(loads[1:], loads[0])]
    if sum(counts) != len(loads):
        raise ValueError(
            f"`auxiliary` must have statistics of each router in `tree`, {sum(counts)} of them; "
            f"got {len(loads)}. Give a decoder its own output, and a block its own."
        )
    remaining = iter(loads)
    updated = iter(
        [
            _updated(router, [next(remaining) for _ in range(count)], rate)
            for router, count in zip(routers, counts, strict=True)
        ]
    )
    return jax.tree.unflatten(
        structure, [next(updated) if _is_router(leaf) else leaf for leaf in leaves]
    )


def _updated(router: Router, loads: list[Array], rate: Scalar) -> Router:
    if router.bias is None:
        return router
    load = jnp.stack(loads).reshape(router.bias.shape)
    return eqx.tree_at(
        lambda router: router.bias, router, update_router_bias(router.bias, load, rate)
    )


def _loads(auxiliary: Any) -> list[Array]:
    """The load of each router."""
    of_layers = [x.load.reshape(-1, x.load.shape[-1]) for x in router_statistics_in(auxiliary)]
    return [row for load in of_layers for row in load]


def _size_of_one(router: Router) -> int:
    """Of the matrix; a stack of routers has several."""
    embed, experts = router.kernel.shape[-2:]
    return embed * experts


def _is_statistics(x: Any) -> bool:
    return isinstance(x, RouterStatistics)


def _is_router(x: Any) -> bool:
    return isinstance(x, Router)
