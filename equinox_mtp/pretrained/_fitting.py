"""Depths rewritten in the conventions of a layout, where that is exact."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._block import MultiTokenPredictionBlock
from .._config import MTPConfig
from .._model import MTPModel
from .._types import module_of
from ..nn import GroupedQueryAttention, RMSNorm
from ._tables import MTPTable


def fit_depths(
    model: MTPModel, mtp: MTPTable, layout: str, *, any_input: bool, may_repeat: bool
) -> MultiTokenPredictionBlock:
    """A block of the same function, by the conventions of a layout.

    The halves of the projection change places for another `concat_order`, a shared norm is copied
    into each layer for a norm of its own, and a repeated layer is written for each depth.

    **Arguments:**

    - `any_input`: whether readers differ in the hidden state that enters depth 1.
    - `may_repeat`: whether the layout holds one layer, which its readers repeat.

    **Raises:** `ValueError` for what the layout cannot say.
    """
    config, wanted = model.block.config, MTPConfig(model.block.config.num_depths, **mtp.config)
    layers = model.block.layers
    if layers is None:
        raise ValueError(
            f"`layout` {layout!r} is of prediction depths, and `model` has none. Load it with "
            "`num_depths=`, or take the layout of the folder it came from."
        )
    # With a single depth nothing is carried on while training. Readers that repeat the layer of a
    # family's own depth differ in what they carry, as in what enters it.
    carries = config.num_depths > 1 and not (may_repeat and any_input)
    for name, matters in (("input_hidden_state", not any_input), ("carried_hidden_state", carries)):
        if matters and getattr(config, name) != getattr(wanted, name):
            raise ValueError(
                f"`layout` {layout!r} has `{name}={getattr(wanted, name)!r}`, and `model` was made "
                f"with {getattr(config, name)!r}: its readers would draft otherwise. Set it in "
                "`MTPConfig` before training; the preset 'fast_mtp' has 'after_norm'."
            )
    if may_repeat and config.num_depths > 1 and not config.repeated_layer:
        raise ValueError(
            f"`layout` {layout!r} holds one layer, which is repeated; `model` has "
            f"{config.num_depths} different ones. Train with `repeated_layer=True`, as the preset "
            "'fast_mtp' has it."
        )
    if wanted.output_norm == "own" and layers.output_norm is None:
        norm = getattr(model.decoder, "norm", None)
        if not isinstance(norm, RMSNorm):
            raise ValueError(f"`layout` {layout!r} needs a norm; `model.decoder` has no `norm`.")
        num = layers.embedding_norm.scale.shape[0]
        scales = jnp.broadcast_to(norm.scale, (num, *norm.scale.shape))
        norm = eqx.tree_at(lambda norm: norm.scale, norm, scales)
        layers = eqx.tree_at(lambda x: x.output_norm, layers, norm, is_leaf=lambda x: x is None)
    if wanted.concat_order != config.concat_order:
        kernel = layers.projection_layer.kernel
        swapped = jnp.roll(kernel, kernel.shape[-2] // 2, axis=-2)
        layers = eqx.tree_at(lambda x: x.projection_layer.kernel, layers, swapped)
    if config.repeated_layer and not may_repeat:
        layers = jax.tree.map(
            lambda x: jnp.repeat(x, config.num_depths, axis=0) if eqx.is_array(x) else x, layers
        )
    return module_of(MultiTokenPredictionBlock, config=config, layers=layers)


def with_biases(tree: Any) -> Any:
    """Attention without biases as attention with biases of 0."""

    def add(attention: Any) -> Any:
        if not isinstance(attention, GroupedQueryAttention) or attention.query_bias is not None:
            return attention
        kernels = (attention.query_kernel, attention.key_kernel, attention.value_kernel)
        # Of `[… embed heads head_dim]`, with layers in front; on the host, where they are written.
        biases = [np.zeros((*k.shape[:-3], *k.shape[-2:]), k.dtype) for k in kernels]
        return eqx.tree_at(
            lambda a: (a.query_bias, a.key_bias, a.value_bias),
            attention,
            tuple(biases),
            is_leaf=lambda x: x is None,
        )

    return jax.tree.map(add, tree, is_leaf=lambda x: isinstance(x, GroupedQueryAttention))
