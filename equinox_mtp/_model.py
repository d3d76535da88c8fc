"""A language model with Multi-Token Prediction: the page to read first."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Integer, PRNGKeyArray, PyTree

from ._block import MTPOutput, MultiTokenPredictionBlock
from ._cross_entropy import summed_linear_cross_entropy
from ._decoder import AbstractDecoder, split_auxiliary
from ._losses import Objective, TokenLoss, calculate_mtp_loss
from ._shift import MTPTargets, align_targets, default_position_ids, scored_targets
from ._types import HostOrDeviceArray, checked


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
        z_loss_weight: float | Float[Array, ""] | None = None,
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
            every row is one document.
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
        """
        input_ids, target_ids = jnp.asarray(input_ids), jnp.asarray(target_ids)
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        position_ids = (
            default_position_ids(input_ids) if position_ids is None else jnp.asarray(position_ids)
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
        scored = scored_targets(target_ids, target_mask, segment_ids)
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
