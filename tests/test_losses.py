from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal, assert_rejects, finite_differences, loss_oracle
from hypothesis import given
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError

from equinox_mtp import (
    MTPLosses,
    TokenLoss,
    calculate_mtp_loss,
    exponential_depth_weights,
    sum_token_losses,
)
from equinox_mtp._losses import loss_weights

NUM_DEPTHS = 3
SUMS = np.array([12.0, 30.5, 7.25], np.float32)
COUNTS = np.array([10.0, 8.0, 2.0], np.float32)
DEPTH_WEIGHTS = np.array([4.0, 2.0, 1.0], np.float32)
REDUCTIONS = ("pooled", "mean_of_depths")

both_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def mtp_losses(losses: np.ndarray, counts: np.ndarray) -> MTPLosses:
    return MTPLosses(losses=jnp.asarray(losses), weights=jnp.asarray(counts))


def per_depth(low: float, high: float) -> st.SearchStrategy[np.ndarray]:
    # Zeros are common; numbers too small for a float32 quotient are not losses.
    numbers = st.just(0.0) | st.floats(max(low, 2.0**-10), high, width=32)
    return arrays(np.float32, NUM_DEPTHS, elements=numbers)


def per_depth_counts() -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, NUM_DEPTHS, elements=st.integers(0, 1000).map(float))


# The loss


@given(
    losses=per_depth(0, 1000),
    counts=per_depth_counts(),
    scaling_factor=st.floats(0, 10),
    depth_weights=st.none() | per_depth(0, 8),
    total_weights=st.none() | per_depth_counts(),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_loss(
    losses: np.ndarray,
    counts: np.ndarray,
    scaling_factor: float,
    depth_weights: np.ndarray | None,
    total_weights: np.ndarray | None,
    reduction: Any,
) -> None:
    loss = calculate_mtp_loss(
        mtp_losses(losses, counts),
        scaling_factor=scaling_factor,
        depth_weights=None if depth_weights is None else jnp.asarray(depth_weights),
        reduction=reduction,
        total_weights=None if total_weights is None else jnp.asarray(total_weights),
    )
    expected = loss_oracle(
        losses,
        counts,
        scaling_factor=scaling_factor,
        depth_weights=depth_weights,
        reduction=reduction,
        total_weights=total_weights,
    )
    assert loss.dtype == jnp.float32
    assert_close(loss, expected)


def test_reductions_by_hand() -> None:
    losses = mtp_losses(SUMS, COUNTS)
    assert_close(calculate_mtp_loss(losses), 0.1 * 49.75 / 20)
    assert_close(
        calculate_mtp_loss(losses, reduction="mean_of_depths"),
        0.1 * (1.2 + 3.8125 + 3.625) / 3,
    )


@both_reductions
def test_depth_weights_are_normalised(reduction: Any) -> None:
    expected = loss_oracle(SUMS, COUNTS, depth_weights=DEPTH_WEIGHTS, reduction=reduction)
    for scale in (1.0, 0.01, 300.0):
        weights = jnp.asarray(scale * DEPTH_WEIGHTS)
        loss = calculate_mtp_loss(
            mtp_losses(SUMS, COUNTS), depth_weights=weights, reduction=reduction
        )
        assert_close(loss, expected)


@both_reductions
def test_coarse_depth_weights_are_normalised_in_float32(reduction: Any) -> None:
    # Too coarse to hold their own sum: in bfloat16, 256 + 1 is 256.
    coarse = np.array([256.0, 1.0, 0.0], np.float32)
    loss = calculate_mtp_loss(
        mtp_losses(SUMS, COUNTS),
        depth_weights=jnp.asarray(coarse, jnp.bfloat16),
        reduction=reduction,
    )
    assert_close(loss, loss_oracle(SUMS, COUNTS, depth_weights=coarse, reduction=reduction))


@both_reductions
def test_gradients(reduction: Any) -> None:
    def loss(losses: jax.Array, scaling_factor: jax.Array, depth_weights: jax.Array) -> jax.Array:
        return calculate_mtp_loss(
            MTPLosses(losses=losses, weights=jnp.asarray(COUNTS)),
            scaling_factor=scaling_factor,
            depth_weights=depth_weights,
            reduction=reduction,
        )

    inputs = (SUMS, np.array(0.3, np.float32), DEPTH_WEIGHTS)
    gradients = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, inputs))
    for argument, gradient in enumerate(gradients):

        def oracle(x: np.ndarray, argument: int = argument) -> float:
            losses, scaling_factor, depth_weights = (
                x if n == argument else given for n, given in enumerate(inputs)
            )
            return loss_oracle(
                losses,
                COUNTS,
                scaling_factor=float(scaling_factor),
                depth_weights=depth_weights,
                reduction=reduction,
            )

        assert_close(gradient, finite_differences(oracle, inputs[argument]))


@both_reductions
@pytest.mark.parametrize("scored", [(), (0,), (2,), (0, 2)])
def test_nothing_scored_gives_zero_loss_and_gradient(
    reduction: Any, scored: tuple[int, ...]
) -> None:
    # Per-token losses of masked tokens may be anything, infinity included.
    token_losses = np.random.default_rng(0).uniform(1, 5, (NUM_DEPTHS, 2, 4)).astype(np.float32)
    mask = np.zeros((NUM_DEPTHS, 2, 4), bool)
    mask[list(scored), 1, 1:3] = True
    token_losses[~mask] = np.inf

    def loss(
        token_losses: jax.Array, scaling_factor: jax.Array, depth_weights: jax.Array
    ) -> jax.Array:
        depths = [
            sum_token_losses(*depth) for depth in zip(token_losses, jnp.asarray(mask), strict=True)
        ]
        losses = MTPLosses(
            losses=jnp.stack([depth.loss for depth in depths]),
            weights=jnp.stack([depth.weight for depth in depths]),
        )
        return calculate_mtp_loss(
            losses,
            scaling_factor=scaling_factor,
            depth_weights=depth_weights,
            reduction=reduction,
        )

    inputs = (jnp.asarray(token_losses), jnp.asarray(0.5), jnp.ones(NUM_DEPTHS))
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*inputs)
    sums = np.where(mask, token_losses, 0).sum(axis=(1, 2), dtype=np.float64)
    counts = mask.sum(axis=(1, 2))
    assert_close(value, loss_oracle(sums, counts, scaling_factor=0.5, reduction=reduction))
    # Every depth that is scored has two tokens.
    tokens = max(mask.sum(), 1) if reduction == "pooled" else NUM_DEPTHS * 2
    assert_close(gradients[0], np.where(mask, 0.5 / tokens, 0.0))
    assert_close(gradients[1], loss_oracle(sums, counts, scaling_factor=1.0, reduction=reduction))
    if not scored:
        assert_equal(value, np.float32(0))
        assert_equal(gradients[2], np.zeros(NUM_DEPTHS, np.float32))
    assert np.all(np.isfinite(gradients[2]))


@both_reductions
def test_zero_depth_weights_give_zero(reduction: Any) -> None:
    def loss(losses: jax.Array, depth_weights: jax.Array) -> jax.Array:
        return calculate_mtp_loss(
            MTPLosses(losses=losses, weights=jnp.asarray(COUNTS)),
            depth_weights=depth_weights,
            reduction=reduction,
        )

    inputs = (jnp.asarray(SUMS), jnp.zeros(NUM_DEPTHS))
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(*inputs)
    for number in (value, *gradients):
        assert_equal(number, np.zeros(number.shape, np.float32))


@both_reductions
def test_traced_scaling_factor_and_weights_compile_once(reduction: Any) -> None:
    traces = []

    @jax.jit
    def loss(losses: MTPLosses, scaling_factor: Any, depth_weights: jax.Array) -> jax.Array:
        traces.append(scaling_factor)
        return calculate_mtp_loss(
            losses,
            scaling_factor=scaling_factor,
            depth_weights=depth_weights,
            reduction=reduction,
        )

    for scaling_factor in (0.3, 0.1, 0.0):
        for decay in (1.0, 0.5):
            weights = decay ** np.arange(NUM_DEPTHS)
            actual = loss(mtp_losses(SUMS, COUNTS), scaling_factor, weights.astype(np.float32))
            expected = loss_oracle(
                SUMS,
                COUNTS,
                scaling_factor=scaling_factor,
                depth_weights=weights,
                reduction=reduction,
            )
            assert_close(actual, expected)
    assert len(traces) == 1


@both_reductions
def test_no_depths_give_zero(reduction: Any) -> None:
    nothing = mtp_losses(np.zeros(0, np.float32), np.zeros(0, np.float32))
    assert_equal(calculate_mtp_loss(nothing, reduction=reduction), np.float32(0))
    assert_equal(nothing.mean, np.zeros(0, np.float32))
    assert (nothing + nothing).losses.shape == (0,)


# Sums that add up


@both_reductions
def test_batches_add_up(reduction: Any) -> None:
    rng = np.random.default_rng(0)
    token_losses = rng.uniform(0, 5, (NUM_DEPTHS, 4, 6)).astype(np.float32)
    mask = rng.random((NUM_DEPTHS, 4, 6)) < 0.5
    mask[:, 3] = False

    def losses_of(rows: slice) -> MTPLosses:
        depths = [
            sum_token_losses(jnp.asarray(token_losses[k, rows]), jnp.asarray(mask[k, rows]))
            for k in range(NUM_DEPTHS)
        ]
        return MTPLosses(
            losses=jnp.stack([depth.loss for depth in depths]),
            weights=jnp.stack([depth.weight for depth in depths]),
        )

    # Uneven microbatches, the last one with nothing to score.
    microbatches = [losses_of(slice(0, 2)), losses_of(slice(2, 3)), losses_of(slice(3, 4))]
    whole = microbatches[0] + microbatches[1] + microbatches[2]
    sums = np.where(mask, token_losses, 0).sum(axis=(1, 2), dtype=np.float64)
    counts = mask.sum(axis=(1, 2))
    assert_close(whole.losses, sums)
    assert_equal(whole.weights, counts.astype(np.float64))
    assert_close(whole.mean, sums / counts)

    expected = loss_oracle(sums, counts, depth_weights=DEPTH_WEIGHTS, reduction=reduction)
    weights = jnp.asarray(DEPTH_WEIGHTS)
    assert_close(calculate_mtp_loss(whole, depth_weights=weights, reduction=reduction), expected)
    accumulated = sum(
        calculate_mtp_loss(
            losses, depth_weights=weights, reduction=reduction, total_weights=whole.weights
        )
        for losses in microbatches
    )
    assert_close(accumulated, expected)


def test_token_losses_add_up() -> None:
    token_losses = np.array([[1.5, 2.0, np.nan], [0.25, 8.0, 4.0]], np.float32)
    mask = np.array([[True, True, False], [False, False, True]])
    first, second = (
        sum_token_losses(jnp.asarray(token_losses[b : b + 1]), jnp.asarray(mask[b : b + 1]))
        for b in range(2)
    )
    assert_equal(first.loss, np.float32(3.5))
    assert_equal(first.mean, np.float32(1.75))
    both = first + second
    assert isinstance(both, TokenLoss)
    assert_equal(both.loss, np.float64(7.5))
    assert_equal(both.weight, np.float64(3))
    assert_equal(both.mean, np.float32(2.5))


def test_token_losses_are_summed_in_float32() -> None:
    # In bfloat16 the sum would stop growing at 256.
    token_losses = jnp.ones((8, 128), jnp.bfloat16)
    summed = sum_token_losses(token_losses, jnp.ones((8, 128), bool))
    assert_equal(summed.loss, np.float32(1024))
    assert_equal(summed.weight, np.float32(1024))


def test_means_without_tokens_are_zero() -> None:
    losses = mtp_losses(np.zeros(2, np.float32), np.array([0.0, 4.0], np.float32))
    assert_equal(losses.mean, np.zeros(2, np.float32))
    nothing = sum_token_losses(jnp.full((1, 2), jnp.inf), jnp.zeros((1, 2), bool))
    assert_equal(nothing.mean, np.float32(0))


# Depth weights


@pytest.mark.parametrize("num_depths", [0, 1, 2, 5])
@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0, 1.5])
def test_exponential_depth_weights(num_depths: int, decay: float) -> None:
    powers = np.array([decay**k for k in range(num_depths)], np.float64)
    expected = powers / powers.sum() if num_depths else powers
    assert_close(exponential_depth_weights(num_depths, decay), expected)
    traced = jax.jit(lambda decay: exponential_depth_weights(num_depths, decay))(decay)
    assert_close(traced, expected)


# The weights with which the depths' losses enter an objective


def weighted(losses: MTPLosses, **arguments: Any) -> jax.Array:
    return calculate_mtp_loss(losses, depth_weights=jnp.asarray(DEPTH_WEIGHTS), **arguments)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (calculate_mtp_loss, [1, 1, 1]),
        (lambda losses: -3 * calculate_mtp_loss(losses), [-1, -1, -1]),
        (partial(calculate_mtp_loss, scaling_factor=0), [0, 0, 0]),
        (partial(calculate_mtp_loss, reduction="mean_of_depths"), 2 / COUNTS),
        (weighted, DEPTH_WEIGHTS / 4),
        (partial(weighted, reduction="mean_of_depths"), DEPTH_WEIGHTS / COUNTS / 0.5),
        (lambda losses: jnp.sum(losses.losses**2), [0, 0, 0]),
        (lambda losses: losses.losses[1] - 2 * losses.losses[2], [0, 0.5, -1]),
        (lambda losses: jnp.max(losses.mean), [1 / 10 / 0.5, 1 / 8 / 0.5, 1]),
    ],
)
def test_loss_weights(objective: Any, expected: Any) -> None:
    assert_close(loss_weights(objective, jnp.asarray(COUNTS)), np.asarray(expected, np.float64))


def test_loss_weights_where_nothing_is_scored() -> None:
    mean_of_depths = partial(calculate_mtp_loss, reduction="mean_of_depths")
    counts = jnp.asarray([4.0, 0.0, 8.0])
    assert_close(loss_weights(mean_of_depths, counts), np.array([1, 0, 0.5]))
    nothing = loss_weights(calculate_mtp_loss, jnp.zeros(NUM_DEPTHS))
    assert_equal(nothing, np.zeros(NUM_DEPTHS, np.float32))


def test_loss_weights_are_constants() -> None:
    def total(scaling_factor: jax.Array, depth_weights: jax.Array) -> jax.Array:
        objective = partial(
            calculate_mtp_loss, scaling_factor=scaling_factor, depth_weights=depth_weights
        )
        return jnp.sum(loss_weights(objective, jnp.asarray(COUNTS)))

    arguments = jnp.asarray(0.3), jnp.asarray(DEPTH_WEIGHTS)
    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*arguments)
    assert_close(value, np.sum(DEPTH_WEIGHTS) / 4)
    assert_equal(gradients[0], np.float32(0))
    assert_equal(gradients[1], np.zeros(NUM_DEPTHS, np.float32))


def test_z_losses_add_up() -> None:
    some = MTPLosses(jnp.asarray(SUMS), jnp.asarray(COUNTS), z_losses=jnp.asarray(SUMS) / 10)
    both = some + mtp_losses(SUMS, COUNTS)
    assert_close(both.z_losses, SUMS / 10)
    assert_close(both.losses, 2 * SUMS)
    token = TokenLoss(jnp.asarray(3.0), jnp.asarray(2.0), z_loss=jnp.asarray(0.5))
    assert_equal((token + token).z_loss, np.float64(1))
    assert_equal(TokenLoss(jnp.asarray(3.0), jnp.asarray(2.0)).z_loss, np.float32(0))


# Wrong arguments

LOSSES = mtp_losses(SUMS, COUNTS)


def test_unknown_reduction_raises() -> None:
    unknown: Any = "sum"
    with pytest.raises((ValueError, TypeCheckError), match="reduction"):
        calculate_mtp_loss(LOSSES, reduction=unknown)


@pytest.mark.parametrize(
    ("argument", "function", "args", "kwargs"),
    [
        ("losses", calculate_mtp_loss, (SUMS,), {}),
        ("scaling_factor", calculate_mtp_loss, (LOSSES,), {"scaling_factor": jnp.ones(1)}),
        ("depth_weights", calculate_mtp_loss, (LOSSES,), {"depth_weights": jnp.ones((3, 1))}),
        ("depth_weights", calculate_mtp_loss, (LOSSES,), {"depth_weights": jnp.ones(3, bool)}),
        ("total_weights", calculate_mtp_loss, (LOSSES,), {"total_weights": 3.0}),
        ("mask", sum_token_losses, (jnp.ones((2, 3)), jnp.ones((2, 4), bool)), {}),
        ("mask", sum_token_losses, (jnp.ones((2, 3)), jnp.ones((2, 3))), {}),
        ("negative_log_likelihood", sum_token_losses, (jnp.ones(3), jnp.ones((2, 3), bool)), {}),
        ("num_depths", exponential_depth_weights, ("2", 0.5), {}),
        ("decay", exponential_depth_weights, (2, jnp.ones(2)), {}),
    ],
)
def test_wrong_arguments_are_named(
    argument: str, function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert_rejects(argument, function, *args, **kwargs)


@pytest.mark.parametrize("argument", ["depth_weights", "total_weights"])
@pytest.mark.parametrize("length", [1, 2])
@both_reductions
def test_wrong_number_of_depths_raises(argument: str, length: int, reduction: Any) -> None:
    wrong: dict[str, Any] = {argument: jnp.ones(length)}
    with pytest.raises((ValueError, TypeCheckError), match=argument):
        calculate_mtp_loss(LOSSES, reduction=reduction, **wrong)


def test_whole_numbers_are_numbers() -> None:
    assert_close(
        calculate_mtp_loss(LOSSES, scaling_factor=1), calculate_mtp_loss(LOSSES, scaling_factor=1.0)
    )
    assert_close(exponential_depth_weights(3, 1), np.full(3, 1 / 3))


# Numbers at the edges


def test_counts_do_not_stall_where_float32_has_no_odd_numbers() -> None:
    many, one = (mtp_losses(np.ones(3, np.float32), np.full(3, n, np.float32)) for n in (2**24, 1))
    assert_equal((many + one + one + one).weights, np.full(3, 2.0**24 + 3))
    token = TokenLoss(jnp.asarray(1.0), jnp.asarray(2.0**24))
    assert_equal((token + TokenLoss(jnp.asarray(1.0), jnp.asarray(1.0))).weight, 2.0**24 + 1)


def test_sums_are_traced_in_a_compiled_function() -> None:
    losses = mtp_losses(SUMS, COUNTS)
    both = jax.jit(lambda x, y: x + y)(losses, losses)
    assert_equal(both.losses, 2 * SUMS)
    assert isinstance(both.losses, jax.Array)


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), np.array(0.5), 0.5, jnp.asarray(0.5)]
)
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    if isinstance(number, np.ndarray):
        number = jnp.asarray(number)
    half = calculate_mtp_loss(LOSSES, scaling_factor=number)
    assert_close(half, 5 * np.asarray(calculate_mtp_loss(LOSSES)), rtol=1e-6)


@pytest.mark.parametrize(
    "weights", [[1, 0, 2], (1.0, 0.0, 2.0), np.array([1, 0, 2]), jnp.asarray([1, 0, 2])]
)
def test_weights_of_lists_and_of_integers(weights: Any) -> None:
    expected = loss_oracle(SUMS, COUNTS, depth_weights=np.array([1.0, 0, 2]))
    assert_close(calculate_mtp_loss(LOSSES, depth_weights=weights), expected)
    assert calculate_mtp_loss(LOSSES, depth_weights=weights).dtype == jnp.float32


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_weights_and_factors_that_are_negative_or_not_finite_are_errors(bad: float) -> None:
    for name in ("depth_weights", "total_weights"):
        wrong: dict[str, Any] = {name: jnp.asarray([1.0, bad, 1.0])}
        with pytest.raises(ValueError, match=f"`{name}` must be finite and not negative"):
            calculate_mtp_loss(LOSSES, **wrong)
    with pytest.raises(ValueError, match="`scaling_factor` must be finite and not negative"):
        calculate_mtp_loss(LOSSES, scaling_factor=bad)
    with pytest.raises(ValueError, match="`decay` must be finite and not negative"):
        exponential_depth_weights(3, bad)


@pytest.mark.parametrize("decay", [1e30, 3.0, 1e-30, 0.0])
def test_depth_weights_of_a_steep_decay(decay: float) -> None:
    exact = [float(decay) ** k if k else 1.0 for k in range(5)]
    assert_close(exponential_depth_weights(5, decay), np.array(exact) / sum(exact), atol=1e-7)
    last = exponential_depth_weights(200, 1e30)
    assert_close(last, np.eye(200)[-1], atol=1e-29)


def test_losses_of_different_depths_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="same number of depths; got 3 and 1"):
        _ = LOSSES + mtp_losses(SUMS[:1], COUNTS[:1])
    with pytest.raises((ValueError, TypeCheckError), match=r"one number a depth|'weights'"):
        MTPLosses(jnp.ones(3), jnp.ones(1))


def test_an_objective_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="`objective` must reduce"):
        loss_weights(lambda losses: jnp.asarray(losses.losses), jnp.asarray(COUNTS))
