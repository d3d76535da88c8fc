"""Runs over architectures of configurations: experts, latent attention, gated delta layers."""

import dataclasses
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal

import equinox_mtp as emtp
from equinox_mtp import nn, pretrained
from equinox_mtp.__main__ import main
from equinox_mtp.training import PackedRows, TrainConfig, load_corpus, load_model, train
from equinox_mtp.training._architecture import differences, read_architecture
from equinox_mtp.training._config import without_output
from equinox_mtp.training._placement import ONE_DEVICE
from equinox_mtp.training._routers import Auxiliary, TokenCounts
from equinox_mtp.training._step import (
    StepInputs,
    aligned_batch,
    make_optimizer,
    make_state,
    train_step,
)

EXPERTS, DEPTHS, RATE = 4, 2, 0.01
TINY: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("architecture")
    (root / "config.json").write_text(json.dumps(TINY))
    (root / "text").mkdir()
    for index in range(6):
        words = np.random.default_rng(index).choice(["to", "be", "or", "not", "sea"], 60)
        (root / "text" / f"{index}.txt").write_text(" ".join(words))
    return TrainConfig(
        data=(root / "text",),
        architecture=root / "config.json",
        depths=DEPTHS,
        steps=4,
        warmup_steps=1,
        batch_size=8,
        seq_len=16,
        balance_loss=0.02,
        router_z_loss=0.01,
        router_bias_rate=RATE,
        eval_rows=8,
        eval_every=4,
        checkpoint_every=2,
        compare_prompts=0,
        out=root / "run",
    )


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> Path:
    return train(config)


def train_records(out: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["split"] == "train"]


def losses(out: Path) -> list[list[float]]:
    return [[x["main_loss"], *x["mtp_losses"]] for x in train_records(out)]


def step_inputs(config: TrainConfig) -> tuple[StepInputs, Any]:
    """What the first step of a run reads, and the state before it."""
    corpus = load_corpus(config.data)
    indices = np.arange(config.batch_size).reshape(config.accumulate, -1)
    rows = ONE_DEVICE.load(PackedRows(corpus, config.seq_len), indices)
    optimizer = make_optimizer(config)
    architecture = read_architecture(config, corpus.vocab_size)
    assert architecture is not None
    options = without_output(config)
    state = make_state(
        options, corpus.vocab_size, optimizer, ONE_DEVICE, architecture=architecture.json
    )
    return StepInputs(rows, options, optimizer, ONE_DEVICE), state


@pytest.mark.slow
def test_run_is_read_back(config: TrainConfig, run: Path) -> None:
    model, info = load_model(run)
    assert json.loads(str(info.architecture)) == {"vocab_size": 257, **TINY}
    layers: Any = model.decoder
    assert isinstance(layers.layer(0).attention, nn.MultiHeadLatentAttention)
    assert isinstance(layers.layer(1).feed_forward, nn.MixtureOfExperts)
    assert model.block.config == emtp.MTPConfig.preset("deepseek_v3", DEPTHS)
    shutil.move(str(config.architecture), f"{config.architecture}.moved")
    try:
        load_model(run)
    finally:
        shutil.move(f"{config.architecture}.moved", str(config.architecture))


@pytest.mark.slow
def test_routers_are_reported(run: Path) -> None:
    num_routers = 1 + DEPTHS
    for record in train_records(run):
        assert len(record["router_max_load"]) == num_routers
        assert all(1 <= x <= EXPERTS for x in record["router_max_load"])
        # Of a uniform choice it is 1; random routers are not far from it.
        assert all(0.7 < x < 2 for x in record["router_balance_loss"])
        assert all(x > 0 for x in record["router_z_loss"])
    assert (run / "curves.png").is_file()


@pytest.fixture(scope="module")
def first_step(config: TrainConfig) -> tuple[Any, Any]:
    """The state after it, and its metrics."""
    return train_step(*step_inputs(config))


@pytest.mark.slow
def test_biases_follow_loads(config: TrainConfig, first_step: tuple[Any, Any]) -> None:
    """After a step each bias is up or down by the rate, as its expert had less or more to do."""
    inputs, state = step_inputs(config)
    before, after = state.model, first_step[0].model
    batch = aligned_batch(jax.tree.map(lambda x: x[0], inputs.rows), DEPTHS)
    output = eqx.filter_jit(before)(batch)
    found = (
        (output.auxiliary.load, after.decoder.layers[1].layers.feed_forward.router.bias),
        (output.mtp.auxiliary.load, after.block.layers.transformer_layer.feed_forward.router.bias),
    )
    for load, bias in found:
        load = np.asarray(load)
        expected = RATE * np.sign(load.mean(axis=-1, keepdims=True) - load)
        assert_close(bias, expected)
        assert np.any(expected != 0)


def test_router_losses() -> None:
    """By hand: each layer's losses, over the rows and tokens of all microbatches."""
    rng = np.random.default_rng(0)

    def statistics(layers: int) -> nn.RouterStatistics:
        vectors, scalars = rng.uniform(1, 9, (2, layers, EXPERTS)), rng.uniform(1, 9, (4, layers))
        return nn.RouterStatistics(
            *map(partial(jnp.asarray, dtype=jnp.float32), vectors),
            *(jnp.asarray(x, jnp.float32) for x in scalars),
        )

    found = Auxiliary((statistics(1), statistics(2)), (statistics(DEPTHS),))
    depths = jnp.asarray([40.0, 30.0]), jnp.asarray([4.0, 3.0])
    counts = TokenCounts(jnp.float32(50), jnp.float32(4), *depths)
    config = TrainConfig(balance_loss=0.5, router_z_loss=0.25)
    expected = sum(
        0.5 * float(s.sequence_balance_losses[i]) / rows + 0.25 * float(s.z_losses[i]) / tokens
        for s, i, rows, tokens in (
            *((found.main[0], 0, 4, 50), (found.main[1], 0, 4, 50), (found.main[1], 1, 4, 50)),
            *((found.depths[0], 0, 4, 40), (found.depths[0], 1, 3, 30)),
        )
    )
    assert_close(found.loss(config, counts), expected)


@pytest.fixture(scope="module")
def heavy(config: TrainConfig) -> TrainConfig:
    """With routers' losses that weigh more than all others."""
    return dataclasses.replace(config, balance_loss=10.0, router_z_loss=10.0)


@pytest.fixture(scope="module")
def heavy_step(heavy: TrainConfig) -> tuple[Any, Any]:
    return train_step(*step_inputs(heavy))


@pytest.mark.slow
def test_microbatches_have_the_gradient_of_the_batch(
    heavy: TrainConfig, heavy_step: tuple[Any, Any]
) -> None:
    """The routers' losses, too: their counts matter."""
    split_step = train_step(*step_inputs(dataclasses.replace(heavy, accumulate=4)))
    norms = [metrics.grad_norm for _, metrics in (heavy_step, split_step)]
    assert_close(*norms, rtol=1e-4)
    pairs = [
        (eqx.filter(state.model, eqx.is_array), metrics.routers)
        for state, metrics in (heavy_step, split_step)
    ]
    jax.tree.map(partial(assert_close, rtol=1e-3, atol=1e-5), *pairs)


@pytest.mark.slow
def test_losses_of_routers_have_gradients(
    config: TrainConfig, first_step: tuple[Any, Any], heavy_step: tuple[Any, Any]
) -> None:
    """A large weight of one loss, and then of the other, changes what a step does to the routers
    of main model and depths."""
    balanced = train_step(*step_inputs(dataclasses.replace(config, balance_loss=10.0)))
    for one, other in ((balanced, first_step), (heavy_step, balanced)):
        models: list[Any] = [state.model for state, _ in (one, other)]
        for routers in (
            [model.decoder.layers[1].layers.feed_forward.router.kernel for model in models],
            [model.block.layers.transformer_layer.feed_forward.router.kernel for model in models],
        ):
            assert not np.allclose(*routers, atol=1e-5)


@pytest.mark.slow
def test_resumed_run_is_the_same(config: TrainConfig, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "step_00000004")
    train(dataclasses.replace(config, out=out, resume=True))
    assert losses(out) == losses(run)
    trained = [eqx.filter(load_model(path)[0], eqx.is_array) for path in (out, run)]
    jax.tree.map(assert_equal, *trained)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(TINY | {"routed_scaling_factor": 2.0}))
    with pytest.raises(
        ValueError, match=r"`architecture` is not what .* differs in routed_scaling"
    ):
        train(dataclasses.replace(config, out=out, resume=True, architecture=other))


@pytest.mark.slow
def test_experts_on_a_mesh(config: TrainConfig, run: Path, tmp_path: Path) -> None:
    split = train(dataclasses.replace(config, mesh="data=2,expert=4", out=tmp_path / "run"))
    assert_close(losses(split), losses(run), rtol=1e-4)
    for ours, theirs in zip(train_records(split), train_records(run), strict=True):
        assert_close(ours["router_balance_loss"], theirs["router_balance_loss"], rtol=1e-3)


HYBRID: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_conv_kernel_dim": 4,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 8,
    "tie_word_embeddings": True,
}


@pytest.mark.slow
def test_a_hybrid_model(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two stacks of routers without biases: trained on a mesh, and on one device; resumed."""
    (tmp_path / "hybrid.json").write_text(json.dumps(HYBRID))
    hybrid = dataclasses.replace(
        config, architecture=tmp_path / "hybrid.json", router_bias_rate=1e-3, depths=1
    )
    one = train(dataclasses.replace(hybrid, out=tmp_path / "one"))
    split = train(dataclasses.replace(hybrid, mesh="data=2,expert=4", out=tmp_path / "split"))
    assert_close(losses(split), losses(one), rtol=1e-4)
    assert [len(record["router_max_load"]) for record in train_records(one)] == [3] * 4
    shutil.rmtree(one / "checkpoints" / "step_00000004")
    train(dataclasses.replace(hybrid, out=one, resume=True))
    assert_close(losses(split), losses(one), rtol=1e-4)
    prompt = ["--prompt", "to be", "--compare", "--max-new-tokens", "8"]
    main(["generate", "--checkpoint", str(one), *prompt])
    assert "100% of the continuations equal" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"`router_bias_rate` is of the bias .* got 0\.5"):
        train(dataclasses.replace(hybrid, router_bias_rate=0.5, out=tmp_path / "none"))


@pytest.mark.slow
def test_generation_with_drafts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "generate",
            "--checkpoint",
            str(run),
            "--prompt",
            "to be",
            "--compare",
            "--max-new-tokens",
            "8",
        ]
    )
    assert "100% of the continuations equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("dense", {"GroupedQueryAttention", "SwiGLU"}),
        ("deepseek_v3", {"MultiHeadLatentAttention", "SwiGLU", "MixtureOfExperts"}),
        ("hybrid", {"GatedDeltaNet", "GroupedQueryAttention", "MixtureOfExperts"}),
    ],
)
def test_those_that_come_with_the_library(name: str, kinds: set[str]) -> None:
    config = TrainConfig(architecture=Path(name), depths=3, preset="fast_mtp", dtype="bfloat16")
    architecture = read_architecture(config, 300)
    assert architecture is not None
    assert architecture.vocab_size == 300
    model: Any = architecture.shapes
    layers = [model.decoder.layer(index) for index in range(model.decoder.num_layers)]
    assert {
        type(x).__name__ for layer in layers for x in (layer.attention, layer.feed_forward)
    } == kinds
    assert model.decoder.embedding.shape == (300, 128)
    assert (model.decoder.dtype, model.block.config.num_depths) == ("bfloat16", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is no JSON object"),
        ("{", "is no JSON object"),
        (json.dumps({"architectures": ["Mamba"]}), "`architectures` must hold one of"),
        (json.dumps(TINY | {"n_group": 3}), "mine.json: .*group"),
        (json.dumps(TINY | {"hidden_size": None}), "mine.json: `hidden_size` must be an integer"),
        (json.dumps(TINY | {"vocab_size": 100}), r"has 100 token ids .* and the text 257"),
    ],
)
def test_bad_files(config: TrainConfig, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    bad = dataclasses.replace(config, architecture=tmp_path / "mine.json", out=tmp_path / "run")
    with pytest.raises(ValueError, match=message) as error:
        train(bad)
    assert str(error.value).startswith(f"`architecture`: {tmp_path}/mine.json")
    assert "config.json:" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_differences() -> None:
    one = json.dumps({"rope_theta": 10000, "n_group": 2, "left_out": None})
    assert differences(one, json.dumps({"rope_theta": 10000.0, "n_group": 2})) == []
    assert differences(one, json.dumps({"n_group": 1, "top_k": 2})) == [
        "n_group",
        "rope_theta",
        "top_k",
    ]
    assert differences(None, None) == []
    assert differences(None, json.dumps({"n_group": 1})) == ["n_group"]


def test_bad_options(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"no file none\. .*deepseek_v3, dense, hybrid"):
        train(dataclasses.replace(config, architecture=Path("none"), out=out))
    with pytest.raises(ValueError, match="`embed_size` is that of the `architecture`; got 64"):
        dataclasses.replace(config, embed_size=64)
    with pytest.raises(ValueError, match="`architecture` is of a model from scratch"):
        dataclasses.replace(config, model=tmp_path)
    for options in ({"architecture": None}, {"architecture": Path("dense")}):
        with pytest.raises(ValueError, match=r"`balance_loss` is of the routers .* got 0\.02"):
            train(dataclasses.replace(config, out=out, **options))
    with pytest.raises(ValueError, match="must not split positions over `context`"):
        train(dataclasses.replace(config, mesh="data=4,context=2", out=out))
    assert not out.exists()


@pytest.mark.slow
def test_a_released_model_with_experts(tmp_path: Path, config: TrainConfig) -> None:
    """Routers of a whole released model train, too; frozen ones stay."""
    model = pretrained.from_config({"vocab_size": 257, **TINY}, num_depths=1, key=jax.random.key(0))
    pretrained.save(tmp_path / "model", model, layout="deepseek_v3")
    for freeze in (False, True):
        trained, _ = load_model(
            train(
                dataclasses.replace(
                    config,
                    architecture=None,
                    model=tmp_path / "model",
                    freeze_model=freeze,
                    steps=1,
                    warmup_steps=0,
                    tokenizer=None,
                    data=tokens_of(config, tmp_path),
                    vocab_size=257,
                    out=tmp_path / f"run_{freeze}",
                )
            )
        )
        decoder: Any = trained.decoder
        block: Any = trained.block
        bias = decoder.layers[1].layers.feed_forward.router.bias
        assert np.all(np.asarray(bias) == 0) == freeze
        assert np.any(np.asarray(block.layers.transformer_layer.feed_forward.router.bias) != 0)


def tokens_of(config: TrainConfig, folder: Path) -> tuple[Path, ...]:
    path = folder / "tokens.npy"
    np.save(path, np.concatenate([np.asarray(x) for x in load_corpus(config.data)]))
    return (path,)


@pytest.mark.slow
def test_guess_at_the_start(config: TrainConfig, run: Path) -> None:
    first = train_records(run)[0]
    assert abs(first["main_loss"] - math.log(257)) < 0.5


@pytest.mark.slow
def test_utilization(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens a second times FLOPs a token, over the peak of all devices."""
    peak = 1e9
    # Of a model that compiles soon: FLOPs of the others are tested where they are counted.
    dense = TrainConfig(
        data=config.data,
        embed_size=16,
        num_layers=1,
        num_heads=2,
        depths=1,
        steps=2,
        warmup_steps=1,
        batch_size=8,
        seq_len=16,
        eval_rows=8,
        compare_prompts=0,
        peak_flops=peak,
        mesh="data=8",
        out=tmp_path / "run",
    )
    out = train(dense)
    model, _ = load_model(out)
    flops = emtp.flops_per_token(model, seq_len=dense.seq_len).training
    for record in train_records(out):
        expected = flops * record["tokens_per_second"] / (8 * peak)
        assert_close(record["model_flops_utilization"], expected)
    assert "model FLOPs utilisation" in capsys.readouterr().out
