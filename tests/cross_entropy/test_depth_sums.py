"""The gradient of the head summed over depths, whatever cotangents the sums come back with."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick_jit
from helpers import HeadOracle, assert_close, assert_equal
from jaxtyping import Array

from equinox_mtp import LinearHead
from equinox_mtp.cross_entropy import _weighted_losses, summed_cross_entropy_by_depth

DEPTHS, SHAPE, VOCAB, EMBED, Z = 3, (2, 7), 33, 8, 0.1
NAN, INF = np.nan, np.inf

# What cotangents were expected and which came back, and whether they are proportional.
CASES = [
    ([1, 1, 1], [1, 1, 1], True),
    ([1, 1, 1], [-0.3, -0.3, -0.3], True),
    ([1, 2, 3], [0.1, 0.2, 0.3], True),
    ([0, 2, 3], [0, 200, 300], True),
    ([1, -1, 0], [2, -2, 0], True),
    ([1, 2, 3], [0, 0, 0], True),
    ([0, 0, 0], [0, 0, 0], True),
    ([0, 0, 0], [1, 2, 3], False),
    ([1, 1, 1], [1, 2, 3], False),
    ([1, 1, 1], [1, 1, 1.0001], False),
    ([1, 1, 0], [1, 1, 1e-3], False),
    ([1, 2, 3], [3, 2, 1], False),
    ([NAN, NAN, NAN], [1, 2, 3], False),
    ([INF, 1, 1], [1, 1, 1], False),
]


class Case:
    def __init__(self, num_depths: int):
        rng = np.random.default_rng(0)
        shape = (num_depths, *SHAPE)
        self.hidden_states = rng.standard_normal((*shape, EMBED)).astype(np.float32)
        self.weight = rng.standard_normal((VOCAB, EMBED)).astype(np.float32)
        self.bias = rng.standard_normal(VOCAB).astype(np.float32)
        self.target_ids = rng.integers(0, VOCAB, shape)
        self.weights = (rng.random(shape) * (rng.random(shape) < 0.8)).astype(np.float32)

    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        nll, log_sum_exp, _ = self.oracle.losses
        z_losses = np.sum(self.weights * Z * log_sum_exp**2, axis=(1, 2))
        return np.sum(self.weights * nll, axis=(1, 2)) + z_losses, z_losses

    @property
    def oracle(self) -> HeadOracle:
        return HeadOracle(self.hidden_states, self.weight, self.bias, self.target_ids, 3.0)

    def gradients(self, cotangents: np.ndarray) -> list[np.ndarray]:
        by_token = cotangents[:, None, None]
        gradients = self.oracle.summed(by_token * self.weights, Z)[1]
        gradients[3] = by_token * gradients[3]
        return gradients


def pull_back(
    case: Case, arguments: tuple[Array, ...], cotangents: Array, expected: Array
) -> tuple[Any, Any]:
    def sums(
        hidden_states: Array, weight: Array, bias: Array, weights: Array, z: Array
    ) -> tuple[Array, Any]:
        out = summed_cross_entropy_by_depth(
            hidden_states,
            LinearHead(weight, bias, soft_cap=3.0, token_tile=4, vocab_tile=8),
            jnp.asarray(case.target_ids),
            weights,
            z_loss_weight=z,
            expected_cotangents=expected,
        )
        return out.losses, out

    _, pull, out = jax.vjp(sums, *arguments, has_aux=True)
    return out, pull(cotangents)


@pytest.fixture(scope="module")
def quick_pull_back() -> Any:
    """Compiled once: what comes back, and what was expected, are arrays."""
    return {
        num_depths: quick_jit(partial(pull_back, Case(num_depths))) for num_depths in (1, DEPTHS)
    }


def assert_sums_and_gradients(pull: Any, case: Case, actual: list[float], expected: list[float]):
    cotangents = np.asarray(actual, np.float32)
    arguments = (case.hidden_states, case.weight, case.bias, case.weights, np.float32(Z))
    out, gradients = pull(
        tuple(map(jnp.asarray, arguments)), jnp.asarray(cotangents), jnp.asarray(expected, float)
    )
    losses, z_losses = case.losses()
    assert_close(out.losses, losses)
    assert_close(out.z_losses, z_losses)
    assert_equal(out.predictions, case.oracle.losses[2])
    scale = max(1.0, *np.abs(cotangents))
    for x, y in zip(gradients, case.gradients(cotangents), strict=True):
        assert_close(x, y, 5e-5, 5e-5 * scale)


@pytest.mark.parametrize(("expected", "actual", "proportional"), CASES)
def test_gradients_are_right_whatever_was_expected(
    quick_pull_back: Any, expected: list[float], actual: list[float], proportional: bool
) -> None:
    assert_sums_and_gradients(quick_pull_back[DEPTHS], Case(DEPTHS), actual, expected)


@pytest.mark.parametrize("expected", [1.0, 0.0, NAN, INF])
def test_one_depth_is_always_as_expected(quick_pull_back: Any, expected: float) -> None:
    assert_sums_and_gradients(quick_pull_back[1], Case(1), [-2.5], [expected])


@pytest.mark.parametrize(("expected", "actual", "proportional"), CASES)
def test_proportion(expected: list[float], actual: list[float], proportional: bool) -> None:
    factor, is_proportional = _weighted_losses.common_factor(
        jnp.asarray(actual, jnp.float32), jnp.asarray(expected, jnp.float32)
    )
    assert bool(is_proportional) == proportional
    if proportional:
        assert_close(factor * np.asarray(expected, np.float32), actual)


def test_only_what_was_not_expected_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(head: LinearHead, hidden_states: Array, *_: Any, **__: Any) -> Any:
        return hidden_states, jax.tree.map(lambda x: jnp.full_like(x, 7.0), head)

    monkeypatch.setattr(_weighted_losses, "token_gradients", marked)
    case = Case(DEPTHS)
    arguments = (case.hidden_states, case.weight, case.bias, case.weights, np.float32(Z))
    # Not the other tests' compiled program: this one has the mark in it.
    pull = quick_jit(partial(pull_back, case, tuple(map(jnp.asarray, arguments))))
    for expected, actual, proportional in CASES:
        _, gradients = pull(jnp.asarray(actual, float), jnp.asarray(expected, float))
        assert bool(jnp.all(gradients[1] == 7)) == (not proportional)


def test_all_depths_weigh_the_same_if_nothing_is_expected() -> None:
    case = Case(2)

    def total(weight: Array) -> Array:
        out = summed_cross_entropy_by_depth(
            jnp.asarray(case.hidden_states),
            LinearHead(weight, jnp.asarray(case.bias), soft_cap=3.0),
            jnp.asarray(case.target_ids),
            jnp.asarray(case.weights),
            z_loss_weight=Z,
        )
        return jnp.sum(out.losses) / 4

    gradient = quick_jit(jax.grad(total))(jnp.asarray(case.weight))
    assert_close(gradient, case.gradients(np.full(2, 0.25))[1], 2e-5, 2e-5)
