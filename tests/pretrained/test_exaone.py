"""K-EXAONE, of which there are no recorded numbers: its names, and its layers by a plain loop."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import config_of, tensors_of
from golden import quick_jit
from safetensors.numpy import save_file

import equinox_mtp as emtp
from equinox_mtp import pretrained, speculative
from equinox_mtp._decoder import split_auxiliary

NAME = "exaone_moe"
Tensors = dict[str, np.ndarray]
EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, EXPERT_MLP, EXPERTS, VOCAB = 32, 4, 2, 8, 40, 12, 8, 64

# As the configurations of these models say it.
CONFIG = {
    "architectures": ["ExaoneMoEForCausalLM"],
    "model_type": "exaone_moe",
    "vocab_size": VOCAB,
    "hidden_size": EMBED,
    "intermediate_size": MLP,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": 3,
    "sliding_window_pattern": "LLLG",
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "sliding_windows": [3, 3, 3, 0],
    "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": EXPERT_MLP,
    "num_experts": EXPERTS,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "num_nextn_predict_layers": 1,
    "mtp_layer_types": ["sliding_attention"],
    "mtp_sliding_windows": [3],
    "torch_dtype": "float32",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Of all tensors, by the names of public readers."""
    attention = {
        "input_layernorm.weight": (EMBED,),
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, EMBED),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, EMBED),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, EMBED),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "self_attn.o_proj.weight": (EMBED, HEADS * HEAD_DIM),
        "post_attention_layernorm.weight": (EMBED,),
    }

    def swiglu(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        shapes = (("gate", (size, EMBED)), ("up", (size, EMBED)), ("down", (EMBED, size)))
        return {f"{prefix}.{part}_proj.weight": shape for part, shape in shapes}

    dense = {**attention, **swiglu("mlp", MLP)}
    sparse = {
        **attention,
        "mlp.gate.weight": (EXPERTS, EMBED),
        "mlp.e_score_correction_bias": (EXPERTS,),
        **swiglu("mlp.shared_experts", EXPERT_MLP),
    }
    for expert in range(EXPERTS):
        sparse |= swiglu(f"mlp.experts.{expert}", EXPERT_MLP)
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, EMBED),
        "model.norm.weight": (EMBED,),
        "lm_head.weight": (VOCAB, EMBED),
        "mtp.pre_fc_norm_embedding.weight": (EMBED,),
        "mtp.pre_fc_norm_hidden.weight": (EMBED,),
        "mtp.fc.weight": (EMBED, 2 * EMBED),
        "mtp.norm.weight": (EMBED,),
    }
    for index, layer in enumerate((dense, sparse, sparse, sparse)):
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return found | {f"mtp.layers.0.{name}": shape for name, shape in dense.items()}


def tensors() -> Tensors:
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1] if len(shape) > 1 else 4)).astype("f4")
        for name, shape in shapes().items()
    }


def write(target: Path, **config: Any) -> Path:
    target.mkdir()
    save_file(tensors(), target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return target


def load(folder: Path, **options: Any) -> emtp.MTPModel:
    return pretrained.load(folder, **options)[0]


class Loop:
    """The model in float64, a position and an expert at a time."""

    def __init__(self, **config: Any):
        self.config = {**CONFIG, **config}
        self.tensors = {name: x.astype(np.float64) for name, x in tensors().items()}

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = self.tensors[f"{name}.weight"]
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T

    def swiglu(self, x: np.ndarray, name: str) -> np.ndarray:
        gate, up = (self.linear(x, f"{name}.{part}_proj") for part in ("gate", "up"))
        return self.linear(gate / (1 + np.exp(-gate)) * up, f"{name}.down_proj")

    def mixture(self, x: np.ndarray, name: str) -> np.ndarray:
        scores = 1 / (1 + np.exp(-self.linear(x, f"{name}.gate")))
        corrected = scores + self.tensors[f"{name}.e_score_correction_bias"]
        groups = corrected.reshape(2, 4)
        best = np.sort(groups, -1)[:, -2:].sum(-1).argmax()
        chosen = np.where(np.arange(EXPERTS) // 4 == best, corrected, -np.inf).argsort()[-2:]
        out = self.swiglu(x, f"{name}.shared_experts")
        for expert in chosen:
            weight = 2.5 * scores[expert] / scores[chosen].sum()
            out = out + weight * self.swiglu(x, f"{name}.experts.{expert}")
        return out

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """`[seq heads head_dim]`."""
        half = HEAD_DIM // 2
        angles = np.arange(len(x))[:, None] * 1e6 ** -(np.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def layer(self, x: np.ndarray, name: str, *, window: bool, rotates: bool) -> np.ndarray:
        """`[seq embed]`."""
        hidden = self.norm(x, f"{name}.input_layernorm")
        query, key, value = (
            self.linear(hidden, f"{name}.self_attn.{part}_proj").reshape(len(x), -1, HEAD_DIM)
            for part in "qkv"
        )
        query, key = (
            self.norm(part, f"{name}.self_attn.{which}_norm")
            for part, which in ((query, "q"), (key, "k"))
        )
        if rotates:
            query, key = self.rotated(query), self.rotated(key)
        attended = np.zeros_like(query)
        for i, head in np.ndindex(query.shape[:2]):
            seen = slice(max(0, i - 2) if window else 0, i + 1)
            logits = key[seen, head // 2] @ query[i, head] / np.sqrt(HEAD_DIM)
            weights = np.exp(logits - logits.max())
            attended[i, head] = weights @ value[seen, head // 2] / weights.sum()
        x = x + self.linear(attended.reshape(len(x), -1), f"{name}.self_attn.o_proj")
        hidden = self.norm(x, f"{name}.post_attention_layernorm")
        if f"{name}.mlp.gate.weight" not in self.tensors:
            return x + self.swiglu(hidden, f"{name}.mlp")
        return x + np.stack([self.mixture(token, f"{name}.mlp") for token in hidden])

    def main(self, tokens: np.ndarray) -> np.ndarray:
        """Normed hidden states."""
        x = self.tensors["model.embed_tokens.weight"][tokens]
        kinds = self.config["layer_types"]
        windows = [kind == "sliding_attention" for kind in kinds]
        for index, window in enumerate(windows):
            rotates = window or not any(windows)
            x = self.layer(x, f"model.layers.{index}", window=window, rotates=rotates)
        return self.norm(x, "model.norm")

    def depth(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Normed hidden states of the depth, from those before and the tokens after them."""
        embedded = self.tensors["model.embed_tokens.weight"][tokens]
        both = np.concatenate(
            [
                self.norm(embedded, "mtp.pre_fc_norm_embedding"),
                self.norm(hidden, "mtp.pre_fc_norm_hidden"),
            ],
            -1,
        )
        window = self.config["mtp_layer_types"] == ["sliding_attention"]
        x = self.linear(both, "mtp.fc")
        return self.norm(self.layer(x, "mtp.layers.0", window=window, rotates=window), "mtp.norm")


@quick_jit
def states(model: emtp.MTPModel, tokens: Any) -> tuple[Any, Any]:
    """Normed hidden states of the main model, and of the depth at all positions but the last."""
    decoder, positions = model.decoder, jnp.arange(tokens.shape[1])[None]
    hidden, _ = split_auxiliary(decoder(tokens, position_ids=positions))
    normed = decoder.final_norm(hidden)
    layer = model.block.layer(1)
    of_depth = layer(
        normed[:, :-1],
        decoder.embed(tokens[:, 1:], positions[:, 1:]),
        position_ids=positions[:, :-1],
    )
    of_depth, _ = split_auxiliary(of_depth)
    return normed, layer.normed_and_carried(of_depth, decoder.final_norm)[0]


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_against_a_loop(kind: str, tmp_path: Path) -> None:
    """Windows are rotated; what sees all has no positional encoding. A depth is of either kind."""
    window = 3 if kind == "sliding_attention" else 0
    folder = write(tmp_path / "in", mtp_layer_types=[kind], mtp_sliding_windows=[window])
    model = load(folder)
    tokens = np.random.default_rng(1).integers(0, VOCAB, 9)
    loop = Loop(mtp_layer_types=[kind])
    main = loop.main(tokens)
    normed, of_depth = states(model, jnp.asarray(tokens)[None])
    np.testing.assert_allclose(normed[0], main, atol=1e-4)
    np.testing.assert_allclose(of_depth[0], loop.depth(main[:-1], tokens[1:]), atol=1e-4)


NO_WINDOWS: dict[str, Any] = {
    "sliding_window": None,
    "layer_types": ["full_attention"] * 4,
    "sliding_windows": [0] * 4,
    "mtp_layer_types": ["full_attention"],
    "mtp_sliding_windows": [0],
}


def test_without_windows_all_layers_are_rotated(tmp_path: Path) -> None:
    model = load(write(tmp_path / "in", **NO_WINDOWS), num_depths=0)
    tokens = np.random.default_rng(1).integers(0, VOCAB, 9)
    decoder: Any = model.decoder
    positions = jnp.arange(9)[None]
    hidden = split_auxiliary(
        eqx.filter_jit(decoder)(jnp.asarray(tokens)[None], position_ids=positions)
    )[0]
    np.testing.assert_allclose(
        decoder.final_norm(hidden)[0], Loop(**NO_WINDOWS).main(tokens), atol=1e-4
    )
    pretrained.save(tmp_path / "out", model, layout=NAME)
    assert config_of(tmp_path / "out")["sliding_window"] is None
    assert eqx.tree_equal(load(tmp_path / "out"), model)


def test_greedy_continuations(tmp_path: Path) -> None:
    """By drafts, as the loop's best tokens."""
    model, loop = load(write(tmp_path / "in")), Loop()
    prompt = np.random.default_rng(2).integers(0, VOCAB, 6)
    expected = prompt
    for _ in range(6):
        logits = loop.main(expected)[-1] @ loop.tensors["lm_head.weight"].T
        expected = np.append(expected, logits.argmax())
    found = speculative.generate(model, prompt[None], max_new_tokens=6, num_drafts=2)
    np.testing.assert_array_equal(found.tokens[0], expected)


def test_round_trips(tmp_path: Path) -> None:
    """As it came, and from the model alone."""
    folder = write(tmp_path / "in")
    model = load(folder)
    assert model.block.config == emtp.MTPConfig(
        num_depths=1,
        concat_order="embedding_first",
        input_hidden_state="after_norm",
        carried_hidden_state="after_norm",
        output_norm="own",
        repeated_layer=False,
    )
    ways: list[dict[str, Any]] = [{"source": folder}, {"layout": NAME}]
    for number, options in enumerate(ways):
        out = tmp_path / f"out{number}"
        pretrained.save(out, model, **options)
        written, stored = tensors_of(out), tensors()
        assert written.keys() == stored.keys()
        for name, x in stored.items():
            np.testing.assert_array_equal(written[name], x, strict=True)
        assert eqx.tree_equal(load(out), model)
        described = config_of(out)
        same = described.keys() & CONFIG.keys() - {"max_position_embeddings"}
        assert {n: described[n] for n in same} == {n: CONFIG[n] for n in same}
        # vLLM reads all of these.
        assert {"sliding_windows", "mtp_layer_types", "mtp_sliding_windows"} <= same
    assert config_of(tmp_path / "out0") == CONFIG


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"sliding_windows": None, "mtp_sliding_windows": None}, [3, 3, 3, None, 3]),
        ({"sliding_window": None, "sliding_windows": [2, 7, 2, 0]}, [2, 7, 2, None, 3]),
        ({"mtp_layer_types": None, "mtp_sliding_windows": None}, [3, 3, 3, None, None]),
        ({"mtp_layer_types": ["full_attention"]}, [3, 3, 3, None, None]),
    ],
)
def test_windows(config: dict[str, Any], windows: list[int | None], tmp_path: Path) -> None:
    """By a single size or a list; written and read back."""
    model = load(write(tmp_path / "in", **config))
    layers: list[Any] = [model.decoder.layer(i) for i in range(4)]  # type: ignore[union-attr]
    layers.append(model.block.layer(1).transformer_layer)
    assert [layer.attention.window for layer in layers] == windows
    assert [layer.attention.rotary is None for layer in layers] == [x is None for x in windows]
    pretrained.save(tmp_path / "out", model, layout=NAME)
    assert eqx.tree_equal(load(tmp_path / "out"), model)


def test_a_fresh_depth_is_described(tmp_path: Path) -> None:
    """In a folder that has none, too."""
    changes = {"num_nextn_predict_layers": 0, "mtp_layer_types": None, "mtp_sliding_windows": None}
    folder = tmp_path / "in"
    folder.mkdir()
    main = {name: x for name, x in tensors().items() if not name.startswith("mtp.")}
    save_file(main, folder / "model.safetensors")
    config = {name: x for name, x in {**CONFIG, **changes}.items() if x is not None}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder, num_depths=1, preset="megatron", key=jax.random.key(0))
    pretrained.save(tmp_path / "out", model, source=folder)
    described = config_of(tmp_path / "out")
    assert described["num_nextn_predict_layers"] == 1
    assert described["mtp_layer_types"] == ["full_attention"]
    assert described["mtp_sliding_windows"] == [0]
    assert eqx.tree_equal(load(tmp_path / "out").decoder, model.decoder)


def test_fresh() -> None:
    """The shapes are those of the folder."""
    fresh = eqx.filter_eval_shape(pretrained.from_config, CONFIG, key=jax.random.key(0))
    attention: Any = fresh.decoder.layer(3).attention  # type: ignore[union-attr]
    assert attention.rotary is None
    assert attention.window is None
    assert fresh.block.layer(1).transformer_layer.attention.window == 3  # type: ignore[union-attr]
    arrays = [x for x in jax.tree.leaves(fresh) if isinstance(x, jax.ShapeDtypeStruct)]
    count = sum(x.size for x in arrays)
    assert count == sum(int(np.prod(shape)) for shape in shapes().values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": None}, "`layer_types` must be a list of 4 times sliding_attention or"),
        (
            {"layer_types": ["full"] * 4},
            "`layer_types` must be a list of 4 times sliding_attention",
        ),
        ({"mlp_layer_types": ["dense"]}, "`mlp_layer_types` must be a list of 4 times dense or"),
        (
            {"sliding_window": None, "sliding_windows": None},
            "`sliding_window` must be the window of every layer of sliding_attention.*got None",
        ),
        ({"sliding_windows": [3, 4, 3, 0]}, r"`sliding_windows` must be the window.*got \[3, 4"),
        ({"sliding_windows": [3, 3, 0, 0]}, r"`sliding_windows` must be the window.*got \[3, 3, 0"),
        ({"sliding_windows": [3]}, "`sliding_windows` must be a list of 4 windows"),
        (
            {"layer_types": ["full_attention"] * 4},
            "`sliding_window` must be null, and not left out, where no layer has a window; got 3",
        ),
        ({"layer_types": [["full_attention"]] * 4}, "`layer_types` must be a list of 4 times"),
        ({"mtp_layer_types": []}, "`mtp_layer_types` must be a list of 1 times sliding"),
        ({"mtp_layer_types": "sliding_attention"}, "`mtp_layer_types` must be a list of 1 times"),
        ({**NO_WINDOWS, "mtp_layer_types": ["sliding_attention"]}, "`mtp_sliding_windows` must be"),
        ({"attention_bias": True}, "`attention_bias` must be false, and without tensors"),
        ({"rope_theta": None}, "`rope_theta` must be a number; got None"),
        ({"rms_norm_eps": None}, "`rms_norm_eps` must be a number; got None"),
        ({"num_shared_experts": None}, "`num_shared_experts` must be an integer, at least 0; got"),
        ({"routed_scaling_factor": None}, "`routed_scaling_factor` must be a number; got None"),
        ({"scoring_func": "softmax"}, "`scoring_func` must be 'sigmoid'; got 'softmax'"),
        ({"swiglu_limits": [1.0]}, "`swiglu_limits` must be None in this family"),
        ({"logit_scale": 0.5}, "`logit_scale` must be 1 in this family; got 0.5"),
        ({"num_nextn_predict_layers": 2}, "`num_nextn_predict_layers` must be 0 or 1"),
        ({"num_experts": None}, "`num_experts` must be an integer, at least 1; got None"),
    ],
)
def test_configurations_that_are_not_right(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "in", **config)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(str(folder))
