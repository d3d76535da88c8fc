"""Qwen3.5 with experts, in one tensor or one by one, and as the text part of a larger model.

Its layers are those of Qwen3-Next, whose weights and recorded numbers are taken under its names.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import FOLDER, config_of, reference, tensors_of
from golden import quick_jit
from safetensors.numpy import save_file

import equinox_mtp as emtp
from equinox_mtp import nn, pretrained, sharding
from equinox_mtp._decoder import split_auxiliary
from equinox_mtp.pretrained._write import StoredTensor, write_file

KEY = jax.random.key(0)
NAME = "qwen3_5_moe"
Tensors = dict[str, np.ndarray]

CONFIG = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "full_attention_interval": 4,
    "mtp_num_hidden_layers": 1,
    "dtype": "float32",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [1, 1, 0],
    },
}
VISION = {"depth": 1, "hidden_size": 8, "model_type": "qwen3_5_moe_vision"}


def split_tensors() -> Tensors:
    """Qwen3-Next's weights with queries, keys, values and gates each for themselves."""
    found: Tensors = {}
    for name, x in tensors_of(FOLDER / "qwen3_next").items():
        start, _, last = name.rpartition("linear_attn.")
        # Two heads of keys, with two heads of values each; all heads have 8 features.
        heads = x.reshape(2, -1, 64) if "in_proj" in last else x
        if last == "in_proj_qkvz.weight":
            query, key, value, gate = np.split(heads, [8, 16, 32], axis=1)
            rows = [part.reshape(-1, 64) for part in (query, key, value)]
            found[f"{start}linear_attn.in_proj_qkv.weight"] = np.concatenate(rows)
            found[f"{start}linear_attn.in_proj_z.weight"] = gate.reshape(-1, 64)
        elif last == "in_proj_ba.weight":
            found[f"{start}linear_attn.in_proj_b.weight"] = heads[:, :2].reshape(-1, 64)
            found[f"{start}linear_attn.in_proj_a.weight"] = heads[:, 2:].reshape(-1, 64)
        else:
            found[name] = x
    return found


def packed(tensors: Tensors, prefixes: tuple[str, ...] = ("model.", "mtp.")) -> Tensors:
    """All experts in two tensors: gates above up-projections, and down-projections."""
    found = dict(tensors)
    layers = {n.split("experts.")[0] for n in found if ".experts." in n and n.startswith(prefixes)}
    for layer in layers:
        gate, up, down = (
            np.stack([found.pop(f"{layer}experts.{i}.{part}_proj.weight") for i in range(6)])
            for part in ("gate", "up", "down")
        )
        found[f"{layer}experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[f"{layer}experts.down_proj"] = down
    return found


FORMS: dict[str, Callable[[Tensors], Tensors]] = {
    "packed": packed,
    "split": dict,
    # As some are released.
    "split depth": lambda tensors: packed(tensors, ("model.",)),
}


def write(target: Path, tensors: Tensors, config: dict[str, Any] = CONFIG) -> Path:
    target.mkdir()
    save_file(
        {n: np.ascontiguousarray(x) for n, x in tensors.items()}, target / "model.safetensors"
    )
    (target / "config.json").write_text(json.dumps(config))
    return target


def nested(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """As the text part of a model with vision."""
    moved = {n.replace("model.", "model.language_model.", 1): x for n, x in tensors.items()}
    rng = np.random.default_rng(1)
    for name, shape in (
        ("patch_embed.proj.bias", (8,)),
        ("blocks.0.attn.qkv.weight", (24, 8)),
        ("blocks.0.mlp.linear_fc1.bias", (16,)),
    ):
        moved[f"model.visual.{name}"] = rng.normal(size=shape).astype(np.float32)
    text = {**config, "architectures": None}
    del text["tie_word_embeddings"]
    whole = {
        "architectures": [config["architectures"][0].replace("CausalLM", "ConditionalGeneration")],
        "model_type": "qwen3_5_moe",
        "image_token_id": 9,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "text_config": text,
        "vision_config": VISION,
    }
    return moved, whole


def load(folder: Path, **options: Any) -> emtp.MTPModel:
    return pretrained.load(folder, **options)[0]


def assert_same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(other[name], x, strict=True)


@pytest.fixture(scope="module")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> emtp.MTPModel:
    return load(write(tmp_path_factory.mktemp("split") / "in", split_tensors()))


def test_the_recorded_numbers_of_its_layers(split_model: emtp.MTPModel) -> None:
    numbers = reference("qwen3_next")
    tokens = jnp.asarray(numbers["tokens"])

    @quick_jit
    def outputs(model: Any) -> tuple[Any, ...]:
        decoder, layer = model.decoder, model.block.layer(1)
        positions = jnp.tile(jnp.arange(16), (2, 1))
        hidden, _ = split_auxiliary(decoder(tokens[:, :16], position_ids=positions))
        normed, head = decoder.final_norm(hidden), decoder.output_head()
        embeddings = decoder.embed(tokens[:, 1:17], positions)
        out, _ = layer(normed, embeddings, position_ids=positions)
        return (
            hidden,
            normed @ head.T,
            layer.normed_and_carried(out, decoder.final_norm)[0] @ head.T,
        )

    names = ("hidden_pre_norm", "logits", "mtp0_logits")
    for found, name in zip(outputs(split_model), names, strict=True):
        np.testing.assert_allclose(found, numbers[name], rtol=0, atol=1e-4)
    assert split_model.block.config == emtp.MTPConfig.preset("megatron", 1)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_model(
    form: str, split_model: emtp.MTPModel, tmp_path: Path
) -> None:
    tensors = FORMS[form](split_tensors())
    folder = write(tmp_path / "in", tensors)
    model = load(folder)
    assert eqx.tree_equal(model, split_model)
    # In the form of the folder, its depth's form included.
    ways: list[dict[str, Any]] = [{"source": folder}, {"layout": folder}]
    for number, options in enumerate(ways):
        out = tmp_path / f"out{number}"
        pretrained.save(out, model, **options)
        assert_same(tensors_of(out), tensors)
        assert config_of(out) == CONFIG
    # By its name: packed, wherever it came from.
    pretrained.save(tmp_path / "named", model, layout=NAME, source=folder)
    assert_same(tensors_of(tmp_path / "named"), packed(split_tensors()))
    assert eqx.tree_equal(load(tmp_path / "named"), model)


def test_gates_lie_above_up_projections(tmp_path: Path) -> None:
    """A layer's feed-forward network, from the packed tensors, token by token in float64."""
    tensors = packed(split_tensors())
    model = load(write(tmp_path / "in", tensors))
    x = np.random.default_rng(0).normal(size=(1, 5, 64))
    prefix = "model.layers.1.mlp."
    stored = {n.removeprefix(prefix): t.astype(np.float64) for n, t in tensors.items()}

    def swiglu(token: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Any:
        gated = gate @ token
        return down @ (gated / (1 + np.exp(-gated)) * (up @ token))

    def shared(part: str) -> np.ndarray:
        return stored[f"shared_expert.{part}_proj.weight"]

    expected = []
    for token in x[0]:
        logits = stored["gate.weight"] @ token
        probabilities = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-probabilities)[:3]
        out = swiglu(token, *(shared(part) for part in ("gate", "up", "down")))
        out = out / (1 + np.exp(-stored["shared_expert_gate.weight"] @ token))
        for i in chosen:
            both = stored["experts.gate_up_proj"][i]
            weight = probabilities[i] / probabilities[chosen].sum()
            out = out + weight * swiglu(token, both[:16], both[16:], stored["experts.down_proj"][i])
        expected.append(out)
    decoder: Any = model.decoder
    found, _ = split_auxiliary(decoder.layer(1).feed_forward(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(found[0], np.stack(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["packed", "split"])
def test_the_text_part_of_a_model_with_vision(
    form: str, split_model: emtp.MTPModel, tmp_path: Path
) -> None:
    tensors, config = nested(FORMS[form](split_tensors()), CONFIG)
    folder = write(tmp_path / "in", tensors, config)
    (folder / "preprocessor_config.json").write_text("{}")
    model = load(folder)
    assert eqx.tree_equal(model, split_model)
    # As it came, vision included.
    pretrained.save(tmp_path / "same", model, source=folder)
    assert (tmp_path / "same" / "preprocessor_config.json").read_text() == "{}"
    assert_same(tensors_of(tmp_path / "same"), tensors)
    assert config_of(tmp_path / "same") == config
    # By name: the text alone.
    pretrained.save(tmp_path / "text", model, layout=NAME, source=folder)
    assert not (tmp_path / "text" / "preprocessor_config.json").exists()
    assert_same(tensors_of(tmp_path / "text"), packed(split_tensors()))
    written = config_of(tmp_path / "text")
    assert written["max_position_embeddings"] == 128
    same = written.keys() & CONFIG.keys() - {"rope_parameters"}
    assert {n: written[n] for n in same} == {n: CONFIG[n] for n in same}
    assert not {"text_config", "vision_config", "norm_topk_prob", "mlp_only_layers"} & set(written)
    assert eqx.tree_equal(load(tmp_path / "text"), model)
    # Another dtype, and no depth.
    alone = load(folder, num_depths=0, dtype="bfloat16")
    pretrained.save(tmp_path / "alone", alone, source=folder)
    changed = config_of(tmp_path / "alone")
    text = changed["text_config"]
    assert (changed["dtype"], text["dtype"], text["mtp_num_hidden_layers"]) == (
        *("bfloat16", "bfloat16"),
        0,
    )
    assert not [name for name in tensors_of(tmp_path / "alone") if name.startswith("mtp.")]


def test_the_text_part_of_a_dense_model_with_vision(tmp_path: Path) -> None:
    tensors = tensors_of(FOLDER / "qwen3_5")
    moved, config = nested(tensors, config_of(FOLDER / "qwen3_5"))
    folder = write(tmp_path / "in", moved, config)
    model = load(folder)
    assert eqx.tree_equal(model, load(FOLDER / "qwen3_5"))
    pretrained.save(tmp_path / "same", model, source=folder)
    assert_same(tensors_of(tmp_path / "same"), moved)
    assert config_of(tmp_path / "same") == config
    pretrained.save(tmp_path / "text", model, layout="qwen3_5", source=folder)
    assert_same(tensors_of(tmp_path / "text"), tensors)


def test_vision_of_8_bits_is_dequantized(tmp_path: Path) -> None:
    """As all weights that are written: `config.json` says nothing of 8 bits any more."""
    tensors, config = nested(split_tensors(), CONFIG)
    name = "model.visual.blocks.0.attn.qkv.weight"
    narrow = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    scales = np.asarray([[0.5], [2.0]], np.float32)  # of blocks of 16 × 8, the last one cut
    tensors |= {name: narrow, f"{name}_scale_inv": scales}
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 8]}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    stored = [StoredTensor(n, x.dtype, x.shape, partial(np.copy, x)) for n, x in tensors.items()]
    write_file(tmp_path / "in" / "model.safetensors", stored)
    pretrained.save(tmp_path / "out", load(tmp_path / "in"), source=tmp_path / "in")
    written = tensors_of(tmp_path / "out")
    expected = narrow.astype(np.float32) * np.repeat(scales, 16, axis=0)[:24]
    np.testing.assert_array_equal(written[name], expected, strict=True)
    assert f"{name}_scale_inv" not in written
    assert "quantization_config" not in config_of(tmp_path / "out")


def test_names_of_the_packed_form(split_model: emtp.MTPModel, tmp_path: Path) -> None:
    pretrained.save(tmp_path / "out", split_model, layout=NAME)
    shapes = {name: x.shape for name, x in tensors_of(tmp_path / "out").items()}
    mixture = {
        "mlp.gate.weight": (6, 64),
        "mlp.experts.gate_up_proj": (6, 32, 64),
        "mlp.experts.down_proj": (6, 64, 16),
        "mlp.shared_expert.gate_proj.weight": (24, 64),
        "mlp.shared_expert.up_proj.weight": (24, 64),
        "mlp.shared_expert.down_proj.weight": (64, 24),
        "mlp.shared_expert_gate.weight": (1, 64),
    }
    norms = {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
    full = {
        "self_attn.q_proj.weight": (128, 64),
        "self_attn.k_proj.weight": (32, 64),
        "self_attn.v_proj.weight": (32, 64),
        "self_attn.o_proj.weight": (64, 64),
        "self_attn.q_norm.weight": (16,),
        "self_attn.k_norm.weight": (16,),
    }
    linear = {
        "linear_attn.in_proj_qkv.weight": (64, 64),
        "linear_attn.in_proj_z.weight": (32, 64),
        "linear_attn.in_proj_b.weight": (4, 64),
        "linear_attn.in_proj_a.weight": (4, 64),
        "linear_attn.conv1d.weight": (64, 1, 4),
        "linear_attn.A_log": (4,),
        "linear_attn.dt_bias": (4,),
        "linear_attn.norm.weight": (8,),
        "linear_attn.out_proj.weight": (64, 32),
    }
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (256, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (256, 64),
        "mtp.fc.weight": (64, 128),
        "mtp.norm.weight": (64,),
        "mtp.pre_fc_norm_embedding.weight": (64,),
        "mtp.pre_fc_norm_hidden.weight": (64,),
    }
    for prefix, attention in (
        *((f"model.layers.{i}.", linear) for i in range(3)),
        *(("model.layers.3.", full), ("mtp.layers.0.", full)),
    ):
        expected |= {prefix + n: shape for n, shape in {**norms, **attention, **mixture}.items()}
    assert shapes == expected


def test_on_a_mesh(split_model: emtp.MTPModel, tmp_path: Path) -> None:
    """Each device reads its part of the packed tensors."""
    folder = write(tmp_path / "in", packed(split_tensors()))
    sharded = load(folder, mesh=sharding.make_mesh({"expert": 2, "fsdp": 2, "tensor": 2}))
    experts = sharded.block.layers.transformer_layer.feed_forward.experts  # type: ignore[union-attr]
    assert experts.up.sharding.spec[1] == "expert"
    assert eqx.tree_equal(jax.device_get(sharded), jax.device_get(split_model))


def test_narrow_weights_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {n: np.asarray(jnp.asarray(x, jnp.bfloat16)) for n, x in split_tensors().items()}
    folder = write(tmp_path / "in", packed(tensors), {**CONFIG, "dtype": "bfloat16"})
    model = load(folder)
    assert {str(x.dtype) for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))} == {"bfloat16"}
    pretrained.save(tmp_path / "out", model, source=folder)
    assert_same(tensors_of(tmp_path / "out"), packed(tensors))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_topk_prob": False}, "`norm_topk_prob` must be True in this family; got False"),
        ({"num_experts": 5}, r"mlp.experts.gate_up_proj`: it must have shape \(5, 32, 64\)|gate.w"),
        ({"moe_intermediate_size": 15}, r"gate_up_proj`: it must have shape \(6, 30, 64\)"),
        ({"shared_expert_intermediate_size": None}, "`shared_expert_intermediate_size` must be an"),
    ],
)
def test_configurations_that_are_not_right(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "in", packed(split_tensors()), {**CONFIG, **config})
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(str(folder))


def test_folders_that_are_not_right(tmp_path: Path) -> None:
    both = {**split_tensors(), **packed(split_tensors())}
    with pytest.raises(ValueError, match=r"`.*experts\..*_proj`: the family .* no place for it"):
        load(write(tmp_path / "both", both))
    cut = packed(split_tensors())
    del cut["model.layers.1.mlp.experts.gate_up_proj"]
    with pytest.raises(ValueError, match=r"`model.layers.1.mlp.experts.gate_up_proj` is missing"):
        load(write(tmp_path / "cut", cut))


def test_what_the_layout_cannot_hold(split_model: emtp.MTPModel, tmp_path: Path) -> None:
    dense = load(FOLDER / "qwen3_5")
    with pytest.raises(ValueError, match="must have a layer with a MixtureOfExperts"):
        pretrained.save(tmp_path / "dense", dense, layout=NAME)

    # Readers normalize the probabilities of the chosen experts.
    def unnormalized(router: Any) -> Any:
        fields = {name: getattr(router, name) for name in router.__dataclass_fields__}
        return emtp._types.module_of(nn.Router, **{**fields, "normalize": False})  # type: ignore[attr-defined]

    model = jax.tree.map(
        lambda x: unnormalized(x) if isinstance(x, nn.Router) else x,
        split_model,
        is_leaf=lambda x: isinstance(x, nn.Router),
    )
    with pytest.raises(ValueError, match=r"`feed_forward.router.normalize` is False, and would"):
        pretrained.save(tmp_path / "other", model, layout=NAME)
