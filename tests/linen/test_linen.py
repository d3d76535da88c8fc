"""The Linen-style shim: MaxText's numbers, collections and calls."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import golden
import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import pytest
from golden import assert_close, quick_jit
from helpers import align_oracle, assert_rejects
from jaxtyping import Array
from maxtext import (
    SEGMENTS,
    library_output,
    toy_block,
    toy_config,
    toy_inputs,
)

from equinox_mtp import linen, nn

COLLECTIONS = ["mtp_losses", "mtp_acceptance"]
CASES = [("a", 1), ("a", 2), ("c", 1)]
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-D{case[1]}")


# MaxText's numbers


@pytest.fixture
def _full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def one_hot_logits(predictions: np.ndarray) -> np.ndarray:
    return np.eye(256, dtype=np.float32)[predictions]


@pytest.mark.usefixtures("_full_precision")
@all_cases
def test_golden_values_and_gradients(case: tuple[str, int]) -> None:
    name, num_depths = case
    numbers = golden.load_numbers(name)
    config = maxtext.make_config(num_depths)
    block = maxtext.make_block(config)
    args, rows = maxtext.golden_inputs(name)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss_fn(params: Any, embedding: Array, hidden_states: Array) -> tuple[Array, Any]:
        _, collections = block.apply(
            {"params": params}, embedding, hidden_states, *args[2:], mutable=COLLECTIONS, **rows
        )
        return linen.calculate_mtp_loss(collections, config), collections

    params = maxtext.golden_params(num_depths)
    (loss, collections), gradients = loss_fn(params, *args[:2])
    assert_close(loss, numbers[f"D{num_depths}/mtp_loss"])
    assert collections.keys() == {"mtp_losses"}
    collected = collections["mtp_losses"]["mtp_block"]
    assert_close(collected["losses"], numbers[f"D{num_depths}/losses"])
    np.testing.assert_array_equal(collected["weights"], numbers[f"D{num_depths}/weights"])

    recorded = {
        key.removeprefix(f"D{num_depths}/grad/"): value
        for key, value in numbers.items()
        if key.startswith(f"D{num_depths}/grad/")
    }
    named = {
        key if key.startswith("decoder.") else f"mtp_block.{key}": value
        for key, value in gradients[0].items()
    }
    named |= {"token_embedder.embedding": gradients[1], "main_hidden_state": gradients[2]}
    assert named.keys() == recorded.keys()
    for key, expected in recorded.items():
        assert_close(named[key], expected)


@pytest.mark.usefixtures("_full_precision")
@pytest.mark.parametrize(
    ("name", "num_depths", "eval_depth"), [("a", 1, 1), ("a", 2, 1), ("a", 2, 2), ("c", 1, 1)]
)
def test_golden_acceptance(name: str, num_depths: int, eval_depth: int) -> None:
    numbers = golden.load_numbers(name)
    config = maxtext.make_config(num_depths, eval_depth)
    block = maxtext.make_block(config)
    args, rows = maxtext.golden_inputs(name)

    @quick_jit
    def run(params: Any) -> Any:
        return block.apply({"params": params}, *args, mutable=COLLECTIONS, **rows)[1]

    outputs = dict(run(maxtext.golden_params(num_depths)))
    recorded = f"D{num_depths}/eval{eval_depth}/"
    collected = outputs["mtp_acceptance"]["mtp_block"]
    for entry in ("mtp_preds", "mtp_mask"):
        expected = numbers[recorded + entry]
        np.testing.assert_array_equal(collected[entry], expected)
        assert (collected[entry].shape, collected[entry].dtype) == (expected.shape, expected.dtype)
    for suffix, logits in (
        ("", numbers["in/main_logits"] if name == "a" else None),
        ("_biased", one_hot_logits(numbers[recorded + "main_preds_biased"])),
    ):
        if logits is None:
            continue
        outputs["logits"] = jnp.asarray(logits)
        rate = linen.calculate_mtp_acceptance_rate(outputs, config)
        assert_close(rate, numbers[f"{recorded}acceptance_rate{suffix}"])


@pytest.mark.usefixtures("_full_precision")
def test_golden_through_the_modules() -> None:
    # MaxText's constructors, called outside of `jit`.
    numbers = golden.load_numbers("c")
    args, rows = maxtext.golden_inputs("c")
    params = maxtext.golden_params(1)
    of_decoder = {k.partition(".")[2]: v for k, v in params.items() if k.startswith("decoder.")}
    of_block = {k: v for k, v in params.items() if k.startswith("mtp_layer")}
    block = linen.MultiTokenPredictionBlock(
        config=maxtext.make_config(1, 1),
        mesh=None,
        transformer_layer_module=nn.TransformerDecoderLayer,
        decoder=linen.with_decoder_params(maxtext.make_decoder(), of_decoder),
        rngs=jax.random.key(0),
    )
    block = eqx.tree_at(lambda m: m.block, block, linen.from_linen_params(of_block, block.block))
    collections = block(*args, **rows)
    assert_close(collections["mtp_losses"]["mtp_block"]["losses"], numbers["D1/losses"])
    np.testing.assert_array_equal(
        collections["mtp_acceptance"]["mtp_block"]["mtp_preds"], numbers["D1/eval1/mtp_preds"]
    )
    embedding, hidden_states, *_ = args
    shifted = jnp.asarray(numbers["D1/rolled_input_ids"][0])
    hidden = block.mtp_layer_1(
        prev_hidden_state=hidden_states,
        target_token_embedding=embedding[shifted],
        **{name: rows[name] for name in ("position_ids", "decoder_segment_ids", "deterministic")},
    )
    assert_close(hidden, numbers["D1/hidden"][0])
    with pytest.raises(AttributeError, match="mtp_layer_one"):
        _ = block.mtp_layer_one
    assert not hasattr(block, "mtp_layer_2")
    with pytest.raises(AttributeError, match="no `mtp_layer_2`: `depth` must lie in 1 … 1"):
        _ = block.mtp_layer_2


# Which collections are filled


@pytest.mark.parametrize(
    ("model_mode", "eval_depth", "with_targets", "filled"),
    [
        ("train", 0, True, {"mtp_losses"}),
        ("train", 2, True, {"mtp_losses", "mtp_acceptance"}),
        ("train", 2, False, {"mtp_acceptance"}),
        ("eval", 0, True, set()),
        ("eval", 1, True, {"mtp_acceptance"}),
        ("prefill", 1, False, {"mtp_acceptance"}),
    ],
)
def test_collections_are_filled_when_the_original_fills_them(
    model_mode: str, eval_depth: int, with_targets: bool, filled: set[str]
) -> None:
    block = toy_block(toy_config(2, eval_depth))
    inputs = toy_inputs(model_mode=model_mode)
    if not with_targets:
        inputs["target_ids"] = None
    variables = block.init(jax.random.key(0))
    output, collections = block.apply(variables, **inputs, mutable=COLLECTIONS)
    assert output == {}
    assert collections.keys() == filled
    library = library_output(block, variables, toy_inputs())
    if "mtp_losses" in filled:
        collected = collections["mtp_losses"]["mtp_block"]
        assert_close(collected["losses"], library.losses.losses)
        np.testing.assert_array_equal(collected["weights"], library.losses.weights)
    if "mtp_acceptance" in filled:
        collected = collections["mtp_acceptance"]["mtp_block"]
        depth = slice(eval_depth - 1, eval_depth)
        np.testing.assert_array_equal(collected["mtp_preds"], library.acceptance.predictions[depth])
        np.testing.assert_array_equal(collected["mtp_mask"], library.acceptance.mask[depth])


@pytest.mark.parametrize(
    ("mutable", "names"),
    [
        (True, {"params", "mtp_losses", "mtp_acceptance"}),
        ([], set()),
        ("mtp_losses", {"mtp_losses"}),
        (("params", "mtp_acceptance"), {"params", "mtp_acceptance"}),
        ({"unheard_of"}, set()),
    ],
)
def test_mutable_says_what_is_returned(mutable: Any, names: set[str]) -> None:
    block = toy_block()
    variables = block.init(jax.random.key(0))
    output, collections = block.apply(variables, **toy_inputs(), mutable=mutable)
    assert output == {}
    assert collections.keys() == names
    if "params" in names:
        assert collections["params"] is variables["params"]


def test_without_mutable_there_is_the_output_alone() -> None:
    block = toy_block()
    assert block.apply(block.init(jax.random.key(0)), **toy_inputs()) == {}


@pytest.mark.parametrize("mask_dtype", [np.int32, np.int8, bool, np.float32, None])
def test_masks_keep_their_dtype(mask_dtype: Any) -> None:
    block = toy_block()
    mask = None if mask_dtype is None else jnp.asarray(SEGMENTS.astype(mask_dtype))
    _, collections = block.apply(
        block.init(jax.random.key(0)), **toy_inputs(target_mask=mask), mutable=True
    )
    expected = align_oracle(
        *(np.asarray(toy_inputs()[name]) for name in ("input_ids", "target_ids")),
        num_depths=2,
        segment_ids=SEGMENTS,
    )["mask"]
    collected = collections["mtp_acceptance"]["mtp_block"]["mtp_mask"]
    np.testing.assert_array_equal(collected, expected[1:])
    assert collected.dtype == (np.int32 if mask_dtype is None else mask_dtype)
    weights = collections["mtp_losses"]["mtp_block"]["weights"]
    np.testing.assert_array_equal(weights, expected.sum((1, 2)))


def test_without_depths_nothing_is_collected() -> None:
    config = toy_config(0, 0)
    block = toy_block(config)
    variables = block.init(jax.random.key(0))
    assert variables == {"params": {}}
    output = block.apply(variables, **toy_inputs(), mutable=COLLECTIONS)
    assert output == ({}, {})
    assert linen.calculate_mtp_loss(output[1], config) == 0


def test_packed_documents_do_not_leak_as_they_do_in_the_original() -> None:
    block = toy_block()
    inputs = toy_inputs()
    _, collections = block.apply(block.init(jax.random.key(0)), **inputs, mutable=True)
    # MaxText shifts the segment ids themselves from depth to depth, and compares neighbours.
    segments, mask = SEGMENTS.copy(), SEGMENTS != 0
    original = []
    for _ in range(2):
        following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
        same = (segments == following) & (segments != 0)
        mask = np.where(same, np.pad(mask[:, 1:], ((0, 0), (0, 1))), False)
        original.append(mask.sum())
        segments = following
    weights = collections["mtp_losses"]["mtp_block"]["weights"]
    expected = align_oracle(
        *(np.asarray(inputs[name]) for name in ("input_ids", "target_ids")),
        num_depths=2,
        segment_ids=SEGMENTS,
    )["mask"]
    np.testing.assert_array_equal(weights, expected.sum((1, 2)))
    assert weights[0] == original[0]
    # It scores the last token of a document at depth 2, across its end.
    assert weights[1] < original[1]


# What was collected


@pytest.mark.parametrize(
    ("losses", "weights"),
    [
        (jnp.asarray([3.0, 5.0]), jnp.asarray([2.0, 6.0])),
        ((jnp.float32(3), jnp.float32(5)), (jnp.float32(2), jnp.float32(6))),
        ([np.float32(3), np.float32(5)], [np.float32(2), np.float32(6)]),
        ((jnp.asarray([3.0, 5.0]),), (jnp.asarray([2.0, 6.0]),)),
        (jnp.asarray(8.0), jnp.asarray(8.0)),
    ],
)
def test_loss_of_every_form(losses: Any, weights: Any) -> None:
    outputs = {"mtp_losses": {"mtp_block": {"losses": losses, "weights": weights}}}
    loss = linen.calculate_mtp_loss(outputs, maxtext.make_config())
    assert_close(loss, maxtext.LAMBDA * 8 / 8)


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"mtp_losses": {}, "mtp_acceptance": {}},
        {"mtp_losses": None},
        {"mtp_losses": {"mtp_block": {}}, "mtp_acceptance": {"mtp_block": {}}},
        {"mtp_losses": {"mtp_block": {"losses": (), "weights": ()}}},
        {"mtp_losses": {"mtp_block": {"losses": jnp.zeros(0), "weights": jnp.zeros(0)}}},
        {"mtp_losses": {"mtp_block": {"losses": jnp.zeros(2), "weights": jnp.zeros(2)}}},
        {"mtp_acceptance": {"mtp_block": {"mtp_preds": (), "mtp_mask": ()}}},
    ],
)
def test_nothing_collected_is_zero(outputs: Any) -> None:
    config = maxtext.make_config(1, 1)
    assert linen.calculate_mtp_loss(outputs, config) == 0.0
    assert linen.calculate_mtp_acceptance_rate(outputs, config) == 0.0


@pytest.mark.parametrize("eval_depth", [1, 2, 3])
@pytest.mark.parametrize("form", ["array", "tuple", "flat"])
def test_acceptance_of_every_form(eval_depth: int, form: str) -> None:
    rng = np.random.default_rng(eval_depth)
    predictions, main = rng.integers(0, 3, (2, 2, 9))
    mask = rng.integers(0, 2, (2, 9)).astype(np.int32)
    accepted = total = 0
    for b, i in np.ndindex(2, 9):
        if mask[b, i]:
            total += 1
            reference = main[b, i + eval_depth] if i + eval_depth < 9 else 0
            accepted += predictions[b, i] == reference
    forms = {
        "array": (predictions.astype(np.float32)[None], mask[None]),
        "tuple": ((jnp.asarray(predictions, jnp.float32)[None],), (jnp.asarray(mask)[None],)),
        "flat": (jnp.asarray(predictions, jnp.float32), jnp.asarray(mask)),
    }
    preds, masks = forms[form]
    outputs = {
        "mtp_acceptance": {"mtp_block": {"mtp_preds": preds, "mtp_mask": masks}},
        "logits": jnp.asarray(one_hot_logits(main)),
    }
    rate = linen.calculate_mtp_acceptance_rate(outputs, maxtext.make_config(3, eval_depth))
    assert_close(rate, 100 * accepted / total)


def test_collections_of_another_block_raise() -> None:
    config = maxtext.make_config(1, 1)
    other = {"other": {"losses": jnp.ones(1), "weights": jnp.ones(1)}}
    with pytest.raises(ValueError, match=r"must hold 'mtp_block'; got \['other'\]"):
        linen.calculate_mtp_loss({"mtp_losses": other}, config)
    with pytest.raises(ValueError, match=r"must hold 'mtp_block'; got \['other'\]"):
        linen.calculate_mtp_acceptance_rate({"mtp_acceptance": other}, config)
    assert_rejects("intermediate_outputs", linen.calculate_mtp_loss, ({}, {}), config)
    collected = {"mtp_preds": jnp.ones((1, 2, 3)), "mtp_mask": jnp.ones((1, 2, 3))}
    with pytest.raises(ValueError, match="must hold the main model's logits under 'logits'"):
        linen.calculate_mtp_acceptance_rate({"mtp_acceptance": {"mtp_block": collected}}, config)
