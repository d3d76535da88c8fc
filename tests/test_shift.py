from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DTYPES, align_oracle, assert_equal, assert_rejects, shift_oracle
from hypothesis import example, given
from hypothesis.extra.numpy import arrays
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import TypeCheckError

from equinox_mtp import (
    MTPTargets,
    align_targets,
    inputs_and_targets,
    roll_and_mask,
    roll_and_mask_by_segment,
    scored_targets,
)

BATCH, SEQ = 2, 7
NUM_SHARDS = 8
FIELDS = ("input_ids", "position_ids", "target_ids", "mask", "token_mask")

# Left padding, two documents that meet, one that comes back, padding between and after.
SEGMENT_IDS = np.array([[0, 1, 1, 2, 2, 2, 1], [3, 3, 0, 0, 4, 4, 0]], np.int32)


def random_array(shape: tuple[int, ...], dtype: Any = np.int32, seed: int = 0) -> np.ndarray:
    # Never zero unless boolean, so that fill cannot pass for a value.
    integers = np.random.default_rng(seed).integers(1, 100, shape)
    return (integers % 2 == 0) if dtype == jnp.bool_ else integers.astype(dtype)


def sequence_mesh(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    devices = jax.devices("cpu")[:NUM_SHARDS]
    return jax.make_mesh((NUM_SHARDS,), ("context",), axis_types=(axis_type,), devices=devices)


# Shifting


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", [(), (3,), (2, 2)])
@pytest.mark.parametrize("shift", [0, -1, -3, -SEQ + 1, -SEQ, -SEQ - 1, -1000])
def test_roll_and_mask(dtype: Any, rest: tuple[int, ...], shift: int) -> None:
    x = random_array((BATCH, SEQ, *rest), dtype)
    assert_equal(roll_and_mask(x, shift), shift_oracle(x, shift))
    assert_equal(roll_and_mask(jnp.asarray(x), shift), shift_oracle(x, shift))


@pytest.mark.parametrize(
    ("dtype", "fill_value"),
    [
        (jnp.bool_, True),
        (jnp.int32, -100),
        (jnp.uint8, 255),
        (jnp.float32, float("-inf")),
        (jnp.float32, 7),
        (jnp.bfloat16, 0.5),
    ],
)
@pytest.mark.parametrize("shift", [-2, -SEQ - 1])
def test_fill_values(dtype: Any, fill_value: float, shift: int) -> None:
    x = random_array((BATCH, SEQ), dtype)
    assert_equal(roll_and_mask(x, shift, fill_value=fill_value), shift_oracle(x, shift, fill_value))
    assert_equal(
        roll_and_mask_by_segment(x, SEGMENT_IDS, shift, fill_value=fill_value),
        shift_oracle(x, shift, fill_value, SEGMENT_IDS),
    )


def test_default_shift_is_one_to_the_left() -> None:
    x = random_array((BATCH, SEQ))
    assert_equal(roll_and_mask(x), shift_oracle(x, -1))
    assert_equal(
        roll_and_mask_by_segment(x, SEGMENT_IDS), shift_oracle(x, -1, segment_ids=SEGMENT_IDS)
    )


@pytest.mark.parametrize("rest", [(), (3,)])
@pytest.mark.parametrize("shift", [0, -1, -2, -3, -SEQ, -SEQ - 1])
def test_roll_and_mask_by_segment(rest: tuple[int, ...], shift: int) -> None:
    x = random_array((BATCH, SEQ, *rest))
    expected = shift_oracle(x, shift, segment_ids=SEGMENT_IDS)
    assert_equal(roll_and_mask_by_segment(x, SEGMENT_IDS, shift), expected)
    assert_equal(roll_and_mask_by_segment(x, jnp.asarray(SEGMENT_IDS), shift), expected)
    assert_equal(roll_and_mask_by_segment(x, None, shift), shift_oracle(x, shift))


def test_shift_0_keeps_everything_but_padding() -> None:
    x = random_array((BATCH, SEQ))
    assert_equal(roll_and_mask(x, 0, fill_value=-1), x)
    assert_equal(
        roll_and_mask_by_segment(x, SEGMENT_IDS, 0, fill_value=-1),
        np.where(SEGMENT_IDS == 0, np.int32(-1), x),
    )


@pytest.mark.parametrize("shift", [1, 5])
def test_positive_shift_raises(shift: int) -> None:
    x = random_array((BATCH, SEQ))
    with pytest.raises(ValueError, match=rf"`shift` must be .*`shift=-{shift}`"):
        roll_and_mask(x, shift)
    with pytest.raises(ValueError, match=rf"`shift` must be .*`shift=-{shift}`"):
        roll_and_mask_by_segment(x, SEGMENT_IDS, shift)


def test_shifts_under_jit_and_vmap() -> None:
    x = random_array((3, BATCH, SEQ))
    segment_ids = np.stack([SEGMENT_IDS, SEGMENT_IDS[::-1], SEGMENT_IDS[:, ::-1]])
    rolled = jax.jit(jax.vmap(lambda row: roll_and_mask(row, -2, fill_value=9)))(x)
    assert_equal(rolled, np.stack([shift_oracle(row, -2, 9) for row in x]))
    by_segment = jax.jit(jax.vmap(lambda x, ids: roll_and_mask_by_segment(x, ids, -2)))
    expected = [shift_oracle(x[n], -2, segment_ids=segment_ids[n]) for n in range(3)]
    assert_equal(by_segment(x, segment_ids), np.stack(expected))


def test_shifts_under_scan() -> None:
    x = random_array((BATCH, SEQ))

    def step(carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        carry = roll_and_mask(carry, -1, fill_value=-1)
        return carry, carry

    _, rolled = lax.scan(step, jnp.asarray(x), length=SEQ + 1)
    expected = [shift_oracle(x, -k, -1) for k in range(1, SEQ + 2)]
    assert_equal(rolled, np.stack(expected))


def test_gradient_of_a_shift_is_a_shift_to_the_right() -> None:
    x = random_array((BATCH, SEQ), np.float32)
    cotangent = random_array((BATCH, SEQ), np.float32, seed=1)
    gradient = jax.grad(lambda x: jnp.sum(roll_and_mask(x, -2) * cotangent))(x)
    expected = np.concatenate([np.zeros((BATCH, 2), np.float32), cotangent[:, :-2]], axis=1)
    assert_equal(gradient, expected)


# Shifting a sequence that is split over devices


@pytest.mark.parametrize("shard_len", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int32])
def test_roll_and_mask_across_shards(shard_len: int, dtype: Any) -> None:
    # From nothing, over less than a shard and one or more whole ones, to beyond the row.
    seq = NUM_SHARDS * shard_len
    shifts = range(0, -(seq + 3) - 1, -1)
    x = random_array((BATCH, seq, 2), dtype)

    def shard(x: jax.Array) -> list[jax.Array]:
        return [roll_and_mask(x, shift, fill_value=1, axis_name="context") for shift in shifts]

    split = P(None, "context")
    sharded = jax.shard_map(shard, mesh=sequence_mesh(), in_specs=split, out_specs=split)
    for shift, rolled in zip(shifts, jax.jit(sharded)(x), strict=True):
        assert_equal(rolled, shift_oracle(x, shift, 1))


@pytest.mark.parametrize("shard_len", [1, 3])
def test_roll_and_mask_by_segment_across_shards(shard_len: int) -> None:
    seq = NUM_SHARDS * shard_len
    shifts = range(0, -(seq + 3) - 1, -1)
    x = random_array((BATCH, seq))
    # Runs of a few tokens, some of padding: documents end inside shards and at their edges.
    segment_ids = np.repeat(np.random.default_rng(0).integers(0, 3, (BATCH, seq)), 4, axis=1)
    segment_ids = segment_ids[:, 2 : 2 + seq].astype(np.int32)

    def shard(x: jax.Array, segment_ids: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        def roll(segments: jax.Array | None, shift: int) -> jax.Array:
            return roll_and_mask_by_segment(x, segments, shift, fill_value=-1, axis_name="context")

        return [(roll(segment_ids, shift), roll(None, shift)) for shift in shifts]

    split = P(None, "context")
    sharded = jax.shard_map(shard, mesh=sequence_mesh(), in_specs=(split, split), out_specs=split)
    for shift, rolled in zip(shifts, jax.jit(sharded)(x, segment_ids), strict=True):
        assert_equal(rolled[0], shift_oracle(x, shift, -1, segment_ids))
        assert_equal(rolled[1], shift_oracle(x, shift, -1))


def test_gradient_crosses_shards() -> None:
    seq, shift = 2 * NUM_SHARDS, -5
    x = random_array((BATCH, seq), np.float32)
    cotangent = random_array((BATCH, seq), np.float32, seed=1)
    split = P(None, "context")
    roll = jax.shard_map(
        lambda x: roll_and_mask(x, shift, axis_name="context"),
        mesh=sequence_mesh(),
        in_specs=split,
        out_specs=split,
    )
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(roll(x) * cotangent)))(x)
    expected = np.concatenate([np.zeros((BATCH, 5), np.float32), cotangent[:, :shift]], axis=1)
    assert_equal(gradient, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_without_axis_name(axis_type: AxisType) -> None:
    seq = 4 * NUM_SHARDS
    shifts = (0, -1, -3, -4, -6, -13, -seq, -seq - 3)
    x = random_array((BATCH, seq))
    segment_ids = np.repeat(np.arange(seq // 4, dtype=np.int32) % 3, 4)[None].repeat(BATCH, 0)
    mesh = sequence_mesh(axis_type)
    sharding = NamedSharding(mesh, P(None, "context"))

    @jax.jit
    def roll(x: jax.Array, segments: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        return [
            (roll_and_mask(x, shift), roll_and_mask_by_segment(x, segments, shift))
            for shift in shifts
        ]

    with jax.set_mesh(mesh):
        placed = jax.device_put((x, segment_ids), sharding)
        compiled = roll.lower(*placed).compile().as_text()
        rolled = roll(*placed)
    # The tokens that move cross the devices; the sequence is never put together on one.
    assert compiled is not None
    assert "collective-permute" in compiled
    assert "all-gather" not in compiled
    for shift, (plain, by_segment) in zip(shifts, rolled, strict=True):
        assert_equal(plain, shift_oracle(x, shift))
        assert_equal(by_segment, shift_oracle(x, shift, segment_ids=segment_ids))


# Alignment


def assert_aligned(targets: MTPTargets, expected: dict[str, np.ndarray]) -> None:
    assert targets.num_depths == expected["mask"].shape[0]
    for field in FIELDS:
        assert_equal(getattr(targets, field), expected[field])


def ids(low: int, high: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.int32, (BATCH, SEQ), elements=st.integers(low, high))


@st.composite
def segment_rows(draw: st.DrawFn) -> np.ndarray:
    """Rows of runs of one document or of padding (0), in any order and of any length."""
    runs = st.lists(st.integers(1, SEQ), min_size=SEQ, max_size=SEQ)
    names = st.lists(st.integers(0, 3), min_size=SEQ, max_size=SEQ)
    rows = [np.repeat(draw(names), draw(runs))[:SEQ] for _ in range(BATCH)]
    return np.stack(rows).astype(np.int32)


@st.composite
def alignment_cases(draw: st.DrawFn) -> dict[str, Any]:
    segment_ids = draw(st.none() | segment_rows())
    masks: list[st.SearchStrategy[np.ndarray | None]] = [
        st.none(),
        arrays(np.bool_, (BATCH, SEQ)),
        ids(0, 1),
        st.just(np.ones((BATCH, SEQ), np.int32) if segment_ids is None else segment_ids),
    ]
    return {
        "input_ids": draw(ids(1, 99)),
        "target_ids": draw(ids(1, 99)),
        "target_mask": draw(st.one_of(masks)),
        "segment_ids": segment_ids,
        "position_ids": draw(st.none() | ids(0, SEQ)),
        "chain_mask": draw(st.booleans()),
        # Few values, as each compiles; below, at and beyond the sequence length.
        "num_depths": draw(st.sampled_from([0, 1, 2, 3, SEQ, SEQ + 2])),
    }


# A document that comes back, with a masked target in between: every rule at once.
RETURNING_DOCUMENT = {
    "input_ids": random_array((BATCH, SEQ)),
    "target_ids": random_array((BATCH, SEQ), seed=1),
    "target_mask": np.array([[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1]], np.int32),
    "segment_ids": np.array([[1, 1, 2, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 0]], np.int32),
    "position_ids": None,
    "num_depths": 4,
}


@given(case=alignment_cases(), on_device=st.booleans())
@example(case=RETURNING_DOCUMENT | {"chain_mask": False}, on_device=True)
@example(case=RETURNING_DOCUMENT | {"chain_mask": True}, on_device=False)
def test_align_targets(case: dict[str, Any], on_device: bool) -> None:
    to_array: Callable[[Any], Any] = jnp.asarray if on_device else np.asarray
    given_case: dict[str, Any] = {
        k: to_array(v) if isinstance(v, np.ndarray) else v for k, v in case.items()
    }
    assert_aligned(align_targets(**given_case), align_oracle(**case))


@pytest.mark.parametrize(
    ("segment_ids", "counts"), [([1, 2, 1, 1, 1], [2, 1]), ([1, 0, 1, 1, 1], [2, 1])]
)
def test_no_depth_is_scored_across_a_gap(segment_ids: list[int], counts: list[int]) -> None:
    # The first document has one token: no depth can be scored from it, whatever id comes again.
    segments = np.array([segment_ids], np.int32)
    tokens = np.arange(5, dtype=np.int32)[None]
    targets = align_targets(tokens, tokens + 1, num_depths=2, segment_ids=segments)
    assert_equal(targets.mask.sum(axis=(1, 2)), np.array(counts, np.int32))
    assert not np.any(targets.mask[:, 0, 0])
    assert_equal(targets.token_mask, targets.mask)


def test_ids_that_32_bits_cannot_hold() -> None:
    tokens = np.arange(6)[None]
    for dtype in (np.int64, np.uint8, np.uint16, np.uint32, np.uint64):
        inputs, targets, _ = inputs_and_targets(tokens.astype(dtype))
        np.testing.assert_array_equal(inputs, tokens[:, :-1])
        np.testing.assert_array_equal(targets, tokens[:, 1:])
    for bad in (2**32 + 3, 2**31, -(2**31) - 1):
        wrong = tokens.copy()
        wrong[0, 2] = bad
        with pytest.raises(ValueError, match=r"`tokens` must lie in .* 32 bits"):
            inputs_and_targets(wrong)
        with pytest.raises(ValueError, match=r"`x` must lie in .* 32 bits"):
            roll_and_mask(wrong)
        for name in ("input_ids", "target_ids", "segment_ids", "position_ids"):
            arguments: dict[str, Any] = dict.fromkeys(("input_ids", "target_ids"), tokens)
            arguments[name] = wrong
            with pytest.raises(ValueError, match=f"`{name}` must lie in"):
                align_targets(num_depths=1, **arguments)
    with pytest.raises(ValueError, match="`segment_ids` must lie in"):
        inputs_and_targets(tokens, segment_ids=tokens * 2**32)


def test_targets_whose_fields_differ_are_an_error() -> None:
    ids = jnp.zeros((2, 1, 4), jnp.int32)
    with pytest.raises((ValueError, TypeCheckError)):
        MTPTargets(ids, ids, ids, jnp.ones((1, 1, 4), bool))


def test_align_targets_by_hand() -> None:
    # Documents a = 10 11 12 13 and b = 20 21 22, each with its end-of-text token last.
    input_ids = np.array([[10, 11, 12, 13, 20, 21, 22]], np.int32)
    target_ids = np.array([[11, 12, 13, 20, 21, 22, 99]], np.int32)
    target_mask = np.array([[1, 1, 1, 0, 1, 1, 0]], bool)
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2]], np.int32)
    targets = align_targets(
        input_ids, target_ids, target_mask, num_depths=3, segment_ids=segment_ids
    )
    expected = {
        "input_ids": [
            [[11, 12, 13, 0, 21, 22, 0]],
            [[12, 13, 0, 0, 22, 0, 0]],
            [[13, 0, 0, 0, 0, 0, 0]],
        ],
        "position_ids": [[[1, 2, 3, 0, 1, 2, 0]], [[2, 3, 0, 0, 2, 0, 0]], [[3, 0, 0, 0, 0, 0, 0]]],
        "target_ids": [
            [[12, 13, 20, 0, 22, 99, 0]],
            [[13, 20, 0, 0, 99, 0, 0]],
            [[20, 0, 0, 0, 0, 0, 0]],
        ],
        "mask": [[[1, 1, 0, 0, 1, 0, 0]], [[1, 0, 0, 0, 0, 0, 0]], [[0] * 7]],
        "token_mask": [
            [[1, 1, 1, 0, 1, 1, 0]],
            [[1, 1, 0, 0, 1, 0, 0]],
            [[1, 0, 0, 0, 0, 0, 0]],
        ],
    }
    dtypes = dict.fromkeys(FIELDS, np.int32) | {"mask": np.bool_, "token_mask": np.bool_}
    assert_aligned(targets, {field: np.array(expected[field], dtypes[field]) for field in FIELDS})


align_all_depths = jax.jit(partial(align_targets, num_depths=SEQ), static_argnames="chain_mask")


@given(segment_ids=segment_rows(), other=ids(100, 199), chain_mask=st.booleans())
def test_no_document_sees_another(
    segment_ids: np.ndarray, other: np.ndarray, chain_mask: bool
) -> None:
    # Whatever is written into the other documents, at every depth this one stays as it was.
    own = segment_ids == 1
    tokens = random_array((BATCH, SEQ))

    changed = np.where(own, tokens, other)
    before, after = (
        align_all_depths(ids, ids, segment_ids=segment_ids, chain_mask=chain_mask)
        for ids in (tokens, changed)
    )
    for field in FIELDS:
        in_own = [np.where(own, getattr(targets, field), 0) for targets in (before, after)]
        assert_equal(in_own[1], in_own[0])
    for k in range(1, SEQ + 1):
        assert not np.isin(np.asarray(after.input_ids[k - 1])[own], other).any()
        assert not np.isin(np.asarray(after.target_ids[k - 1])[own], other).any()


@pytest.mark.parametrize("chain_mask", [False, True])
def test_align_targets_under_jit_and_vmap(chain_mask: bool) -> None:
    input_ids, target_ids = random_array((3, BATCH, SEQ)), random_array((3, BATCH, SEQ), seed=1)
    target_mask = random_array((3, BATCH, SEQ), np.bool_, seed=2)
    segment_ids = np.stack([SEGMENT_IDS, SEGMENT_IDS[::-1], SEGMENT_IDS[:, ::-1]])
    traces = []

    def align(*row: jax.Array) -> MTPTargets:
        traces.append(row)
        *first, segments = row
        return align_targets(*first, num_depths=3, segment_ids=segments, chain_mask=chain_mask)

    jitted, mapped = (
        jax.jit(align),
        jax.jit(jax.vmap(align))(input_ids, target_ids, target_mask, segment_ids),
    )
    for n in range(3):
        row = (input_ids[n], target_ids[n], target_mask[n])
        expected = align_oracle(
            *row, num_depths=3, segment_ids=segment_ids[n], chain_mask=chain_mask
        )
        assert_aligned(jitted(*row, segment_ids[n]), expected)
        assert_aligned(jax.tree.map(lambda leaf, n=n: leaf[n], mapped), expected)
    # One trace mapped, one not: documents and masks are data, and nothing compiles anew for them.
    assert len(traces) == 2


def test_zero_depths_keep_shape_and_dtype() -> None:
    tokens = random_array((BATCH, SEQ))
    targets = align_targets(tokens, tokens, num_depths=0, segment_ids=SEGMENT_IDS)
    assert targets.num_depths == 0
    for field in FIELDS:
        dtype = np.bool_ if "mask" in field else np.int32
        assert_equal(getattr(targets, field), np.zeros((0, BATCH, SEQ), dtype))


def test_negative_num_depths_raises() -> None:
    tokens = random_array((BATCH, SEQ))
    with pytest.raises(ValueError, match=r"`num_depths` must be .*-1"):
        align_targets(tokens, tokens, num_depths=-1)


# From tokens to inputs, targets and masks


@given(
    tokens=arrays(np.int32, (BATCH, SEQ + 1), elements=st.integers(1, 99)),
    segment_ids=st.none() | arrays(np.int32, (BATCH, SEQ + 1), elements=st.integers(0, 2)),
)
def test_inputs_and_targets(tokens: np.ndarray, segment_ids: np.ndarray | None) -> None:
    input_ids, target_ids, target_mask = inputs_and_targets(tokens, segment_ids=segment_ids)
    assert_equal(input_ids, tokens[:, :SEQ])
    assert_equal(target_ids, tokens[:, 1:])
    expected = np.ones((BATCH, SEQ), bool)
    if segment_ids is not None:
        for b, i in np.ndindex(BATCH, SEQ):
            expected[b, i] = segment_ids[b, i] == segment_ids[b, i + 1] != 0
    assert_equal(target_mask, expected)


@pytest.mark.parametrize("width", [0, 1])
def test_too_few_tokens_raise(width: int) -> None:
    with pytest.raises(ValueError, match=r"`tokens` must have at least two"):
        inputs_and_targets(np.zeros((BATCH, width), np.int32))


def test_two_tokens_are_enough() -> None:
    input_ids, target_ids, target_mask = inputs_and_targets(np.array([[3, 4]], np.int32))
    assert_equal(input_ids, np.array([[3]], np.int32))
    assert_equal(target_ids, np.array([[4]], np.int32))
    assert_equal(target_mask, np.array([[True]]))


@given(
    target_mask=st.none() | arrays(np.bool_, (BATCH, SEQ)) | ids(0, 3),
    segment_ids=st.none() | segment_rows(),
)
def test_scored_targets(target_mask: np.ndarray | None, segment_ids: np.ndarray | None) -> None:
    expected = np.ones((BATCH, SEQ), bool)
    for b, i in np.ndindex(BATCH, SEQ):
        counts = target_mask is None or target_mask[b, i] != 0
        expected[b, i] = counts and (segment_ids is None or segment_ids[b, i] != 0)
    target_ids = random_array((BATCH, SEQ))
    assert_equal(scored_targets(target_ids, target_mask, segment_ids), expected)


# Wrong shapes and dtypes

GOOD = random_array((BATCH, SEQ))
SHORT = GOOD[:, :-1]
FLOAT = GOOD.astype(np.float32)


@pytest.mark.parametrize(
    ("argument", "function", "args", "kwargs"),
    [
        ("x", roll_and_mask, (GOOD[0],), {}),
        ("x", roll_and_mask, ([[1, 2]],), {}),
        ("shift", roll_and_mask, (GOOD, -1.0), {}),
        ("fill_value", roll_and_mask, (GOOD,), {"fill_value": "0"}),
        ("segment_ids", roll_and_mask_by_segment, (GOOD, SHORT), {}),
        ("segment_ids", roll_and_mask_by_segment, (GOOD, FLOAT), {}),
        ("input_ids", align_targets, (FLOAT, GOOD), {"num_depths": 1}),
        ("target_ids", align_targets, (GOOD, SHORT), {"num_depths": 1}),
        ("target_mask", align_targets, (GOOD, GOOD, FLOAT), {"num_depths": 1}),
        ("num_depths", align_targets, (GOOD, GOOD), {"num_depths": 1.5}),
        ("segment_ids", align_targets, (GOOD, GOOD), {"num_depths": 1, "segment_ids": SHORT}),
        ("position_ids", align_targets, (GOOD, GOOD), {"num_depths": 1, "position_ids": FLOAT}),
        ("tokens", inputs_and_targets, (FLOAT,), {}),
        ("segment_ids", inputs_and_targets, (GOOD,), {"segment_ids": SHORT}),
        ("target_mask", scored_targets, (GOOD, SHORT), {}),
        ("segment_ids", scored_targets, (GOOD, None, FLOAT), {}),
    ],
)
def test_wrong_arguments_are_named(
    argument: str, function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert_rejects(argument, function, *args, **kwargs)
