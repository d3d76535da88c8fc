"""What a step minimises: of a whole model, or of the depths over a frozen one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import equinox_mtp as emtp
from equinox_mtp.distillation import draft_losses

from .._decoder import split_auxiliary
from .._types import HostOrDeviceArray
from ._config import TrainConfig
from ._routers import Auxiliary


def model_losses(
    model: emtp.MTPModel,
    batch: emtp.Batch,
    config: TrainConfig,
    objective: Any,
    key: Array,
    draft_vocab: HostOrDeviceArray | None = None,
) -> tuple[emtp.TokenLoss, Array, emtp.MTPLosses, Auxiliary]:
    """The main model's loss, what the depths minimise, its parts, and what routers have done."""
    if config.objective == "cross_entropy":
        output = model(batch, objective=objective, predictions=False, key=key, inference=False)
        routers = Auxiliary.of(output.auxiliary, output.mtp.auxiliary)
        return output.main, output.mtp.loss, output.mtp.losses, routers
    drafts = draft_losses(
        model,
        batch,
        divergence=config.objective,
        draft_vocab=draft_vocab,
        objective=objective,
        key=key,
        inference=False,
    )
    return drafts.main, drafts.loss, drafts.losses, Auxiliary.of(*drafts.auxiliary)


def depth_losses(
    model: emtp.MTPModel,
    batch: emtp.Batch,
    config: TrainConfig,
    objective: Any,
    key: Array,
    draft_vocab: HostOrDeviceArray | None = None,
    hidden_states: Array | None = None,
) -> tuple[Array, emtp.MTPLosses, Auxiliary]:
    """What the depths minimise over a frozen main model, its parts, and what routers have done.

    Without `hidden_states` the main model runs first; it has no dropout.
    """
    if hidden_states is None:
        hidden_states = main_hidden_states(model.decoder, batch)
    options: dict[str, Any] = {"objective": objective, "key": key, "inference": False}
    if config.objective == "cross_entropy":
        assert batch.targets is not None
        mtp = model.block(
            model.decoder,
            hidden_states,
            batch.targets,
            predictions=False,
            **_context(batch),
            **options,
        )
        return mtp.loss, mtp.losses, Auxiliary.of(None, mtp.auxiliary)
    drafts = draft_losses(
        model,
        batch,
        divergence=config.objective,
        draft_vocab=draft_vocab,
        hidden_states=hidden_states,
        **options,
    )
    # The routers of the main model stay as they are.
    return drafts.loss, drafts.losses, Auxiliary.of(None, drafts.auxiliary[1])


def main_hidden_states(
    decoder: emtp.AbstractDecoder, batch: emtp.Batch
) -> Float[Array, "batch seq embed"]:
    """What the depths read of a frozen main model."""
    output = decoder(jnp.asarray(batch.input_ids), inference=True, **_context(batch))
    return split_auxiliary(output)[0]


def _context(batch: emtp.Batch) -> dict[str, Any]:
    context = {"position_ids": batch.position_ids, "segment_ids": batch.segment_ids}
    return jax.tree.map(jnp.asarray, context)
