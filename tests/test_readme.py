"""The examples of README and of each package's README run as they stand, and show what they say."""

import contextlib
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FOLDER, changed
from helpers import as_float64

import equinox_mtp as emtp

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGES = ROOT / "equinox_mtp"


def blocks(path: Path) -> list[str]:
    text = path.read_text(encoding="utf8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_blocks(path: Path, folder: Path) -> list[dict[str, Any]]:
    """What is defined after each block."""
    names: dict[str, Any] = {}
    snapshots = []
    with contextlib.chdir(folder):
        for block in blocks(path):
            exec(compile(block, str(path), "exec"), names)
            snapshots.append(dict(names))
    return snapshots


def test_readme_can_be_read_in_two_minutes() -> None:
    lines = README.read_text(encoding="utf8").splitlines()
    assert len(lines) <= 170
    code = [line for line in blocks(README)[0].splitlines() if line.strip()]
    assert len(code) <= 22
    (wrapper,) = (block for block in blocks(README) if "class GPTDecoder" in block)
    decoder = wrapper.split("class GPTDecoder")[1].split("class GPTLayer")[0]
    assert len([line for line in decoder.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize(
    "path",
    [README, *sorted(PACKAGES.rglob("README.md")), ROOT / "tests" / "benchmarks" / "README.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf8"))
    local = [link for link in links if not link.startswith("http")]
    missing = [link for link in local if not (path.parent / link.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.slow
def test_examples(tmp_path: Path) -> None:
    """In one test: its examples build on one another, and take long to compile."""
    readme = run_blocks(README, tmp_path)
    check_training_loop_learns(readme)
    check_packed_example_counts(readme)
    check_generation_is_plain_decoding_and_the_file_holds_the_model(readme)
    check_wrapped_model_shares_its_weights(readme)


def check_training_loop_learns(readme: list[dict[str, Any]]) -> None:
    names = readme[0]
    uniform_guess = 1.3 * np.log(257)  # λ = 0.3
    assert float(names["loss"]) < 0.75 * uniform_guess
    assert float(names["output"].main.mean) < 0.75 * np.log(257)
    assert readme[1]["acceptance"].scored.tolist() == [127, 126]


def check_packed_example_counts(readme: list[dict[str, Any]]) -> None:
    names = readme[1]
    output = eqx.filter_jit(names["model"])(names["packed"])
    np.testing.assert_array_equal(output.mtp.losses.weights, [4.0, 2.0])


def check_generation_is_plain_decoding_and_the_file_holds_the_model(
    readme: list[dict[str, Any]],
) -> None:
    names = readme[1]
    plain = emtp.speculative.generate(
        names["model"], [list(b"to be or")], max_new_tokens=12, num_drafts=0
    )
    np.testing.assert_array_equal(names["generation"].tokens, plain.tokens)
    np.testing.assert_array_equal(names["generation"].num_generated, [12])
    assert eqx.tree_equal(names["loaded"], names["model"])


def check_wrapped_model_shares_its_weights(readme: list[dict[str, Any]]) -> None:
    names = readme[-1]
    gpt = names["gpt"]
    model = emtp.MTPModel(names["GPTDecoder"](gpt), names["block"])
    assert model.decoder.output_head() is gpt.head.weight
    input_ids = jnp.ones((2, 64), int)

    def logits(ids: jax.Array) -> jax.Array:
        x = jax.vmap(gpt.tokens)(ids)
        for layer in gpt.layers:
            x = layer(x)
        return jax.vmap(gpt.head)(jax.vmap(gpt.norm)(x))

    log_probabilities = jax.nn.log_softmax(jax.jit(jax.vmap(logits))(input_ids))
    output = names["output"]
    np.testing.assert_allclose(output.main.mean, -log_probabilities[..., 1].mean(), rtol=1e-5)
    np.testing.assert_array_equal(output.mtp.losses.weights, [2 * 63, 2 * 62])

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model: emtp.MTPModel) -> jax.Array:
        return model(input_ids, input_ids, inference=True).mtp.losses.losses.sum()

    grads = gradient(model)
    assert float(jnp.abs(grads.decoder.gpt.head.weight).max()) > 0


def test_losses_without_logits_are_those_with_logits(tmp_path: Path) -> None:
    token, summed = run_blocks(PACKAGES / "cross_entropy" / "README.md", tmp_path)
    hidden_states, matrix = token["hidden_states"], token["head"].weight
    logits = as_float64(hidden_states) @ as_float64(matrix).T
    logits = 30 * np.tanh(logits / 30)
    log_sum_exp = np.log(np.exp(logits).sum(-1))
    expected = np.mean(log_sum_exp - logits[..., 0] + 1e-4 * log_sum_exp**2)
    np.testing.assert_allclose(token["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(summed["loss"], expected, rtol=1e-5)


def test_attention_without_the_square_is_attention(tmp_path: Path) -> None:
    (names,) = run_blocks(PACKAGES / "attention" / "README.md", tmp_path)
    query, key, value = (as_float64(names[name]) for name in ("query", "key", "value"))
    for position, first in ((0, 0), (50, 0), (205, 200), (299, 236)):  # 64 of 100 are in sight
        seen = slice(first, position + 1)
        logits = 30 * np.tanh(key[1, seen, 1] @ query[1, position, 7] / 4 / 30)
        weights = np.exp(logits)
        expected = weights @ value[1, seen, 1] / weights.sum()
        np.testing.assert_allclose(names["attended"][1, position, 7], expected, rtol=1e-5)


@pytest.mark.slow
def test_sharded_example_is_that_of_one_device(tmp_path: Path) -> None:
    names = run_blocks(PACKAGES / "sharding" / "README.md", tmp_path)[-1]
    expected = eqx.filter_jit(names["model"])(names["batch"])
    for output in (names["sharded_output"], names["output"]):
        np.testing.assert_allclose(output.main.loss, expected.main.loss, rtol=1e-5)
        np.testing.assert_allclose(output.mtp.losses.losses, expected.mtp.losses.losses, rtol=1e-5)
    np.testing.assert_array_equal(names["predictions"], expected.predictions)
    assert names["reordered"].position_ids[0].tolist() == names["order"].tolist()


@pytest.mark.slow
def test_generation_of_its_package(tmp_path: Path) -> None:
    names, own, _ = run_blocks(PACKAGES / "speculative" / "README.md", tmp_path)
    plain = emtp.speculative.generate(
        names["model"],
        names["prompt_ids"],
        names["prompt_lengths"],
        max_new_tokens=12,
        num_drafts=0,
    )
    np.testing.assert_array_equal(names["generation"].tokens, plain.tokens)
    # And the decoder of one's own.
    model = emtp.MTPModel(own["gpt"], own["block"])
    plain = emtp.speculative.generate(model, [[5, 6, 7]], max_new_tokens=8, num_drafts=0)
    np.testing.assert_array_equal(own["generation"].tokens, plain.tokens)


def test_a_family_of_ones_own_is_read(tmp_path: Path) -> None:
    (names,) = run_blocks(PACKAGES / "pretrained" / "README.md", tmp_path)
    folder = tmp_path / "mine"

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace("self_attn", "attn")] = tensors.pop(name)

    changed(
        "llama3",
        folder,
        config=lambda config: config.update(architectures=["MineForCausalLM"]),
        tensors=rename,
    )
    model, _ = emtp.pretrained.load(folder, families=names["families"], tokenizer=False)
    same, _ = emtp.pretrained.load(FOLDER / "llama3", tokenizer=False)
    assert eqx.tree_equal(model, same)


def test_shim_example_is_the_functional_loss(tmp_path: Path) -> None:
    (names,) = run_blocks(PACKAGES / "linen" / "README.md", tmp_path)
    losses = jax.tree.leaves(names["outputs"]["mtp_losses"])
    assert all(np.isfinite(x).all() for x in losses)
    assert 0 < float(names["mtp_loss"]) < 0.2 * np.log(257)


@pytest.mark.slow
def test_distillation_example_trains_the_depths_alone(tmp_path: Path) -> None:
    names = run_blocks(PACKAGES / "distillation" / "README.md", tmp_path)[-1]
    trained, before = names["model"], names["decoder"]
    for x, y in zip(jax.tree.leaves(trained.decoder), jax.tree.leaves(before), strict=True):
        assert x is y
    moved = eqx.filter(trained.block, eqx.is_array), eqx.filter(names["block"], eqx.is_array)
    assert any(bool(jnp.any(x != y)) for x, y in zip(*map(jax.tree.leaves, moved), strict=True))
    assert 1 <= float(names["acceptance"].expected_accepted_length) <= 3
