"""All depths of Multi-Token Prediction."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree

from ._acceptance import MTPAcceptance
from ._config import MTPConfig
from ._cross_entropy import linear_cross_entropy
from ._decoder import AbstractDecoder
from ._layer import MultiTokenPredictionLayer
from ._losses import MTPLosses, sum_token_losses
from ._shift import MTPTargets, default_position_ids
from ._types import MakeLayer, checked


class MTPOutput(eqx.Module):
    """Everything that a block computed, stacked over depths.

    **Fields:**

    - `losses`: for `calculate_mtp_loss`.
    - `acceptance`: for `calculate_mtp_acceptance_rate`.
    - `hidden_states`: each MTP layer's raw output, before any norm.
    - `auxiliary`: what the transformer layers returned beside hidden states, or `None`.
    """

    losses: MTPLosses
    acceptance: MTPAcceptance
    hidden_states: Float[Array, "depth batch seq embed"]
    auxiliary: PyTree[Any]


class MultiTokenPredictionBlock(eqx.Module):
    """D prediction depths over a decoder that is passed in when called.

    The block holds only the MTP layers; embedding, final norm and output head are the decoder's, so
    that a model's pytree holds each weight once. The depths are scanned and recomputed in the
    backward pass: neither compile time nor activation memory grows with D layers.

    `layers` holds all layers stacked over a leading axis of size D (1 if the layer is repeated, and
    `None` without depths); `block.layer(depth)` takes one out.
    """

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
        self.layers = _stack_layers(
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
            ):
                if value != getattr(config, name):
                    raise ValueError(
                        f"`layers` must follow `config`: `{name}` is {getattr(config, name)!r} "
                        f"there, and {value!r} in the layer of depth {depth}."
                    )
        # A frozen dataclass with an `__init__` of its own: built as unflattening builds it.
        block = object.__new__(cls)
        object.__setattr__(block, "config", config)
        object.__setattr__(block, "layers", _stack_layers(layers))
        return block

    def layer(self, depth: int) -> MultiTokenPredictionLayer:
        """The layer of one depth; depths count from 1.

        **Raises:** `ValueError` if there is no such depth.
        """
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
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> MTPOutput:
        """Runs all depths.

        **Arguments:**

        - `decoder`: lends its embedding, final norm and output head.
        - `main_hidden_state`: the main model's, **before** its final norm.
        - `targets`: of `align_targets`, with as many depths as the block.
        - `position_ids`, `segment_ids`: of the batch, **not** shifted; `position_ids` count from 0
            in each row if `None`.
        - `key`, `inference`: for dropout.

        **Returns:** `MTPOutput`.

        **Raises:** `ValueError` if `targets` has other depths than the block or another shape than
        `main_hidden_state`, if that has not `embed_size` features, or if the layers change its
        dtype.
        """
        config, layers = self.config, self.layers
        _check_targets(targets, config.num_depths, main_hidden_state)
        if layers is None:
            return _empty_output(targets, main_hidden_state)
        _check_embed_size(layers, main_hidden_state)
        if position_ids is None:
            position_ids = default_position_ids(main_hidden_state[..., 0])
        if config.repeated_layer:
            scanned, constant = None, self.layer(1)
        else:
            scanned, constant = eqx.partition(layers, eqx.is_array)
        embedder = _stop_gradient(decoder) if config.stop_gradient_embedding else decoder
        predictor = _stop_gradient(decoder) if config.stop_gradient_head else decoder

        def run_depth(hidden_states: Array, inputs: tuple[Any, MTPTargets, Array | None]):
            scanned, target, layer_key = inputs
            layer = eqx.combine(scanned, constant) if scanned is not None else constant
            hidden_states, auxiliary = layer(
                hidden_states,
                embedder.embed(target.input_ids, target.position_ids),
                position_ids=position_ids,
                segment_ids=segment_ids,
                key=layer_key,
                inference=inference,
            )
            output_norm = predictor.final_norm if layer.output_norm is None else layer.output_norm
            normed = output_norm(hidden_states)
            token = linear_cross_entropy(normed, predictor.output_head(), target.target_ids)
            loss = sum_token_losses(token.negative_log_likelihood, target.mask)
            carried = normed if config.carried_hidden_state == "after_norm" else hidden_states
            _check_dtype(carried, main_hidden_state)
            return carried, (loss, token.predictions, hidden_states, auxiliary)

        hidden_states = main_hidden_state
        if config.input_hidden_state == "after_norm":
            hidden_states = predictor.final_norm(hidden_states)
        if config.stop_gradient_hidden:
            hidden_states = lax.stop_gradient(hidden_states)
        keys = None if key is None else jax.random.split(key, config.num_depths)
        _, (loss, predictions, hidden_states, auxiliary) = lax.scan(
            jax.checkpoint(run_depth), hidden_states, (scanned, targets, keys)
        )
        return MTPOutput(
            losses=MTPLosses(losses=loss.loss, weights=loss.weight),
            acceptance=MTPAcceptance(predictions, targets.target_ids, targets.mask),
            hidden_states=hidden_states,
            auxiliary=auxiliary,
        )


def _num_layers(config: MTPConfig) -> int:
    return 1 if config.repeated_layer else config.num_depths


def _stack_layers(
    layers: Sequence[MultiTokenPredictionLayer],
) -> MultiTokenPredictionLayer | None:
    """Stacks the arrays of layers over a new leading axis; the rest must be the same in all."""
    if not layers:
        return None
    first, *others = layers
    for depth, layer in enumerate(others, start=2):
        difference = _first_difference(first, layer)
        if difference is not None:
            raise ValueError(
                "the layers of all depths must have the same structure, shapes, dtypes and static "
                f"fields, so that they can be stacked; depth {depth} differs from depth 1: "
                f"{difference}. Pass the same functions and sizes to every layer."
            )
    return jax.tree.map(lambda x, *xs: jnp.stack((x, *xs)) if eqx.is_array(x) else x, *layers)


def _first_difference(
    first: MultiTokenPredictionLayer, other: MultiTokenPredictionLayer
) -> str | None:
    if jax.tree.structure(first) != jax.tree.structure(other):
        return "their tree structures, or their static fields, are not equal"
    first_leaves = jax.tree_util.tree_leaves_with_path(first)
    for (path, x), y in zip(first_leaves, jax.tree.leaves(other), strict=True):
        if eqx.is_array(x) and eqx.is_array(y):
            same = (x.shape, x.dtype) == (y.shape, y.dtype)
        else:
            same = type(x) is type(y) and x == y
        if not same:
            described = eqx.tree_pformat((x, y))
            return f"`{jax.tree_util.keystr(path)}` is {described}"
    return None


def _stop_gradient(decoder: AbstractDecoder) -> AbstractDecoder:
    return jax.tree.map(lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, decoder)


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


def _check_dtype(carried: Array, main_hidden_state: Array) -> None:
    if carried.dtype != main_hidden_state.dtype:
        raise ValueError(
            f"`main_hidden_state` is {main_hidden_state.dtype}, and the MTP layer made "
            f"{carried.dtype} of it and of the decoder's embeddings; they must agree, so that "
            "depths can be chained. Cast `main_hidden_state` or what `embed` returns."
        )


def _empty_output(targets: MTPTargets, main_hidden_state: Array) -> MTPOutput:
    return MTPOutput(
        losses=MTPLosses(losses=jnp.zeros(0, jnp.float32), weights=jnp.zeros(0, jnp.float32)),
        acceptance=MTPAcceptance(
            jnp.zeros(targets.mask.shape, jnp.int32), targets.target_ids, targets.mask
        ),
        hidden_states=jnp.zeros((0, *main_hidden_state.shape), main_hidden_state.dtype),
        auxiliary=None,
    )
