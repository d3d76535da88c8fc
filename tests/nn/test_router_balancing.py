"""All routers of a model: their statistics, and their biases after a step."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from equinox_mtp import nn

EMBED, EXPERTS, RATE = 8, 4, 0.25


def make_router(bias: bool = True, num_layers: int | None = None) -> Any:
    def make(key: Any) -> nn.Router:
        return nn.Router(EMBED, EXPERTS, top_k=1, bias=bias, key=key)

    key = jax.random.key(0)
    return (
        make(key)
        if num_layers is None
        else eqx.filter_vmap(make)(jax.random.split(key, num_layers))
    )


def statistics(load: Any) -> nn.RouterStatistics:
    load = jnp.asarray(load, jnp.float32)
    zeros = jnp.zeros(load.shape[:-1])
    return nn.RouterStatistics(load, load, zeros, zeros, zeros, zeros)


def expected(load: Any) -> np.ndarray:
    load = np.asarray(load, np.float64)
    return RATE * np.sign(load.mean(axis=-1, keepdims=True) - load)


LOADS = np.random.default_rng(0).integers(0, 9, (5, EXPERTS))


def test_stacks_and_single_routers_in_their_order() -> None:
    """One router, three stacked, and one without a bias, whose load is passed over."""
    tree = (make_router(), {"run": make_router(num_layers=3)}, make_router(bias=False))
    auxiliary = (statistics(LOADS[0]), "other", statistics(LOADS[1:4]), (statistics(LOADS[4]),))
    update = eqx.filter_jit(lambda tree, rate: nn.update_router_biases(tree, auxiliary, rate))
    one, stacked, without = update(tree, jnp.float32(RATE))
    assert_close(one.bias, expected(LOADS[0]))
    assert_close(stacked["run"].bias, expected(LOADS[1:4]))
    assert without.bias is None
    np.testing.assert_array_equal(one.kernel, tree[0].kernel)


def test_shared_router_gets_the_sum() -> None:
    tree = make_router(num_layers=1)
    updated = nn.update_router_biases(tree, statistics(LOADS[:3]), RATE)
    assert_close(updated.bias, expected(LOADS[:3].sum(0, keepdims=True)))


def test_found_in_order() -> None:
    first, second = statistics(LOADS[0]), statistics(LOADS[1:])
    assert nn.router_statistics_in(({"b": second, "a": first}, 1.0, None)) == (first, second)
    assert nn.router_statistics_in(None) == ()


def test_a_single_router_takes_one_load() -> None:
    """That of a decoder's one layer with experts is not summed with that of the depths."""
    for tree, auxiliary in (
        (make_router(), statistics(LOADS[:2])),
        (make_router(num_layers=1), (statistics(LOADS[:1]), statistics(LOADS[1:2]))),
    ):
        with pytest.raises(ValueError, match="1 of them; got 2"):
            nn.update_router_biases(tree, auxiliary, RATE)


@pytest.mark.parametrize("num_loads", [0, 2, 4])
def test_wrong_number(num_loads: int) -> None:
    with pytest.raises(ValueError, match=f"`auxiliary` must .* 3 of them; got {num_loads}"):
        nn.update_router_biases(make_router(num_layers=3), statistics(LOADS[:num_loads]), RATE)
