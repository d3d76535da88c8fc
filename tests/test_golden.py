"""The block against MaxText system's numbers, in float32.

Two measures, both with tolerance 1e-5: max|a - b| / max|b| of each array, and element by element
|a - b| <= 1e-5 · (|b| + max|b|).
"""

import functools
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close
from jaxtyping import Array

from equinox_mtp import (
    MTPOutput,
    MTPTargets,
    MultiTokenPredictionBlock,
    calculate_mtp_acceptance_rate,
    calculate_mtp_loss,
    linear_cross_entropy,
    sum_token_losses,
)

_CASES = [("a", 1), ("a", 2), ("c", 1)]
_all_cases = pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case[0]}-D{case[1]}")
_Differentiated = tuple[golden.GoldenDecoder, MultiTokenPredictionBlock, Array]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


class _Case:
    """One recorded run: its inputs, our modules, and its numbers under short names."""

    def __init__(self, name: str, num_depths: int):
        self.inputs = golden.load_numbers(name)
        self.num_depths = num_depths
        prefix = f"D{num_depths}/"
        self.numbers = {
            key.removeprefix(prefix): value
            for key, value in self.inputs.items()
            if key.startswith(prefix)
        }
        self.differentiated: _Differentiated = (
            golden.load_decoder(),
            golden.load_block(num_depths),
            jnp.asarray(self.inputs["in/main_hidden_state"]),
        )
        self.targets = golden.load_targets(self.inputs, num_depths)
        self.rows: dict[str, Any] = {
            "position_ids": jnp.asarray(self.inputs["in/position_ids"]),
            "segment_ids": jnp.asarray(self.inputs["in/decoder_segment_ids"]),
        }


_load = functools.cache(_Case)


def _run(
    differentiated: _Differentiated, targets: MTPTargets, rows: dict[str, Any]
) -> tuple[Array, MTPOutput]:
    decoder, block, hidden_states = differentiated
    output = block(decoder, hidden_states, targets, **rows)
    return calculate_mtp_loss(output.losses, scaling_factor=0.1), output


_value_and_grad = eqx.filter_value_and_grad(_run, has_aux=True)


@functools.cache
def _jitted(name: str, num_depths: int) -> tuple[Array, MTPOutput, _Differentiated]:
    case = _load(name, num_depths)
    (loss, output), gradients = eqx.filter_jit(_value_and_grad)(
        case.differentiated, case.targets, case.rows
    )
    return loss, output, gradients


def _assert_values(numbers: dict[str, np.ndarray], loss: Array, output: MTPOutput) -> None:
    assert_close(loss, numbers["mtp_loss"])
    assert_close(output.losses.losses, numbers["losses"])
    np.testing.assert_array_equal(output.losses.weights, numbers["weights"])
    assert_close(output.hidden_states, numbers["hidden"])


@_all_cases
def test_targets(case: tuple[str, int]):
    loaded = _load(*case)
    targets, numbers = loaded.targets, loaded.numbers
    mask = np.asarray(targets.mask)
    for depth in range(1, loaded.num_depths + 1):
        np.testing.assert_array_equal(mask[depth - 1], numbers[f"eval{depth}/mtp_mask"][0] != 0)
    # Beyond a document both hold 0.
    np.testing.assert_array_equal(targets.input_ids, numbers["rolled_input_ids"])
    np.testing.assert_array_equal(targets.target_ids, numbers["rolled_target_ids"])
    positions = np.where(mask, targets.position_ids, 0)
    np.testing.assert_array_equal(positions, np.where(mask, numbers["rolled_position_ids"], 0))


@_all_cases
def test_values_and_gradients(case: tuple[str, int]):
    numbers = _load(*case).numbers
    loss, output, gradients = _jitted(*case)
    _assert_values(numbers, loss, output)
    named = golden.named_gradients(*gradients)
    recorded = {
        key.removeprefix("grad/"): value
        for key, value in numbers.items()
        if key.startswith("grad/")
    }
    assert named.keys() == recorded.keys()
    for name, expected in recorded.items():
        assert_close(named[name], expected)


def test_values_without_jit():
    case = _load("c", 1)
    loss, output = _run(case.differentiated, case.targets, case.rows)
    _assert_values(case.numbers, loss, output)


@_all_cases
def test_token_losses(case: tuple[str, int]):
    loaded = _load(*case)
    _, output, _ = _jitted(*case)
    decoder = loaded.differentiated[0]
    for depth in range(loaded.num_depths):
        token = linear_cross_entropy(
            decoder.final_norm(output.hidden_states[depth]),
            decoder.output_head(),
            loaded.targets.target_ids[depth],
        )
        mask = np.asarray(loaded.targets.mask[depth])
        assert mask.sum() == loaded.numbers["weights"][depth]
        expected = loaded.numbers["xent"][depth][mask]
        assert_close(np.asarray(token.negative_log_likelihood)[mask], expected)


@_all_cases
def test_acceptance(case: tuple[str, int]):
    loaded = _load(*case)
    _, output, _ = _jitted(*case)
    assert output.acceptance is not None
    for depth in range(1, loaded.num_depths + 1):
        prefix = f"eval{depth}/"
        mask = loaded.numbers[prefix + "mtp_mask"][0] != 0
        predictions = np.asarray(output.acceptance.predictions[depth - 1])
        expected = loaded.numbers[prefix + "mtp_preds"][0]
        np.testing.assert_array_equal(predictions[mask], expected[mask])
        references = {"acceptance_rate_biased": loaded.numbers[prefix + "main_preds_biased"]}
        if "in/main_logits" in loaded.inputs:
            references["acceptance_rate"] = loaded.inputs["in/main_logits"].argmax(-1)
        for name, reference in references.items():
            rate = calculate_mtp_acceptance_rate(
                output.acceptance, jnp.asarray(reference, jnp.int32)
            )
            assert_close(rate.percent[depth - 1], loaded.numbers[prefix + name])


def test_vmap():
    """Mapped over a leading axis: the recorded batch, and the same with its rows reversed."""
    loaded = _load("c", 1)
    decoder, block, hidden_states = loaded.differentiated

    def both(x: Array, axis: int = 0) -> Array:
        return jnp.stack([x, jnp.flip(x, axis)])

    def run(hidden_states: Array, targets: MTPTargets, rows: dict[str, Any]) -> Any:
        loss, output = _run((decoder, block, hidden_states), targets, rows)
        return loss, output.losses, output.hidden_states

    loss, losses, hidden = jax.jit(jax.vmap(run))(
        both(hidden_states),
        jax.tree.map(lambda x: both(x, axis=1), loaded.targets),
        jax.tree.map(both, loaded.rows),
    )
    assert_close(loss, np.stack([loaded.numbers["mtp_loss"]] * 2))
    assert_close(losses.losses, np.stack([loaded.numbers["losses"]] * 2))
    assert_close(hidden[0], loaded.numbers["hidden"])
    assert_close(hidden[1], loaded.numbers["hidden"][:, ::-1])


def test_unrolled_by_hand():
    """`block.layer(1)`, `block.layer(2)`, … one after another equal the scan, and the record."""
    loaded = _load("a", 2)
    _, output, _ = _jitted("a", 2)
    decoder, block, hidden_states = loaded.differentiated
    for depth in range(1, loaded.num_depths + 1):
        target = jax.tree.map(lambda x, depth=depth: x[depth - 1], loaded.targets)
        embeddings = decoder.embed(target.input_ids, target.position_ids)
        layer = eqx.filter_jit(block.layer(depth))
        hidden_states, auxiliary = layer(hidden_states, embeddings, **loaded.rows)
        assert auxiliary is None
        assert_close(hidden_states, output.hidden_states[depth - 1])
        assert_close(hidden_states, loaded.numbers["hidden"][depth - 1])
        token = linear_cross_entropy(
            decoder.final_norm(hidden_states), decoder.output_head(), target.target_ids
        )
        loss = sum_token_losses(token.negative_log_likelihood, target.mask)
        assert_close(loss.loss, loaded.numbers["losses"][depth - 1])
        assert float(loss.weight) == loaded.numbers["weights"][depth - 1]
