"""Prediction depths that are trained over a released model."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import checkpoints as released
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal

import equinox_mtp as emtp
from equinox_mtp import pretrained
from equinox_mtp.__main__ import main
from equinox_mtp.distillation import draft_losses, start_from_trunk
from equinox_mtp.speculative import frequent_ids, generate
from equinox_mtp.training import TrainConfig, held_out_prompts, load_model, train
from equinox_mtp.training._checkpoint_files import checkpoints, write_digests
from equinox_mtp.training._fit_depths import with_fitted_depths
from equinox_mtp.training._prepare import prepare
from equinox_mtp.training._step import aligned_batch, depth_weights_at, make_model, make_optimizer
from equinox_mtp.training._token_counts import count_tokens
from equinox_mtp.training._train import compare_on_held_out, fresh_state

FOLDER = released.FOLDER / "qwen3"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("released")
    text = root / "text"
    text.mkdir()
    for index in range(4):
        words = np.random.default_rng(index).choice(["to", "be", "or", "not", "sea"], 80)
        (text / f"{index}.txt").write_text(" ".join(words))
    return TrainConfig(
        data=(text,),
        model=FOLDER,
        freeze_model=True,
        objective="total_variation",
        depths=2,
        preset="fast_mtp",
        steps=4,
        warmup_steps=1,
        batch_size=2,
        seq_len=24,
        eval_rows=2,
        eval_every=4,
        checkpoint_every=2,
        compare_prompts=0,
        out=root / "run",
    )


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> Path:
    return train(config)


def arrays(tree: Any) -> list[Any]:
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def test_the_main_model_stays(config: TrainConfig, run: Path) -> None:
    trained, info = load_model(run)
    assert info.step == 4
    key = jax.random.key(config.seed)
    before, _ = pretrained.load(FOLDER, num_depths=2, preset="fast_mtp", key=key, tokenizer=False)
    for x, y in zip(arrays(trained.decoder), arrays(before.decoder), strict=True):
        assert_equal(x, y)
    moved = [
        np.any(x != y) for x, y in zip(arrays(trained.block), arrays(before.block), strict=True)
    ]
    assert any(moved)


def test_a_checkpoint_holds_the_depths_alone(run: Path) -> None:
    trained, _ = load_model(run)
    depths = sum(x.nbytes for x in arrays(trained.block))
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    # The parameters and two moments, and what describes them.
    assert size < 3 * depths + 60_000


def test_resumed_run_is_the_uninterrupted_one(
    config: TrainConfig, run: Path, tmp_path: Path
) -> None:
    short = dataclasses.replace(config, out=tmp_path / "other")
    other = train(short)
    last = sorted((other / "checkpoints").glob("step_*"))[-1]
    shutil.rmtree(last)
    train(dataclasses.replace(short, resume=True))
    for x, y in zip(arrays(load_model(other)[0]), arrays(load_model(run)[0]), strict=True):
        assert_close(x, y)


def test_generates_with_the_depths(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--prompt", "to be", "--max-new-tokens", "6"]
    assert main(["generate", "--model", str(FOLDER), "--heads", str(run), *common]) == 0
    with_heads = capsys.readouterr().out
    assert main(["generate", "--checkpoint", str(run), *common]) == 0
    assert capsys.readouterr().out == with_heads
    assert "first draft" in with_heads


@pytest.mark.slow
def test_continuations_end_with_their_document(config: TrainConfig, run: Path) -> None:
    """What a model says behind an end is not what drafts are for."""
    model, _ = load_model(run)
    config = dataclasses.replace(config, compare_prompts=1)
    prepared = prepare(config)
    (prompt,) = held_out_prompts(prepared.held_out_corpus, num_prompts=1, length=12)
    generation = generate(model, prompt[None], max_new_tokens=12, num_drafts=1)
    tokens = generation.tokens[0, 12:].tolist()
    assert [x.num_tokens for x in compare_on_held_out(prepared, model)] == [12, 12]
    ended = prepare(dataclasses.replace(config, end_of_document=tokens[3]))
    expected = tokens.index(tokens[3]) + 1
    assert [x.num_tokens for x in compare_on_held_out(ended, model)] == [expected, expected]


@pytest.mark.slow
def test_drafts_of_frequent_tokens(
    config: TrainConfig, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = prepare(config).corpus
    counts = sum(np.bincount(document, minlength=corpus.vocab_size) for document in corpus)
    assert_equal(np.load(run / "token_counts.npy"), counts)
    common = ["--model", str(FOLDER), "--heads", str(run), "--prompt", "to", "--max-new-tokens"]
    texts = []
    for options in ([], ["--draft-vocab", "5", "--compare"]):
        assert main(["generate", *common, "9", *options]) == 0
        texts.append(capsys.readouterr().out.replace("⟦", "").replace("⟧", ""))
    plain, frequent = (text.partition("\n\n")[0] for text in texts)
    assert plain == frequent
    assert "100% of the continuations equal" in texts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "RUN", "--draft-vocab", "0"], "`draft_vocab` must be at least 1"),
        (["--draft-vocab", "5"], "`draft_vocab` goes with depths of a run"),
        (["--heads", "OLD", "--draft-vocab", "5"], "has no token_counts.npy"),
    ],
)
def test_frequent_tokens_that_are_not_known(
    options: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns("token_counts*"))
    options = [{"RUN": str(run), "OLD": str(old)}.get(option, option) for option in options]
    assert main(["generate", "--model", str(FOLDER), "--prompt", "to", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_depths_learn_to_draft_from_frequent_tokens(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, draft_vocab=5, steps=1, warmup_steps=0, out=tmp_path / "a")
    run = prepare(config)
    assert run.released is not None
    counts = count_tokens(run.corpus)
    vocab = frequent_ids(counts, 5)
    assert len(vocab) == 5
    train(config)
    record = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
    rows = run.train_rows.read(run.train_rows.of_step(0, config.batch_size, config.seed))
    model: Any = eqx.combine(run.released, run.frozen)
    output = draft_losses(model, aligned_batch(rows, config.depths), draft_vocab=vocab)
    assert_close(record["mtp_losses"], output.losses.mean, rtol=1e-5)
    drafted = []
    monkeypatch.setattr(
        "equinox_mtp.training._generate.stream",
        lambda *_, draft_vocab, **__: drafted.append(draft_vocab) or iter(()),
    )
    for options in ([], ["--draft-vocab", "3"]):
        main(
            [
                "generate",
                "--model",
                str(FOLDER),
                "--heads",
                str(config.out),
                "--prompt",
                "to",
                *options,
            ]
        )
    assert_equal(drafted[0], vocab)
    assert_equal(drafted[1], frequent_ids(counts, 3))


@pytest.mark.slow
def test_drafts_of_frequent_tokens_and_fitted_depths_on_a_mesh(
    config: TrainConfig, tmp_path: Path
) -> None:
    """Whose axis `tensor` splits matrices, and would split the vocabulary."""
    common: dict[str, Any] = {"draft_vocab": 5, "initial_depths": "trunk", "steps": 1}
    common["batch_size"] = 4
    losses = []
    for mesh in (None, "data=2,fsdp=2,tensor=2"):
        out = tmp_path / str(mesh)
        train(dataclasses.replace(config, warmup_steps=0, mesh=mesh, out=out, **common))
        record = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        losses.append(record["mtp_losses"])
    assert_close(losses[1], losses[0], rtol=1e-3)


@pytest.mark.slow
def test_whole_training_with_an_objective(config: TrainConfig, tmp_path: Path) -> None:
    """Beside the main loss, of a model from scratch, by Muon."""
    scratch = dataclasses.replace(
        config,
        model=None,
        freeze_model=False,
        objective="expected_accepted_length",
        optimizer="muon",
        embed_size=16,
        num_layers=1,
        num_heads=2,
        out=tmp_path / "scratch",
    )
    model, _ = load_model(train(scratch))
    assert emtp.count_parameters(model.decoder) > 0


@pytest.mark.slow
def test_muon_decays_what_adamw_decays() -> None:
    """Where gradients are zero the update is the decay: matrices of both parts, and no scales."""
    config = TrainConfig(embed_size=16, num_layers=1, num_heads=2, optimizer="muon", warmup_steps=0)
    model = make_model(config, 32)
    params = eqx.filter(model, eqx.is_inexact_array)
    optimizer = make_optimizer(config)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    mask = emtp.weight_decay_mask(params)
    rate = config.learning_rate * config.weight_decay
    leaves = zip(*map(jax.tree.leaves, (updates, params, mask)), strict=True)
    for update, x, decays in leaves:
        assert_close(update, -rate * np.asarray(x) * decays, rtol=1e-4, atol=1e-9)


def test_a_model_that_has_moved(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(FOLDER, tmp_path / "moved")
    there, _ = load_model(str(run), model=str(moved))
    for x, y in zip(arrays(there), arrays(load_model(run)[0]), strict=True):
        assert_equal(x, y)


def test_another_model_is_refused(
    run: Path, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, info = load_model(run)
    assert info.model_digest is not None
    other = released.one_bit_changed(tmp_path / "other")
    resumed = dataclasses.replace(config, model=other, resume=True)
    for function in (lambda: load_model(run, model=other), lambda: train(resumed)):
        with pytest.raises(ValueError, match="`model` must be the one that the depths") as caught:
            function()
        said = str(caught.value)
        assert f"which was in {FOLDER}; that in {other} has the digest " in said
        assert info.model_digest[:12] in said
    command = ["generate", "--model", str(other), "--heads", str(run), "--prompt", "a"]
    assert main(command) == 1
    assert capsys.readouterr().err.startswith("error: `model` must be the one that the depths")


def test_checkpoints_of_earlier_versions(run: Path, tmp_path: Path) -> None:
    """They have no digest: any model of these shapes is taken."""
    old = shutil.copytree(run, tmp_path / "old")
    for checkpoint in checkpoints(old / "checkpoints"):
        path = checkpoint / "info" / "metadata"
        info = json.loads(path.read_text())
        assert info.pop("model_digest")
        path.write_text(json.dumps(info))
        write_digests(checkpoint)
    model, info = load_model(old, model=released.one_bit_changed(tmp_path / "other"))
    assert info.model_digest is None
    for x, y in zip(arrays(model.block), arrays(load_model(run)[0].block), strict=True):
        assert_equal(x, y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "`freeze_model` trains the prediction depths of a released model"),
        (
            {"depths": 0, "objective": "cross_entropy"},
            "`freeze_model` trains the prediction depths",
        ),
        ({"embed_size": 64}, "`embed_size` is that of the released `model`"),
        ({"curriculum": "reverse"}, "`curriculum` 'reverse' leaves the main model to train alone"),
        (
            {"initial_depths": "trunk", "model": None, "freeze_model": False},
            "`initial_depths` 'trunk' is of prediction depths over a released model",
        ),
        (
            {"draft_vocab": 5, "objective": "cross_entropy"},
            "`draft_vocab` is of an objective on drafts",
        ),
        ({"initial_depths": "zeros"}, "`initial_depths` must be 'random' or 'trunk'"),
        (
            {"initial_depths": "trunk", "distributed": True},
            "`initial_depths` 'trunk' fits the depths in one process",
        ),
    ],
)
def test_bad_options(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_positions_must_not_be_split(config: TrainConfig, tmp_path: Path) -> None:
    split = dataclasses.replace(config, mesh="data=2,context=4", out=tmp_path / "split")
    with pytest.raises(ValueError, match="`objective` 'total_variation' compares"):
        train(split)
    # Attention of a released model goes by the order of the row.
    with pytest.raises(ValueError, match="`mesh` must not split positions over `context`"):
        train(dataclasses.replace(split, objective="cross_entropy"))
    assert not (tmp_path / "split").exists()


@pytest.mark.slow
def test_depths_begin_as_fitted_to_the_main_model(config: TrainConfig, tmp_path: Path) -> None:
    """On the rows of the first steps; a first step with a rate of 0 leaves them as they are."""
    config = dataclasses.replace(
        config, initial_depths="trunk", steps=1, warmup_steps=0, learning_rate=1e-9, out=tmp_path
    )
    train(config)
    started, _ = load_model(tmp_path)
    run = prepare(dataclasses.replace(config, out=tmp_path / "other"))
    assert run.released is not None
    num_tokens = 32 * started.block.layer(1).projection_layer.kernel.shape[1]
    num_rows = 2 * math.ceil(num_tokens / (2 * config.seq_len))
    rows = run.train_rows.read(run.train_rows.of_step(0, num_rows, config.seed))
    batches = [aligned_batch(rows, config.depths)]
    model: Any = eqx.combine(run.released, run.frozen)
    wanted = start_from_trunk(model, batches)
    for x, y in zip(arrays(started), arrays(wanted), strict=True):
        assert_close(x, y, rtol=1e-2, atol=1e-3)
    # Were its arrays bound to a device, which fresh ones are not, step 2 would be compiled anew.
    fresh = fresh_state(run)
    fitted = with_fitted_depths(run, fresh)
    for x, y in zip(arrays(fitted.model), arrays(fresh.model), strict=True):
        assert x.committed == y.committed


def test_depths_that_decay_and_a_curriculum(config: TrainConfig) -> None:
    decay = dataclasses.replace(config, depth_decay=0.5)
    weights = depth_weights_at(jnp.int32(0), decay)
    assert_close(weights, [2 / 3, 1 / 3])
    both = dataclasses.replace(decay, model=None, freeze_model=False, curriculum="forward", steps=9)
    for step, wanted in ((0, [0, 0]), (4, [2 / 3, 0]), (8, [2 / 3, 1 / 3])):
        assert_close(depth_weights_at(jnp.int32(step), both), wanted)


def test_heads_need_a_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--checkpoint", str(run), "--heads", str(run), "--prompt", "a"]) == 1
    assert "error: `heads` are of a released model" in capsys.readouterr().err
