"""The scan over depths: from the main model's hidden states to those that the head reads."""

from typing import Any

import equinox as eqx
import jax
from jax import lax
from jaxtyping import Array, Float, PyTree

from ._alignment import MTPTargets
from ._config import MTPConfig
from ._decoder import AbstractDecoder
from ._layer import MultiTokenPredictionLayer, enter_first_depth


class DepthStates(eqx.Module):
    """Each depth's hidden states; made by `MultiTokenPredictionBlock.depth_states`.

    **Fields:**

    - `hidden_states`: each MTP layer's raw output, before any norm.
    - `normed`: after the output norm, as the output head reads them.
    - `auxiliary`: what the transformer layers returned alongside hidden states, or `None`.
    """

    hidden_states: Float[Array, "depth batch seq embed"]
    normed: Float[Array, "depth batch seq embed"]
    auxiliary: PyTree[Any]


def run_depths(
    config: MTPConfig,
    layers: MultiTokenPredictionLayer,
    decoder: AbstractDecoder,
    head_decoder: AbstractDecoder,
    hidden_states: Float[Array, "batch seq embed"],
    targets: MTPTargets,
    *,
    position_ids: Array,
    **arguments: Any,
) -> DepthStates:
    """Runs stacked layers over the main model's hidden states.

    `head_decoder` lends the final norm, as `config` lets gradients into it; `arguments` are the
    layers' own, and `key`.
    """
    key = arguments.pop("key")
    dtype = hidden_states.dtype
    if config.repeated_layer:
        scanned, constant = None, jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, layers)
    else:
        scanned, constant = eqx.partition(layers, eqx.is_array)
    embedder = stop_gradient(decoder) if config.stop_gradient_embedding else decoder

    # All at once, though it takes one more `[batch seq embed]` a depth: in the scan the
    # embedding's gradient would be summed over devices for every depth.
    embeddings = jax.vmap(embedder.embed)(targets.input_ids, targets.position_ids)

    def run_depth(hidden_states: Array, inputs: tuple[Any, Array, Array | None, Array | None]):
        scanned, embedding, token_mask, layer_key = inputs
        layer = constant if scanned is None else eqx.combine(scanned, constant)
        hidden_states, auxiliary = layer(
            hidden_states,
            embedding,
            position_ids=position_ids,
            token_mask=token_mask,
            key=layer_key,
            **arguments,
        )
        normed, carried = layer.normed_and_carried(hidden_states, head_decoder.final_norm)
        _check_dtype(carried, dtype)
        return carried, (hidden_states, normed, auxiliary)

    hidden_states = enter_first_depth(config, hidden_states, head_decoder.final_norm)
    if config.stop_gradient_hidden:
        hidden_states = lax.stop_gradient(hidden_states)
    keys = None if key is None else jax.random.split(key, config.num_depths)
    # In a scan nothing is merged across iterations: `prevent_cse` would only cost.
    run_depth = jax.checkpoint(run_depth, policy=config.checkpoint_policy, prevent_cse=False)
    inputs = (scanned, embeddings, targets.token_mask, keys)
    return DepthStates(*lax.scan(run_depth, hidden_states, inputs)[1])


def stop_gradient(decoder: AbstractDecoder) -> AbstractDecoder:
    """The same decoder, without gradient."""
    return jax.tree.map(lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, decoder)


def _check_dtype(carried: Array, dtype: Any) -> None:
    if carried.dtype != dtype:
        raise ValueError(
            f"`main_hidden_state` is {dtype}, and the MTP layer made "
            f"{carried.dtype} of it and of the decoder's embeddings; they must agree, so that "
            "depths can be chained. Cast `main_hidden_state` or what `embed` returns."
        )
