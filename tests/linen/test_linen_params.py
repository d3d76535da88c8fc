"""Parameters under MaxText's names, bit for bit, and every wrong entry named."""

from typing import Any

import equinox as eqx
import golden
import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import pytest
from jaxtyping import Array

import equinox_mtp as emtp
from equinox_mtp import linen, nn


def golden_block_params(num_depths: int) -> dict[str, np.ndarray]:
    params = maxtext.golden_params(num_depths)
    return {name: value for name, value in params.items() if name.startswith("mtp_layer")}


def golden_like(num_depths: int) -> emtp.MultiTokenPredictionBlock:
    """The structure of the golden block, without values."""
    return eqx.filter_eval_shape(golden.load_block, num_depths)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *branches, leaf = name.split(".")
        branch = tree
        for key in branches:
            branch = branch.setdefault(key, {})
        branch[leaf] = value
    return tree


def flat_paths(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("num_depths", [1, 2])
@pytest.mark.parametrize("form", ["flat", "nested", "wrapped"])
def test_golden_parameters_round_trip_bit_for_bit(num_depths: int, form: str) -> None:
    flat = golden_block_params(num_depths)
    tree = {
        "flat": flat,
        "nested": nested(flat),
        "wrapped": {"params": {"mtp_block": nested(flat)}},
    }
    block = linen.from_linen_params(tree[form], golden_like(num_depths))
    back = flat_paths(linen.to_linen_params(block))
    assert back.keys() == flat.keys()
    for name, expected in flat.items():
        assert_same_bits(back[name], expected)
    # The hand-made loader of the golden tests says where each of them belongs.
    expected = golden.load_block(num_depths)
    assert jax.tree.structure(block) == jax.tree.structure(expected)
    jax.tree.map(assert_same_bits, block, expected)


def test_a_model_takes_a_checkpoint_and_gives_it_back() -> None:
    config = nn.TransformerConfig(
        vocab_size=256,
        embed_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=128,
        attention_scale=1.0,
    )
    model = emtp.MTPModel(
        nn.TransformerDecoder(config, key=jax.random.key(0)),
        emtp.MultiTokenPredictionBlock(
            emtp.MTPConfig.preset("maxtext", 2),
            lambda key: nn.TransformerDecoderLayer(config, key=key),
            embed_size=64,
            key=jax.random.key(1),
        ),
    )
    flat = golden_block_params(2)
    loaded = eqx.tree_at(lambda m: m.block, model, linen.from_linen_params(flat, model.block))
    jax.tree.map(assert_same_bits, flat_paths(linen.to_linen_params(loaded.block)), flat)
    assert loaded.block.layers is not None
    layer: Any = loaded.block.layers.transformer_layer
    assert layer.attention.scale == 1.0


def test_scale_of_one_is_in_the_initial_query() -> None:
    # What a fresh layer computes is the same, whichever of the two holds 1 / sqrt(head_dim).
    make: dict[str, Any] = {"embed_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    usual, folded = (
        nn.GroupedQueryAttention(**make, scale=scale, key=jax.random.key(0))
        for scale in (None, 1.0)
    )
    np.testing.assert_allclose(folded.query_kernel * 4, usual.query_kernel, rtol=1e-6)
    x = jax.random.normal(jax.random.key(1), (1, 5, 64))
    positions = jnp.arange(5)[None]
    golden.assert_close(folded(x, position_ids=positions), usual(x, position_ids=positions))
    with pytest.raises(ValueError, match="`scale` must be above 0"):
        nn.GroupedQueryAttention(**make, scale=0.0, key=jax.random.key(0))


@pytest.mark.parametrize("preset", ["deepseek_v3", "fast_mtp"])
def test_own_norms_and_repeated_layers(preset: Any) -> None:
    config = emtp.MTPConfig.preset(preset, 3)
    sizes = nn.TransformerConfig(vocab_size=8, embed_size=8, num_layers=1, num_heads=2)
    block = golden.build(
        lambda key: emtp.MultiTokenPredictionBlock(
            config,
            lambda key: nn.TransformerDecoderLayer(sizes, key=key),
            embed_size=8,
            key=key,
        )
    )
    tree = linen.to_linen_params(block)
    depths = 1 if config.repeated_layer else 3
    assert list(tree) == [f"mtp_layer_{k}" for k in range(1, depths + 1)]
    for depth in range(1, depths + 1):
        norm = tree[f"mtp_layer_{depth}"][f"mtp_{depth}_final_norm"]["scale"]
        assert_same_bits(norm, block.layer(depth).output_norm.scale)
    back = linen.from_linen_params(tree, block)
    jax.tree.map(assert_same_bits, back, block)


def test_values_of_low_precision_are_kept() -> None:
    like = golden_like(1)
    flat = {k: jnp.asarray(v, jnp.bfloat16) for k, v in golden_block_params(1).items()}
    back = flat_paths(linen.to_linen_params(linen.from_linen_params(flat, like)))
    jax.tree.map(assert_same_bits, back, flat)


KERNEL = "mtp_layer_2.mtp_2_projection.kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KERNEL: None}, "mtp_layer_2/mtp_2_projection/kernel: missing"),
        ({"mtp_layer_3.mtp_3_projection.kernel": np.ones((128, 64))}, "mtp_layer_3/.*: not known"),
        ({"mtp_layer_1.mtp_1_projection.bias": np.ones(64)}, "mtp_1_projection/bias: not known"),
        (
            {KERNEL: np.ones((64, 128), np.float32)},
            r"kernel: of shape \(64, 128\), not \(128, 64\)",
        ),
        ({KERNEL: 3.0}, "kernel: not an array but a `float`"),
        (
            {"mtp_layer_2": {"mtp_2_projection": {"kernel": np.ones((128, 64))}}},
            "each entry once; twice in it: mtp_layer_2/mtp_2_projection/kernel",
        ),
        ({KERNEL: np.ones((128, 64))}, "kernel is float64, and would be rounded to float32"),
        (
            {KERNEL: np.ones((128, 64), np.float16)},
            "one dtype for all depths; mtp_layer_2/mtp_2_projection/kernel is float16",
        ),
    ],
)
def test_wrong_entries_are_named(change: dict[str, Any], message: str) -> None:
    flat = {k: v for k, v in (golden_block_params(2) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        linen.from_linen_params(flat, golden_like(2))


def test_all_wrong_entries_are_named_at_once() -> None:
    flat = golden_block_params(1)
    del flat["mtp_layer_1.mtp_1_embedding_norm.scale"]
    flat["mtp_layer_1.head"] = np.ones((64, 256), np.float32)
    with pytest.raises(ValueError, match="no more and no less") as raised:
        linen.from_linen_params(flat, golden_like(1))
    assert str(raised.value).splitlines()[1:] == [
        "  mtp_layer_1/head: not known",
        "  mtp_layer_1/mtp_1_embedding_norm/scale: missing",
    ]


def test_the_tree_of_a_whole_model_is_told_apart() -> None:
    tree = {
        "mtp_block": nested(golden_block_params(1)),
        "decoder": {},
        "token_embedder": {"x": 1.0},
    }
    with pytest.raises(ValueError, match=r"got \['token_embedder'\] beside 'mtp_block'. Pass"):
        linen.from_linen_params(tree, golden_like(1))


def test_names_of_a_structure_without_values() -> None:
    shapes = linen.to_linen_params(golden_like(2))
    flat = golden_block_params(2)
    assert {k: x.shape for k, x in flat_paths(shapes).items()} == {
        k: x.shape for k, x in flat.items()
    }


def test_decoder_parameters_round_trip() -> None:
    decoder = maxtext.make_decoder()
    tree = linen.decoder_params(decoder)
    assert flat_paths(tree).keys() == {"decoder_norm.scale", "head"}
    head: Array = 2 * decoder.head
    changed = linen.with_decoder_params(decoder, {"head": head})
    assert_same_bits(changed.head, head)
    assert_same_bits(changed.decoder_norm.scale, decoder.decoder_norm.scale)
    for params, message in (
        (
            {"heads": head},
            "`Decoder`, by their names: decoder_norm/scale, head. Got\n  decoder/heads",
        ),
        ({"head": head.T}, r"decoder/head: of shape \(256, 64\), not \(64, 256\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linen.with_decoder_params(decoder, params)
