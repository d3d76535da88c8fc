"""What a run has trained, as a folder that others read: the `export` command."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FOLDER, config_of
from golden import build, quick_jit
from helpers import assert_close, assert_equal

import equinox_mtp as emtp
from equinox_mtp import pretrained
from equinox_mtp.__main__ import main
from equinox_mtp._types import is_array_or_shape
from equinox_mtp.training import (
    CheckpointInfo,
    ExportConfig,
    TrainConfig,
    export_run,
    load_model,
    train,
)
from equinox_mtp.training._checkpoint import save_checkpoint
from equinox_mtp.training._released import split_model
from equinox_mtp.training._step import TrainState, make_model, make_optimizer, state_of

RELEASED = FOLDER / "qwen3"
VOCAB = 320


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Repeated depths over a released model, which stays as it is."""
    root = tmp_path_factory.mktemp("exported")
    text = root / "text"
    text.mkdir()
    for index in range(4):
        words = np.random.default_rng(index).choice(["to", "be", "or", "not", "sea"], 80)
        (text / f"{index}.txt").write_text(" ".join(words))
    return TrainConfig(
        data=(text,),
        model=RELEASED,
        freeze_model=True,
        objective="hybrid",
        depths=2,
        preset="fast_mtp",
        steps=3,
        warmup_steps=1,
        learning_rate=1e-2,
        batch_size=2,
        seq_len=24,
        eval_rows=2,
        eval_every=3,
        checkpoint_every=3,
        compare_prompts=0,
        out=root / "run",
    )


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> Path:
    return train(config)


def save_run(run: Path, config: TrainConfig, model: emtp.MTPModel) -> Path:
    """The checkpoint of a model that no step has seen; nothing is compiled."""
    trained, _ = split_model(model, config)
    like = eqx.filter_eval_shape(state_of, trained, make_optimizer(config))
    shapes = eqx.filter((like.optimizer_state, like.step), is_array_or_shape)
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)
    state = TrainState(trained, *zeros)
    return save_checkpoint(run / "checkpoints", state, CheckpointInfo(1, VOCAB, "", config))


def from_scratch(run: Path, **options: Any) -> Path:
    """The checkpoint of a model of its own."""
    sizes = {"embed_size": 16, "num_layers": 2, "num_heads": 2, "preset": "megatron"}
    config = TrainConfig(**{**sizes, **options})
    return save_run(run, config, build(lambda *, key: make_model(config, VOCAB)))


@quick_jit
def numbers(model: emtp.MTPModel, batch: emtp.Batch) -> dict[str, jax.Array]:
    """The hidden states and logits of the main model, and of every depth."""
    head: Any = model.decoder.output_head()
    positions = jnp.asarray(batch.position_ids)
    hidden: Any = model.decoder(jnp.asarray(batch.input_ids), position_ids=positions)
    found = {"hidden": hidden, "logits": model.decoder.final_norm(hidden) @ head.T}
    if model.block.layers is not None:
        targets = batch.align(model.block.config.num_depths).targets
        assert targets is not None
        states = model.block.depth_states(
            model.decoder, hidden, targets, position_ids=positions, inference=True
        )
        found |= {"depths": states.hidden_states, "depths' logits": states.normed @ head.T}
    return found


def assert_same_model(one: emtp.MTPModel, other: emtp.MTPModel) -> None:
    assert one.block.config.num_depths == other.block.config.num_depths
    batch = emtp.make_batch(np.random.default_rng(0).integers(0, VOCAB, (2, 13)))
    ours, theirs = numbers(one, batch), numbers(other, batch)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert_close(x, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers", "speculators", "stitched"])
def test_depths_over_a_released_model(
    run: Path, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), "--layout", layout, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: {run} with 2 prediction depth(s), in the layout {layout!r}")
    reader = f"vllm serve {out}" if layout == "speculators" else "generate(use_mtp=True)"
    assert printed.endswith(f": {reader}\n")
    assert printed.count("\n") == 1
    trained, _ = load_model(run)
    again, tokenizer = pretrained.load(out)
    assert_same_model(again, trained)
    assert tokenizer is not None
    # What was trained, and not where it began.
    before, _ = pretrained.load(RELEASED, num_depths=2, preset="fast_mtp", key=jax.random.key(0))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_model(again, before)
    for x, y in zip(jax.tree.leaves(again.decoder), jax.tree.leaves(before.decoder), strict=True):
        assert_equal(x, y)


def test_a_checkpoint_in_python(run: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    for path in (run, checkpoint):
        export_run(ExportConfig(path, "speculators", tmp_path / path.name))
    of_run, of_checkpoint = (tmp_path / path.name for path in (run, checkpoint))
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in of_checkpoint.iterdir()) == names
    for name in names:
        assert (of_checkpoint / name).read_bytes() == (of_run / name).read_bytes()


def test_a_model_that_has_moved(
    run: Path, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = dataclasses.replace(config, model=tmp_path / "gone", out=tmp_path / "run")
    model, _ = load_model(run)
    save_run(tmp_path / "run", there, model)
    options = ["export", str(tmp_path / "run"), "--layout", "speculators", "--out"]
    assert main([*options, str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: `model`: {tmp_path / 'run'}")
    assert f"there is no folder {tmp_path / 'gone'}. Say where it is: " in error
    assert not (tmp_path / "out").exists()
    moved = shutil.copytree(RELEASED, tmp_path / "moved")
    assert main([*options, str(tmp_path / "out"), "--model", str(moved)]) == 0
    verifier = config_of(tmp_path / "out")["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == str(moved.resolve())
    assert_same_model(pretrained.load(tmp_path / "out")[0], model)


def test_a_run_over_a_head_goes_with_its_model(
    run: Path, config: TrainConfig, tmp_path: Path
) -> None:
    """The folder of a head is that of its model, as in `load`: the head's files are not linked."""
    for name in ("qwen3", "fastmtp"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    export_run(ExportConfig(run, "stitched", tmp_path / "out", model=tmp_path / "fastmtp"))
    assert_same_model(pretrained.load(tmp_path / "out")[0], load_model(run)[0])


@pytest.mark.parametrize(
    ("layout", "depths", "reader"),
    [
        ("transformers", 2, "generate(use_mtp=True)"),
        ("mimo", 2, "vLLM and SGLang, with the flags in equinox_mtp/pretrained/README.md"),
        ("llama", 0, "for transformers, vLLM and SGLang"),
    ],
)
def test_a_run_from_scratch(
    layout: str,
    depths: int,
    reader: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = from_scratch(tmp_path / "run", depths=depths)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--layout", layout, "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"{reader}\n")
    again, tokenizer = pretrained.load(out)
    assert_same_model(again, load_model(checkpoint)[0])
    assert tokenizer is None
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_that_was_trained_as_a_whole(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = dataclasses.replace(config, freeze_model=False, out=tmp_path / "run")
    changed = jax.tree.map(
        lambda x: 0.9 * x if eqx.is_array(x) else x,
        pretrained.load(RELEASED, num_depths=2, preset="fast_mtp", key=jax.random.key(0))[0],
    )
    save_run(tmp_path / "run", whole, changed)
    options = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout"]
    for layout in ("stitched", "speculators"):
        # Over the files of the model that it was.
        assert main([*options, layout]) == 1
        expected = f"error: `layout` '{layout}' goes with a released model as it was"
        assert capsys.readouterr().err.startswith(expected)
        assert not (tmp_path / "out").exists()
    assert main([*options, "transformers"]) == 0
    again, tokenizer = pretrained.load(tmp_path / "out")
    assert_same_model(again, changed)
    assert tokenizer is not None


@pytest.mark.parametrize("is_full", [False, True])
def test_the_tokenizer_that_a_run_keeps(
    is_full: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from_scratch(tmp_path / "run", depths=1)
    shutil.copyfile(RELEASED / "tokenizer.json", tmp_path / "run" / "tokenizer.json")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if is_full:
        monkeypatch.setattr("equinox_mtp.training._export.keep_tokenizer", full)
    out = tmp_path / "out"
    options = ["export", str(tmp_path / "run"), "--layout", "transformers", "--out", str(out)]
    assert main(options) == is_full
    assert ("No space left on device" in capsys.readouterr().err) == is_full
    # All of it, or nothing.
    assert out.exists() != is_full
    if not is_full:
        assert pretrained.load_tokenizer(out).encode("to be").ids == [261, 264]


def test_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, plain = tmp_path / "own", tmp_path / "plain"
    from_scratch(own, depths=2, preset="deepseek_v3")
    from_scratch(plain, depths=0)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    out, taken = str(tmp_path / "out"), str(tmp_path / "taken")
    of_ours = ["--layout", "transformers", "--out", out]
    before = sorted(tmp_path.iterdir())
    cases = [
        ([str(tmp_path / "none"), *of_ours], "`run`: there is none in"),
        (["", *of_ours], "`run` must not be empty"),
        ([str(run), "--layout", "transformers", "--out", ""], "`out` must not be empty"),
        ([str(run), "--layout", "transformers", "--out", taken], f"`out`: {taken} exists, and is"),
        (
            [str(run), "--layout", "stitched", "--out", str(tmp_path / "no" / "out")],
            f"`out`: there is no folder {tmp_path / 'no'} to put it in",
        ),
        ([str(run), "--layout", "gguf", "--out", out], "`layout` must be 'llama', 'qwen2', "),
        ([str(run), "--layout", "qwen3", "--out", out], "`layout` 'qwen3' has no place for"),
        ([str(plain), *of_ours], "`layout` 'transformers' is of prediction depths, and"),
        ([str(own), "--layout", "stitched", "--out", out], "`layout` 'stitched' goes with a"),
        ([str(own), *of_ours], "`layout` 'transformers' has `carried_hidden_state='after_norm'`"),
        ([str(own), *of_ours, "--model", str(RELEASED)], "`model`: "),
        ([str(run), *of_ours, "--model", str(tmp_path / "no")], "`model`: "),
        ([str(run), *of_ours, "--model", str(tmp_path / "taken")], f"{taken}/config.json: it is"),
    ]
    for options, message in cases:
        assert main(["export", *options]) == 1, message
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}"), error
        assert error.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
