"""README's examples run as they stand, and show what it says they show."""

import contextlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_float64

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What is defined after each block."""
    names: dict[str, Any] = {}
    snapshots = []
    with contextlib.chdir(tmp_path_factory.mktemp("readme")):
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)
            snapshots.append(dict(names))
    return snapshots


def test_training_loop_learns(namespaces: list[dict[str, Any]]) -> None:
    uniform_guess = 1.3 * np.log(257)  # λ = 0.3
    assert float(namespaces[0]["loss"]) < 0.75 * uniform_guess
    assert float(namespaces[0]["output"].main.mean) < 0.75 * np.log(257)
    assert namespaces[1]["acceptance"].scored.tolist() == [127, 126]
    code_lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(code_lines) <= 22


def test_packed_example_counts(namespaces: list[dict[str, Any]]) -> None:
    np.testing.assert_array_equal(namespaces[2]["output"].mtp.losses.weights, [4.0, 2.0])


def test_wrapped_model_shares_its_weights(namespaces: list[dict[str, Any]]) -> None:
    namespace = namespaces[-1]
    gpt, model = namespace["gpt"], namespace["model"]
    assert model.decoder.gpt is gpt
    assert model.decoder.output_head() is gpt.head.weight
    output = namespace["output"]
    input_ids = jnp.ones((2, 64), int)

    def logits(ids: jax.Array) -> jax.Array:
        x = jax.vmap(gpt.tokens)(ids) + gpt.positions.weight[: len(ids)]
        for layer in gpt.layers:
            x = layer(x)
        return jax.vmap(gpt.head)(jax.vmap(gpt.norm)(x))

    log_probabilities = jax.nn.log_softmax(jax.vmap(logits)(input_ids))
    np.testing.assert_allclose(output.main.mean, -log_probabilities[..., 1].mean(), rtol=1e-5)
    np.testing.assert_array_equal(output.mtp.losses.weights, [2 * 63, 2 * 62])
    grads = eqx.filter_grad(
        lambda m: m(input_ids, input_ids, inference=True).mtp.losses.losses.sum()
    )(model)
    assert float(jnp.abs(grads.decoder.gpt.head.weight).max()) > 0


def test_wrapper_is_short() -> None:
    (wrapper,) = (block for block in BLOCKS if "class GPTDecoder" in block)
    decoder = wrapper.split("class GPTLayer")[0]
    lines = [line for line in decoder.splitlines() if line.strip()]
    assert len(lines) <= 15


def test_losses_without_logits_are_those_with_logits(namespaces: list[dict[str, Any]]) -> None:
    token, summed = (next(n for n in namespaces if name in n) for name in ("token", "out"))
    hidden_states, matrix = token["hidden_states"], token["head"].weight
    logits = as_float64(hidden_states) @ as_float64(matrix).T
    logits = 30 * np.tanh(logits / 30)
    log_sum_exp = np.log(np.exp(logits).sum(-1))
    expected = np.mean(log_sum_exp - logits[..., 0] + 1e-4 * log_sum_exp**2)
    np.testing.assert_allclose(token["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(summed["loss"], expected, rtol=1e-5)


def test_sharded_example_is_that_of_one_device(namespaces: list[dict[str, Any]]) -> None:
    names = namespaces[-1]
    output, batch = names["sharded_output"], names["batch"]
    decoder = names["emtp"].nn.TransformerDecoder(names["config"], key=jax.random.key(0))
    block = names["emtp"].MultiTokenPredictionBlock(
        names["emtp"].MTPConfig(num_depths=2),
        partial(names["emtp"].nn.TransformerDecoderLayer, decoder.config),
        embed_size=64,
        key=jax.random.key(1),
    )
    expected = eqx.filter_jit(names["emtp"].MTPModel(decoder, block))(*batch)
    np.testing.assert_allclose(output.main.loss, expected.main.loss, rtol=1e-5)
    np.testing.assert_allclose(output.mtp.losses.losses, expected.mtp.losses.losses, rtol=1e-5)
    # The reordered targets are those of the text, elsewhere.
    order = names["order"]
    assert names["targets"].target_ids.shape == (2, 8, 64)
    assert names["positions"][0].tolist() == order.tolist()


def test_generation_is_plain_decoding(namespaces: list[dict[str, Any]]) -> None:
    names = next(n for n in namespaces if "generation" in n)
    generation, prompts, lengths = (
        names[name] for name in ("generation", "prompt_ids", "prompt_lengths")
    )
    plain = names["emtp"].speculative.generate(
        names["emtp"].MTPModel(names["decoder"], names["drafting_block"]),
        prompts,
        lengths,
        max_new_tokens=12,
        num_drafts=0,
    )
    np.testing.assert_array_equal(generation.tokens, plain.tokens)
    np.testing.assert_array_equal(generation.num_generated, [12, 12])


def test_saved_model_comes_back(namespaces: list[dict[str, Any]]) -> None:
    saved, loaded = namespaces[-1]["sharded_model"], namespaces[-1]["loaded_model"]
    assert eqx.tree_equal(jax.device_get(loaded), jax.device_get(saved))
    assert loaded.decoder.embedding.devices() == {jax.devices()[0]}
