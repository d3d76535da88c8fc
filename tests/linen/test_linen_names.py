"""The README's table of MaxText's names: every row is there, and both sides do the same."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import pytest
from golden import assert_close
from maxtext import ToyLayer, library_output, toy_block, toy_config, toy_decoder, toy_inputs

import equinox_mtp as emtp
from equinox_mtp import linen

README = (Path(linen.__file__).parent / "README.md").read_text(encoding="utf8")
TABLE = README.partition("| MaxText, and `equinox_mtp.linen` |")[2].partition("\n\n")[0]
ROWS = {
    old: re.findall(r"`([^`]*)`", new)
    for old, new in re.findall(r"^\| `([^`]*)` \| ([^|]*) \|", TABLE, flags=re.MULTILINE)
}


def collected() -> tuple[Any, Any]:
    """The shim's collections, and the library's output."""
    block = toy_block()
    variables = block.init(jax.random.key(0))
    _, outputs = block.apply(variables, **toy_inputs(), mutable=True)
    return outputs, library_output(block, variables, toy_inputs())


def linen_block() -> None:
    outputs, library = collected()
    assert_close(outputs["mtp_losses"]["mtp_block"]["losses"], library.losses.losses)
    inputs = toy_inputs()
    model = emtp.MTPModel(toy_decoder(), functional_block())
    names = ("input_ids", "target_ids", "target_mask", "position_ids")
    output = model(
        *(inputs[name] for name in names[:3]),
        position_ids=inputs["position_ids"],
        segment_ids=inputs["decoder_segment_ids"],
        inference=True,
    )
    shim = toy_block()
    embedded = toy_decoder().embedding[inputs["input_ids"]]
    variables = {"params": linen.to_linen_params(model.block)}
    _, outputs = shim.apply(variables, **{**inputs, "main_hidden_state": embedded}, mutable=True)
    assert_close(outputs["mtp_losses"]["mtp_block"]["losses"], output.mtp.losses.losses)


def functional_block() -> emtp.MultiTokenPredictionBlock:
    config = emtp.MTPConfig.preset("maxtext", 2)
    return emtp.MultiTokenPredictionBlock(config, ToyLayer, embed_size=8, key=jax.random.key(0))


def module_block() -> None:
    block = linen.MultiTokenPredictionBlock(
        toy_config(), None, ToyLayer, toy_decoder(), rngs=jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, block.block, functional_block())
    losses = block(**toy_inputs())["mtp_losses"]["mtp_block"]["losses"]
    variables = {"params": linen.to_linen_params(block.block)}
    assert_close(losses, library_output(toy_block(), variables, toy_inputs()).losses.losses)


def layers() -> tuple[linen.MultiTokenPredictionLayer, emtp.MultiTokenPredictionLayer]:
    config = emtp.MTPConfig.preset("maxtext")
    old = linen.MultiTokenPredictionLayer(toy_config(), None, 1, ToyLayer, rngs=jax.random.key(0))
    new = emtp.MultiTokenPredictionLayer(config, ToyLayer, embed_size=8, key=jax.random.key(0))
    return old, new


def layer() -> None:
    old, new = layers()
    inputs = toy_inputs()
    hidden = inputs["main_hidden_state"]
    positions, segments = inputs["position_ids"], inputs["decoder_segment_ids"]
    actual = old(
        hidden, 2 * hidden, position_ids=positions, decoder_segment_ids=segments, deterministic=True
    )
    expected, _ = new(
        hidden, 2 * hidden, position_ids=positions, segment_ids=segments, inference=True
    )
    assert_close(actual, expected)


def part(name: str) -> Callable[[], None]:
    def check() -> None:
        old, new = layers()
        assert eqx.tree_equal(getattr(old, name), getattr(new, name))
        assert jax.tree.leaves(getattr(old, name))

    return check


def shift(by_segment: bool) -> Callable[[], None]:
    def check() -> None:
        x, segments = np.asarray([[5, 6, 7, 8, 9]]), np.asarray([[1, 1, 2, 2, 0]])
        if by_segment:
            expected = [[6, 0, 8, 0, 0]]
            outs = (
                linen.roll_and_mask_by_segment(x, segments),
                emtp.roll_and_mask_by_segment(x, segments),
                emtp.align_targets(x, x, num_depths=1, segment_ids=segments).input_ids[0],
            )
        else:
            expected = [[6, 7, 8, 9, 0]]
            outs = (linen.roll_and_mask(x), emtp.roll_and_mask(x))
        for out in outs:
            np.testing.assert_array_equal(out, expected)

    return check


def losses_class() -> None:
    outputs, library = collected()
    read = linen.mtp_losses.from_variables(outputs)
    assert read is not None
    assert isinstance(library.losses, emtp.MTPLosses)
    assert_close(read.losses, library.losses.losses)
    np.testing.assert_array_equal(read.weights, library.losses.weights)
    assert linen.mtp_losses.from_variables({}) is None


def acceptance_class() -> None:
    outputs, library = collected()
    read = linen.mtp_acceptance.from_variables(outputs)
    assert read is not None
    assert isinstance(library.acceptance, emtp.MTPAcceptance)
    np.testing.assert_array_equal(read.mtp_preds, library.acceptance.predictions[1:])
    np.testing.assert_array_equal(read.mtp_mask, library.acceptance.mask[1:])
    assert linen.mtp_acceptance.from_variables({}) is None


def loss() -> None:
    outputs, library = collected()
    actual = linen.calculate_mtp_loss(outputs, toy_config())
    expected = emtp.calculate_mtp_loss(library.losses, scaling_factor=maxtext.LAMBDA)
    assert_close(actual, expected)
    total = maxtext.LAMBDA * library.losses.losses.sum() / library.losses.weights.sum()
    assert_close(actual, total)


def acceptance_rate() -> None:
    outputs, library = collected()
    logits = jax.random.normal(jax.random.key(0), (2, 7, 11))
    actual = linen.calculate_mtp_acceptance_rate({**outputs, "logits": logits}, toy_config())
    rate = emtp.calculate_mtp_acceptance_rate(library.acceptance, jnp.argmax(logits, axis=-1))
    assert_close(actual, rate.percent[1])


CHECKS: dict[str, Callable[[], None]] = {
    "multi_token_prediction_block_as_linen": linen_block,
    "MultiTokenPredictionBlock": module_block,
    "MultiTokenPredictionLayer": layer,
    "MultiTokenPredictionLayer.embedding_norm": part("embedding_norm"),
    "MultiTokenPredictionLayer.hidden_state_norm": part("hidden_state_norm"),
    "MultiTokenPredictionLayer.projection_layer": part("projection_layer"),
    "MultiTokenPredictionLayer.transformer_layer": part("transformer_layer"),
    "roll_and_mask": shift(by_segment=False),
    "roll_and_mask_by_segment": shift(by_segment=True),
    "mtp_losses": losses_class,
    "mtp_acceptance": acceptance_class,
    "calculate_mtp_loss": loss,
    "calculate_mtp_acceptance_rate": acceptance_rate,
}


def test_every_name_has_a_row_and_a_check() -> None:
    assert ROWS.keys() == CHECKS.keys()


@pytest.mark.parametrize("old", CHECKS)
def test_row(old: str) -> None:
    name, _, attribute = old.partition(".")
    found = getattr(linen, name)
    assert found.__module__.startswith("equinox_mtp.linen")
    assert not attribute or isinstance(inspect.getattr_static(found, attribute), property)
    assert ROWS[old]
    for new in ROWS[old]:
        if not new.startswith("block."):
            assert getattr(emtp, new).__module__.startswith("equinox_mtp._")
    CHECKS[old]()


def test_names_without_a_namesake_are_at_the_top() -> None:
    for name in ("multi_token_prediction_block_as_linen", "mtp_losses", "mtp_acceptance"):
        assert getattr(emtp, name) is getattr(linen, name)
