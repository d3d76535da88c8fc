"""The whole model: its output by hand, on eight devices, and the gradient of shared weights."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import assert_close, build, quick_jit
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray

from equinox_mtp import (
    AbstractDecoder,
    LinearHead,
    ModelOutput,
    MTPConfig,
    MTPModel,
    MultiTokenPredictionBlock,
    align_targets,
    calculate_mtp_acceptance_rate,
    calculate_mtp_loss,
    inputs_and_targets,
    nn,
)
from equinox_mtp.cross_entropy import _weighted_losses

_VOCAB, _EMBED, _BATCH, _SEQ, _DEPTHS = 23, 16, 8, 10, 2
_TRANSFORMER = nn.TransformerConfig(
    vocab_size=_VOCAB, embed_size=_EMBED, num_layers=2, num_heads=2, num_kv_heads=1, mlp_size=24
)


class _Batch(NamedTuple):
    input_ids: Array
    target_ids: Array
    target_mask: Array
    position_ids: Array
    segment_ids: Array


@pytest.fixture
def batch() -> _Batch:
    return _make_batch()


def _make_batch() -> _Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, _VOCAB, (_BATCH, _SEQ + 1))
    segments = np.asarray([[1] * 4 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 8] * (_BATCH // 2))
    positions = np.asarray([[*range(4), *range(5), 0], [*range(3), *range(7)]] * (_BATCH // 2))
    inputs = inputs_and_targets(tokens, segment_ids=segments)
    return _Batch(*inputs, jnp.asarray(positions), jnp.asarray(segments[:, :-1]))


def _make_model(mtp_config: MTPConfig | None = None, **changes: Any) -> MTPModel:
    config = dataclasses.replace(_TRANSFORMER, **changes)
    mtp_config = mtp_config or MTPConfig(_DEPTHS)

    def make(key: PRNGKeyArray) -> MTPModel:
        make_layer = partial(nn.TransformerDecoderLayer, config)
        block = MultiTokenPredictionBlock(mtp_config, make_layer, embed_size=_EMBED, key=key)
        return MTPModel(nn.TransformerDecoder(config, key=key), block)

    return build(make)


def _run(model: MTPModel, batch: _Batch, **arguments: Any) -> ModelOutput:
    return model(
        batch.input_ids,
        batch.target_ids,
        batch.target_mask,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids,
        **arguments,
    )


def _loss(model: MTPModel, batch: _Batch) -> tuple[Array, ModelOutput]:
    output = _run(model, batch)
    return output.main.mean + calculate_mtp_loss(output.mtp.losses, scaling_factor=0.7), output


_forward = quick_jit(_run)
_value_and_grad = quick_jit(eqx.filter_value_and_grad(_loss, has_aux=True))


def test_output_by_hand(batch: _Batch):
    model = _make_model()
    output = _forward(model, batch)
    decoder = model.decoder
    rows: dict[str, Any] = {"position_ids": batch.position_ids, "segment_ids": batch.segment_ids}
    hidden_states: Any = quick_jit(decoder)(batch.input_ids, **rows)
    head: Any = decoder.output_head()
    logits = decoder.final_norm(hidden_states) @ head.T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.target_ids)
    # inputs_and_targets masks the last token of each document, and padding.
    assert float(output.main.weight) == int(batch.target_mask.sum()) == 4 * (3 + 4 + 2 + 7)
    assert_close(output.main.loss, jnp.sum(losses * batch.target_mask))
    np.testing.assert_array_equal(output.predictions, logits.argmax(-1))
    assert output.auxiliary is None
    targets = align_targets(
        batch.input_ids, batch.target_ids, batch.target_mask, num_depths=_DEPTHS, **rows
    )
    mtp = quick_jit(model.block)(decoder, hidden_states, targets, **rows)
    for actual, expected in zip(jax.tree.leaves(output.mtp), jax.tree.leaves(mtp), strict=True):
        assert_close(actual, expected)


def test_rows_without_documents(batch: _Batch):
    """Without positions and segments every row is one document which counts from 0."""
    model = _make_model()
    plain = quick_jit(lambda model: model(batch.input_ids, batch.target_ids))(model)
    counting = jnp.broadcast_to(jnp.arange(_SEQ), (_BATCH, _SEQ))
    ones = jnp.ones((_BATCH, _SEQ), int)
    explicit = _forward(model, _Batch(batch.input_ids, batch.target_ids, ones, counting, ones))
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(explicit), strict=True):
        assert_close(x, y)
    assert float(plain.main.weight) == _BATCH * _SEQ
    assert plain.mtp.losses.weights.tolist() == [_BATCH * (_SEQ - 1), _BATCH * (_SEQ - 2)]


def test_padding_is_not_scored(batch: _Batch):
    """Padding counts nowhere, whatever the mask says."""
    everything = batch._replace(target_mask=jnp.ones_like(batch.target_mask))
    output = _forward(_make_model(), everything)
    assert float(output.main.weight) == 4 * (4 + 5 + 3 + 7)
    assert output.mtp.losses.weights.tolist() == [4 * (3 + 4 + 2 + 6), 4 * (2 + 3 + 1 + 5)]


def test_chain_mask(batch: _Batch):
    mask = batch.target_mask.at[:, 5].set(False)
    masked = batch._replace(target_mask=mask)
    model = _make_model()
    counts = [
        _forward(model, masked, **arguments).mtp.losses.weights
        for arguments in ({}, {"chain_mask": True})
    ]
    # The pair (i, k) of depth k ends at i + k, and passes over masked targets.
    expected = np.zeros((2, _DEPTHS), int)
    segments, mask = np.asarray(batch.segment_ids), np.asarray(mask)
    for chain in (0, 1):
        for k in range(1, _DEPTHS + 1):
            for row in range(_BATCH):
                for i in range(_SEQ - k):
                    same = segments[row, i] == segments[row, i + k] != 0
                    counted = mask[row, i : i + k + 1].all() if chain else mask[row, i + k]
                    expected[chain, k - 1] += same and counted
    np.testing.assert_array_equal(counts, expected)
    assert (expected[0] > expected[1]).all()


def test_no_depths(batch: _Batch):
    model = _make_model(MTPConfig(0))
    output = _forward(model, batch)
    assert output.mtp.losses.losses.shape == (0,)
    assert float(calculate_mtp_loss(output.mtp.losses)) == 0
    assert_close(output.main.loss, _forward(_make_model(), batch).main.loss)


class _RoutedDecoder(AbstractDecoder):
    """Returns auxiliary outputs beside its hidden states."""

    embedding: Array

    def embed(self, input_ids: Array, position_ids: Array) -> Array:
        return self.embedding[input_ids]

    def __call__(self, input_ids: Array, **arguments: Any) -> tuple[Array, dict[str, Any]]:
        return self.embedding[input_ids], arguments

    def final_norm(self, hidden_states: Array) -> Array:
        return hidden_states

    def output_head(self) -> Array:
        return self.embedding


def test_auxiliary_outputs(batch: _Batch, getkey: Callable[[], PRNGKeyArray]):
    plain = _make_model(MTPConfig(0))
    decoder = _RoutedDecoder(jnp.eye(_VOCAB, _EMBED))
    model = MTPModel(decoder, plain.block)
    output = _run(model, batch)
    assert output.auxiliary["position_ids"] is batch.position_ids
    assert output.auxiliary["segment_ids"] is batch.segment_ids
    assert (output.auxiliary["key"], output.auxiliary["inference"]) == (None, None)
    # One-hot embeddings as head: each token predicts itself, or token 0 if it has no feature.
    inputs = np.asarray(batch.input_ids)
    np.testing.assert_array_equal(output.predictions, np.where(inputs < _EMBED, inputs, 0))
    key = getkey()
    output = _run(model, batch, key=key, inference=True)
    assert output.auxiliary["inference"] is True
    assert jax.random.key_data(output.auxiliary["key"]).tolist() == (
        jax.random.key_data(jax.random.split(key)[0]).tolist()
    )


class _CappedDecoder(AbstractDecoder):
    """The reference decoder with a bias, and logits between -2 and 2."""

    decoder: AbstractDecoder
    bias: Array
    is_callable: bool

    def embed(self, input_ids: Array, position_ids: Array) -> Array:
        return self.decoder.embed(input_ids, position_ids)

    def __call__(self, input_ids: Array, **arguments: Any) -> Any:
        return self.decoder(input_ids, **arguments)

    def final_norm(self, hidden_states: Array) -> Array:
        return self.decoder.final_norm(hidden_states)

    def logits(self, hidden_states: Array) -> Array:
        matrix: Any = self.decoder.output_head()
        return 2 * jnp.tanh((hidden_states @ matrix.T + self.bias) / 2)

    def output_head(self) -> Any:
        if self.is_callable:
            return self.logits
        matrix: Any = self.decoder.output_head()
        return LinearHead(matrix, self.bias, soft_cap=2, token_tile=16, vocab_tile=10)


def test_head_with_bias_and_soft_cap_and_z_loss(batch: _Batch):
    plain, z = _make_model(), 0.2
    bias = jnp.linspace(-1, 1, _VOCAB)

    @quick_jit
    @partial(eqx.filter_value_and_grad, has_aux=True)
    def step(model: MTPModel) -> tuple[Array, ModelOutput]:
        output = _run(model, batch, z_loss_weight=z)
        return output.main.mean + calculate_mtp_loss(output.mtp.losses), output

    tiled, callable_ = (
        step(MTPModel(_CappedDecoder(plain.decoder, bias, is_callable), plain.block))
        for is_callable in (False, True)
    )
    for x, y in zip(jax.tree.leaves(tiled), jax.tree.leaves(callable_), strict=True):
        assert_close(x, y)
    (_, output), gradients = tiled
    assert float(jnp.abs(gradients.decoder.bias).min()) > 1e-5

    decoder = _CappedDecoder(plain.decoder, bias, is_callable=False)
    rows: dict[str, Any] = {"position_ids": batch.position_ids, "segment_ids": batch.segment_ids}
    main_hidden: Any = quick_jit(decoder)(batch.input_ids, **rows)
    targets = align_targets(
        batch.input_ids, batch.target_ids, batch.target_mask, num_depths=_DEPTHS, **rows
    )
    sums, z_sums = [], []
    for hidden, ids, mask in (
        (main_hidden, batch.target_ids, batch.target_mask),
        *zip(output.mtp.hidden_states, targets.target_ids, targets.mask, strict=True),
    ):
        logits = decoder.logits(decoder.final_norm(hidden))
        z_losses = z * jax.nn.logsumexp(logits, axis=-1) ** 2
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        sums.append(jnp.sum((losses + z_losses) * mask))
        z_sums.append(jnp.sum(z_losses * mask))
    losses = output.mtp.losses
    assert_close(jnp.stack([output.main.loss, *losses.losses]), jnp.stack(sums))
    assert_close(jnp.stack([output.main.z_loss, *losses.z_losses]), jnp.stack(z_sums))


def test_no_predictions(batch: _Batch):
    model = _make_model()
    with_best, without = (
        _forward(model, batch, predictions=predictions) for predictions in (True, False)
    )
    assert without.predictions is None
    assert without.mtp.acceptance is None
    assert_close(without.main.loss, with_best.main.loss, 1e-6)
    assert_close(without.mtp.losses.losses, with_best.mtp.losses.losses, 1e-6)
    assert with_best.predictions.shape == (_BATCH, _SEQ)
    with pytest.raises(ValueError, match="was called with `predictions=False`"):
        calculate_mtp_acceptance_rate(without.mtp.acceptance, without.predictions)


def test_objective_reaches_the_block(batch: _Batch, monkeypatch: pytest.MonkeyPatch):
    def marked(head: LinearHead, hidden_states: Array, *_: Any, **__: Any) -> Any:
        return hidden_states, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), head)

    # What computes the head's gradient anew where it was not expected.
    monkeypatch.setattr(_weighted_losses, "token_gradients", marked)
    mean_of_depths = partial(calculate_mtp_loss, reduction="mean_of_depths")

    def head_gradient(**arguments: Any) -> Array:
        def loss(model: MTPModel) -> Array:
            return mean_of_depths(_run(model, batch, **arguments).mtp.losses)

        gradients: Any = quick_jit(eqx.filter_grad(loss))(_make_model(tie_embeddings=False))
        return gradients.decoder.head

    assert bool(jnp.isfinite(head_gradient(objective=mean_of_depths)).all())
    assert bool(jnp.isnan(head_gradient()).all())


def test_dropout(batch: _Batch):
    dropping, plain = _make_model(dropout_rate=0.5), _make_model()

    def losses(model: MTPModel, **arguments: Any) -> list[float]:
        output = _forward(model, batch, **arguments)
        return [float(output.main.loss), *output.mtp.losses.losses.tolist()]

    without = losses(plain)
    one, again, other = (losses(dropping, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert one == again
    assert all(x != y for x, y in zip(one, other, strict=True))
    assert all(x != y for x, y in zip(one, without, strict=True))
    np.testing.assert_allclose(losses(dropping, inference=True), without, rtol=1e-6)


def test_data_parallel_equals_one_device(batch: _Batch):
    """Rows split over eight devices: the same losses, predictions and gradients."""
    assert jax.device_count() == 8
    model = _make_model()
    (loss, output), gradients = _value_and_grad(model, batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(batch, NamedSharding(mesh, P("data")))
    assert len(split.input_ids.addressable_shards) == 8
    everywhere = eqx.filter_shard(model, NamedSharding(mesh, P()))
    (sharded_loss, sharded_output), sharded_gradients = _value_and_grad(everywhere, split)
    assert_close(sharded_loss, loss)
    hidden_states = sharded_output.mtp.hidden_states
    assert {x.data.shape for x in hidden_states.addressable_shards} == {(_DEPTHS, 1, _SEQ, _EMBED)}
    for actual, expected in (
        (sharded_output, output),
        (sharded_gradients, gradients),
    ):
        leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        for x, y in leaves:
            assert_close(x, y)


def test_tied_embedding_gradient(batch: _Batch):
    """The gradient through embedding and head, each counted once, in the main model and MTP."""
    tied = _make_model()
    untied: Any = _make_model(tie_embeddings=False)
    embedding: Any = tied.decoder.output_head()
    untied = eqx.tree_at(
        lambda m: (m.decoder, m.block),
        untied,
        (
            eqx.tree_at(
                lambda d: (d.embedding, d.layers, d.norm, d.head),
                untied.decoder,
                (embedding, tied.decoder.layers, tied.decoder.norm, embedding),  # pyright: ignore[reportAttributeAccessIssue]
            ),
            tied.block,
        ),
    )
    (loss, _), gradients = _value_and_grad(tied, batch)
    (untied_loss, _), untied_gradients = _value_and_grad(untied, batch)
    assert_close(untied_loss, loss)
    gradient = gradients.decoder.embedding
    ways = untied_gradients.decoder
    assert float(jnp.abs(ways.embedding).max()) > 1e-3
    assert float(jnp.abs(ways.head).max()) > 1e-3
    assert_close(gradient, ways.embedding + ways.head)
    # Central differences along the gradient itself: the derivative is its norm.
    norm = float(jnp.linalg.norm(gradient))
    step = 1e-2 * gradient / norm

    def shifted(sign: int) -> float:
        model = eqx.tree_at(lambda m: m.decoder.embedding, tied, embedding + sign * step)
        return float(_value_and_grad(model, batch)[0][0])

    np.testing.assert_allclose((shifted(1) - shifted(-1)) / 2e-2, norm, rtol=1e-2)


def test_every_weight_is_held_once():
    model = _make_model(tie_embeddings=False)
    shapes = [x.shape for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))]
    assert shapes.count((_VOCAB, _EMBED)) == 2
    tied = [x.shape for x in jax.tree.leaves(eqx.filter(_make_model(), eqx.is_array))]
    assert tied.count((_VOCAB, _EMBED)) == 1


def test_parts_of_another_kind_are_named() -> None:
    # Checked on a bare instance: the import hook of the tests would stop the constructor first.
    model = object.__new__(MTPModel)
    object.__setattr__(model, "decoder", eqx.nn.Identity())
    with pytest.raises(
        TypeError, match="`decoder` must be of the class `AbstractDecoder`; got `Identity`"
    ):
        model.__check_init__()
    object.__setattr__(model, "decoder", _make_model().decoder)
    object.__setattr__(model, "block", model.decoder)
    with pytest.raises(TypeError, match="`block` must be of the class `MultiTokenPredictionBlock`"):
        model.__check_init__()


def test_ids_on_the_host_that_are_not_in_the_vocabulary(batch: _Batch) -> None:
    model = _make_model(MTPConfig(0))
    ids = np.asarray(batch.input_ids)
    for dtype in (np.int64, np.uint32, np.uint8):
        output = model(ids.astype(dtype), ids.astype(dtype))
        assert_close(output.main.loss, model(ids, ids).main.loss)
    wrong = ids.copy()
    wrong[0, 1] = -100
    with pytest.raises(ValueError, match=r"`target_ids` must lie in 0 … 22"):
        model(ids, wrong)
    masked = model(ids, wrong, wrong != -100)
    assert_close(masked.main.weight, ids.size - 1)
    padded = np.ones_like(ids)
    padded[0, :2] = 0
    assert_close(model(ids, wrong, segment_ids=padded).main.weight, ids.size - 2)
    with pytest.raises(ValueError, match="`segment_ids` must lie in"):
        model(ids, ids, segment_ids=padded.astype(np.int64) * 2**32)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (2, 0), (3, 1)])
def test_batches_that_are_empty_or_of_one_position(shape: tuple[int, int]) -> None:
    model = _make_model()
    ids = jnp.zeros(shape, jnp.int32)

    def loss(model: MTPModel) -> Array:
        output = model(ids, ids, jnp.zeros(shape, bool))
        return output.main.mean + calculate_mtp_loss(output.mtp.losses)

    value, gradients = quick_jit(eqx.filter_value_and_grad(loss))(model)
    assert value == 0
    for gradient in jax.tree.leaves(gradients):
        assert not np.any(gradient)


def _numbers(dtype: Any) -> list[float]:
    """The loss of a model of one dtype, and the squared size of each gradient."""
    model = jax.tree.map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x,
        _make_model(MTPConfig(2, output_norm="own")),
    )
    (loss, _), gradients = _value_and_grad(model, _make_batch())
    return [float(loss), *(float(np.sum(np.square(x))) for x in jax.tree.leaves(gradients))]


def test_a_model_under_x64() -> None:
    # In a process of its own, as the switch is for all of it; against the default's numbers.
    code = """
        import jax.numpy as jnp, test_model
        for dtype in (jnp.float32, jnp.float64):
            print(*test_model._numbers(dtype))
    """
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent)])
    printed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "JAX_ENABLE_X64": "1"},
    ).stdout.splitlines()
    expected = _numbers(jnp.float32)
    assert len(printed) == 2
    for line in printed:
        np.testing.assert_allclose(np.array(line.split(), float), expected, rtol=1e-4)
