"""DeepSeek-V3's layout: its layers, its copies of embedding and head, and what it cannot say."""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FOLDER, changed, config_of, reference, tensors_of
from golden import quick_jit

import equinox_mtp as emtp
from equinox_mtp import nn, pretrained, sharding

KEY = jax.random.key(0)
NAME = "deepseek_v3"
COPIES = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")


def load(folder: Path = FOLDER / NAME, **options: Any) -> emtp.MTPModel:
    return pretrained.load(folder, **options)[0]


def kinds_of(model: emtp.MTPModel) -> list[type]:
    decoder: Any = model.decoder
    return [type(decoder.layer(i).feed_forward) for i in range(decoder.num_layers)]


def test_layers_and_settings() -> None:
    model = load()
    assert kinds_of(model) == [nn.SwiGLU, nn.MixtureOfExperts, nn.MixtureOfExperts]
    layer: Any = model.block.layer(1).transformer_layer
    router = layer.feed_forward.router
    assert (router.num_groups, router.top_groups, router.top_k) == (4, 2, 3)
    assert router.scaling_factor == 2.5
    stored = tensors_of(FOLDER / NAME)
    name = "model.layers.3.self_attn.kv_b_proj.weight"
    # Each head's keys, and then its values.
    np.testing.assert_array_equal(
        layer.attention.up_kernel, stored[name].reshape(4, 28, 20).transpose(2, 0, 1)
    )
    bias = stored["model.layers.3.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(router.bias, bias)
    scaling = layer.attention.rotary.scaling
    assert scaling == nn.YarnScaling(40.0, 8, mscale=1.0, mscale_all_dim=1.0)
    # The embedding and the head are in the tree once.
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    assert [x.shape for x in arrays].count((256, 64)) == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"first_k_dense_replace": 0}, "mmm"),
        ({"moe_layer_freq": 2}, "ddm"),
        ({"first_k_dense_replace": 3}, "ddd"),
    ],
)
def test_which_layers_have_experts(config: dict[str, int], expected: str) -> None:
    from equinox_mtp.pretrained import FAMILIES
    from equinox_mtp.pretrained._settings import Settings

    settings = Settings({**config_of(FOLDER / NAME), **config}, Path("config.json"))
    family = next(family for family in FAMILIES if family.name == NAME)
    for index, kind in enumerate(expected):
        layer: Any = eqx.filter_eval_shape(
            lambda key, i=index: family.make_layer(settings, i, (), key=key), KEY
        )
        wanted = {"d": nn.SwiGLU, "m": nn.MixtureOfExperts}[kind]
        assert type(layer.feed_forward) is wanted


def test_copies_may_be_missing(tmp_path: Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in COPIES:
            del tensors[name]

    model = load()
    without = load(changed(NAME, tmp_path / "without", tensors=drop))
    assert eqx.tree_equal(without, model)
    pretrained.save(tmp_path / "out", without, layout=NAME)
    written = tensors_of(tmp_path / "out")
    for name, x in tensors_of(FOLDER / NAME).items():
        np.testing.assert_array_equal(written[name], x)


@pytest.mark.parametrize("name", COPIES)
def test_copies_that_differ_are_refused(name: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name] + np.eye(256, 64, dtype=np.float32)

    folder = changed(NAME, tmp_path / "in", tensors=change)
    with pytest.raises(ValueError, match=f"`{name}`: it differs from (the embedding|`lm_head)"):
        load(folder)
    assert load(folder, num_depths=0).block.layers is None


def test_the_layout_of_a_model_without_a_folder(tmp_path: Path) -> None:
    """All of it is told by the model: the configuration gives it back, at two depths."""
    base = load()
    decoder: Any = base.decoder
    layers: Any = jax.tree.map(
        lambda x: jnp.concatenate([x, 2 * x]) if eqx.is_array(x) else x, base.block.layers
    )
    config = dataclasses.replace(base.block.config, num_depths=2)
    block = emtp._types.module_of(type(base.block), config=config, layers=layers)  # type: ignore[attr-defined]
    model = emtp.MTPModel(decoder, block)
    pretrained.save(tmp_path / "out", model, layout=NAME)
    written, described = tensors_of(tmp_path / "out"), config_of(tmp_path / "out")
    assert described["num_nextn_predict_layers"] == 2
    stored = config_of(FOLDER / NAME)
    same = stored.keys() & described.keys() - {"num_nextn_predict_layers", "rope_scaling"}
    same -= {"max_position_embeddings", "head_dim", "model_type"}
    assert {name: described[name] for name in same} == {name: stored[name] for name in same}
    assert described["rope_scaling"].items() >= {
        **stored["rope_scaling"],
        "rope_type": "yarn",
    }.items() - {("type", "yarn")}
    for name in COPIES:
        np.testing.assert_array_equal(written[name.replace(".3.", ".4.")], written[name])
    expected = tensors_of(FOLDER / NAME)["model.layers.3.mlp.experts.5.up_proj.weight"]
    name = "model.layers.4.mlp.experts.5.up_proj.weight"
    np.testing.assert_array_equal(written[name], 2 * expected)
    assert eqx.tree_equal(load(tmp_path / "out"), model)


def test_queries_that_are_not_compressed(tmp_path: Path) -> None:
    """Their down- and up-projection as one matrix, where no norm lies between."""
    model = load()
    rng = np.random.default_rng(0)

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if ".q_a_proj." in name]:
            del tensors[name], tensors[name.replace("q_a_proj", "q_a_layernorm")]
            del tensors[name.replace("q_a_proj", "q_b_proj")]
            kernel = rng.normal(size=(80, 64)).astype(np.float32)
            tensors[name.replace("q_a_proj", "q_proj")] = kernel

    folder = changed(
        NAME, tmp_path / "in", config=lambda c: c.update(q_lora_rank=None), tensors=change
    )
    whole = load(folder)
    attention: Any = whole.block.layer(1).transformer_layer.attention  # type: ignore[union-attr]
    assert attention.query_down is None
    stored = tensors_of(folder)
    expected = stored["model.layers.3.self_attn.q_proj.weight"].T.reshape(64, 4, 20)
    np.testing.assert_array_equal(attention.query_kernel, expected)
    pretrained.save(tmp_path / "out", whole, layout=NAME)
    assert config_of(tmp_path / "out")["q_lora_rank"] is None
    assert tensors_of(tmp_path / "out").keys() == stored.keys()
    assert eqx.tree_equal(load(tmp_path / "out"), whole)
    assert jax.tree.structure(whole) != jax.tree.structure(model)


def test_fresh_depths_have_layers_of_the_family() -> None:
    model = load(num_depths=2, key=KEY)
    assert model.block.config == emtp.MTPConfig.preset("deepseek_v3", 2)
    layer: Any = model.block.layer(2).transformer_layer
    assert isinstance(layer.attention, nn.MultiHeadLatentAttention)
    assert isinstance(layer.feed_forward, nn.MixtureOfExperts)


def test_a_step_of_training() -> None:
    """Every matrix of the main model and of the depth has a gradient that is finite."""
    model, batch = load(), emtp.make_batch(reference(NAME)["tokens"])

    def loss(model: emtp.MTPModel) -> jax.Array:
        output = model(batch)
        return output.main.mean + output.mtp.loss

    gradients = quick_jit(eqx.filter_grad(loss))(model)
    for path, x in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(x).all(), path
        assert np.any(x) != (path[-1].name == "bias"), path


def test_on_a_mesh() -> None:
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    sharded, whole = load(mesh=mesh), load()
    attention: Any = sharded.block.layers.transformer_layer.attention  # type: ignore[union-attr]
    assert attention.up_kernel.sharding.spec == jax.P(None, "fsdp", "tensor", None)
    assert eqx.tree_equal(jax.device_get(sharded), jax.device_get(whole))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"qk_rope_head_dim": 7}, "`qk_rope_head_dim` must be even, .* got 7"),
        ({"kv_lora_rank": None}, "`kv_lora_rank` must be an integer, at least 1; got None"),
        ({"v_head_dim": 0}, "`v_head_dim` must be an integer, at least 1; got 0"),
        ({"kv_lora_rank": 19}, "kv_a_proj_with_mqa.weight`: it must have shape .27, 64."),
        ({"q_lora_rank": None}, "`q_lora_rank` must be an integer: queries are compressed here"),
        ({"n_group": 3}, "`n_group` must divide `n_routed_experts`; got 3 and 8"),
        ({"attention_bias": True}, "`attention_bias` must be False in this family; got True"),
        ({"scoring_func": "softmax"}, "`scoring_func` must be 'sigmoid'; got 'softmax'"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be 1 in this family"),
        ({"first_k_dense_replace": 0}, "`model.layers.0.mlp.down_proj.weight`: .* no place for it"),
    ],
)
def test_configurations_that_are_not_right(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed(NAME, tmp_path / "in", config=lambda c: c.update(config))
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))


def test_what_the_layout_cannot_hold(tmp_path: Path) -> None:
    dense, _ = pretrained.load(FOLDER / "qwen3", num_depths=1, key=KEY, tokenizer=False)
    with pytest.raises(ValueError, match=r"has no tensor for `attention.key_kernel`"):
        pretrained.save(tmp_path / "dense", dense, layout=NAME)
    model = load()
    decoder: Any = model.decoder
    first = nn.TransformerDecoder.of(
        [decoder.layer(0)], embedding=decoder.embedding, norm=decoder.norm
    )
    with pytest.raises(ValueError, match=r"latent attention, and a mixture of .* and SwiGLU"):
        pretrained.save(tmp_path / "first", emtp.MTPModel(first, model.block), layout=NAME)
    config = dataclasses.replace(model.block.config, input_hidden_state="before_norm")
    block = emtp._types.module_of(type(model.block), config=config, layers=model.block.layers)  # type: ignore[attr-defined]
    other = emtp.MTPModel(model.decoder, block)
    with pytest.raises(ValueError, match="has `input_hidden_state='after_norm'`"):
        pretrained.save(tmp_path / "other", other, layout=NAME)


@pytest.mark.parametrize("layout", ["transformers", "stitched", "speculators"])
def test_layouts_of_grouped_query_attention_name_themselves(layout: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="grouped-query attention") as error:
        pretrained.save(tmp_path / "out", load(), layout=layout, source=FOLDER / NAME)
    assert str(error.value) == (
        f"`layout` '{layout}' is for models of grouped-query attention alone; `model` has a "
        "MultiHeadLatentAttention. Take the layout of its family, or the folder it came from."
    )
    # And of what else a model of theirs has no place for.
    glm, _ = pretrained.load(FOLDER / "glm4_moe")
    with pytest.raises(ValueError, match=f"'{layout}' has no tensor for `feed_|and SwiGLU for"):
        pretrained.save(tmp_path / "glm", glm, layout=layout, source=FOLDER / "glm4_moe")
