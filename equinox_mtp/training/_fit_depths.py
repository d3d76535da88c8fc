"""Prediction depths over a released model, fitted to it before the first step."""

import dataclasses
import math
from collections.abc import Iterator

import jax
from tqdm import tqdm

import equinox_mtp as emtp
from equinox_mtp.distillation import start_from_trunk

from ._prepare import Run
from ._processes import is_first
from ._released import split_model
from ._step import TrainState, aligned_batch

_TOKENS_PER_FEATURE = 32


def with_fitted_depths(run: Run, state: TrainState) -> TrainState:
    """The state before the first step, with depths as `start_from_trunk` makes them."""
    (_, embed_size) = state.model.block.layer(1).projection_layer.kernel.shape
    batches = first_batches(run, _TOKENS_PER_FEATURE * embed_size)
    fitted = start_from_trunk(state.combined(run.frozen), batches)
    trains, _ = split_model(fitted, run.config)
    return dataclasses.replace(state, model=jax.tree.map(_placed_like, trains, state.model))


def _placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    # An array that is put on a device stays there, and the second step would be compiled anew.
    return jax.device_put(x, like.sharding) if like.committed else x


def first_batches(run: Run, num_tokens: int) -> Iterator[emtp.Batch]:
    """The rows of the first steps, a microbatch at a time."""
    config = run.config
    size = config.batch_size // config.accumulate
    num_batches = math.ceil(num_tokens / (size * config.seq_len))
    for index in tqdm(range(num_batches), "fitting depths", delay=2, disable=not is_first()):
        rows = run.train_rows.read(run.train_rows.of_step(index, size, config.seed))
        yield aligned_batch(rows, config.depths)
