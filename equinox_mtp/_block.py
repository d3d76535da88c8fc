"""All depths of Multi-Token Prediction."""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree

from ._acceptance import MTPAcceptance
from ._alignment import MTPTargets, default_position_ids
from ._checks import check_integer
from ._config import MTPConfig
from ._decoder import AbstractDecoder
from ._depths import DepthStates, run_depths, stop_gradient
from ._layer import MultiTokenPredictionLayer
from ._losses import MTPLosses, Objective, calculate_mtp_loss, loss_weights
from ._types import MakeLayer, Scalar, checked, module_of
from .cross_entropy import summed_cross_entropy_by_depth
from .stacking import stack_layers


class MTPOutput(eqx.Module):
    """Everything that a block computed, stacked over depths.

    >>> mtp = output.mtp
    >>> mtp.losses.mean.shape, mtp.acceptance.predictions.shape, mtp.hidden_states.shape
    ((2,), (2, 2, 8), (2, 2, 8, 16))

    **Fields:**

    - `loss`: what Multi-Token Prediction adds to the main model's loss: `objective(losses)`.
    - `losses`: sums and counts, for reports and for `calculate_mtp_loss`.
    - `acceptance`: for `calculate_mtp_acceptance_rate`; `None` if predictions were not asked for.
    - `hidden_states`: each MTP layer's raw output, before any norm.
    - `auxiliary`: what the transformer layers returned alongside hidden states, or `None`.
    """

    loss: Float[Array, ""]
    losses: MTPLosses
    acceptance: MTPAcceptance | None
    hidden_states: Float[Array, "depth batch seq embed"]
    auxiliary: PyTree[Any]


class MultiTokenPredictionBlock(eqx.Module):
    """D prediction depths over a decoder that is passed in when called.

    The block holds only the MTP layers; embedding, final norm and output head are the decoder's, so
    that a model's pytree holds each weight once. The layers are scanned over depths and recomputed
    in the backward pass, and the losses of all depths are computed tile by tile, without logits:
    a depth more takes next to no compile time, and the memory of seven arrays `[batch seq embed]`.

    `layers` holds all layers stacked over a leading axis of size D (1 if the layer is repeated, and
    `None` without depths); `block.layer(depth)` takes one out.

    >>> input_ids, position_ids = jnp.asarray(batch.input_ids), jnp.asarray(batch.position_ids)
    >>> hidden_states = eqx.filter_jit(decoder)(input_ids, position_ids=position_ids)
    >>> targets = batch.align(num_depths=2).targets
    >>> output = eqx.filter_jit(block)(decoder, hidden_states, targets)
    >>> print(output.losses.weights)  # targets scored at depths 1 and 2
    [14. 12.]
    """

    STACKED: ClassVar = ("layers",)

    layers: MultiTokenPredictionLayer | None
    config: MTPConfig = eqx.field(static=True)

    @checked
    def __init__(
        self,
        config: MTPConfig,
        make_layer: MakeLayer,
        *,
        embed_size: int,
        norm_epsilon: float = 1e-5,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `config`: the number of depths, and the conventions.
        - `make_layer`: `make_layer(key=key)` builds one transformer layer; for the reference
            decoder, `functools.partial(nn.TransformerDecoderLayer, transformer_config)`.
        - `embed_size`: features of hidden states and embeddings.
        - `norm_epsilon`: the epsilon of the MTP layers' own norms.
        - `key`: for the initial values.

        **Raises:** `TypeError` if `make_layer` does not make an `AbstractDecoderLayer`;
        `ValueError` if the layers it makes are not alike.
        """
        self.config = config
        self.layers = stack_layers(
            [
                MultiTokenPredictionLayer(
                    config,
                    make_layer,
                    embed_size=embed_size,
                    norm_epsilon=norm_epsilon,
                    key=layer_key,
                )
                for layer_key in jax.random.split(key, _num_layers(config))
            ]
        )

    @classmethod
    @checked
    def from_layers(
        cls, config: MTPConfig, layers: Sequence[MultiTokenPredictionLayer]
    ) -> "MultiTokenPredictionBlock":
        """A block of given layers, depth 1 first; the inverse of `layer`.

        >>> layers = [block.layer(2), block.layer(1)]
        >>> swapped = emtp.MultiTokenPredictionBlock.from_layers(block.config, layers)

        **Raises:** `ValueError` if the number of layers or one of their conventions is not what
        `config` says, or if they differ in structure, shapes or static fields.
        """
        if len(layers) != _num_layers(config):
            raise ValueError(
                f"`layers` must hold {_num_layers(config)} layer(s) for `config` with "
                f"`num_depths={config.num_depths}, repeated_layer={config.repeated_layer}`; got "
                f"{len(layers)}."
            )
        for depth, layer in enumerate(layers, start=1):
            output_norm = "shared" if layer.output_norm is None else "own"
            for name, value in (
                ("concat_order", layer.concat_order),
                ("output_norm", output_norm),
                ("carried_hidden_state", layer.carried_hidden_state),
            ):
                if value != getattr(config, name):
                    raise ValueError(
                        f"`layers` must follow `config`: `{name}` is {getattr(config, name)!r} "
                        f"there, and {value!r} in the layer of depth {depth}."
                    )
        return module_of(cls, config=config, layers=stack_layers(layers))

    def layer(self, depth: int) -> MultiTokenPredictionLayer:
        """The layer of one depth; depths count from 1.

        **Raises:** `ValueError` if there is no such depth.
        """
        depth = check_integer("depth", depth)
        if self.layers is None or not 1 <= depth <= self.config.num_depths:
            raise ValueError(
                f"`depth` must lie in 1 … {self.config.num_depths}, the depths of this block; got "
                f"{depth}."
            )
        index = 0 if self.config.repeated_layer else depth - 1
        return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, self.layers)

    @checked
    def __call__(
        self,
        decoder: AbstractDecoder,
        main_hidden_state: Float[Array, "batch seq embed"],
        targets: MTPTargets,
        *,
        position_ids: Integer[Array, "batch seq"] | None = None,
        segment_ids: Integer[Array, "batch seq"] | None = None,
        predictions: bool = True,
        z_loss_weight: Scalar | None = None,
        objective: Objective = calculate_mtp_loss,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> MTPOutput:
        """Runs all depths.

        **Arguments:**

        - `decoder`: lends its embedding, final norm and output head.
        - `main_hidden_state`: the main model's, **before** its final norm.
        - `targets`: of `align_targets`, with as many depths as the block.
        - `position_ids`, `segment_ids`: of the batch, **not** shifted; `position_ids` count from 0
            in each document if `None`.
        - `predictions`: whether to find every position's best id, for acceptance.
        - `z_loss_weight`: adds `z_loss_weight · log_sum_exp²` to the loss of every scored token
            (PaLM, arXiv 2204.02311, §5); `None` for none.
        - `objective`: the reduction to `MTPOutput.loss`, `MTPLosses -> scalar`. The head's gradient
            is summed over depths in the forward pass, with the weights that this function gives
            them. Take the gradient of that loss: one of another reduction of `losses` is right too,
            but computes the head's gradient a second time.
        - `key`, `inference`: for dropout.

        **Returns:** `MTPOutput`.

        **Raises:** `ValueError` if `targets` has other depths than the block or another shape than
        `main_hidden_state`, if that has not `embed_size` features, or if the layers change its
        dtype.
        """
        if self.layers is None:
            _check_targets(targets, self.config.num_depths, main_hidden_state)
            return _empty_output(targets, main_hidden_state, predictions, objective)
        states = self.depth_states(
            decoder,
            main_hidden_state,
            targets,
            position_ids=position_ids,
            segment_ids=segment_ids,
            key=key,
            inference=inference,
        )
        counts = jnp.sum(targets.mask, axis=(1, 2), dtype=jnp.float32)
        sums = summed_cross_entropy_by_depth(
            states.normed,
            self.head_decoder(decoder).output_head(),
            targets.target_ids,
            targets.mask,
            z_loss_weight=z_loss_weight,
            predictions=predictions,
            expected_cotangents=loss_weights(objective, counts),
        )
        acceptance = None
        if sums.predictions is not None:
            acceptance = MTPAcceptance(sums.predictions, targets.target_ids, targets.mask)
        losses = MTPLosses(sums.losses, counts, z_losses=sums.z_losses)
        return MTPOutput(
            loss=objective(losses),
            losses=losses,
            acceptance=acceptance,
            hidden_states=states.hidden_states,
            auxiliary=states.auxiliary,
        )

    def head_decoder(self, decoder: AbstractDecoder) -> AbstractDecoder:
        """The decoder that lends final norm and head: without gradient if `config` says so."""
        return stop_gradient(decoder) if self.config.stop_gradient_head else decoder

    @checked
    def depth_states(
        self,
        decoder: AbstractDecoder,
        main_hidden_state: Float[Array, "batch seq embed"],
        targets: MTPTargets,
        *,
        position_ids: Integer[Array, "batch seq"] | None = None,
        segment_ids: Integer[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> DepthStates:
        """Runs all depths up to the output head, for a loss of your own.

        `head_decoder(decoder).output_head()` is the head that its gradients belong to.

        >>> targets = batch.align(num_depths=2).targets
        >>> hidden_states = eqx.filter_jit(decoder)(
        ...     jnp.asarray(batch.input_ids), position_ids=jnp.asarray(batch.position_ids)
        ... )
        >>> block.depth_states(decoder, hidden_states, targets).normed.shape
        (2, 2, 8, 16)

        **Arguments:** as of `__call__`.

        **Returns:** `DepthStates`.

        **Raises:** `ValueError` as `__call__` does, and for a block without depths.
        """
        _check_targets(targets, self.config.num_depths, main_hidden_state)
        if self.layers is None:
            raise ValueError(
                "`block` must have a prediction depth; got `num_depths=0`. Make it with "
                "`MTPConfig(num_depths=1)` or more."
            )
        _check_embed_size(self.layers, main_hidden_state)
        if position_ids is None:
            rows = main_hidden_state[..., 0]
            position_ids = jnp.asarray(default_position_ids(rows, segment_ids))
        return run_depths(
            self.config,
            self.layers,
            decoder,
            self.head_decoder(decoder),
            main_hidden_state,
            targets,
            position_ids=position_ids,
            segment_ids=segment_ids,
            key=key,
            inference=inference,
        )


def _num_layers(config: MTPConfig) -> int:
    return 1 if config.repeated_layer else config.num_depths


def _check_targets(targets: MTPTargets, num_depths: int, main_hidden_state: Array) -> None:
    wanted = (num_depths, *main_hidden_state.shape[:2])
    if targets.mask.shape != wanted:
        raise ValueError(
            f"`targets` must have shape {wanted}, that is (depth, batch, seq) of this block and of "
            f"`main_hidden_state`; got {targets.mask.shape}. Make them with "
            f"`align_targets(..., num_depths={num_depths})` from the same batch."
        )


def _check_embed_size(layers: MultiTokenPredictionLayer, main_hidden_state: Array) -> None:
    embed_size = layers.embedding_norm.scale.shape[-1]
    if main_hidden_state.shape[-1] != embed_size:
        raise ValueError(
            f"`main_hidden_state` must have the {embed_size} features that the block was made with "
            f"as `embed_size`; got {main_hidden_state.shape[-1]}."
        )


def _empty_output(
    targets: MTPTargets, main_hidden_state: Array, predictions: bool, objective: Objective
) -> MTPOutput:
    no_sums = jnp.zeros(0, jnp.float32)
    best_ids = jnp.zeros(targets.mask.shape, jnp.int32)
    acceptance = MTPAcceptance(best_ids, targets.target_ids, targets.mask) if predictions else None
    losses = MTPLosses(no_sums, no_sums, z_losses=no_sums)
    return MTPOutput(
        loss=objective(losses),
        losses=losses,
        acceptance=acceptance,
        hidden_states=jnp.zeros((0, *main_hidden_state.shape), main_hidden_state.dtype),
        auxiliary=None,
    )
