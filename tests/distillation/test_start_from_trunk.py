"""Depths that begin as linear maps to the main model's next hidden states."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal

import equinox_mtp as emtp
from equinox_mtp.distillation import start_from_trunk

VOCAB, EMBED = 23, 8
CONFIG = emtp.nn.TransformerConfig(vocab_size=VOCAB, embed_size=EMBED, num_layers=2, num_heads=2)


@eqx.filter_jit
def make_model(config: emtp.MTPConfig, key: Any) -> emtp.MTPModel:
    layer = partial(emtp.nn.TransformerDecoderLayer, CONFIG)
    block = emtp.MultiTokenPredictionBlock(config, layer, embed_size=EMBED, key=key)
    decoder = emtp.nn.TransformerDecoder(CONFIG, key=key)
    norm = eqx.tree_at(lambda n: n.scale, decoder.norm, 1 + jnp.arange(EMBED) / EMBED)
    return emtp.MTPModel(eqx.tree_at(lambda d: d.norm, decoder, norm), block)


def make_batches() -> list[emtp.Batch]:
    """Two of different shapes; of two documents a row and padding, and of one."""
    rng = np.random.default_rng(0)
    segments = np.asarray([[1] * 9 + [2] * 8 + [0] * 3] * 3)
    packed = emtp.make_batch(rng.integers(0, VOCAB, (3, 20)), segment_ids=segments)
    return [packed, emtp.make_batch(rng.integers(0, VOCAB, (2, 16)))]


@eqx.filter_jit
def embeddings_and_hidden_states(decoder: Any, batch: emtp.Batch) -> tuple[jax.Array, jax.Array]:
    ids, positions = jnp.asarray(batch.input_ids), jnp.asarray(batch.position_ids)
    segments = jnp.ones(ids.shape, int) if batch.segment_ids is None else batch.segment_ids
    hidden = decoder(ids, position_ids=positions, segment_ids=jnp.asarray(segments))
    return decoder.embed(ids, positions), hidden


def normalised(x: Any) -> np.ndarray:
    wide = np.asarray(x, np.float64)
    return wide / np.sqrt(np.mean(np.square(wide), axis=-1, keepdims=True))


def pairs_of(model: emtp.MTPModel) -> list[tuple[np.ndarray, ...]]:
    """Of each pair of neighbours: embedding, hidden state, next hidden state; in a loop."""
    pairs = []
    for batch in make_batches():
        on_device = jax.tree.map(jnp.asarray, batch)
        found = embeddings_and_hidden_states(model.decoder, on_device)
        # In NumPy: an index into an array of JAX takes far longer.
        embeddings, hidden = map(np.asarray, found)
        shape = hidden.shape[:2]
        segments = np.ones(shape, int) if batch.segment_ids is None else batch.segment_ids
        for row in range(shape[0]):
            for i in range(shape[1] - 1):
                if segments[row, i] == segments[row, i + 1] != 0:
                    pairs.append((embeddings[row, i + 1], hidden[row, i], hidden[row, i + 1]))
    return pairs


def fitted(features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and kernel, the ridge as more equations."""
    scale = 1 / np.sqrt(np.mean(np.square(features), axis=0) + 1e-4)
    num, size = features.shape
    rows = np.concatenate([features * scale, np.sqrt(1e-3 * num) * np.eye(size)])
    wanted = np.concatenate([target, np.zeros((size, target.shape[1]))])
    return scale, np.linalg.lstsq(rows, wanted, rcond=None)[0]


@pytest.mark.parametrize("preset", ["deepseek_v3", "fast_mtp", "maxtext", "megatron", "paper"])
def test_depths_begin_as_least_squares(preset: Any, getkey: Any) -> None:
    model = make_model(emtp.MTPConfig.preset(preset, 2), getkey())
    started, config = start_from_trunk(model, make_batches()), model.block.config
    assert started.decoder is model.decoder
    scale = np.asarray(model.decoder.norm.scale, np.float64)  # type: ignore[attr-defined]
    pairs = pairs_of(model)
    embedding, before, after = (normalised(np.stack(x)) for x in zip(*pairs, strict=True))
    is_own = config.output_norm == "own"
    target = normalised(scale * after) if is_own else after
    size = np.sqrt(np.mean(np.square(scale * after)))
    for depth in (1, 2):
        is_first = depth == 1 or config.repeated_layer
        is_read = config.carried_hidden_state == "after_norm" or is_own
        if is_first:
            is_read = config.input_hidden_state == "after_norm"
        hidden = normalised(scale * before) if is_read else before
        wanted_scale, kernel = fitted(np.concatenate([embedding, hidden], axis=-1), target)
        layer = started.block.layer(depth)
        assert_close(layer.embedding_norm.scale, wanted_scale[:EMBED], rtol=1e-4)
        assert_close(layer.hidden_state_norm.scale, wanted_scale[EMBED:], rtol=1e-4)
        if config.concat_order == "hidden_first":
            kernel = np.concatenate(np.split(kernel, 2)[::-1])
        assert_close(layer.projection_layer.kernel, kernel, rtol=1e-3, atol=1e-4)
        if layer.output_norm is not None:
            assert_close(layer.output_norm.scale, np.full(EMBED, size), rtol=1e-4)


@pytest.mark.parametrize("preset", ["megatron", "maxtext"])
def test_norms_that_store_their_scale_less_1(preset: Any, getkey: Any) -> None:
    """The same depths as with other norms of the same function."""
    plain = make_model(emtp.MTPConfig.preset(preset, 2), getkey())

    def less_1(x: Any) -> Any:
        if not isinstance(x, emtp.nn.RMSNorm):
            return x
        norm = emtp.nn.RMSNorm(EMBED, epsilon=x.epsilon, scale_offset=1.0)
        return eqx.tree_at(lambda norm: norm.scale, norm, x.scale - 1)

    is_norm = lambda x: isinstance(x, emtp.nn.RMSNorm)  # noqa: E731
    offset = jax.tree.map(less_1, plain, is_leaf=is_norm)
    batch = emtp.make_batch(np.random.default_rng(0).integers(0, VOCAB, (2, 9)))
    run = eqx.filter_jit(lambda model: model(batch, inference=True).mtp.hidden_states)
    one, other = (run(start_from_trunk(model, make_batches())) for model in (plain, offset))
    assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_a_depth_passes_its_projection_on(getkey: Any) -> None:
    """Its layer adds nothing at first, and keeps all but its outputs."""
    model = make_model(emtp.MTPConfig.preset("deepseek_v3", 1), getkey())
    started = start_from_trunk(model, make_batches())
    layer = started.block.layer(1)
    hidden, embedding = jax.random.normal(getkey(), (2, 1, 5, EMBED))
    positions = jnp.arange(5)[None]

    @eqx.filter_jit
    def outputs(layer: Any) -> tuple[jax.Array, jax.Array]:
        raw, _ = layer(hidden, embedding, position_ids=positions)
        parts = [layer.embedding_norm(embedding), layer.hidden_state_norm(hidden)]
        return raw, layer.projection_layer(jnp.concatenate(parts, axis=-1))

    assert_close(*outputs(layer), rtol=1e-5)
    zero = {"attention.out_kernel", "feed_forward.down.kernel"}
    before = model.block.layer(1).transformer_layer
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(eqx.filter(layer.transformer_layer, eqx.is_array)),
        jax.tree.leaves(eqx.filter(before, eqx.is_array)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert_equal(x, np.zeros_like(y) if name in zero else y)


def test_a_linear_text_is_predicted(getkey: Any) -> None:
    """Of a decoder whose layers add nothing, on a text that counts: one id follows from another."""
    config = emtp.MTPConfig.preset("deepseek_v3", 1)
    model = make_model(config, getkey())
    decoder: Any = model.decoder
    without_layers = jax.tree.map(lambda x: 0 * x if eqx.is_array(x) else x, decoder.layers)
    decoder = eqx.tree_at(lambda d: d.layers, decoder, without_layers)
    decoder = eqx.tree_at(lambda d: d.embedding, decoder, 3 * jnp.eye(EMBED))
    batch = emtp.make_batch(np.arange(40).reshape(1, 40) % EMBED)
    started = start_from_trunk(emtp.MTPModel(decoder, model.block), [batch])
    output = eqx.filter_jit(started)(batch)
    rate = emtp.calculate_mtp_acceptance_rate(output.mtp.acceptance, output.predictions)
    assert rate.independent.tolist() == [1.0]


def test_number_of_layers_and_dtypes(getkey: Any) -> None:
    model = make_model(emtp.MTPConfig.preset("fast_mtp", 3), getkey())
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, model)
    for given in (model, low):
        started = start_from_trunk(given, make_batches())
        before, after = (
            jax.tree.leaves(eqx.filter(m.block, eqx.is_array)) for m in (given, started)
        )
        for x, y in zip(before, after, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert started.block.config.num_depths == 3


def test_bad_input(getkey: Any) -> None:
    with pytest.raises(ValueError, match="`model` must have prediction depths to start"):
        start_from_trunk(make_model(emtp.MTPConfig(0), getkey()), make_batches())
    model = make_model(emtp.MTPConfig(1), getkey())
    apart = emtp.make_batch(np.ones((1, 3), int), segment_ids=np.asarray([[1, 2, 0]]))
    for batches in ([], [apart]):
        with pytest.raises(ValueError, match="`batches` must hold text to fit the depths to"):
            start_from_trunk(model, batches)
    feed_forward = lambda m: m.block.layers.transformer_layer.feed_forward  # noqa: E731
    other = eqx.tree_at(feed_forward, model, emtp.nn.RMSNorm(EMBED))
    with pytest.raises(ValueError, match="have `GroupedQueryAttention` and `SwiGLU`"):
        start_from_trunk(other, make_batches())
