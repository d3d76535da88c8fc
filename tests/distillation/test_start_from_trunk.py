"""Depths that begin with the main model's own parts."""

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

VOCAB, EMBED = 23, 16
CONFIG = emtp.nn.TransformerConfig(vocab_size=VOCAB, embed_size=EMBED, num_layers=2, num_heads=2)


def make_model(config: emtp.MTPConfig, key: Any, **changes: Any) -> emtp.MTPModel:
    layer = partial(
        emtp.nn.TransformerDecoderLayer,
        emtp.nn.TransformerConfig(
            vocab_size=VOCAB, embed_size=EMBED, num_layers=1, **{"num_heads": 2, **changes}
        ),
    )
    block = emtp.MultiTokenPredictionBlock(config, layer, embed_size=EMBED, key=key)
    decoder = emtp.nn.TransformerDecoder(CONFIG, key=key)
    norm = eqx.tree_at(lambda n: n.scale, decoder.norm, 1 + jnp.arange(EMBED) / EMBED)
    return emtp.MTPModel(eqx.tree_at(lambda d: d.norm, decoder, norm), block)


@pytest.mark.parametrize("preset", ["deepseek_v3", "fast_mtp", "maxtext", "megatron"])
def test_depths_begin_as_the_main_models_output(preset: Any, getkey: Any) -> None:
    """The norm of half an embedding and a hidden state, in float64."""
    model = make_model(emtp.MTPConfig.preset(preset, 2), getkey())
    batch = emtp.make_batch(np.random.default_rng(0).integers(0, VOCAB, (2, 9)))
    started = start_from_trunk(model)
    decoder: Any = model.decoder
    assert started.decoder is decoder
    ids, positions = jnp.asarray(batch.input_ids), jnp.asarray(batch.position_ids)
    hidden = decoder(ids, position_ids=positions)
    scale = np.asarray(decoder.norm.scale, np.float64)

    def rms(x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))

    def normalised(x: Any) -> np.ndarray:
        wide = np.asarray(x, np.float64)
        return wide / rms(wide)

    embedding = jnp.asarray(np.random.default_rng(1).standard_normal(hidden.shape), jnp.float32)
    config = model.block.config
    placements = [config.input_hidden_state, config.carried_hidden_state]
    for depth, placement in enumerate(placements, start=1):
        if config.repeated_layer:
            placement = placements[0]
        layer = started.block.layer(depth)
        given = hidden if placement == "before_norm" else decoder.final_norm(hidden)
        of_hidden = normalised(hidden)
        if placement == "after_norm":
            of_hidden = of_hidden * rms(scale) / rms(scale * of_hidden)
        total = 0.5 * normalised(embedding) + of_hidden
        raw, _ = layer(given, embedding, position_ids=positions)
        assert_close(raw, 0.1 * total, rtol=1e-3, atol=1e-4)
        normed, _ = layer.normed_and_carried(raw, decoder.final_norm)
        assert_close(normed, scale * normalised(total), rtol=2e-3, atol=1e-3)


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
    one, other = (
        start_from_trunk(model)(batch, inference=True).mtp.hidden_states
        for model in (plain, offset)
    )
    assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_the_layer_is_the_last_one_without_its_outputs(getkey: Any) -> None:
    model = make_model(emtp.MTPConfig(1), getkey())
    decoder: Any = model.decoder
    last, layer = decoder.layer(1), start_from_trunk(model).block.layer(1).transformer_layer
    zero = {"attention.out_kernel", "feed_forward.down.kernel"}
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(eqx.filter(layer, eqx.is_array)),
        jax.tree.leaves(eqx.filter(last, eqx.is_array)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert_equal(x, np.zeros_like(y) if name in zero else y)


def test_number_of_layers_and_dtypes(getkey: Any) -> None:
    model = make_model(emtp.MTPConfig.preset("fast_mtp", 3), getkey())
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), eqx.filter(model.decoder, eqx.is_array))
    low = emtp.MTPModel(eqx.combine(halves, model.decoder), model.block)
    for started in (start_from_trunk(model), start_from_trunk(low)):
        before, after = (
            jax.tree.leaves(eqx.filter(m.block, eqx.is_array)) for m in (model, started)
        )
        for x, y in zip(before, after, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert started.block.config.num_depths == 3


def test_bad_input(getkey: Any) -> None:
    with pytest.raises(ValueError, match="`model` must have prediction depths over"):
        start_from_trunk(make_model(emtp.MTPConfig(0), getkey()))
    other = make_model(emtp.MTPConfig(1), getkey(), mlp_size=20)
    with pytest.raises(ValueError, match="like the last one of its decoder"):
        start_from_trunk(other)
