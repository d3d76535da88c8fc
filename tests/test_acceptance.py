from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import acceptance_oracle, assert_close, assert_equal, assert_rejects
from hypothesis import given
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError

from equinox_mtp import MTPAcceptance, MTPAcceptanceRate, calculate_mtp_acceptance_rate

BATCH, SEQ = 2, 6
COUNTS = ("accepted", "scored", "joint_accepted", "joint_scored", "joint_reached")


def acceptance_of(case: dict[str, Any]) -> MTPAcceptance:
    fields = ("predictions", "target_ids", "mask")
    return MTPAcceptance(**{field: jnp.asarray(case[field]) for field in fields})


def rate_of(case: dict[str, Any]) -> MTPAcceptanceRate:
    main = case["main_predictions"]
    main = None if main is None else jnp.asarray(main)
    return calculate_mtp_acceptance_rate(acceptance_of(case), main)


def assert_rates(rate: MTPAcceptanceRate, counts: dict[str, np.ndarray]) -> None:
    """The five counts are `counts`, and every rate is their quotient."""
    for name in COUNTS:
        assert_equal(getattr(rate, name), counts[name])

    def quotient(numerator: str, denominator: str) -> np.ndarray:
        pairs = zip(counts[numerator].tolist(), counts[denominator].tolist(), strict=True)
        return np.array([n / d if d else 0.0 for n, d in pairs], np.float64)

    joint = quotient("joint_accepted", "joint_scored")
    assert_close(rate.independent, quotient("accepted", "scored"))
    assert_close(rate.percent, 100 * quotient("accepted", "scored"))
    assert_close(rate.joint, joint)
    assert_close(rate.conditional, quotient("joint_accepted", "joint_reached"))
    assert_close(rate.expected_accepted_length, 1 + joint.sum())


@st.composite
def acceptance_cases(draw: st.DrawFn) -> dict[str, Any]:
    shape = (draw(st.sampled_from([0, 1, 3])), BATCH, SEQ)
    # Few ids, so that chance agreement is common; masks of depths that need not nest.
    few_ids = st.integers(0, 2)
    return {
        "predictions": draw(arrays(np.int32, shape, elements=few_ids)),
        "target_ids": draw(arrays(np.int32, shape, elements=few_ids)),
        "mask": draw(arrays(np.bool_, shape)),
        "main_predictions": draw(st.none() | arrays(np.int32, (BATCH, SEQ), elements=few_ids)),
    }


@given(case=acceptance_cases())
def test_acceptance(case: dict[str, Any]) -> None:
    assert_rates(rate_of(case), acceptance_oracle(**case))


@given(first=acceptance_cases(), second=acceptance_cases())
def test_batches_add_up(first: dict[str, Any], second: dict[str, Any]) -> None:
    # Of two cases the second takes the depths of the first: sums are over equal depths.
    num_depths = min(first["mask"].shape[0], second["mask"].shape[0])
    for case in (first, second):
        for field in ("predictions", "target_ids", "mask"):
            case[field] = case[field][:num_depths]
    summed = rate_of(first) + rate_of(second)
    counts = [acceptance_oracle(**case) for case in (first, second)]
    added = {name: counts[0][name].astype(np.int64) + counts[1][name] for name in COUNTS}
    assert_rates(summed, added)


def test_acceptance_by_hand() -> None:
    # The main model says 5 6 7 8; depth 1 agrees at the first two positions of three, depth 2 at
    # the second of two. Jointly only the second position gets both.
    case = {
        "predictions": np.array([[[6, 7, 0, 9]], [[0, 8, 9, 9]]], np.int32),
        "target_ids": np.zeros((2, 1, 4), np.int32),
        "mask": np.array([[[1, 1, 1, 0]], [[1, 1, 0, 0]]], bool),
        "main_predictions": np.array([[5, 6, 7, 8]], np.int32),
    }
    rate = rate_of(case)
    assert_equal(rate.accepted, np.array([2, 1], np.int32))
    assert_equal(rate.scored, np.array([3, 2], np.int32))
    assert_equal(rate.joint_accepted, np.array([2, 1], np.int32))
    assert_equal(rate.joint_scored, np.array([3, 2], np.int32))
    assert_equal(rate.joint_reached, np.array([3, 2], np.int32))
    assert_close(rate.percent, [200 / 3, 50])
    assert_close(rate.expected_accepted_length, 1 + 2 / 3 + 1 / 2)


def test_perfect_drafts_are_accepted_up_to_the_end() -> None:
    main_predictions = np.random.default_rng(0).integers(1, 99, (BATCH, SEQ)).astype(np.int32)
    num_depths = 3
    mask = np.zeros((num_depths, BATCH, SEQ), bool)
    predictions = np.zeros(mask.shape, np.int32)
    for k in range(1, num_depths + 1):
        predictions[k - 1, :, : SEQ - k] = main_predictions[:, k:]
        mask[k - 1, :, : SEQ - k] = True
    acceptance = MTPAcceptance(
        predictions=jnp.asarray(predictions),
        target_ids=jnp.zeros_like(predictions),
        mask=jnp.asarray(mask),
    )
    rate = calculate_mtp_acceptance_rate(acceptance, jnp.asarray(main_predictions))
    scored = np.array([BATCH * (SEQ - k) for k in range(1, num_depths + 1)], np.int32)
    for name in COUNTS:
        assert_equal(getattr(rate, name), scored)
    assert_equal(rate.expected_accepted_length, np.float32(1 + num_depths))


def test_nothing_scored_gives_zero_rates() -> None:
    shape = (2, BATCH, SEQ)
    case = {
        "predictions": np.zeros(shape, np.int32),
        "target_ids": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, bool),
        "main_predictions": None,
    }
    rate = rate_of(case)
    assert_rates(rate, dict.fromkeys(COUNTS, np.zeros(2, np.int32)))
    assert_equal(rate.expected_accepted_length, np.float32(1))


def test_acceptance_under_jit_and_vmap() -> None:
    rng = np.random.default_rng(0)
    num_cases, shape = 3, (2, BATCH, SEQ)
    cases = {
        "predictions": rng.integers(0, 2, (num_cases, *shape)).astype(np.int32),
        "target_ids": rng.integers(0, 2, (num_cases, *shape)).astype(np.int32),
        "mask": rng.random((num_cases, *shape)) < 0.7,
        "main_predictions": rng.integers(0, 2, (num_cases, BATCH, SEQ)).astype(np.int32),
    }
    mapped = jax.jit(jax.vmap(rate_of))(cases)
    for n in range(num_cases):
        expected = acceptance_oracle(**{name: value[n] for name, value in cases.items()})
        assert_rates(jax.tree.map(lambda leaf, n=n: leaf[n], mapped), expected)


# Wrong arguments

ACCEPTANCE = MTPAcceptance(
    predictions=jnp.zeros((2, BATCH, SEQ), jnp.int32),
    target_ids=jnp.zeros((2, BATCH, SEQ), jnp.int32),
    mask=jnp.ones((2, BATCH, SEQ), bool),
)


def test_wrong_arguments_are_named() -> None:
    assert_rejects(
        "main_predictions", calculate_mtp_acceptance_rate, ACCEPTANCE, jnp.zeros((BATCH, SEQ))
    )
    assert_rejects(
        "main_predictions", calculate_mtp_acceptance_rate, ACCEPTANCE, jnp.zeros(SEQ, jnp.int32)
    )
    assert_rejects("acceptance", calculate_mtp_acceptance_rate, ACCEPTANCE.mask, None)


@pytest.mark.parametrize("shape", [(1, SEQ), (BATCH, 1), (BATCH, SEQ + 1)])
def test_main_predictions_of_another_batch_raise(shape: tuple[int, int]) -> None:
    with pytest.raises((ValueError, TypeCheckError), match="main_predictions"):
        calculate_mtp_acceptance_rate(ACCEPTANCE, jnp.zeros(shape, jnp.int32))


def test_no_acceptance_raises() -> None:
    with pytest.raises(ValueError, match=r"`acceptance` is `None`.*`predictions=True`"):
        calculate_mtp_acceptance_rate(None, None)


def test_counts_of_many_batches_are_not_cut_to_32_bits() -> None:
    case = {
        "predictions": np.zeros((1, 1, 4), np.int32),
        "target_ids": np.zeros((1, 1, 4), np.int32),
        "mask": np.ones((1, 1, 4), bool),
        "main_predictions": None,
    }
    rate = rate_of(case)
    many = jax.tree.map(lambda x: x + jnp.int32(2**31 - 5), rate)
    total = many + rate + rate
    assert_equal(total.scored, np.array([2**31 + 7]))
    assert_equal(total.independent, np.array([1], np.float32))


def test_what_is_not_finite_is_never_accepted() -> None:
    # All predictions of a model of NaN are -1, the main model's and the depths'.
    case = {
        "predictions": np.full((2, 1, 4), -1, np.int32),
        "target_ids": np.zeros((2, 1, 4), np.int32),
        "mask": np.ones((2, 1, 4), bool),
        "main_predictions": np.full((1, 4), -1, np.int32),
    }
    rate = rate_of(case)
    assert_equal(rate.joint, np.zeros(2, np.float32))
    assert_equal(rate.expected_accepted_length, np.float32(1))


def test_fields_and_sums_of_different_shapes_are_errors() -> None:
    ids = jnp.zeros((2, 1, 4), jnp.int32)
    with pytest.raises((ValueError, TypeCheckError)):
        MTPAcceptance(ids, ids, jnp.ones((1, 1, 4), bool))
    rates = [
        calculate_mtp_acceptance_rate(MTPAcceptance(x, x, x == 0), None) for x in (ids, ids[:1])
    ]
    with pytest.raises(ValueError, match="same number of depths; got 2 and 1"):
        _ = rates[0] + rates[1]
