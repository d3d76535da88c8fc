"""Released layouts against the recorded numbers of other implementations."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import FOLDER, changed, config_of, reference, tensors_of
from golden import quick_jit
from safetensors.numpy import save_file

import equinox_mtp as emtp
from equinox_mtp import nn, pretrained, speculative
from equinox_mtp._decoder import split_auxiliary
from equinox_mtp.pretrained._folder import CheckpointFolder

FAMILIES = (
    *("qwen3", "llama3", "mimo", "fastmtp", "qwen3_moe", "glm4_moe"),
    *("deepseek_v3", "qwen3_5", "qwen3_next"),
)
WITH_DEPTHS = ("mimo", "fastmtp", "glm4_moe", "deepseek_v3", "qwen3_5", "qwen3_next")
PLACEMENTS = {"post": "after_norm", "pre": "before_norm"}
OTHER_HIDDEN_STATES = (
    *(("mimo", "post"), ("fastmtp", "pre")),
    *(("glm4_moe", "pre"), ("deepseek_v3", "pre")),
)
TOLERANCE = 1e-4


def marked(names: Any) -> list[Any]:
    """Cases, of which those whose loop of decoding compiles longest are slow."""
    slow = ("deepseek_v3", "qwen3_5", "qwen3_next")
    return [pytest.param(x, marks=pytest.mark.slow) if x in slow else x for x in names]


class Loaded(dict[str, emtp.MTPModel]):
    """The models of the families, each read when a test first asks for it."""

    def __missing__(self, name: str) -> emtp.MTPModel:
        self[name] = pretrained.load(FOLDER / name, tokenizer=False)[0]
        return self[name]


@pytest.fixture(scope="module")
def models() -> dict[str, emtp.MTPModel]:
    return Loaded()


def close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def with_config(model: emtp.MTPModel, **changes: Any) -> emtp.MTPModel:
    """The same weights by other conventions."""
    config = dataclasses.replace(model.block.config, **changes)
    layers: Any = model.block.layers
    fields = {field.name: getattr(layers, field.name) for field in dataclasses.fields(layers)}
    fields["carried_hidden_state"] = config.carried_hidden_state
    layers = emtp._types.module_of(type(layers), **fields)  # type: ignore[attr-defined]
    block = emtp._types.module_of(type(model.block), layers=layers, config=config)  # type: ignore[attr-defined]
    return emtp.MTPModel(model.decoder, block)


# Programs that tests share: all arrays are arguments, and shapes are always these. Rows are longer
# than a test may need: no position sees what follows it.

ROWS, LENGTH = 3, 23


def padded(*rows: Any) -> np.ndarray:
    """Rows of tokens, and padding."""
    out = np.zeros((ROWS, LENGTH), np.int32)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


@quick_jit
def whole_pass(decoder: Any, ids: Any) -> tuple[Any, Any, Any]:
    """Hidden states, the normed ones, and logits; without a router's statistics."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    hidden = split_auxiliary(decoder(ids, position_ids=positions))[0]
    normed = decoder.final_norm(hidden)
    return hidden, normed, normed @ decoder.output_head().T


def logits_of(decoder: Any, tokens: np.ndarray) -> np.ndarray:
    logits = whole_pass(decoder, padded(*tokens))[2]
    return np.asarray(logits)[: len(tokens), : tokens.shape[1]]


@quick_jit
def cached_step(decoder: Any, ids: Any, cache: Any, start: Any) -> tuple[Any, Any]:
    positions = jnp.broadcast_to(start + jnp.arange(ids.shape[1]), ids.shape)
    hidden, cache = decoder.decode(ids, cache, position_ids=positions)
    normed = decoder.final_norm(hidden)
    return (hidden, normed, normed @ decoder.output_head().T), cache


def in_cached_steps(decoder: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """As `whole_pass`, four tokens at a time, and the last four one by one."""
    cache, parts, length = decoder.init_cache(*tokens.shape), [], tokens.shape[1]
    starts = [*range(0, length - 4, 4), *range(length - 4, length)]
    for start, end in itertools.pairwise([*starts, length]):
        part, cache = cached_step(decoder, tokens[:, start:end], cache, np.int32(start))
        parts.append(part)
    return [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]


@quick_jit
def depth_pass(decoder: Any, layer: Any, states: Any, ids: Any, first: Any) -> tuple[Any, ...]:
    """A depth's outputs, the normed ones, and logits; the first embedding times a number."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    embeddings = decoder.embed(ids, positions).at[:, 0].multiply(first)
    out, _ = layer(states, embeddings, position_ids=positions)
    normed, _ = layer.normed_and_carried(out, decoder.final_norm)
    return out, normed, normed @ decoder.output_head().T


run_model = quick_jit(lambda model, batch: model(batch))


class MainPass(NamedTuple):
    """Of a family: rows 0 and 1 are the recorded tokens, row 2 is the recorded continuation."""

    hidden: np.ndarray
    normed: np.ndarray
    logits: np.ndarray

    def entering(self, input_hidden_state: str) -> np.ndarray:
        return self.normed if input_hidden_state == "after_norm" else self.hidden


class MainPasses(dict[str, MainPass]):
    """Each made when a test first asks for it."""

    def __init__(self, models: dict[str, emtp.MTPModel]):
        super().__init__()
        self.models = models

    def __missing__(self, name: str) -> MainPass:
        numbers = reference(name)
        ids = padded(*numbers["tokens"], *numbers["greedy"])
        self[name] = MainPass(*map(np.asarray, whole_pass(self.models[name].decoder, ids)))
        return self[name]


@pytest.fixture(scope="module")
def passes(models: dict[str, emtp.MTPModel]) -> dict[str, MainPass]:
    return MainPasses(models)


class KnownStates(emtp.AbstractCachedDecoder):
    """A decoder whose hidden states are known: only what the depths do is left to compile."""

    decoder: Any
    hidden_states: Any

    def embed(self, input_ids: Any, position_ids: Any) -> Any:
        return self.decoder.embed(input_ids, position_ids)

    def __call__(self, input_ids: Any, **kwargs: Any) -> Any:
        return self.hidden_states

    def final_norm(self, hidden_states: Any) -> Any:
        return self.decoder.final_norm(hidden_states)

    def output_head(self) -> Any:
        return self.decoder.output_head()

    def init_cache(self, batch_size: int, max_length: int) -> Any:
        return ()

    def prefill(self, input_ids: Any, cache: Any, **kwargs: Any) -> Any:
        return self.hidden_states, cache

    def decode(self, input_ids: Any, cache: Any, *, position_ids: Any) -> Any:
        raise NotImplementedError("the depths' drafts do not ask for it")


def with_known_states(model: emtp.MTPModel, hidden_states: np.ndarray) -> emtp.MTPModel:
    return emtp.MTPModel(KnownStates(model.decoder, jnp.asarray(hidden_states)), model.block)


def check_main_model(found: Any, numbers: dict[str, np.ndarray]) -> None:
    for x, name in zip(found, ("hidden_pre_norm", "hidden_post_norm", "logits"), strict=True):
        close(x, numbers[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_logits(name: str, passes: dict[str, MainPass]) -> None:
    check_main_model([x[:2, :16] for x in passes[name]], reference(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_logits_in_cached_steps(
    name: str, models: dict[str, emtp.MTPModel]
) -> None:
    numbers = reference(name)
    check_main_model(in_cached_steps(models[name].decoder, numbers["tokens"][:, :16]), numbers)


@quick_jit
def block_pass(model: emtp.MTPModel, batch: emtp.Batch) -> tuple[Any, list[Any]]:
    """The model's output; and of each depth hidden states, the normed ones, and logits."""
    decoder: Any = model.decoder
    output: Any = model(batch)
    states = []
    for depth in range(1, model.block.config.num_depths + 1):
        raw = output.mtp.hidden_states[depth - 1]
        normed, _ = model.block.layer(depth).normed_and_carried(raw, decoder.final_norm)
        states.append((raw, normed, normed @ decoder.output_head().T))
    return output, states


@pytest.mark.parametrize("name", WITH_DEPTHS)
def test_the_first_depth(
    name: str, models: dict[str, emtp.MTPModel], passes: dict[str, MainPass]
) -> None:
    """The block's own pass over `tokens[:, :17]`, whose last position has no target at depth 1."""
    numbers = reference(name)
    model = with_known_states(models[name], passes[name].hidden[:2, :17])
    output, states = block_pass(model, emtp.make_batch(numbers["tokens"]))
    hidden, normed, logits = (x[:, :16] for x in states[0])
    close(hidden, numbers["mtp0_hidden_pre_norm"])
    close(normed, numbers["mtp0_hidden_post_norm"])
    close(logits, numbers["mtp0_logits"])
    best = numbers["mtp0_logits"].argmax(-1)
    np.testing.assert_array_equal(output.mtp.acceptance.predictions[0][:, :15], best[:, :15])


@pytest.mark.parametrize(("name", "other"), OTHER_HIDDEN_STATES)
def test_the_other_hidden_state_at_the_entrance(
    name: str, other: str, models: dict[str, emtp.MTPModel], passes: dict[str, MainPass]
) -> None:
    model = with_config(models[name], input_hidden_state=PLACEMENTS[other])
    numbers = reference(name)
    known = with_known_states(model, passes[name].hidden[:2, :17])
    _, states = block_pass(known, emtp.make_batch(numbers["tokens"]))
    close(states[0][2][:, :16], numbers[f"mtp0_logits_from_{other}"])


def test_recursion_in_training(
    models: dict[str, emtp.MTPModel], passes: dict[str, MainPass]
) -> None:
    """FastMTP's layer three times, each over the normed state of the one before."""
    numbers, model = reference("fastmtp"), models["fastmtp"]
    assert model.block.config.num_depths == 3
    known = with_known_states(model, passes["fastmtp"].hidden[:2, :17])
    _, states = block_pass(known, emtp.make_batch(numbers["tokens"]))
    for depth, (_, normed, logits) in enumerate(states):
        length = 15 - depth
        close(normed[:, :length], numbers[f"recursive_step{depth}_hidden"])
        close(logits[:, :length], numbers[f"recursive_step{depth}_logits"])


@pytest.mark.parametrize("name", marked(FAMILIES))
def test_greedy_continuations(
    name: str, models: dict[str, emtp.MTPModel], passes: dict[str, MainPass]
) -> None:
    """With drafts where there are depths: the tokens are those of the main model alone."""
    numbers, model = reference(name), models[name]
    num_drafts = 2 if model.block.config.num_depths else 0
    generation = speculative.generate(
        model, numbers["prompt"], max_new_tokens=16, num_drafts=num_drafts
    )
    np.testing.assert_array_equal(generation.tokens, numbers["greedy"])
    best = passes[name].logits[2, 6:22].argmax(-1)
    np.testing.assert_array_equal(best, numbers["greedy"][0, 7:])


@quick_jit
def three_drafts(model: emtp.MTPModel, prompt: Any) -> Any:
    """After the prompt and the main model's own token, through the cached steps."""
    decoding = speculative.DecodingModel.of(model)
    shape = speculative.DecodingShape(3, max_new_tokens=8, recursion="extended")
    key, sampler = jax.random.key(0), speculative.Sampler()
    lengths = jnp.asarray([prompt.shape[1]], jnp.int32)
    state = speculative.prefill(
        decoding, prompt, lengths, shape, sampler, eos_id=jnp.int32(-1), key=key
    )
    return speculative.draft(decoding, state, shape, sampler, key=key)[0].ids


def draft_ids(model: emtp.MTPModel, name: str, main: MainPass) -> Any:
    prompt = jnp.asarray(reference(name)["prompt"], jnp.int32)
    return three_drafts(with_known_states(model, main.hidden[2:, :7]), prompt)


@pytest.mark.parametrize("carried", PLACEMENTS)
@pytest.mark.parametrize("name", WITH_DEPTHS)
def test_recursive_drafts(
    name: str, carried: str, models: dict[str, emtp.MTPModel], passes: dict[str, MainPass]
) -> None:
    numbers = reference(name)
    model = with_config(models[name], carried_hidden_state=PLACEMENTS[carried])
    ids = np.asarray(draft_ids(model, name, passes[name]))
    np.testing.assert_array_equal(ids, numbers[f"recursive_{carried}_drafts"])
    # And the logits, in a whole pass over the text and the drafts before each.
    layer = models[name].block.layer(1)
    states = passes[name].entering(model.block.config.input_hidden_state).copy()
    pairs = padded([], [], np.concatenate([numbers["greedy"][0, 1:8], ids[0]]))
    found = []
    for last in (6, 7, 8):
        out, normed, logits = depth_pass(model.decoder, layer, states, pairs, np.float32(1))
        found.append(logits[2, last])
        states[2, last + 1] = (normed if carried == "post" else out)[2, last]
    close(np.stack(found)[None], numbers[f"recursive_{carried}_logits"])


@pytest.mark.parametrize("carried", PLACEMENTS)
@pytest.mark.parametrize(("name", "other"), OTHER_HIDDEN_STATES)
def test_recursive_drafts_from_the_other_hidden_state(
    name: str,
    other: str,
    carried: str,
    models: dict[str, emtp.MTPModel],
    passes: dict[str, MainPass],
) -> None:
    model = with_config(
        models[name],
        carried_hidden_state=PLACEMENTS[carried],
        input_hidden_state=PLACEMENTS[other],
    )
    expected = reference(name)[f"recursive_{carried}_drafts_from_{other}"]
    np.testing.assert_array_equal(draft_ids(model, name, passes[name]), expected)


@pytest.mark.parametrize("name", WITH_DEPTHS)
def test_without_the_first_embedding(
    name: str, models: dict[str, emtp.MTPModel], passes: dict[str, MainPass]
) -> None:
    """As vLLM serves them; rotary positions are relative, so they may be those of depth 1."""
    numbers, model = reference(name), models[name]
    states = passes[name].entering(model.block.config.input_hidden_state)
    pairs = padded(*numbers["tokens"][:, 1:])
    _, _, logits = depth_pass(model.decoder, model.block.layer(1), states, pairs, np.float32(0))
    close(logits[:2, :16], numbers["mtp0_logits_zero0"])


def test_conventions_are_the_families(models: dict[str, emtp.MTPModel]) -> None:
    mimo, fastmtp = models["mimo"].block.config, models["fastmtp"].block.config
    assert (mimo.num_depths, mimo.concat_order, mimo.input_hidden_state) == (
        1,
        "hidden_first",
        "before_norm",
    )
    assert (fastmtp.num_depths, fastmtp.concat_order, fastmtp.input_hidden_state) == (
        3,
        "embedding_first",
        "after_norm",
    )
    assert fastmtp.repeated_layer
    deepseek = models["deepseek_v3"].block.config
    assert deepseek == emtp.MTPConfig.preset("megatron", 1)
    assert models["qwen3"].block.config.num_depths == 0


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_tokenizers(name: str) -> None:
    _, tokenizer = pretrained.load(FOLDER / name)
    for sample in json.loads((FOLDER / name / "tokenizer_samples.json").read_text()):
        assert tokenizer.encode(sample["text"]).ids == sample["ids"]
        assert tokenizer.decode(sample["ids"]) == sample["text"]
    assert pretrained.load(FOLDER / "mimo")[1] is None


# What a configuration may say in another way


def same_logits(folder: Path, name: str) -> None:
    model, _ = pretrained.load(folder, tokenizer=False)
    numbers = reference(name)
    close(logits_of(model.decoder, numbers["tokens"][:, :16]), numbers["logits"])


def logits_by_loop(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """A model in float64, from the tensors and settings of its folder."""
    tensors = {name: x.astype(np.float64) for name, x in tensors_of(folder).items()}
    config = config_of(folder)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    group = heads // config["num_key_value_heads"]
    turned = int(head_dim * config.get("partial_rotary_factor", 1.0))
    angles = np.arange(tokens.shape[1])[:, None] * config["rope_theta"] ** -(
        np.arange(0, turned, 2) / turned
    )

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean_square = np.mean(x**2, -1, keepdims=True)
        return x / np.sqrt(mean_square + config["rms_norm_eps"]) * tensors[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0.0)

    def rotate(x: np.ndarray) -> np.ndarray:
        one, other, rest = np.split(x, [turned // 2, turned], -1)
        sine, cosine = np.sin(angles)[:, None], np.cos(angles)[:, None]
        first = one * cosine - other * sine
        return np.concatenate([first, other * cosine + one * sine, rest], -1)

    def swiglu(x: np.ndarray, name: str) -> np.ndarray:
        gate = linear(x, f"{name}.gate_proj")
        return linear(
            gate / (1 + np.exp(-gate)) * linear(x, f"{name}.up_proj"), f"{name}.down_proj"
        )

    def mixture(token: np.ndarray, name: str) -> np.ndarray:
        """Softmax, or sigmoids with a correction and groups if there is one."""
        logits, correction = linear(token, f"{name}.gate"), f"{name}.gate.e_score_correction_bias"
        scores = np.exp(logits) / np.exp(logits).sum()
        chosen = scores
        if correction in tensors:
            scores = 1 / (1 + np.exp(-logits))
            chosen = scores + tensors[correction]
            groups = np.sort(chosen.reshape(config["n_group"], -1), -1)
            kept = np.argsort(-groups[:, -2:].sum(-1))[: config["topk_group"]]
            is_kept = np.isin(np.arange(len(chosen)) // groups.shape[1], kept)
            chosen = np.where(is_kept, chosen, -np.inf)
        ids = np.argsort(-chosen)[: config["num_experts_per_tok"]]
        weights = scores[ids] / (scores[ids].sum() if config["norm_topk_prob"] else 1)
        parts = [
            w * swiglu(token, f"{name}.experts.{i}") for w, i in zip(weights, ids, strict=True)
        ]
        shared = f"{name}.shared_experts"
        out = config.get("routed_scaling_factor", 1.0) * sum(parts)
        return out + swiglu(token, shared) if f"{shared}.up_proj.weight" in tensors else out

    x = tensors["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        hidden = norm(x, f"{layer}.input_layernorm")
        query, key, value = (
            linear(hidden, f"{layer}.self_attn.{part}_proj").reshape(*x.shape[:2], -1, head_dim)
            for part in "qkv"
        )
        if f"{layer}.self_attn.q_norm.weight" in tensors:
            query = norm(query, f"{layer}.self_attn.q_norm")
            key = norm(key, f"{layer}.self_attn.k_norm")
        query, key = rotate(query), rotate(key)
        attended = np.zeros_like(query)
        for b, s, h in np.ndindex(query.shape[:3]):
            seen = key[b, : s + 1, h // group] @ query[b, s, h] / np.sqrt(head_dim)
            weights = np.exp(seen - seen.max())
            attended[b, s, h] = weights @ value[b, : s + 1, h // group] / weights.sum()
        x = x + linear(attended.reshape(*x.shape[:2], -1), f"{layer}.self_attn.o_proj")
        hidden = norm(x, f"{layer}.post_attention_layernorm")
        if f"{layer}.mlp.gate.weight" in tensors:
            tokens_of = hidden.reshape(-1, hidden.shape[-1])
            mixed = np.stack([mixture(token, f"{layer}.mlp") for token in tokens_of])
            x = x + mixed.reshape(x.shape)
        else:
            x = x + swiglu(hidden, f"{layer}.mlp")
    return linear(norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_biases_of_attention(name: str, tmp_path: Path) -> None:
    """Of the output, too: `attention_bias` of Llama, and what a Qwen3 has."""
    tokens = reference(name)["tokens"][:, :16]
    if name == "qwen3":
        close(logits_by_loop(FOLDER / name, tokens), reference(name)["logits"])
    rng = np.random.default_rng(0)

    def biases(tensors: dict[str, np.ndarray]) -> None:
        for weight in [name for name in tensors if "self_attn" in name and "proj" in name]:
            bias = rng.normal(size=tensors[weight].shape[0]).astype(np.float32)
            tensors[weight.replace("weight", "bias")] = bias

    folder = changed(
        name,
        tmp_path / "in",
        config=lambda config: config.update(attention_bias=True, rope_scaling=None),
        tensors=biases,
    )
    model, _ = pretrained.load(folder, tokenizer=False)
    expected = logits_by_loop(folder, tokens)
    close(logits_of(model.decoder, tokens), expected)
    close(in_cached_steps(model.decoder, tokens)[2], expected)
    # Bit for bit, in the family's layout and with depths.
    stored = tensors_of(folder)
    fresh, _ = pretrained.load(folder, num_depths=1, preset="megatron", key=jax.random.key(0))
    for layout, one in (("llama" if name == "llama3" else name, model), ("transformers", fresh)):
        out = tmp_path / layout
        pretrained.save(out, one, layout=layout)
        assert config_of(out)["attention_bias"] is True
        written = tensors_of(out)
        for key, x in stored.items():
            np.testing.assert_array_equal(written[key], x, strict=True)
        assert eqx.tree_equal(pretrained.load(out, tokenizer=False)[0], one)
    with pytest.raises(ValueError, match=r"has no tensor for `attention\.(out_bias|query_norm)"):
        pretrained.save(tmp_path / "mimo", fresh, layout="mimo")


def dense_layer(index: int) -> Callable[[dict[str, np.ndarray]], None]:
    """Makes the feed-forward network of a layer a dense one."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        rng, prefix = np.random.default_rng(index), f"model.layers.{index}.mlp."
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]
        for part, shape in (("gate", (80, 64)), ("up", (80, 64)), ("down", (64, 80))):
            values = rng.normal(size=shape) / np.sqrt(shape[1])
            tensors[f"{prefix}{part}_proj.weight"] = values.astype(np.float32)

    return change


def with_norms(tensors: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for layer in range(4):
        for part in "qk":
            scale = rng.normal(size=16).astype(np.float32)
            tensors[f"model.layers.{layer}.self_attn.{part}_norm.weight"] = scale


def without_biases(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.bias")]:
        del tensors[name]


def two_shared_experts(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if "shared_experts" in name]:
        axis = 1 if "down" in name else 0
        tensors[name] = np.concatenate([tensors[name], 0.5 * tensors[name]], axis)


def no_shared_expert(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if "shared_experts" in name]:
        del tensors[name]


GROUPS = {"n_group": 4, "topk_group": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any], Callable[..., Any] | None]] = {
    "qwen3_moe": ("qwen3_moe", {}, None),
    "as-they-are": ("qwen3_moe", {"norm_topk_prob": False}, None),
    "dense-by-name": ("qwen3_moe", {"mlp_only_layers": [1]}, dense_layer(1)),
    "dense-by-step": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [2]}, None),
    "glm4_moe": ("glm4_moe", {}, None),
    "groups": ("glm4_moe", GROUPS, None),
    "norms": ("glm4_moe", {"use_qk_norm": True}, with_norms),
    "no-biases": ("glm4_moe", {"attention_bias": False}, without_biases),
    "two-shared": ("glm4_moe", {"n_shared_experts": 2}, two_shared_experts),
    "none-shared": ("glm4_moe", {"n_shared_experts": 0, "norm_topk_prob": False}, no_shared_expert),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(name: str, tmp_path: Path) -> None:
    """What their configurations may say, against a loop; written in their layouts and back."""
    source, config, tensors = MIXTURES[name]
    if name == "dense-by-step":
        tensors = lambda t: [dense_layer(0)(t), dense_layer(2)(t)]  # noqa: E731
    folder = changed(source, tmp_path / "in", config=lambda c: c.update(config), tensors=tensors)
    model, _ = pretrained.load(folder)
    tokens = reference(source)["tokens"][:, :6]
    close(logits_of(model.decoder, tokens), logits_by_loop(folder, tokens))
    pretrained.save(tmp_path / "out", model, layout=source)
    written, stored = tensors_of(tmp_path / "out"), tensors_of(folder)
    assert written.keys() == stored.keys()
    for key, x in stored.items():
        np.testing.assert_array_equal(written[key], x, strict=True)
    assert eqx.tree_equal(pretrained.load(tmp_path / "out")[0], model)


def test_copies_of_embedding_and_head(tmp_path: Path) -> None:
    """A depth's readers may want them; they need not be there, and must be the same."""
    names = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    model, _ = pretrained.load(FOLDER / "glm4_moe")

    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in names:
            del tensors[name]

    without = changed("glm4_moe", tmp_path / "without", tensors=drop)
    alone, _ = pretrained.load(without)
    assert eqx.tree_equal(alone, model)
    pretrained.save(tmp_path / "as-it-came", alone, source=without)
    assert tensors_of(tmp_path / "as-it-came").keys() == tensors_of(without).keys()
    pretrained.save(tmp_path / "new", alone, layout="glm4_moe")
    written = tensors_of(tmp_path / "new")
    for copy, of in zip(names, ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        np.testing.assert_array_equal(written[copy], written[of])
    for name in names:

        def change(tensors: dict[str, np.ndarray], name: str = name) -> None:
            tensors[name][3, 5] += 1

        other = changed("glm4_moe", tmp_path / name, tensors=change)
        with pytest.raises(ValueError, match=f"{name}`: it differs from .* of their own here") as e:
            pretrained.load(other)
        assert "\n" not in str(e.value)
        # Fresh depths leave the folder's own out, whatever they hold.
        assert pretrained.load(other, num_depths=0)[0].block.layers is None


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        (
            "qwen3_moe",
            {"num_experts_per_tok": 9},
            "`top_k` must be at most `num_experts`; got 9 and",
        ),
        ("qwen3_moe", {"mlp_only_layers": "1"}, "`mlp_only_layers` must be a list of numbers"),
        ("glm4_moe", {"n_group": 3}, "`n_group` must divide `n_routed_experts`; got 3 and 8"),
        ("glm4_moe", {"topk_group": 2}, "`topk_group` must be at most `n_group`; got 2 and 1"),
        ("glm4_moe", {"n_group": 8}, "`num_experts_per_tok` must be at most the 1 experts"),
        (
            "glm4_moe",
            {"scoring_func": "softmax"},
            "`scoring_func` must be 'sigmoid'; got 'softmax'",
        ),
        ("glm4_moe", {"topk_method": "greedy"}, "`topk_method` must be 'noaux_tc'; got 'greedy'"),
        ("glm4_moe", {"attention_bias": False}, "`attention_bias` must be true: attention has bia"),
        ("glm4_moe", {"n_routed_experts": 9}, r"mlp.gate.weight`: it must have shape \(9, 64\)"),
        (
            "glm4_moe",
            {"n_routed_experts": 7},
            r"experts.7.down_proj.weight`: .* no place for it|must have shape \(7, 64\)",
        ),
    ],
)
def test_mixtures_that_cannot_be(
    source: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed(source, tmp_path / "in", config=lambda c: c.update(config))
    with pytest.raises(ValueError, match=message) as error:
        pretrained.load(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_layouts_of_other_layers(tmp_path: Path) -> None:
    dense, _ = pretrained.load(FOLDER / "qwen3", tokenizer=False)
    mixture, _ = pretrained.load(FOLDER / "qwen3_moe")
    with pytest.raises(ValueError, match="must have a mixture of experts in one of its layers"):
        pretrained.save(tmp_path / "out", dense, layout="qwen3_moe")
    with pytest.raises(ValueError, match=r"has no tensor for `feed_forward\.router\.kernel`"):
        pretrained.save(tmp_path / "out", mixture, layout="qwen3")


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_chained_drafts(
    name: str, models: dict[str, emtp.MTPModel], passes: dict[str, MainPass]
) -> None:
    """The first draft is depth 1's; there is one depth."""
    numbers, model = reference(name), models[name]
    np.testing.assert_array_equal(numbers["greedy_use_mtp"], numbers["greedy"])
    pairs = padded([], [], numbers["greedy"][0, 1:8])
    layer, states = model.block.layer(1), passes[name].normed
    logits = depth_pass(model.decoder, layer, states, pairs, np.float32(1))[2][2:, 6]
    close(logits, numbers["chain_logits"][:, 0])
    assert int(jnp.argmax(logits)) == numbers["chain_drafts"][0, 0]


def test_biases_that_a_configuration_denies(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.bias"
    zeros = np.zeros(64, np.float32)
    denied = changed("llama3", tmp_path / "denied", tensors=lambda t: t.update({name: zeros}))
    with pytest.raises(ValueError, match=r"`attention_bias` must be true: .* got False"):
        pretrained.load(denied)
    said = changed("llama3", tmp_path / "said", config=lambda c: c.update(attention_bias=True))
    with pytest.raises(ValueError, match=r"`model.layers.0.self_attn.q_proj.bias` is missing"):
        pretrained.load(said)
    mimo = changed("mimo", tmp_path / "mimo", tensors=lambda t: t.update({name: zeros}))
    with pytest.raises(ValueError, match="`attention_bias` must be left out, and tensors"):
        pretrained.load(mimo)


def newer(config: dict[str, Any]) -> None:
    """`rope_parameters`, `dtype`, and the model in `text_config`."""
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    names = [name for name in config if name != "architectures"]
    config["text_config"] = {name: config.pop(name) for name in names}


@pytest.mark.parametrize(("name", "size"), [("qwen3_5", 8), ("qwen3_next", 4)])
def test_hybrid_layers(name: str, size: int, models: dict[str, emtp.MTPModel]) -> None:
    model = models[name]
    decoder: Any = model.decoder
    kinds = [type(decoder.layer(i).attention) for i in range(4)]
    assert kinds == [nn.GatedDeltaNet] * 3 + [nn.GroupedQueryAttention]
    assert [run.num_layers for run in decoder.layers] == [3, 1]
    assert decoder.layer(3).attention.rotary == nn.Rotary(10_000_000.0, size=size)
    layer: Any = model.block.layer(1)
    assert layer.transformer_layer.attention.gate_kernel is not None
    norms = [decoder.norm, layer.embedding_norm, layer.hidden_state_norm, layer.output_norm]
    norms += [layer.transformer_layer.attention.key_norm, decoder.layer(0).attention_norm]
    assert {norm.scale_offset for norm in norms} == {1.0}
    assert decoder.layer(0).attention.output_norm.scale_offset == 0.0
    assert model.block.config == emtp.MTPConfig.preset("megatron", 1)
    # Fresh depths begin with scales of 1, which are stored as 0.
    fresh, _ = pretrained.load(FOLDER / name, num_depths=1, key=jax.random.key(0))
    fresh_layer: Any = fresh.block.layer(1)
    for norm in (fresh_layer.embedding_norm, fresh_layer.transformer_layer.attention_norm):
        assert (norm.scale_offset, not norm.scale.any()) == (1.0, True)


def test_older_and_newer_configurations_of_hybrid_layers(tmp_path: Path) -> None:
    def nested(config: dict[str, Any]) -> None:
        names = [name for name in config if name not in ("architectures", "tie_word_embeddings")]
        config["text_config"] = {name: config.pop(name) for name in names}
        del config["text_config"]["layer_types"]  # every fourth

    same_logits(changed("qwen3_5", tmp_path / "nested", config=nested), "qwen3_5")


def test_a_depth_that_the_configuration_does_not_name(tmp_path: Path) -> None:
    """Qwen3-Next has one if there are tensors of it."""

    def without_depth(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]

    folder = changed("qwen3_next", tmp_path / "main", tensors=without_depth)
    model, _ = pretrained.load(folder)
    assert model.block.config.num_depths == 0
    whole, _ = pretrained.load(FOLDER / "qwen3_next", num_depths=0)
    pretrained.save(tmp_path / "out", whole, source=FOLDER / "qwen3_next")
    assert config_of(tmp_path / "out") == config_of(FOLDER / "qwen3_next")
    assert eqx.tree_equal(pretrained.load(tmp_path / "out")[0], model)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("qwen3_5", {"layer_types": ["full_attention"]}, "`layer_types` must be 4 times"),
        ("qwen3_5", {"layer_types": ["sliding_attention"] * 4}, "`layer_types` must be 4 times"),
        ("qwen3_5", {"attn_output_gate": False}, "`attn_output_gate` must be True in this family"),
        ("qwen3_5", {"attention_bias": True}, "`attention_bias` must be False in this family"),
        ("qwen3_5", {"hidden_act": "gelu"}, "`hidden_act` must be 'silu'"),
        ("qwen3_5", {"linear_num_key_heads": 3}, "`num_key_heads` must divide `num_value_heads`"),
        ("qwen3_5", {"linear_num_value_heads": None}, "`linear_num_value_heads` must be an int"),
        ("qwen3_5", {"linear_key_head_dim": 6}, "in_proj_qkv.weight`: it must have shape"),
        ("qwen3_5", {"linear_conv_kernel_dim": 3}, "conv1d.weight`: it must have shape"),
        ("qwen3_5", {"mtp_num_hidden_layers": 2}, "`mtp_num_hidden_layers` must be 0 or 1"),
        (
            "qwen3_5",
            {"mtp_use_dedicated_embeddings": True},
            "`mtp_use_dedicated_embeddings` must be False",
        ),
        ("qwen3_next", {"mlp_only_layers": 3}, "`mlp_only_layers` must be a list"),
        ("qwen3_next", {"num_experts_per_tok": 7}, "`top_k` must"),
    ],
)
def test_hybrid_layers_that_are_not_right(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed(name, tmp_path / "in", config=lambda c: c.update(config))
    with pytest.raises(ValueError, match=message):
        pretrained.load(folder)


def test_newer_configurations(tmp_path: Path) -> None:
    same_logits(changed("llama3", tmp_path / "llama3", config=newer), "llama3")
    same_logits(changed("qwen3", tmp_path / "qwen3", config=newer), "qwen3")


def test_older_configurations(tmp_path: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
        del config["use_cache"], config["tie_word_embeddings"]

    same_logits(changed("llama3", tmp_path / "llama3", config=older), "llama3")


def test_heads_that_are_tied(tmp_path: Path) -> None:
    """Without a head in the file, or with the embedding there again."""

    def drop(tensors: dict[str, np.ndarray]) -> None:
        del tensors["lm_head.weight"]

    def repeat(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    for name, said, change in (
        ("not-said", None, drop),
        ("said", True, drop),
        ("twice", True, repeat),
    ):
        folder = changed(
            "qwen3",
            tmp_path / name,
            config=lambda config, said=said: config.update(tie_word_embeddings=said),
            tensors=change,
        )
        model, _ = pretrained.load(folder, tokenizer=False)
        assert model.decoder.head is None  # type: ignore[attr-defined]
        assert model.decoder.output_head() is model.decoder.embedding  # type: ignore[attr-defined]
    folder = changed(
        "qwen3", tmp_path / "other", config=lambda c: c.update(tie_word_embeddings=True)
    )
    with pytest.raises(ValueError, match=r"`lm_head.weight`: it differs from the embedding"):
        pretrained.load(folder, tokenizer=False)


def test_shards_in_any_order(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(FOLDER / "qwen3")))
    tensors = tensors_of(FOLDER / "qwen3")
    names = sorted(tensors, key=lambda name: hash(name) % 97)
    files = {name: f"part-{index % 3}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    same_logits(folder, "qwen3")  # without an index: all files
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same_logits(folder, "qwen3")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_stay_as_they_are(dtype: str, tmp_path: Path) -> None:
    narrow = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]

    def cast(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: x.astype(narrow) for name, x in tensors.items()})

    folder = changed(
        "mimo", tmp_path / dtype, config=lambda c: c.update(torch_dtype=dtype), tensors=cast
    )
    model, _ = pretrained.load(folder)
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    assert {str(x.dtype) for x in arrays} == {dtype}
    assert model.decoder.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")  # type: ignore[attr-defined]
    wide, _ = pretrained.load(folder, dtype="float32", compute_dtype="float32")
    assert {str(x.dtype) for x in jax.tree.leaves(eqx.filter(wide, eqx.is_array))} == {"float32"}
    numbers = reference("mimo")
    batch = emtp.make_batch(numbers["tokens"])
    losses = [
        run_model(one, batch).mtp.losses.mean
        for one in (model, wide, pretrained.load(FOLDER / "mimo")[0])
    ]
    np.testing.assert_allclose(losses[1], losses[2], atol=0.05)
    np.testing.assert_allclose(losses[0], losses[2], atol=0.1)
    # Greedy decoding of narrow weights is that of a whole pass with them.
    tokens = speculative.generate(wide, numbers["prompt"], max_new_tokens=16, num_drafts=2).tokens
    best = logits_of(wide.decoder, np.asarray(tokens)).argmax(-1)
    np.testing.assert_array_equal(best[:, 6:-1], tokens[:, 7:])


def test_weights_of_8_bits_are_dequantized() -> None:
    folder = CheckpointFolder(FOLDER / "fp8")
    with np.load(FOLDER / "fp8" / "dequantized.npz") as stored:
        expected = {name: x for name, x in stored.items() if name.endswith(".weight")}
    assert len(expected) == 11
    for name, values in expected.items():
        assert folder.is_quantized(name)
        np.testing.assert_array_equal(folder.view(name), values)


def test_weights_of_8_bits_become_those_of_the_configuration(tmp_path: Path) -> None:
    scale = np.float32(0.0371)
    name = "model.layers.1.mlp.up_proj.weight"
    blocks = (3, 2)  # of 32 × 32 in 96 × 64

    def quantize(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = (tensors[name] / scale).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = np.full(blocks, scale, np.float32)

    def config(config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}

    folder = tmp_path / "fp8"
    changed("llama3", folder, config=config)
    tensors = tensors_of(folder)
    quantize(tensors)
    from equinox_mtp.pretrained._write import StoredTensor, write_file

    (folder / "model.safetensors").unlink()
    write_file(
        folder / "model.safetensors",
        [StoredTensor(n, x.dtype, x.shape, lambda x=x: x) for n, x in tensors.items()],
    )
    model, _ = pretrained.load(folder, tokenizer=False)
    layers: Any = model.decoder.layers  # type: ignore[attr-defined]
    assert layers.feed_forward.up.kernel.dtype == jnp.float32
    expected = tensors[name].astype(np.float32) * scale
    np.testing.assert_array_equal(layers.feed_forward.up.kernel[1], expected.T)


def test_a_model_of_weights_of_8_bits() -> None:
    model, _ = pretrained.load(FOLDER / "fp8", dtype="float32", compute_dtype="float32")
    with np.load(FOLDER / "fp8" / "dequantized.npz") as stored:
        ids, expected = stored["input_ids"], stored["logits"]
    close(logits_of(model.decoder, ids), expected)
    # The weights were made for bfloat16, the bias of the router for float32.
    narrow, _ = pretrained.load(FOLDER / "fp8")
    mixture = narrow.block.layers.transformer_layer.feed_forward  # type: ignore[union-attr]
    assert mixture.experts.up.dtype == jnp.bfloat16
    assert mixture.router.bias.dtype == jnp.float32
    assert narrow.decoder.dtype == "bfloat16"  # type: ignore[attr-defined]


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    def config(config: dict[str, Any]) -> None:
        del config["sliding_window"], config["max_window_layers"]
        config.update(use_sliding_window=True)

    decoder: Any = pretrained.load(changed("qwen3", tmp_path / "no", config=config))[0].decoder
    assert decoder.layers.attention.window is None  # from layer 28 on
    both = changed(
        "qwen3",
        tmp_path / "both",
        config=lambda c: c.update(
            rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"}
        ),
    )
    decoder = pretrained.load(both)[0].decoder
    assert decoder.layers.attention.rotary.scaling == nn.LinearScaling(2.0)


def test_windows(tmp_path: Path) -> None:
    """By the last layers of Qwen2, or by `layer_types`."""
    for name, config in (
        ("flag", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        (
            "types",
            {
                "sliding_window": 5,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            },
        ),
    ):
        folder = changed("qwen3", tmp_path / name, config=lambda c, new=config: c.update(new))
        decoder: Any = pretrained.load(folder, tokenizer=False)[0].decoder
        assert [decoder.layer(i).attention.window for i in range(3)] == [None, 5, 5]
        assert [run.num_layers for run in decoder.layers] == [1, 2]
        stored = tensors_of(FOLDER / "qwen3")["model.layers.2.self_attn.k_proj.weight"]
        kernel = decoder.layer(2).attention.key_kernel
        np.testing.assert_array_equal(kernel.reshape(64, 48).T, stored)


def test_rotary_embeddings_of_a_configuration() -> None:
    from equinox_mtp.pretrained._settings import Settings

    def rotary(**config: Any) -> nn.Rotary:
        sizes = {"hidden_size": 64, "num_attention_heads": 4}
        return Settings({**sizes, **config}, Path("config.json")).rotary()

    assert rotary() == nn.Rotary()
    assert rotary(rope_theta=5, partial_rotary_factor=0.5) == nn.Rotary(5.0, size=8)
    assert rotary(rope_scaling={"type": "linear", "factor": 2}).scaling == nn.LinearScaling(2.0)
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64}
    assert rotary(rope_scaling=yarn).scaling == nn.YarnScaling(40.0, 64)
    # DeepSeek's two scales cancel here: sine and cosine stay as they are.
    equal = {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}
    scaling: Any = rotary(rope_scaling=equal).scaling
    assert scaling == nn.YarnScaling(40.0, 64, mscale=1.0, mscale_all_dim=1.0)
    assert scaling.amplitude == 1.0


# Fresh depths


@pytest.mark.slow
def test_fresh_depths(tmp_path: Path) -> None:
    key = jax.random.key(0)
    model, tokenizer = pretrained.load(FOLDER / "qwen3", num_depths=3, preset="fast_mtp", key=key)
    assert tokenizer is not None
    assert model.block.config == emtp.MTPConfig.preset("fast_mtp", 3)
    numbers = reference("qwen3")
    layer: Any = model.block.layer(1)
    assert layer.transformer_layer.attention.query_norm is not None
    assert layer.transformer_layer.attention.rotary == nn.Rotary(1_000_000.0)
    generation = speculative.generate(model, numbers["prompt"], max_new_tokens=16, num_drafts=1)
    np.testing.assert_array_equal(generation.tokens[:, :23], numbers["greedy"])
    # In place of a folder's own; and none.
    fresh, _ = pretrained.load(FOLDER / "mimo", num_depths=2, key=key)
    assert fresh.block.config == emtp.MTPConfig.preset("deepseek_v3", 2)
    none, _ = pretrained.load(FOLDER / "mimo", num_depths=0)
    assert none.block.layers is None
    again, _ = pretrained.load(FOLDER / "mimo", num_depths=2, key=key, dtype="bfloat16")
    arrays = jax.tree.leaves(eqx.filter(again, eqx.is_array))
    assert {x.dtype for x in arrays} == {jnp.dtype("bfloat16")}


def test_a_head_for_other_numbers_of_drafts() -> None:
    model, _ = pretrained.load(FOLDER / "fastmtp", num_depths=5, verifier=FOLDER / "qwen3")
    assert model.block.config.num_depths == 5
    alone, _ = pretrained.load(FOLDER / "fastmtp", num_depths=0, tokenizer=False)
    assert alone.block.layers is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mimo", {"preset": "fast_mtp"}, r"`preset` is for fresh depths.*got 'fast_mtp' and None"),
        ("qwen3", {"preset": "paper", "num_depths": 0}, r"`preset` is for fresh depths"),
        ("qwen3", {"verifier": FOLDER / "llama3"}, r"`verifier` is for the folder of a FastMTP"),
    ],
)
def test_options_that_would_do_nothing_or_too_much(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained.load(FOLDER / name, key=jax.random.key(0), **options)


def test_arrays_are_not_committed_to_a_device() -> None:
    """So a training step is compiled once: an optimizer's new state is not committed either."""
    for options in ({}, {"num_depths": 1, "key": jax.random.key(0)}):
        model, _ = pretrained.load(FOLDER / "mimo", tokenizer=False, **options)
        arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
        assert not [x.shape for x in arrays if x.committed]
