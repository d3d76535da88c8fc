"""Ling 2 and Ring 2, of which there are no recorded numbers: their names, and GLM-4.5's layers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FOLDER, config_of, tensors_of
from safetensors.numpy import save_file

import equinox_mtp as emtp
from equinox_mtp import pretrained

NAME = "bailing_moe_v2"
Tensors = dict[str, np.ndarray]

# As the configurations of these models say it.
CONFIG = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_sliding_window": False,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "float32",
}


def glm_tensors() -> Tensors:
    """GLM-4.5's weights with query and key norms, and without biases and copies."""
    rng = np.random.default_rng(0)
    left_out = ("_proj.bias", "layers.3.embed_tokens.weight", "shared_head.head.weight")
    found = {n: x for n, x in tensors_of(FOLDER / "glm4_moe").items() if not n.endswith(left_out)}
    for layer in range(4):
        for part in "qk":
            scale = rng.normal(size=16).astype(np.float32)
            found[f"model.layers.{layer}.self_attn.{part}_norm.weight"] = scale
    return found


def renamed(tensors: Tensors) -> Tensors:
    """The same weights as Ling has them."""
    found: Tensors = {}
    for name, x in tensors.items():
        start = name.split("self_attn.")[0]
        if name.endswith("q_proj.weight"):
            others = [tensors[f"{start}self_attn.{part}_proj.weight"] for part in "kv"]
            found[f"{start}attention.query_key_value.weight"] = np.concatenate([x, *others])
            continue
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        for old, new in (
            ("self_attn.o_proj", "attention.dense"),
            ("self_attn.q_norm", "attention.query_layernorm"),
            ("self_attn.k_norm", "attention.key_layernorm"),
            ("gate.e_score_correction_bias", "gate.expert_bias"),
            ("shared_head.norm", "final_layernorm"),
            ("model.embed_tokens", "model.word_embeddings"),
        ):
            name = name.replace(old, new)
        found[name] = x
    return found


def write(target: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


def glm_config() -> dict[str, Any]:
    groups = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    parts = {"use_qk_norm": True, "attention_bias": False}
    return {**config_of(FOLDER / "glm4_moe"), **groups, **parts}


def load(folder: Path, **options: Any) -> emtp.MTPModel:
    return pretrained.load(folder, **options)[0]


def test_its_layers_are_those_of_glm(tmp_path: Path) -> None:
    """Whose numbers are checked: the same arrays and settings, and another way to carry them."""
    model = load(write(tmp_path / "ling", renamed(glm_tensors()), CONFIG))
    glm = load(write(tmp_path / "glm", glm_tensors(), glm_config()))
    assert eqx.tree_equal(model, glm)
    assert model.block.config == emtp.MTPConfig(
        num_depths=1,
        concat_order="embedding_first",
        input_hidden_state="after_norm",
        carried_hidden_state="after_norm",
        output_norm="own",
        repeated_layer=False,
    )
    # As it came, and from the model alone.
    ways: list[dict[str, Any]] = [{"source": tmp_path / "ling"}, {"layout": NAME}]
    for number, options in enumerate(ways):
        out = tmp_path / f"out{number}"
        pretrained.save(out, model, **options)
        written, stored = tensors_of(out), renamed(glm_tensors())
        assert written.keys() == stored.keys()
        for name, x in stored.items():
            np.testing.assert_array_equal(written[name], x, strict=True)
        assert eqx.tree_equal(load(out), model)
        described = config_of(out)
        same = described.keys() & CONFIG.keys() - {"max_position_embeddings"}
        assert {n: described[n] for n in same} == {n: CONFIG[n] for n in same}
    assert config_of(tmp_path / "out0") == CONFIG


def test_names(tmp_path: Path) -> None:
    """Of two depths, written in an empty folder."""
    folder = write(tmp_path / "in", renamed(glm_tensors()), CONFIG)
    base = load(folder)
    layers: Any = jax.tree.map(
        lambda x: jnp.concatenate([x, 2 * x]) if eqx.is_array(x) else x, base.block.layers
    )
    config = dataclasses.replace(base.block.config, num_depths=2)
    block = emtp._types.module_of(type(base.block), config=config, layers=layers)  # type: ignore[attr-defined]
    model = emtp.MTPModel(base.decoder, block)
    pretrained.save(tmp_path / "out", model, layout=NAME)
    attention = (
        "input_layernorm.weight",
        "attention.query_key_value.weight",
        "attention.query_layernorm.weight",
        "attention.key_layernorm.weight",
        "attention.dense.weight",
        "post_attention_layernorm.weight",
    )
    parts = ("gate_proj", "up_proj", "down_proj")
    dense = tuple(f"mlp.{part}.weight" for part in parts)
    mixture = (
        "mlp.gate.weight",
        "mlp.gate.expert_bias",
        *(f"mlp.shared_experts.{part}.weight" for part in parts),
        *(f"mlp.experts.{i}.{part}.weight" for i in range(8) for part in parts),
    )
    depth = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight")
    expected = {"model.word_embeddings.weight", "model.norm.weight", "lm_head.weight"}
    for layer, names in enumerate((dense, mixture, mixture, mixture + depth, mixture + depth)):
        expected |= {f"model.layers.{layer}.{name}" for name in attention + names}
    written = tensors_of(tmp_path / "out")
    assert set(written) == expected
    assert written["model.layers.0.attention.query_key_value.weight"].shape == (160, 64)
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 2
    assert eqx.tree_equal(load(tmp_path / "out"), model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"partial_rotary_factor": None}, "`partial_rotary_factor` must be a number; got None"),
        ({"use_qkv_bias": True}, "`use_qkv_bias` must be False in this family; got True"),
        ({"use_qk_norm": False}, "`use_qk_norm` must be True in this family; got False"),
        ({"norm_head": True}, "`norm_head` must be False in this family; got True"),
        ({"score_function": "softmax"}, "`score_function` must be 'sigmoid'; got 'softmax'"),
        ({"num_experts": None}, "`num_experts` must be an integer, at least 1; got None"),
        (
            {"moe_shared_expert_intermediate_size": 64},
            "`moe_shared_expert_intermediate_size` must be `moe_intermediate_size`, 24; got 64",
        ),
        ({"num_attention_heads": 4}, r"query_key_value.weight`: it must have shape \(128, 64\)"),
    ],
)
def test_configurations_that_are_not_right(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "in", renamed(glm_tensors()), {**CONFIG, **config})
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(str(folder))
