"""Models written in released layouts: bit for bit, or refused."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FOLDER, changed, config_of, tensors_of
from golden import quick_jit

import equinox_mtp as emtp
from equinox_mtp import MTPConfig, nn, pretrained

KEY = jax.random.key(0)


def load(name: str | Path, **options: Any) -> emtp.MTPModel:
    return pretrained.load(FOLDER / name, **options)[0]


def assert_same_tensors(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype
        assert x.tobytes() == other[name].tobytes(), name


def losses(model: emtp.MTPModel) -> list[float]:
    tokens = np.random.default_rng(0).integers(0, 256, (2, 13))
    output = quick_jit(lambda model: model(emtp.make_batch(tokens)))(model)
    return [float(output.main.mean), *output.mtp.losses.mean.tolist()]


@pytest.mark.parametrize("max_bytes", [5_000_000_000, 100_000])
@pytest.mark.parametrize(
    "name",
    [
        *("qwen3", "llama3", "mimo", "qwen3_moe", "glm4_moe"),
        *("deepseek_v3", "qwen3_5", "qwen3_next"),
    ],
)
def test_a_round_trip_gives_every_tensor_back(name: str, max_bytes: int, tmp_path: Path) -> None:
    model = load(name)
    pretrained.save(tmp_path / "out", model, layout=FOLDER / name, max_shard_bytes=max_bytes)
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(FOLDER / name))
    assert config_of(tmp_path / "out") == config_of(FOLDER / name)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (max_bytes < 1_000_000)
    assert all(path.stat().st_size < max_bytes + 10_000 for path in files)
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        sizes = [x.nbytes for x in tensors_of(FOLDER / name).values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        assert set(index["weight_map"].values()) == {path.name for path in files}
    again, tokenizer = pretrained.load(tmp_path / "out")
    assert eqx.tree_equal(again, model)
    assert (tokenizer is not None) == (FOLDER / name / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next"])
def test_hybrid_layers_in_a_folder_of_their_own(name: str, tmp_path: Path) -> None:
    """Without a source, of which the configuration would be taken."""
    model = load(name)
    pretrained.save(tmp_path / "out", model, layout=name)
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(FOLDER / name))
    assert eqx.tree_equal(load(tmp_path / "out"), model)
    written, stored = config_of(tmp_path / "out"), config_of(FOLDER / name)
    same = set(written) & set(stored) - {
        *("rope_parameters", "max_position_embeddings", "intermediate_size"),
    }
    assert {n: written[n] for n in same} == {n: stored[n] for n in same}
    # One layer that is repeated is noted; two different ones have no place.
    twice = load(name, num_depths=2, preset="megatron", key=KEY)
    with pytest.raises(ValueError, match="holds one layer, which is repeated"):
        pretrained.save(tmp_path / "two", twice, layout=name)
    with pytest.raises(ValueError, match=r"'transformers' is for models of .* has a GatedDelta"):
        pretrained.save(tmp_path / "other", twice, layout="transformers")
    dense = load("qwen3", num_depths=1, preset="megatron", key=KEY)
    with pytest.raises(ValueError, match="`model` must have a layer with a GatedDeltaNet"):
        pretrained.save(tmp_path / "dense", dense, layout=name)


def test_a_round_trip_of_narrow_weights_in_a_family_of_its_own(tmp_path: Path) -> None:
    def narrow(tensors: dict[str, np.ndarray]) -> None:
        cast = {n: np.asarray(jnp.asarray(x, jnp.bfloat16)) for n, x in tensors.items()}
        tensors.update(cast)

    folder = changed(
        "qwen3", tmp_path / "in", config=lambda c: c.update(torch_dtype="bfloat16"), tensors=narrow
    )
    pretrained.save(tmp_path / "out", load(folder), layout="qwen3")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(folder))
    written, stored = config_of(tmp_path / "out"), config_of(folder)
    same = set(stored) - {
        *("initializer_range", "attention_dropout", "max_window_layers", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_sliding_window", "sliding_window"),
        "max_position_embeddings",
    }
    assert {name: written[name] for name in same} == {name: stored[name] for name in same}


def test_a_head_alone(tmp_path: Path) -> None:
    model = load("fastmtp")
    pretrained.save(tmp_path / "head", model, layout="speculators", source=FOLDER / "qwen3")
    assert_same_tensors(tensors_of(tmp_path / "head"), tensors_of(FOLDER / "fastmtp"))
    written, stored = config_of(tmp_path / "head"), config_of(FOLDER / "fastmtp")
    assert written.keys() == stored.keys()
    ours, theirs = (c.pop("transformer_layer_config") for c in (written, stored))
    assert {n: theirs[n] for n in ours.keys() & theirs.keys()} == {
        n: ours[n] for n in ours.keys() & theirs.keys()
    }
    verifier = written["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == str((FOLDER / "qwen3").resolve())
    verifier["name_or_path"] = "qwen3"
    assert written == stored
    # The folder of the model is found by its path.
    again, _ = pretrained.load(tmp_path / "head", tokenizer=False)
    assert eqx.tree_equal(again, model)


@pytest.mark.parametrize("layout", ["transformers", "stitched"])
@pytest.mark.parametrize("num_depths", [1, 2])
@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen3_moe"])
def test_depths_as_transformers_has_them(
    name: str, num_depths: int, layout: str, tmp_path: Path
) -> None:
    model = load(name, num_depths=num_depths, preset="megatron", key=KEY)
    before = tensors_of(FOLDER / name)
    pretrained.save(tmp_path / "out", model, layout=layout, source=FOLDER / name)
    written, config = tensors_of(tmp_path / "out"), config_of(tmp_path / "out")
    assert_same_tensors({n: written[n] for n in before}, before)
    assert config["num_mtp_layers"] == num_depths
    assert ("mtp_layer_types" in config) == (name != "llama3")
    expert = "experts.1." if name == "qwen3_moe" else ""
    added = set(written) - set(before)
    if num_depths == 1:
        assert {n for n in added if "layers" not in n} == {
            f"mtp.{part}.weight"
            for part in ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        }
        kernel = written[f"mtp.layers.0.mlp.{expert}up_proj.weight"]
    else:
        assert written["model.layers.4.eh_proj.weight"].shape == (64, 128)
        assert "model.layers.3.shared_head.norm.weight" in added
        kernel = written[f"model.layers.3.mlp.{expert}up_proj.weight"]
    layer: Any = model.block.layer(1)
    feed_forward = layer.transformer_layer.feed_forward
    up = feed_forward.experts.up[1] if expert else feed_forward.up.kernel
    np.testing.assert_array_equal(kernel, up.T)
    again, _ = pretrained.load(tmp_path / "out")
    assert eqx.tree_equal(again, model)
    if layout == "stitched":
        # No second copy of the main model on the disk, and the first is as it was.
        source, target = FOLDER / name / "model.safetensors", tmp_path / "out"
        linked = [path for path in target.iterdir() if os.path.samefile(path, source)]
        assert len(linked) == 1 or os.stat(source).st_dev != os.stat(target).st_dev
        assert not (target / "model.safetensors").exists()
        assert_same_tensors(tensors_of(FOLDER / name), before)
    # A folder with depths may lend its main model alone.
    assert load(tmp_path / "out", num_depths=0).block.layers is None
    pretrained.save(tmp_path / "again", again, layout=tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "again"), written)


CONVENTIONS = {
    "hidden_first": MTPConfig.preset("megatron", 2, concat_order="hidden_first"),
    "shared_norm": MTPConfig.preset("megatron", 2, output_norm="shared"),
    "repeated": MTPConfig.preset("megatron", 2, repeated_layer=True),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions_that_a_layout_says_in_another_way(name: str, tmp_path: Path) -> None:
    """The model that comes back computes the same."""
    base = load("llama3")
    decoder: Any = base.decoder
    settings = nn.TransformerConfig(
        vocab_size=320, embed_size=64, num_layers=3, num_heads=4, num_kv_heads=2, mlp_size=96
    )
    block = emtp.MultiTokenPredictionBlock(
        CONVENTIONS[name],
        lambda key: nn.TransformerDecoderLayer(settings, key=key),
        embed_size=64,
        key=KEY,
    )
    # As the layers of this decoder, whose rotary embedding the layout has once.
    layers: Any = eqx.tree_at(
        lambda x: x.transformer_layer.attention,
        block.layers,
        replace_fn=lambda a: _with_rotary(a, decoder.layer(0).attention.rotary),
    )
    model = emtp.MTPModel(decoder, eqx.tree_at(lambda b: b.layers, block, layers))
    pretrained.save(tmp_path / "out", model, layout="transformers", source=FOLDER / "llama3")
    again, _ = pretrained.load(tmp_path / "out")
    assert again.block.config == MTPConfig.preset("megatron", 2)
    np.testing.assert_allclose(losses(again), losses(model), rtol=1e-5)


def _with_rotary(attention: Any, rotary: nn.Rotary) -> Any:
    fields = {name: getattr(attention, name) for name in attention.__dataclass_fields__}
    return emtp._types.module_of(type(attention), **{**fields, "rotary": rotary})  # type: ignore[attr-defined]


def test_a_model_without_biases_in_mimos_layout(tmp_path: Path) -> None:
    """Its readers have biases: they are 0. What the layout does not tell is kept for `load`."""
    model = load("llama3", num_depths=3, preset="fast_mtp", key=KEY)
    pretrained.save(tmp_path / "out", model, layout="mimo")
    config, written = config_of(tmp_path / "out"), tensors_of(tmp_path / "out")
    assert config["architectures"] == ["MiMoForCausalLM"]
    assert config["model_type"] == "mimo"
    assert config["num_nextn_predict_layers"] == 1
    assert not written["model.layers.1.self_attn.q_proj.bias"].any()
    assert not written["model.mtp_layers.0.self_attn.k_proj.bias"].any()
    # Columns 0 … 63 act on the hidden state, in this preset too.
    layer: Any = model.block.layer(1)
    stored = written["model.mtp_layers.0.input_proj.weight"]
    np.testing.assert_array_equal(stored, layer.projection_layer.kernel.T)
    again = load(tmp_path / "out")
    assert again.block.config == model.block.config
    np.testing.assert_allclose(losses(again), losses(model), rtol=1e-5)


def test_embedding_first_changes_places_in_mimos_layout(tmp_path: Path) -> None:
    model = load("llama3", num_depths=1, preset="deepseek_v3", key=KEY)
    pretrained.save(tmp_path / "out", model, layout="mimo")
    layer: Any = model.block.layer(1)
    kernel = np.asarray(layer.projection_layer.kernel)
    stored = tensors_of(tmp_path / "out")["model.mtp_layers.0.input_proj.weight"].T
    np.testing.assert_array_equal(stored, np.concatenate([kernel[64:], kernel[:64]]))
    again = load(tmp_path / "out")
    assert again.block.config.concat_order == "hidden_first"
    np.testing.assert_allclose(losses(again), losses(model), rtol=1e-5)


def test_rotary_scaling_and_windows_are_written(tmp_path: Path) -> None:
    def config(config: dict[str, Any]) -> None:
        config.update(use_sliding_window=True, sliding_window=5, max_window_layers=1)
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}

    folder = changed("qwen3", tmp_path / "in", config=config)
    model = load(folder)
    pretrained.save(tmp_path / "out", model, layout="qwen3", source=folder)
    again = load(tmp_path / "out")
    assert [again.decoder.layer(i).attention.window for i in range(3)] == [None, 5, 5]  # type: ignore[attr-defined]
    np.testing.assert_allclose(losses(again), losses(model), rtol=1e-6)
    pretrained.save(tmp_path / "like", model, layout=folder)
    assert eqx.tree_equal(load(tmp_path / "like"), model)


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("llama3", "llama", {}),
        ("llama3", "mimo", {"num_depths": 2, "preset": "fast_mtp"}),
        ("llama3", "transformers", {"num_depths": 1, "preset": "megatron"}),
        ("qwen3", "stitched", {"num_depths": 1, "preset": "megatron"}),
        ("qwen3", None, {}),
        ("fastmtp", "speculators", {}),
    ],
)
def test_the_compute_dtype_is_kept(
    name: str, layout: str | None, options: dict[str, Any], tmp_path: Path
) -> None:
    """As a note in config.json, where its other keys imply another one."""
    options = {**options, "key": KEY} if options else {}
    source = FOLDER / ("qwen3" if name == "fastmtp" else name)
    for dtype, noted in (("bfloat16", {"compute_dtype": "bfloat16"}), ("float32", {})):
        model: Any = load(name, compute_dtype=dtype, **options)
        out = tmp_path / dtype
        pretrained.save(out, model, layout=layout, source=source)
        hints = config_of(out).get("equinox_mtp", {})
        assert {n: x for n, x in hints.items() if n == "compute_dtype"} == noted
        again: Any = load(out)
        assert again.decoder.dtype == dtype
        assert again.block.config == model.block.config
        assert load(out, compute_dtype="float32").decoder.dtype == "float32"  # type: ignore[attr-defined]
    if layout is None:
        # A note that no longer holds is gone.
        pretrained.save(tmp_path / "new", load(name), source=tmp_path / "bfloat16")
        assert "equinox_mtp" not in config_of(tmp_path / "new")


def test_a_note_in_a_nested_configuration(tmp_path: Path) -> None:
    def nest(config: dict[str, Any]) -> None:
        names = [name for name in config if name != "architectures"]
        config["text_config"] = {name: config.pop(name) for name in names}

    folder = changed("llama3", tmp_path / "in", config=nest)
    pretrained.save(tmp_path / "out", load(folder, compute_dtype="bfloat16"), layout=folder)
    again: Any = load(tmp_path / "out")
    assert again.decoder.dtype == "bfloat16"
    pretrained.save(tmp_path / "new", load(folder), layout=tmp_path / "out")
    assert config_of(tmp_path / "new") == config_of(folder)


def refused(message: str, tmp_path: Path, model: emtp.MTPModel, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained.save(tmp_path / "refused", model, **options)
    assert not (tmp_path / "refused").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_a_layout_cannot_hold(tmp_path: Path) -> None:
    qwen, llama = load("qwen3"), load("llama3")
    for layout in ("llama", "mimo"):
        refused("has no tensor for `attention.query_norm.scale`", tmp_path, qwen, layout=layout)
    refused("is of prediction depths", tmp_path, llama, layout="transformers")
    refused("`layout` must be 'llama'", tmp_path, llama, layout="gguf")
    refused("`layout` must be given", tmp_path, llama)
    fresh = load("llama3", num_depths=2, key=KEY)
    refused("no place for prediction depths", tmp_path, fresh, layout="llama")
    refused("`carried_hidden_state='after_norm'`", tmp_path, fresh, layout="transformers")
    decoder: Any = fresh.decoder
    for changes, message in (
        ({"carried_hidden_state": "before_norm"}, "`carried_hidden_state='after_norm'`"),
        ({"repeated_layer": False}, "holds one layer, which is repeated"),
    ):
        config = dataclasses.replace(MTPConfig.preset("fast_mtp", 2), **changes)
        block = emtp.MultiTokenPredictionBlock(
            config, lambda key: decoder.layer(0), embed_size=64, key=KEY
        )
        model = emtp.MTPModel(decoder, block)
        refused(message, tmp_path, model, layout="speculators")
    paper = load("llama3", num_depths=1, preset="paper", key=KEY)
    refused("`input_hidden_state='after_norm'`", tmp_path, paper, layout="transformers")
    one = load("llama3", num_depths=1, preset="megatron", key=KEY)
    refused("`source` must be given", tmp_path, one, layout="stitched")
    pretrained.save(tmp_path / "out", one, layout="transformers")
    source = tmp_path / "out"
    refused("has depths already", tmp_path, one, layout="stitched", source=source)


def test_numbers_that_are_not_of_floating_point_are_refused(tmp_path: Path) -> None:
    model: Any = load("llama3")
    for dtype in ("int8", "complex64"):
        spoilt = eqx.tree_at(lambda m: m.decoder.norm.scale, model, jnp.ones(64, dtype))
        message = f"of floating point for a released layout; got {dtype} at `norm.scale`"
        refused(message, tmp_path, spoilt, layout="llama")


def with_layers(model: emtp.MTPModel, change: Any, *, of_depths: bool = False) -> emtp.MTPModel:
    """A model with other settings in its attention."""

    def replaced(attention: Any) -> Any:
        fields = {name: getattr(attention, name) for name in attention.__dataclass_fields__}
        return emtp._types.module_of(type(attention), **{**fields, **change})  # type: ignore[attr-defined]

    where = (
        (lambda m: m.block.layers.transformer_layer.attention)
        if of_depths
        else (lambda m: m.decoder.layers.attention)
    )
    return eqx.tree_at(where, model, replace_fn=replaced)


@pytest.mark.parametrize("of_depths", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"scale": 1.0},
        {"rotary": nn.Rotary(1e6, interleaved=True)},
        {"rotary": nn.Rotary(1e6, size=8)},
        {"window": 3},
    ],
    ids=["scale", "interleaved", "partial", "window"],
)
def test_what_no_configuration_says_is_refused(
    change: dict[str, Any], of_depths: bool, tmp_path: Path
) -> None:
    """The folder would be read as another model."""
    model = load("qwen3", num_depths=1, preset="megatron", key=KEY)
    changed_model = with_layers(model, change, of_depths=of_depths)
    if "window" in change:
        # This the layout has, of both.
        pretrained.save(tmp_path / "out", changed_model, layout="transformers")
        again: Any = load(tmp_path / "out")
        assert again.decoder.layer(0).attention.window == (None if of_depths else 3)
        assert again.block.layers.transformer_layer.attention.window == (3 if of_depths else None)
        return
    refused("cannot hold `model`|partial_rotary", tmp_path, changed_model, layout="transformers")


def test_a_folders_own_layout_says_what_the_model_is(tmp_path: Path) -> None:
    """Not what the folder's model was: depths, a head that is tied, the dtype."""
    model = load("mimo", num_depths=2, preset="megatron", key=KEY)
    pretrained.save(tmp_path / "depths", model, layout=FOLDER / "mimo")
    assert config_of(tmp_path / "depths")["num_nextn_predict_layers"] == 2
    again = load(tmp_path / "depths")
    np.testing.assert_allclose(losses(again), losses(model), rtol=1e-5)
    qwen: Any = load("qwen3")
    tied = emtp.MTPModel(eqx.tree_at(lambda d: d.head, qwen.decoder, None), qwen.block)
    pretrained.save(tmp_path / "tied", tied, layout=FOLDER / "qwen3")
    assert load(tmp_path / "tied").decoder.head is None  # type: ignore[attr-defined]
    pretrained.save(tmp_path / "low", load("qwen3", dtype="bfloat16"), layout=FOLDER / "qwen3")
    assert config_of(tmp_path / "low")["torch_dtype"] == "bfloat16"
    other = load("llama3", num_depths=1, preset="megatron", key=KEY)
    refused("cannot hold", tmp_path, other, layout=FOLDER / "mimo")


def test_depths_of_another_family_are_not_stitched(tmp_path: Path) -> None:
    model = load("qwen3", num_depths=1, preset="megatron", key=KEY)
    refused("cannot hold", tmp_path, model, layout="stitched", source=FOLDER / "llama3")


def test_a_folder_of_fewer_layers_is_no_layout_of_this_model(tmp_path: Path) -> None:
    other: Any = load("llama3").decoder
    layers = [other.layer(index) for index in range(2)]
    parts = {"embedding": other.embedding, "norm": other.norm, "head": other.head}
    smaller = emtp.MTPModel(nn.TransformerDecoder.of(layers, **parts), load("llama3").block)
    refused("It has 2 layers, not 3", tmp_path, smaller, layout=FOLDER / "llama3")


def test_stitched_onto_a_folder_that_does_not_say_whether_it_is_tied(tmp_path: Path) -> None:
    folder = changed("llama3", tmp_path / "in", config=lambda c: c.pop("tie_word_embeddings"))
    model = load(folder, num_depths=1, preset="megatron", key=KEY)
    pretrained.save(tmp_path / "out", model, layout="stitched", source=folder)
    assert eqx.tree_equal(load(tmp_path / "out"), model)


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    model = load("llama3")
    (tmp_path / "taken").mkdir()
    pretrained.save(tmp_path / "taken", model, layout="llama")  # it was empty
    with pytest.raises(FileExistsError, match="exists, and is not empty"):
        pretrained.save(tmp_path / "taken", model, layout="llama")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="is a link"):
        pretrained.save(tmp_path / "link", model, layout="llama")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        pretrained.save(tmp_path / "no" / "out", model, layout="llama")


def test_nothing_is_left_of_a_save_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *args: Any) -> None:
        path.write_bytes(b"a part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("equinox_mtp.pretrained._write.write_file", full)
    with pytest.raises(OSError, match="No space left"):
        pretrained.save(tmp_path / "out", load("llama3"), layout="llama")
    assert list(tmp_path.iterdir()) == []


# A new family, from its table to its round trip


def test_a_new_family(tmp_path: Path) -> None:
    """As `_tables.py` shows: other names, and a feed-forward network of experts."""
    from equinox_mtp.pretrained import FAMILIES, Family, Kernel, Tensor, _dense

    class Experts(nn.AbstractFeedForward):
        up: jax.Array
        down: jax.Array

        def __call__(self, x: Any) -> Any:
            hidden = jax.nn.relu(jnp.einsum("bse,nem->nbsm", x, self.up))
            return jnp.einsum("nbsm,nme->bse", hidden, self.down)

    def make_layer(settings: Any, index: int, names: Any, *, key: Any) -> Any:
        layer: Any = _dense.LLAMA.make_layer(settings, index, names, key=key)
        experts, embed = settings.integer("num_experts"), settings.integer("hidden_size")
        return nn.TransformerDecoderLayer.of(
            layer.attention,
            Experts(jnp.zeros((experts, embed, 5)), jnp.zeros((experts, 5, embed))),
            attention_norm=layer.attention_norm,
            feed_forward_norm=layer.feed_forward_norm,
        )

    attention = {n: t for n, t in _dense.LLAMA.layer.items() if not n.startswith("feed_forward.")}
    family = Family(
        name="experts",
        architectures=("ExpertsForCausalLM",),
        make_layer=make_layer,
        config_of=lambda decoder: {},
        layer={
            **attention,
            "feed_forward.up": Tensor("mlp.experts.{expert}.up.weight", Kernel()),
            "feed_forward.down": Tensor("mlp.experts.{expert}.down.weight", Kernel()),
        },
    )
    families = (family, *FAMILIES)
    rng = np.random.default_rng(0)

    def tensors(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            del tensors[name]
        for layer in range(3):
            for expert in range(4):
                start = f"model.layers.{layer}.mlp.experts.{expert}"
                tensors[f"{start}.up.weight"] = rng.normal(size=(5, 64)).astype(np.float32)
                tensors[f"{start}.down.weight"] = rng.normal(size=(64, 5)).astype(np.float32)

    def config(config: dict[str, Any]) -> None:
        config.update(architectures=["ExpertsForCausalLM"], num_experts=4)

    folder = changed("llama3", tmp_path / "in", config=config, tensors=tensors)
    model = load(folder, families=families)
    stored = tensors_of(folder)
    up: Any = model.decoder.layers.feed_forward.up  # type: ignore[attr-defined]
    assert up.shape == (3, 4, 64, 5)
    np.testing.assert_array_equal(up[2, 1].T, stored["model.layers.2.mlp.experts.1.up.weight"])
    pretrained.save(tmp_path / "out", model, layout=folder, families=families)
    assert_same_tensors(tensors_of(tmp_path / "out"), stored)
