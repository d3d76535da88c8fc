from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_close,
    assert_equal,
    assert_rejects,
    cross_entropy_oracle,
    finite_differences,
)

from equinox_mtp import CrossEntropy, linear_cross_entropy

# Vocabularies are not multiples of the sizes in which one might be cut up.
BATCH_AND_VOCAB = (((), 33), ((5,), 1), ((2, 3), 33), ((2, 3), 300), ((2, 1, 3), 65))
EMBED = 8


def random_case(
    batch: tuple[int, ...], vocab: int, scale: float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # NumPy's numbers, as JAX would compile a generator for every shape.
    rng = np.random.default_rng(0)
    hidden_states = jnp.asarray(scale * rng.standard_normal((*batch, EMBED)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((vocab, EMBED)), jnp.float32)
    return hidden_states, head, jnp.asarray(rng.integers(0, vocab, batch), jnp.int32)


def assert_matches_oracle(
    actual: CrossEntropy, hidden_states: Any, head: Any, target_ids: Any, tolerance: float = 1e-5
) -> None:
    expected = cross_entropy_oracle(*map(np.asarray, (hidden_states, head, target_ids)))
    assert actual.negative_log_likelihood.dtype == actual.log_sum_exp.dtype == jnp.float32
    assert_close(actual.negative_log_likelihood, expected[0], tolerance, tolerance)
    assert_close(actual.log_sum_exp, expected[1], tolerance, tolerance)
    assert_equal(actual.predictions, expected[2])


@pytest.mark.parametrize(("batch", "vocab"), BATCH_AND_VOCAB)
def test_values(batch: tuple[int, ...], vocab: int) -> None:
    hidden_states, head, target_ids = random_case(batch, vocab)
    from_matrix = linear_cross_entropy(hidden_states, head, target_ids)
    from_callable = linear_cross_entropy(hidden_states, lambda hidden: hidden @ head.T, target_ids)
    for actual in (from_matrix, from_callable):
        assert_matches_oracle(actual, hidden_states, head, target_ids)
        assert_close(
            actual.negative_log_likelihood,
            optax.softmax_cross_entropy_with_integer_labels(hidden_states @ head.T, target_ids),
        )


def test_values_of_a_vocabulary_of_many_tiles() -> None:
    case = random_case((2, 600), 4500)
    assert_matches_oracle(jax.jit(linear_cross_entropy)(*case), *case)


def test_values_under_vmap() -> None:
    hidden_states, head, target_ids = random_case((3, 2, 4), 33)
    mapped = jax.vmap(linear_cross_entropy, in_axes=(0, None, 0))
    assert_matches_oracle(mapped(hidden_states, head, target_ids), hidden_states, head, target_ids)


def test_large_logits_do_not_overflow() -> None:
    # Around a thousand, where exp alone is infinite; exact in float32 as all are integers.
    hidden_states, head, target_ids = random_case((2, 3), 33)
    hidden_states, head = jnp.round(100 * hidden_states), jnp.round(10 * head)
    actual = linear_cross_entropy(hidden_states, head, target_ids)
    assert np.max(np.asarray(actual.log_sum_exp)) > 1000
    assert_matches_oracle(actual, hidden_states, head, target_ids)


def loss_of_all_outputs(
    hidden_states: jax.Array, head: Any, target_ids: jax.Array, weights: jax.Array
) -> jax.Array:
    """Per-token weights and a z-loss: what a trainer makes of the outputs."""
    out = linear_cross_entropy(hidden_states, head, target_ids)
    return jnp.sum(weights * out.negative_log_likelihood + 0.1 * out.log_sum_exp**2)


def oracle_of_all_outputs(
    hidden_states: np.ndarray, head: np.ndarray, target_ids: np.ndarray, weights: np.ndarray
) -> float:
    nll, log_sum_exp, _ = cross_entropy_oracle(hidden_states, head, target_ids)
    return float(np.sum(weights * nll + 0.1 * log_sum_exp**2))


@pytest.mark.parametrize("use_jit", [False, True])
def test_gradients(use_jit: bool) -> None:
    hidden_states, head, target_ids = random_case((2, 3), 33)
    # One token weighs nothing, as a masked one does.
    weights = jnp.array([[0.5, 0.0, 1.0], [2.0, 0.1, 0.7]])
    h, w, ids, c = map(np.asarray, (hidden_states, head, target_ids, weights))
    expected = (
        finite_differences(lambda h: oracle_of_all_outputs(h, w, ids, c), h),
        finite_differences(lambda w: oracle_of_all_outputs(h, w, ids, c), w),
    )

    def loss_of_callable(hidden_states: jax.Array, head: jax.Array, *rest: jax.Array) -> jax.Array:
        return loss_of_all_outputs(hidden_states, lambda hidden: hidden @ head.T, *rest)

    for loss in (loss_of_all_outputs, loss_of_callable):
        gradient = jax.grad(loss, argnums=(0, 1))
        gradients = (jax.jit(gradient) if use_jit else gradient)(
            hidden_states, head, target_ids, weights
        )
        for actual, wanted in zip(gradients, expected, strict=True):
            assert actual.dtype == jnp.float32
            assert_close(actual, wanted, 1e-4, 1e-5)


def test_a_callable_head_may_be_nonlinear() -> None:
    hidden_states, head, target_ids = random_case((5,), 33, scale=3.0)
    actual = linear_cross_entropy(
        hidden_states, lambda hidden: 5 * jnp.tanh(hidden @ head.T / 5), target_ids
    )
    h, w = np.asarray(hidden_states, np.float64), np.asarray(head, np.float64)
    logits = 5 * np.tanh(h @ w.T / 5)
    # With the identity for a head the logits are the hidden states.
    assert_matches_oracle(actual, logits, np.eye(33), target_ids)


# bfloat16

BFLOAT16_ROUNDING = 2.0**-8


def bfloat16_case() -> tuple[jax.Array, jax.Array, jax.Array]:
    hidden_states, head, target_ids = random_case((2, 7), 300)
    return hidden_states.astype(jnp.bfloat16), head.astype(jnp.bfloat16), target_ids


def test_bfloat16_products_are_accumulated_in_float32() -> None:
    # The inputs are exact in float64, so what remains is float32 rounding, far below bfloat16's.
    hidden_states, head, target_ids = bfloat16_case()
    actual = linear_cross_entropy(hidden_states, head, target_ids)
    assert_matches_oracle(actual, hidden_states, head, target_ids, 1e-5)


def test_float32_head_is_rounded_to_the_hidden_states() -> None:
    hidden_states, head, target_ids = random_case((2, 7), 300)
    low = hidden_states.astype(jnp.bfloat16)
    actual = linear_cross_entropy(low, head, target_ids)
    assert_matches_oracle(actual, low, head.astype(jnp.bfloat16), target_ids, 1e-5)
    # Against the head before rounding: each of the 8 products is off by one rounding at most.
    h, w = np.asarray(low, np.float64), np.asarray(head, np.float64)
    bound = BFLOAT16_ROUNDING * np.max(np.abs(h) @ np.abs(w).T, axis=-1)
    exact = cross_entropy_oracle(h, w, np.asarray(target_ids))
    assert np.all(np.abs(np.asarray(actual.log_sum_exp) - exact[1]) <= bound)
    assert np.all(np.abs(np.asarray(actual.negative_log_likelihood) - exact[0]) <= 2 * bound)


def test_bfloat16_callable_head() -> None:
    hidden_states, head, target_ids = bfloat16_case()
    logits = hidden_states @ head.T
    assert logits.dtype == jnp.bfloat16
    actual = linear_cross_entropy(hidden_states, lambda hidden: hidden @ head.T, target_ids)
    assert_matches_oracle(actual, np.asarray(logits), np.eye(300), target_ids)


def test_bfloat16_gradients() -> None:
    hidden_states, head, target_ids = bfloat16_case()
    weights = jnp.ones((2, 7))
    actual = jax.grad(loss_of_all_outputs, argnums=(0, 1))(hidden_states, head, target_ids, weights)
    h, w = np.asarray(hidden_states, np.float64), np.asarray(head, np.float64)
    logits = h @ w.T
    _, log_sum_exp, _ = cross_entropy_oracle(h, w, np.asarray(target_ids))
    probabilities = np.exp(logits - log_sum_exp[..., None])
    targets = np.eye(300)[np.asarray(target_ids)]
    cotangent = (1 + 0.2 * log_sum_exp[..., None]) * probabilities - targets
    expected = (cotangent @ w, np.einsum("bsv,bse->ve", cotangent, h))
    # Every term of the sums may be rounded, to at most twice one bfloat16 rounding.
    terms = (np.abs(cotangent) @ np.abs(w), np.einsum("bsv,bse->ve", abs(cotangent), abs(h)))
    for gradient, wanted, size in zip(actual, expected, terms, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert np.all(np.abs(np.asarray(gradient, np.float64) - wanted) <= 2**-7 * size)


# Ties


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("best", [(0, 1), (5, 70, 299), (63, 64), (298, 299), (10, 11, 12)])
def test_ties_go_to_the_first_id(dtype: Any, best: tuple[int, ...]) -> None:
    # Small integers, so that equal rows make exactly equal logits.
    rng = np.random.default_rng(0)
    head = rng.integers(-1, 2, (300, EMBED))
    head[list(best)] = 2
    hidden_states = np.ones((2, 3, EMBED))
    out = linear_cross_entropy(
        jnp.asarray(hidden_states, dtype), jnp.asarray(head, dtype), jnp.zeros((2, 3), jnp.int32)
    )
    assert_equal(out.predictions, np.full((2, 3), best[0], np.int32))


def test_all_tied_gives_id_0_and_log_vocab() -> None:
    out = linear_cross_entropy(jnp.zeros((4, EMBED)), jnp.ones((300, EMBED)), jnp.arange(4))
    assert_equal(out.predictions, np.zeros(4, np.int32))
    assert_close(out.negative_log_likelihood, np.full(4, np.log(300)))


# Wrong arguments

HIDDEN, HEAD, IDS = jnp.ones((2, 3, EMBED)), jnp.ones((33, EMBED)), jnp.zeros((2, 3), jnp.int32)


@pytest.mark.parametrize(
    ("argument", "args"),
    [
        ("hidden_states", (IDS, HEAD, IDS)),
        ("head", (HIDDEN, HEAD.T, IDS)),
        ("head", (HIDDEN, HEAD.astype(int), IDS)),
        ("head", (HIDDEN, None, IDS)),
        ("target_ids", (HIDDEN, HEAD, IDS[0])),
        ("target_ids", (HIDDEN, HEAD, IDS[:, :2])),
        ("target_ids", (HIDDEN, HEAD, IDS.astype(float))),
    ],
)
def test_wrong_arguments_are_named(argument: str, args: tuple[Any, ...]) -> None:
    assert_rejects(argument, linear_cross_entropy, *args)
