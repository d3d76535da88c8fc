"""A language model with Multi-Token Prediction: the page to read first."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Integer, PRNGKeyArray, PyTree

from ._block import MTPOutput, MultiTokenPredictionBlock
from ._checks import check_ids
from ._cross_entropy import summed_linear_cross_entropy
from ._decoder import AbstractDecoder, split_auxiliary
from ._head import head_vocab_size
from ._losses import Objective, TokenLoss, calculate_mtp_loss
from ._shift import MTPTargets, align_targets, default_position_ids, scored_targets
from ._types import HostOrDeviceArray, Scalar, checked


class ModelOutput(eqx.Module):
    """Everything that a model computed.

    **Fields:**

    - `main`: the main model's cross-entropy, as sum and count; `main.mean` is its loss.
    - `mtp`: the block's output; `calculate_mtp_loss(output.mtp.losses)` is its loss.
    - `predictions`: the main model's argmax at each position, or `None` if not asked for.
    - `auxiliary`: what the decoder returned beside hidden states, or `None`.
    """

    main: TokenLoss
    mtp: MTPOutput
    predictions: Int32[Array, "batch seq"] | None
    auxiliary: PyTree[Any]


class MTPModel(eqx.Module):
    """A decoder, and the prediction depths over it.

    See DeepSeek-V3 (arXiv 2412.19437, §2.2). Nothing is stored twice: the block is lent the
    decoder's embedding, final norm and output head.
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
                    f"`{name}` must be a `{wanted.__name__}`; got a `{type(value).__name__}`. A "
                    "model of your own becomes a decoder by a wrapper, as README shows."
                )

    @checked
    def __call__(
        self,
        input_ids: Integer[HostOrDeviceArray, "batch seq"],
        target_ids: Integer[HostOrDeviceArray, "batch seq"],
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
        """Runs the main model and all depths on a batch.

        **Arguments:**

        - `input_ids`, `target_ids`, `target_mask`: of `inputs_and_targets`. In packed rows, mask
            the last token of each document if its target is the next document's first, as
            `inputs_and_targets` does.
        - `position_ids`: count from 0 in each row if `None`.
        - `segment_ids`: which document each position belongs to; 0 is padding. `None` means that
            every row is one document. No depth predicts beyond a run of one id, but attention goes
            by the ids alone: give the documents of a row different ones.
        - `targets`: the depths' targets, if they were made before: of `align_targets`, and in the
            order of the other arrays. Needed if positions are not in the order of the text, as
            `sharding.reorder` puts them; the decoder must find what precedes what from
            `position_ids` then.
        - `chain_mask`: see `align_targets`; without effect if `targets` are given.
        - `predictions`: whether to find every position's best ids, for acceptance.
        - `z_loss_weight`: of a z-loss on the main model's and all depths' tokens; `None` for none.
        - `objective`: how the depths' losses will be reduced, for speed alone; see the block.
        - `key`, `inference`: for dropout.

        **Returns:** `ModelOutput`.

        **Raises:** `ValueError` for ids in NumPy arrays that do not fit 32 bits, and for targets
        there that count and are not in the vocabulary of a head that is a matrix. Ids on the device
        are not looked at: an input id outside is embedded as the decoder does, and a target outside
        has the log-sum-exp for a loss.
        """
        scored = scored_targets(target_ids, target_mask, segment_ids)
        counts = _on_host_mask(target_ids, target_mask, segment_ids)
        vocab_size = head_vocab_size(self.decoder.output_head())
        target_ids = jnp.asarray(check_ids("target_ids", target_ids, vocab_size, counts))
        input_ids = jnp.asarray(check_ids("input_ids", input_ids))
        if segment_ids is not None:
            segment_ids = jnp.asarray(check_ids("segment_ids", segment_ids))
        position_ids = (
            default_position_ids(input_ids)
            if position_ids is None
            else jnp.asarray(check_ids("position_ids", position_ids))
        )
        decoder_key, block_key = (None, None) if key is None else jax.random.split(key)
        if targets is None:
            targets = align_targets(
                input_ids,
                target_ids,
                target_mask,
                num_depths=self.block.config.num_depths,
                segment_ids=segment_ids,
                position_ids=position_ids,
                chain_mask=chain_mask,
            )
        hidden_states, auxiliary = split_auxiliary(
            self.decoder(
                input_ids,
                position_ids=position_ids,
                segment_ids=segment_ids,
                key=decoder_key,
                inference=inference,
            )
        )
        main = summed_linear_cross_entropy(
            self.decoder.final_norm(hidden_states),
            self.decoder.output_head(),
            target_ids,
            scored,
            z_loss_weight=z_loss_weight,
            predictions=predictions,
        )
        mtp = self.block(
            self.decoder,
            hidden_states,
            targets,
            position_ids=position_ids,
            segment_ids=segment_ids,
            predictions=predictions,
            z_loss_weight=z_loss_weight,
            objective=objective,
            key=block_key,
            inference=inference,
        )
        count = jnp.sum(scored, dtype=jnp.float32)
        return ModelOutput(
            main=TokenLoss(main.loss, count, z_loss=main.z_loss),
            mtp=mtp,
            predictions=main.predictions,
            auxiliary=auxiliary,
        )


def _on_host_mask(target_ids: Any, target_mask: Any, segment_ids: Any) -> Any:
    """Which targets count, if all of it is on the host; an array of JAX otherwise."""
    masks = [mask for mask in (target_mask, segment_ids) if mask is not None]
    on_device = [mask for mask in masks if isinstance(mask, jax.Array)]
    if on_device:
        return on_device[0]
    return np.logical_and.reduce([np.ones(target_ids.shape, bool), *(mask != 0 for mask in masks)])
