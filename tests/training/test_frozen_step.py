"""What the compiled step over a frozen model computes, and what it leaves out."""

import functools
from pathlib import Path
from typing import Any

import checkpoints as released
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from hlo import compile_for, parameters, products

import equinox_mtp as emtp
from equinox_mtp.distillation import draft_losses
from equinox_mtp.training import Rows, TrainConfig
from equinox_mtp.training._losses import main_hidden_states
from equinox_mtp.training._placement import ONE_DEVICE
from equinox_mtp.training._released import released_model, split_model
from equinox_mtp.training._report import MetricsFile, describe, plot_curves, train_record
from equinox_mtp.training._step import (
    StepInputs,
    TrainState,
    aligned_batch,
    make_optimizer,
    state_of,
    train_step,
)

VOCAB, DEPTHS, SEQ = 320, 2, 24


def config_of(objective: Any, accumulate: int = 1) -> TrainConfig:
    return TrainConfig(
        model=released.FOLDER / "qwen3",
        freeze_model=True,
        objective=objective,
        depths=DEPTHS,
        preset="fast_mtp",
        seq_len=SEQ,
        batch_size=2 * accumulate,
        accumulate=accumulate,
    )


@functools.cache
def parts() -> tuple[emtp.MTPModel, emtp.MTPModel]:
    config = config_of("cross_entropy")
    heads, frozen = split_model(released_model(config, ONE_DEVICE), config)
    assert frozen is not None
    return heads, frozen


def rows_of(accumulate: int) -> Rows:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (accumulate, 2, SEQ + 1), np.int32)
    return Rows(tokens, np.ones_like(tokens))


def inputs_of(objective: Any, accumulate: int = 1, **options: Any) -> tuple[StepInputs, TrainState]:
    config, (heads, frozen) = config_of(objective, accumulate), parts()
    optimizer = make_optimizer(config)
    # A step takes the state for itself.
    state = state_of(
        jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, heads), optimizer
    )
    return StepInputs(rows_of(accumulate), config, optimizer, ONE_DEVICE, frozen, **options), state


def hidden_states_of(rows: Rows) -> jax.Array:
    decoder = parts()[1].decoder
    run = eqx.filter_jit(lambda rows: main_hidden_states(decoder, aligned_batch(rows, DEPTHS)))
    one_by_one = [run(jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(rows.tokens.shape[0])]
    return jnp.stack(one_by_one)


def temporary_bytes(function: Any, *arguments: Any) -> int:
    compiled, _ = compile_for(function, *arguments)
    return compiled.compiled.memory_analysis().temp_size_in_bytes


def vocabulary_flops(function: Any, *arguments: Any) -> int:
    """Of the matrix products with the output head."""
    _, program = compile_for(function, *arguments)
    return sum(product.flops for product in products(program) if VOCAB in product.sizes)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["cross_entropy", "total_variation"])
def test_a_step_makes_no_pass_over_the_vocabulary_for_the_main_loss(objective: Any) -> None:
    """It takes the products that the depths take by themselves, and fewer than with that loss."""
    (heads, frozen), batch = (
        parts(),
        aligned_batch(jax.tree.map(lambda x: x[0], rows_of(1)), DEPTHS),
    )

    def loss_fn(heads: Any, with_main: bool) -> Any:
        model = eqx.combine(heads, frozen)
        if objective == "cross_entropy":
            output: Any = model(batch, predictions=False)
            return output.mtp.loss, (output.main.loss if with_main else None)
        drafts = draft_losses(model, batch, divergence=objective)
        return drafts.loss, (drafts.main.loss if with_main else None)

    value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn, has_aux=True))
    without, with_main = (vocabulary_flops(value_and_grad, heads, x) for x in (False, True))
    assert with_main - without == 2 * (2 * SEQ) * VOCAB * 64
    inputs, state = inputs_of(objective)
    assert vocabulary_flops(train_step, inputs, state) == without


def test_a_step_with_hidden_states_has_no_main_model() -> None:
    decoder: Any = parts()[1].decoder
    layers = {x.shape for x in jax.tree.leaves(eqx.filter(decoder.layers, eqx.is_array))}
    inputs, state = inputs_of("total_variation")
    _, whole = compile_for(train_step, inputs, state)
    assert layers <= parameters(whole)
    known = inputs._replace(hidden_states=hidden_states_of(inputs.rows))
    _, program = compile_for(train_step, known, state)
    assert not layers & parameters(program)

    def flops(program: str) -> int:
        return sum(product.flops for product in products(program))

    def run_decoder(rows: Rows) -> jax.Array:
        return jnp.sum(main_hidden_states(decoder, aligned_batch(rows, DEPTHS)))

    first = jax.tree.map(lambda x: x[0], inputs.rows)
    _, of_decoder = compile_for(eqx.filter_jit(run_decoder), first)
    assert flops(whole) - flops(program) == flops(of_decoder) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "accumulate"), [("cross_entropy", 2), ("hybrid", 1)])
def test_hidden_states_change_nothing(objective: Any, accumulate: int) -> None:
    inputs, state = inputs_of(objective, accumulate)
    known, other = inputs_of(objective, accumulate)
    known = known._replace(hidden_states=hidden_states_of(inputs.rows))
    state, metrics = train_step(inputs, state)
    other, of_known = train_step(known, other)
    assert_close(of_known.mtp.mean, metrics.mtp.mean, rtol=1e-6)
    assert_close(of_known.grad_norm, metrics.grad_norm)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_step_reports_the_depths_alone(tmp_path: Path) -> None:
    _, metrics = train_step(*inputs_of("cross_entropy"))
    assert metrics.main is None
    record = train_record(7, metrics)
    assert set(record) == {"split", "step", "mtp_losses", "grad_norm", "scaling_factor"}
    assert record["scaling_factor"] == 1
    first, second = metrics.mtp.mean.tolist()
    assert describe(record) == f"depths {first:.3f}, {second:.3f}"
    for before in ([], [record]):
        file = MetricsFile(tmp_path / "metrics.jsonl", last_step=7, depths=DEPTHS)
        assert file.records == before
        file.write(record)
        file.close()
        plot_curves(file, tmp_path / "curves.png")
    spoilt = eqx.tree_at(lambda m: m.mtp.losses, metrics, jnp.asarray([jnp.nan, 1.0]))
    with pytest.raises(FloatingPointError, match=r"at step 7: mtp_losses \[nan, .*\], grad_norm "):
        train_record(7, spoilt)


def test_a_step_takes_the_memory_of_a_forward_pass_and_of_the_depths() -> None:
    """Beside the parameters: no residuals of the main model, and no copy of it."""
    inputs, state = inputs_of("hybrid")
    states = hidden_states_of(inputs.rows)
    of_depths = temporary_bytes(train_step, *inputs_of("hybrid", hidden_states=states))
    decoder, batch = parts()[1].decoder, jax.tree.map(lambda x: x[0], inputs.rows)
    run = eqx.filter_jit(lambda decoder, x: main_hidden_states(decoder, aligned_batch(x, DEPTHS)))
    forward = temporary_bytes(run, decoder, batch)
    assert temporary_bytes(train_step, inputs, state) <= of_depths + forward + states.nbytes
