"""A language model with Multi-Token Prediction: the page to read first."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Integer, PRNGKeyArray, PyTree

from ._alignment import MTPTargets, default_position_ids, scored_targets
from ._batch import Batch
from ._block import MTPOutput, MultiTokenPredictionBlock
from ._checks import check_ids
from ._decoder import AbstractDecoder, split_auxiliary
from ._losses import Objective, TokenLoss, calculate_mtp_loss
from ._types import HostOrDeviceArray, Scalar, checked
from .cross_entropy import head_vocab_size, summed_linear_cross_entropy


class ModelOutput(eqx.Module):
    """Everything that a model computed.

    >>> loss = output.main.mean + output.mtp.loss  # what to minimise
    >>> output.predictions.shape
    (2, 8)

    **Fields:**

    - `main`: the main model's cross-entropy, as sum and count; `main.mean` is its loss.
    - `mtp`: the block's output; `mtp.loss` is what it adds to the main model's loss.
    - `predictions`: the main model's argmax at each position, or `None` if not asked for.
    - `auxiliary`: what the decoder returned alongside hidden states, or `None`.
    """

    main: TokenLoss
    mtp: MTPOutput
    predictions: Int32[Array, "batch seq"] | None
    auxiliary: PyTree[Any]


class MTPModel(eqx.Module):
    """A decoder, and the prediction depths over it.

    See DeepSeek-V3 (arXiv 2412.19437, §2.2). Nothing is stored twice: the block is lent the
    decoder's embedding, final norm and output head.

    >>> output = eqx.filter_jit(model)(batch)
    >>> print(output.main.weight, output.mtp.losses.weights)  # targets scored
    16.0 [14. 12.]
    """

    decoder: AbstractDecoder
    block: MultiTokenPredictionBlock

    def __check_init__(self) -> None:
        for name, wanted in (
            ("decoder", AbstractDecoder),
            ("block", MultiTokenPredictionBlock),
        ):
            value = getattr(self, name)
            if not isinstance(value, wanted):
                raise TypeError(
                    f"`{name}` must be of the class `{wanted.__name__}`; got "
                    f"`{type(value).__name__}`. A "
                    "model of your own becomes a decoder by a wrapper, as README shows."
                )

    @checked
    def __call__(
        self,
        input_ids: Batch | Integer[HostOrDeviceArray, "batch seq"],
        target_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None,
        target_mask: Integer[HostOrDeviceArray, "batch seq"]
        | Bool[HostOrDeviceArray, "batch seq"]
        | None = None,
        *,
        position_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None,
        segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None,
        targets: MTPTargets | None = None,
        chain_mask: bool = False,
        predictions: bool = True,
        z_loss_weight: Scalar | None = None,
        objective: Objective = calculate_mtp_loss,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> ModelOutput:
        """Runs the main model and all depths on a batch: `model(make_batch(tokens))`.

        **Arguments:**

        - `input_ids`: a `Batch`; or token ids, and then the next five arguments are its other
            fields.
        - `target_ids`, `target_mask`: the successor of each token, and which of them count; `None`
            counts all. In packed rows, mask the last token of each document if its target is the
            next document's first, as `inputs_and_targets` does.
        - `position_ids`: count from 0 in each document if `None`.
        - `segment_ids`: which document each position belongs to; 0 is padding. `None` means that
            every row is one document. No depth predicts beyond a run of one id, but attention goes
            by the ids alone: give the documents of a row different ones.
        - `targets`: the depths' targets, if they were aligned before. Needed if positions are not
            in the order of the text, as `sharding.reorder` puts them; the decoder must find what
            precedes what from `position_ids` then.
        - `chain_mask`: see `align_targets`; ignored if the batch has `targets`.
        - `predictions`: whether to find every position's best ids, for acceptance.
        - `z_loss_weight`: of a z-loss on the main model's and all depths' tokens; `None` for none.
        - `objective`: the reduction of the depths' losses to `mtp.loss`, as
            `functools.partial(calculate_mtp_loss, scaling_factor=0.3)`.
        - `key`, `inference`: for dropout.

        **Returns:** `ModelOutput`.

        **Raises:** `ValueError` for ids in NumPy arrays that do not fit 32 bits, and for targets
        there that count and are not in the vocabulary of a head that is a matrix. Ids on the device
        are not read: an input id outside is embedded as the decoder does, and a target outside has
        the log-sum-exp for a loss.
        """
        if isinstance(input_ids, Batch):
            _check_alone(target_ids, target_mask, position_ids, segment_ids, targets)
            batch = input_ids
        else:
            batch = _as_batch(
                input_ids, target_ids, target_mask, position_ids, segment_ids, targets
            )
        batch, targets = checked_batch(self, batch, chain_mask)
        decoder_key, block_key = (None, None) if key is None else jax.random.split(key)
        context: dict[str, Any] = {
            "position_ids": batch.position_ids,
            "segment_ids": batch.segment_ids,
            "inference": inference,
        }
        losses: dict[str, Any] = {"predictions": predictions, "z_loss_weight": z_loss_weight}
        hidden_states, auxiliary = split_auxiliary(
            self.decoder(jnp.asarray(batch.input_ids), **context, key=decoder_key)
        )
        main, best_ids = main_loss(self.decoder, hidden_states, batch, **losses)
        mtp = self.block(
            self.decoder,
            hidden_states,
            targets,
            objective=objective,
            **losses,
            **context,
            key=block_key,
        )
        return ModelOutput(main=main, mtp=mtp, predictions=best_ids, auxiliary=auxiliary)


def checked_batch(model: MTPModel, batch: Batch, chain_mask: bool) -> tuple[Batch, MTPTargets]:
    """The batch on the device, and the depths' targets; ids on the host are checked first."""
    vocab_size = head_vocab_size(model.decoder.output_head())
    is_scored = _scored_on_host(batch)
    ids = {
        "target_ids": check_ids("target_ids", batch.target_ids, vocab_size, is_scored),
        "input_ids": check_ids("input_ids", batch.input_ids),
        "position_ids": check_ids("position_ids", batch.position_ids),
    }
    if batch.segment_ids is not None:
        ids["segment_ids"] = check_ids("segment_ids", batch.segment_ids)
    batch = jax.tree.map(jnp.asarray, dataclasses.replace(batch, **ids))
    targets = batch.targets
    if targets is None:
        targets = batch.align(model.block.config.num_depths, chain_mask=chain_mask).targets
        assert targets is not None
    return batch, targets


def main_loss(
    decoder: AbstractDecoder, hidden_states: Array, batch: Batch, **options: Any
) -> tuple[TokenLoss, Array | None]:
    """The main model's cross-entropy, as sum and count, and its best ids."""
    scored = scored_targets(batch.target_ids, batch.target_mask, batch.segment_ids)
    summed = summed_linear_cross_entropy(
        decoder.final_norm(hidden_states),
        decoder.output_head(),
        jnp.asarray(batch.target_ids),
        scored,
        **options,
    )
    count = jnp.sum(scored, dtype=jnp.float32)
    return TokenLoss(summed.loss, count, z_loss=summed.z_loss), summed.predictions


def _as_batch(
    input_ids: Any,
    target_ids: Any,
    target_mask: Any,
    position_ids: Any,
    segment_ids: Any,
    targets: MTPTargets | None,
) -> Batch:
    if target_ids is None:
        raise ValueError(
            "`target_ids` must be given with `input_ids`; got `None`. Pass both, or a `Batch` in "
            "place of `input_ids`: `model(make_batch(tokens))`."
        )
    return Batch(
        input_ids,
        target_ids,
        np.ones(target_ids.shape, bool) if target_mask is None else target_mask != 0,
        default_position_ids(input_ids, segment_ids) if position_ids is None else position_ids,
        segment_ids,
        targets,
    )


def _check_alone(*others: Any) -> None:
    names = ("target_ids", "target_mask", "position_ids", "segment_ids", "targets")
    given = [name for name, x in zip(names, others, strict=True) if x is not None]
    if given:
        raise ValueError(
            f"`{given[0]}` must be `None` if `input_ids` is a `Batch`, which has it; got both. "
            "Change the batch: `dataclasses.replace(batch, ...)`."
        )


def _scored_on_host(batch: Batch) -> Any:
    """Which targets count, if all of it is on the host; an array of JAX otherwise."""
    masks = [mask for mask in (batch.target_mask, batch.segment_ids) if mask is not None]
    on_device = [mask for mask in masks if isinstance(mask, jax.Array)]
    return on_device[0] if on_device else np.logical_and.reduce([mask != 0 for mask in masks])
