"""One training step and one evaluation: functions of a state and a batch."""

import dataclasses
import functools
import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int32, PyTree

import equinox_mtp as emtp

from .._types import HostOrDeviceArray
from ._architecture import architecture_model
from ._config import TrainConfig, without_output
from ._losses import depth_losses, model_losses
from ._packing import PackedRows, Rows
from ._placement import ONE_DEVICE, Placement
from ._routers import Auxiliary, TokenCounts


class TrainState(eqx.Module):
    """What a step changes, and a checkpoint holds.

    Of a model that is frozen, `model` holds the prediction depths alone; `combined` adds the rest.
    """

    model: emtp.MTPModel
    optimizer_state: PyTree[Any]
    step: Int32[Array, ""]

    def combined(self, frozen: emtp.MTPModel | None) -> emtp.MTPModel:
        """The whole model."""
        return self.model if frozen is None else eqx.combine(self.model, frozen)


class StepInputs(NamedTuple):
    """What a step reads, and leaves as it is.

    **Fields:**

    - `rows`: of all microbatches, `[microbatch batch …]`.
    - `frozen`: what does not train of a released model; `None` if all of it does.
    - `draft_vocab`: the ids that depths learn to draft from; `None` for all.
    - `hidden_states`: what `main_hidden_states` makes of the rows, if that is known; the step of a
        frozen model runs the depths alone then.
    """

    rows: Rows
    config: TrainConfig
    optimizer: optax.GradientTransformation
    placement: Placement
    frozen: emtp.MTPModel | None = None
    draft_vocab: Int32[HostOrDeviceArray, "draft_vocab"] | None = None
    hidden_states: Float[Array, "microbatch batch seq embed"] | None = None


class StepMetrics(eqx.Module):
    """Sums and counts of one step, over all microbatches.

    Over a frozen model `main` is `None`: that loss has no gradient, and would cost a pass over the
    vocabulary. Evaluations have it. `routers` has nothing in it for a model without experts.
    """

    main: emtp.TokenLoss | None
    mtp: emtp.MTPLosses
    routers: Auxiliary
    grad_norm: Float32[Array, ""]
    scaling_factor: Float32[Array, ""]


class Evaluation(eqx.Module):
    """Sums and counts over held-out text."""

    main: emtp.TokenLoss
    mtp: emtp.MTPLosses
    main_model: emtp.MTPAcceptanceRate
    ground_truth: emtp.MTPAcceptanceRate

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return jax.tree.map(jnp.add, self, other)


def make_model(
    config: TrainConfig,
    vocab_size: int,
    placement: Placement = ONE_DEVICE,
    architecture: str | None = None,
) -> emtp.MTPModel:
    """The model that options describe, or an architecture, with fresh parameters."""
    if architecture is not None:
        return architecture_model(architecture, config)
    transformer = placement.transformer(config, vocab_size)
    decoder_key, block_key = jax.random.split(jax.random.key(config.seed))
    return emtp.MTPModel(
        decoder=emtp.nn.TransformerDecoder(transformer, key=decoder_key),
        block=emtp.MultiTokenPredictionBlock(
            config.mtp(),
            functools.partial(emtp.nn.TransformerDecoderLayer, transformer),
            embed_size=transformer.embed_size,
            key=block_key,
        ),
    )


# Functions that are equal for equal options: steps are compiled for them, too.


@dataclasses.dataclass(frozen=True)
class _Init:
    options: TrainConfig

    def __call__(self, params: optax.Params) -> optax.OptState:
        return _optimizer(self.options).init(params)


@dataclasses.dataclass(frozen=True)
class _Update:
    options: TrainConfig

    def __call__(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return _optimizer(self.options).update(updates, state, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW or Muon, with warm-up, cosine decay and clipping."""
    options = without_output(config)
    return optax.GradientTransformation(_Init(options), _Update(options))


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    warmup = min(config.warmup_steps, config.steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=config.steps,
        end_value=0.1 * config.learning_rate,
    )
    decay = {"weight_decay": config.weight_decay, "mask": emtp.weight_decay_mask}
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, b2=0.95, **decay)
    else:
        update = optax.chain(
            optax.contrib.muon(
                1.0,
                adam_b2=0.95,
                muon_weight_dimension_numbers=emtp.muon_dimension_numbers,
                # Updates as large as Adam's, so that one rate does for both (arXiv 2502.16982).
                consistent_rms=0.2,
            ),
            # Not its own decay: that of the matrices leaves out the others, and theirs the mask.
            optax.scale(-1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(schedule),
        )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)


@eqx.filter_jit
def make_state(
    config: TrainConfig,
    vocab_size: int,
    optimizer: optax.GradientTransformation,
    placement: Placement = ONE_DEVICE,
    architecture: str | None = None,
) -> TrainState:
    """The state before the first step, made where it belongs."""
    model = make_model(config, vocab_size, placement, architecture)
    optimizer_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return placement.constrain(TrainState(model, optimizer_state, jnp.zeros((), jnp.int32)))


@eqx.filter_jit
def state_of(
    model: emtp.MTPModel, optimizer: optax.GradientTransformation, placement: Placement = ONE_DEVICE
) -> TrainState:
    """The state before the first step of parameters that exist."""
    optimizer_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return placement.constrain(TrainState(model, optimizer_state, jnp.zeros((), jnp.int32)))


def aligned_batch(rows: Rows, num_depths: int) -> emtp.Batch:
    """Packed rows as the model reads them, with the targets of all depths."""
    return emtp.make_batch(rows.tokens, segment_ids=rows.segment_ids).align(num_depths)


def scaling_switch_step(config: TrainConfig) -> int:
    """The first step with the second λ."""
    # Rounded first, as 0.29 · 100 is 28.999… in floating point.
    return math.floor(round(config.mtp_scaling_switch * config.steps, 6))


def count_targets(batches: emtp.Batch) -> tuple[Float32[Array, ""], Float32[Array, "depth"]]:
    """Scored tokens of all microbatches: of the main model, and of each MTP layer."""
    assert batches.targets is not None
    mtp = jnp.sum(batches.targets.mask, axis=(0, 2, 3), dtype=jnp.float32)
    return jnp.sum(batches.target_mask, dtype=jnp.float32), mtp


@eqx.filter_jit(donate="all-except-first")
def train_step(inputs: StepInputs, state: TrainState) -> tuple[TrainState, StepMetrics]:
    """One optimizer step.

    The gradient is that of the whole batch, however many microbatches it is split into: every
    microbatch's sums are divided by the counts of all.
    """
    rows, config, optimizer, placement, frozen, draft_vocab, hidden_states = inputs
    # Which token a depth predicts follows from the text; only then may positions be reordered.
    batches = placement.reorder(jax.vmap(partial(aligned_batch, num_depths=config.depths))(rows))
    main_count, mtp_counts = count_targets(batches)
    token_counts = TokenCounts.of(batches)
    step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    scaling_factor = scaling_factor_at(state.step, config)
    objective = partial(
        emtp.calculate_mtp_loss,
        scaling_factor=scaling_factor,
        depth_weights=depth_weights_at(state.step, config),
        total_weights=mtp_counts,
    )

    def loss_fn(model: emtp.MTPModel, batch: emtp.Batch, key: Array, hidden_states: Array | None):
        if frozen is not None:
            model = eqx.combine(model, frozen)
            main = None
            loss, mtp, routers = depth_losses(
                model, batch, config, objective, key, draft_vocab, hidden_states
            )
        else:
            main, loss, mtp, routers = model_losses(
                model, batch, config, objective, key, draft_vocab
            )
            loss += main.loss / jnp.maximum(main_count, 1)
        return loss + routers.loss(config, token_counts), (main, mtp, routers)

    def run_microbatch(total: PyTree[Any], inputs: tuple[Any, ...]):
        (_, losses), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(state.model, *inputs)
        return jax.tree.map(jnp.add, total, grads), losses

    params = eqx.filter(state.model, eqx.is_inexact_array)
    keys = jax.random.split(step_key, config.accumulate)
    microbatches = (batches, keys, hidden_states)
    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, losses = jax.lax.scan(run_microbatch, zeros, microbatches)
    main, mtp, routers = jax.tree.map(partial(jnp.sum, axis=0), losses)

    updates, optimizer_state = optimizer.update(grads, state.optimizer_state, params)
    model = eqx.apply_updates(state.model, updates)
    model = routers.updated(model, config.router_bias_rate)
    metrics = StepMetrics(main, mtp, routers, optax.tree.norm(grads), scaling_factor)
    return placement.constrain(TrainState(model, optimizer_state, state.step + 1)), metrics


def scaling_factor_at(step: Int32[Array, ""], config: TrainConfig) -> Float32[Array, ""]:
    """The depths' λ; 1 over a frozen model, which has no other loss to weigh them against."""
    if config.freeze_model:
        return jnp.ones((), jnp.float32)
    first, then = config.mtp_scaling
    return jnp.where(step < scaling_switch_step(config), first, then).astype(jnp.float32)


def depth_weights_at(step: Int32[Array, ""], config: TrainConfig) -> Float32[Array, "depth"]:
    """By depth, and by the curriculum at a step, if there is one."""
    weights = emtp.exponential_depth_weights(config.depths, config.depth_decay)
    if config.curriculum == "none":
        return weights
    order: Any = config.curriculum
    return weights * emtp.curriculum_depth_weights(config.depths, step / config.steps, order)


@eqx.filter_jit
def evaluate_batch(model: emtp.MTPModel, rows: Rows, placement: Placement) -> Evaluation:
    """Losses and acceptance on one batch."""
    batch = placement.reorder(aligned_batch(rows, model.block.config.num_depths))
    output = model(batch, inference=True)
    acceptance, predictions = placement.restore((output.mtp.acceptance, output.predictions))
    return Evaluation(
        main=output.main,
        mtp=output.mtp.losses,
        main_model=emtp.calculate_mtp_acceptance_rate(acceptance, predictions),
        ground_truth=emtp.calculate_mtp_acceptance_rate(acceptance, None),
    )


def evaluate(
    model: emtp.MTPModel,
    rows: PackedRows,
    batch_size: int,
    max_rows: int,
    placement: Placement = ONE_DEVICE,
) -> Evaluation:
    """Losses and acceptance on the first `max_rows` held-out rows."""
    evaluations = [
        evaluate_batch(model, placement.load(rows, indices), placement)
        for indices in rows.in_order(batch_size, max_rows)
    ]
    return functools.reduce(lambda x, y: x + y, evaluations)
