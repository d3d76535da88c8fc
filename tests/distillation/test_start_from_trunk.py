"""Depths that begin with the main model's own parts."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

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


@pytest.mark.parametrize("preset", ["deepseek_v3", "fast_mtp", "maxtext"])
def test_depth_is_the_last_layer_of_the_sum(preset: Any, getkey: Any) -> None:
    """Its output, from the decoder's own parts."""
    model = make_model(emtp.MTPConfig.preset(preset, 2), getkey())
    batch = emtp.make_batch(np.random.default_rng(0).integers(0, VOCAB, (2, 9)))
    started = start_from_trunk(model)
    decoder: Any = model.decoder
    assert started.decoder is decoder
    ids, positions = jnp.asarray(batch.input_ids), jnp.asarray(batch.position_ids)
    hidden = decoder(ids, position_ids=positions)

    def normalised(x: jax.Array) -> np.ndarray:
        wide = np.asarray(x, np.float64)
        return wide / np.sqrt(np.mean(np.square(wide), axis=-1, keepdims=True) + 1e-5)

    embedding = jnp.asarray(np.random.default_rng(1).standard_normal(hidden.shape), jnp.float32)
    given = normalised(hidden) + 0.5 * normalised(embedding)
    expected = decoder.layer(1)(jnp.asarray(given, jnp.float32), position_ids=positions)
    for depth in (1, 2):
        layer = started.block.layer(depth)
        raw, _ = layer(hidden, embedding, position_ids=positions)
        assert_close(raw, expected, rtol=1e-4, atol=1e-4)
        normed, _ = layer.normed_and_carried(raw, decoder.final_norm)
        assert_close(normed, decoder.final_norm(raw))


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
