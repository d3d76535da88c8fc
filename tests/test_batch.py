"""`Batch`: made of tokens, and read by the model, alignment, reordering and sharding alike."""

import dataclasses
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import TypeCheckError

import equinox_mtp as emtp
from equinox_mtp import Batch, MTPConfig, MTPModel, make_batch, nn, sharding

VOCAB = 13
segment_arrays = hnp.arrays(
    np.int32,
    # Of few shapes, as each compiles on a device.
    st.sampled_from([(1, 2), (2, 5), (3, 9)]),
    elements=st.integers(0, 2),
)


def make_rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    segments = np.asarray([[1, 1, 1, 2, 2, 2, 2, 2, 2], [1, 1, 2, 1, 1, 1, 1, 0, 0]], np.int32)
    return rng.integers(0, VOCAB, segments.shape).astype(np.int32), segments


def make_model(num_depths: int = 2, **options: Any) -> MTPModel:
    config = nn.TransformerConfig(
        vocab_size=VOCAB, embed_size=8, num_layers=1, num_heads=2, **options
    )
    return MTPModel(
        nn.TransformerDecoder(config, key=jax.random.key(0)),
        emtp.MultiTokenPredictionBlock(
            MTPConfig(num_depths),
            partial(nn.TransformerDecoderLayer, config),
            embed_size=8,
            key=jax.random.key(1),
        ),
    )


@given(segments=segment_arrays)
@pytest.mark.parametrize("on_host", [True, False])
def test_against_a_loop(segments: np.ndarray, on_host: bool) -> None:
    tokens = np.arange(segments.size, dtype=np.int32).reshape(segments.shape)
    to = np.asarray if on_host else jnp.asarray
    batch = make_batch(to(tokens), segment_ids=to(segments))
    assert all(isinstance(x, np.ndarray) == on_host for x in jax.tree.leaves(batch))
    batch = jax.tree.map(np.asarray, batch)
    for row, (ids, segment) in enumerate(zip(tokens, segments, strict=True)):
        position = 0
        for i in range(len(ids) - 1):
            position = position + 1 if i and segment[i] == segment[i - 1] else 0
            assert batch.position_ids[row, i] == position
            assert batch.input_ids[row, i] == ids[i]
            assert batch.target_ids[row, i] == ids[i + 1]
            assert batch.target_mask[row, i] == (segment[i] == segment[i + 1] != 0)
            assert batch.segment_ids is not None
            assert batch.segment_ids[row, i] == segment[i]


def test_rows_of_one_document_each() -> None:
    tokens = np.arange(10).reshape(2, 5)
    for batch in (make_batch(tokens), make_batch(jnp.asarray(tokens))):
        assert batch.segment_ids is None
        assert np.asarray(batch.position_ids).tolist() == [[0, 1, 2, 3]] * 2
        assert np.asarray(batch.target_mask).all()


def test_make_batch_is_inputs_and_targets() -> None:
    tokens, segments = make_rows()
    batch = jax.jit(lambda tokens, segments: make_batch(tokens, segment_ids=segments))(
        tokens, segments
    )
    expected = emtp.inputs_and_targets(tokens, segment_ids=segments)
    for ours, theirs in zip(
        (batch.input_ids, batch.target_ids, batch.target_mask), expected, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_align_is_align_targets() -> None:
    tokens, segments = make_rows()
    batch = make_batch(tokens, segment_ids=segments)
    for chain_mask in (False, True):
        expected = emtp.align_targets(
            batch.input_ids,
            batch.target_ids,
            batch.target_mask,
            num_depths=3,
            segment_ids=batch.segment_ids,
            position_ids=batch.position_ids,
            chain_mask=chain_mask,
        )
        aligned = batch.align(3, chain_mask=chain_mask)
        jax.tree.map(np.testing.assert_array_equal, aligned.targets, expected)
        assert dataclasses.replace(aligned, targets=None).target_ids is batch.target_ids


@pytest.mark.parametrize("aligned", [False, True])
def test_a_model_takes_a_batch_as_its_fields(aligned: bool) -> None:
    tokens, segments = make_rows()
    batch, model = make_batch(tokens, segment_ids=segments), make_model()
    expected = eqx.filter_jit(model)(
        batch.input_ids,
        batch.target_ids,
        batch.target_mask,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids,
    )
    output = eqx.filter_jit(model)(batch.align(2) if aligned else batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), output, expected)


def test_reordered_and_restored() -> None:
    tokens, segments = make_rows()
    model = make_model(attention=nn.causal_attention_by_position)
    batch = make_batch(tokens, segment_ids=segments)
    order = sharding.zigzag_order(8, 2)
    reordered = sharding.reorder(jax.tree.map(np.asarray, batch.align(2)), order)
    output, expected = eqx.filter_jit(model)(reordered), eqx.filter_jit(model)(batch)
    np.testing.assert_allclose(output.mtp.loss, expected.mtp.loss, rtol=1e-5)
    np.testing.assert_allclose(output.main.loss, expected.main.loss, rtol=1e-5)
    restored = sharding.restore(output.predictions, order)
    np.testing.assert_array_equal(restored, expected.predictions)


def test_a_batch_on_a_mesh() -> None:
    tokens, segments = make_rows()
    mesh = sharding.make_mesh({"data": 2, "context": 4})
    batch: Any = make_batch(tokens, segment_ids=segments).align(2)
    batch = sharding.shard_batch(batch, mesh)
    assert batch.targets.mask.sharding.shard_shape((2, 2, 8)) == (2, 1, 2)
    assert batch.position_ids.sharding.shard_shape((2, 8)) == (1, 2)


def test_lists_are_taken_as_arrays() -> None:
    tokens, segments = make_rows()
    expected = make_batch(tokens, segment_ids=segments)
    actual = make_batch(tokens.tolist(), segment_ids=segments.tolist())
    assert eqx.tree_equal(actual, expected)
    assert actual.input_ids.dtype == np.int32
    for arguments, error, message in (
        (([[1, 2, 3], [4, 5]],), ValueError, "`tokens` must have rows of one length"),
        (([1, 2, 3],), ValueError, r"`tokens` must have .* two tokens a row.* got shape \(3,\)"),
        (([[1.0, 2.0]],), TypeError, "`tokens` must be an array of integers"),
        (([["a", "b"]],), TypeError, "`tokens` must be an array of integers"),
        (([[1, 2, 3]], [[1, 1]]), ValueError, r"`segment_ids` .* \(1, 3\); got \(1, 2\)"),
    ):
        with pytest.raises(error, match=message):
            make_batch(arguments[0], segment_ids=(*arguments, None)[1])


def test_what_does_not_fit() -> None:
    tokens, segments = make_rows()
    batch, model = make_batch(tokens, segment_ids=segments), make_model()
    with pytest.raises(ValueError, match="`target_ids` must be `None` if `input_ids` is a `Batch`"):
        model(batch, batch.target_ids)
    with pytest.raises(ValueError, match="`segment_ids` must be `None` if `input_ids` is a `Ba"):
        model(batch, segment_ids=batch.segment_ids)
    with pytest.raises(ValueError, match="`target_ids` must be given with `input_ids`"):
        model(batch.input_ids)
    # The checks of the tests' import hook come before the class's own.
    with pytest.raises((ValueError, TypeCheckError), match="position_ids"):
        dataclasses.replace(batch, position_ids=np.asarray(batch.position_ids)[:, 1:])
    with pytest.raises(ValueError, match="`tokens` must have at least two tokens a row"):
        make_batch(tokens[:, :1])
    with pytest.raises(ValueError, match=r"`tokens` must lie in .* 32 bits"):
        make_batch(np.full((1, 4), 2**40))
    outside = make_batch(np.where(np.arange(9) == 4, VOCAB, tokens))
    with pytest.raises(ValueError, match="`target_ids` must lie in 0 … 12"):
        model(outside)
    assert isinstance(batch, Batch)


class LearnedPositions(emtp.AbstractDecoder):
    """Positions enter as they are, and not as differences."""

    table: jax.Array
    positions: jax.Array

    def embed(self, input_ids: Any, position_ids: Any) -> Any:
        return self.table[input_ids] + self.positions[position_ids]

    def __call__(self, input_ids: Any, *, position_ids: Any, **unused: Any) -> Any:
        return self.embed(input_ids, position_ids)

    def final_norm(self, hidden_states: Any) -> Any:
        return hidden_states

    def output_head(self) -> Any:
        return self.table


def test_positions_count_from_0_in_each_document_everywhere() -> None:
    tokens, segments = make_rows()
    keys = jax.random.split(jax.random.key(0))
    decoder = LearnedPositions(
        jax.random.normal(keys[0], (VOCAB, 8)), jax.random.normal(keys[1], (16, 8))
    )
    model = MTPModel(decoder, make_model().block)
    batch = make_batch(tokens, segment_ids=segments)
    assert (np.asarray(batch.position_ids) != np.arange(batch.input_ids.shape[1])).any()
    run = eqx.filter_jit(model)
    expected = run(batch)
    fields = {"segment_ids": batch.segment_ids, "target_mask": batch.target_mask}
    output = run(batch.input_ids, batch.target_ids, **fields)
    targets = emtp.align_targets(
        batch.input_ids, batch.target_ids, num_depths=2, segment_ids=batch.segment_ids
    )
    alone = eqx.filter_jit(model.block)(
        decoder,
        decoder(jnp.asarray(batch.input_ids), position_ids=jnp.asarray(batch.position_ids)),
        targets,
        segment_ids=jnp.asarray(batch.segment_ids),
    )
    np.testing.assert_allclose(output.main.loss, expected.main.loss, rtol=1e-6)
    np.testing.assert_allclose(output.mtp.losses.losses, expected.mtp.losses.losses, rtol=1e-6)
    np.testing.assert_allclose(alone.hidden_states, expected.mtp.hidden_states, rtol=1e-5)
    measured = eqx.filter_jit(emtp.speculative.measure_acceptance)(
        model, tokens, segment_ids=segments
    )
    rate = emtp.calculate_mtp_acceptance_rate(expected.mtp.acceptance, expected.predictions)
    np.testing.assert_array_equal(measured.overall.independent, rate.independent)
