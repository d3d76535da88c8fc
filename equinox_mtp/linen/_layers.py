"""Transformer layers as the original makes and calls them."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from .._decoder import AbstractDecoderLayer, HiddenStates
from .._types import MakeLayer
from ..nn import TransformerDecoderLayer
from ._config import read_transformer

TRAIN = "train"
"""The original's name for the mode in which losses are collected."""


class CallableLayer(AbstractDecoderLayer):
    """A layer with the original's call convention:

        function(inputs=, decoder_segment_ids=, decoder_positions=, deterministic=, model_mode=)

    It returns hidden states, or a tuple that begins with them.
    """

    function: Callable[..., Any]
    model_mode: str = eqx.field(static=True, default=TRAIN)

    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> HiddenStates:
        """Calls the function; `key` is not passed on, as it has no place for one."""
        output = self.function(
            inputs=hidden_states,
            decoder_segment_ids=segment_ids,
            decoder_positions=position_ids,
            deterministic=bool(inference),
            model_mode=self.model_mode,
        )
        output = output[0] if isinstance(output, tuple) else output
        return output.astype(hidden_states.dtype)


def layer_maker(transformer_layer_module: Any, *, config: Any, mesh: Any) -> MakeLayer:
    """`make_layer(key=key)` from what the original takes as `transformer_layer_module`.

    That is the class `nn.TransformerDecoderLayer`, with sizes from `config`; a class or factory,
    called with those of `config`, `mesh`, `model_mode`, `rngs` and `key` that it has arguments for
    (`rngs` is the key, too); or a function that is a layer by itself, as it has an argument
    `inputs`.

    **Raises:** `TypeError` if it is none of these.
    """
    if isinstance(transformer_layer_module, AbstractDecoderLayer) or not callable(
        transformer_layer_module
    ):
        raise TypeError(
            "`transformer_layer_module` must be a class or a function that makes a layer, or a "
            "function with the argument `inputs` that is one; got a "
            f"`{type(transformer_layer_module).__name__}`. Pass the class, or `lambda key: ...`."
        )
    if transformer_layer_module is TransformerDecoderLayer:
        return partial(TransformerDecoderLayer, read_transformer(config))
    names = _argument_names(transformer_layer_module)
    if "inputs" in names:
        return lambda *, key: CallableLayer(transformer_layer_module)

    def make_layer(*, key: PRNGKeyArray) -> AbstractDecoderLayer:
        offered = {"config": config, "mesh": mesh, "model_mode": TRAIN, "rngs": key, "key": key}
        layer = transformer_layer_module(
            **{name: value for name, value in offered.items() if name in names}
        )
        if isinstance(layer, AbstractDecoderLayer):
            return layer
        if not callable(layer):
            raise TypeError(
                "`transformer_layer_module` must make a layer that can be called; got a "
                f"`{type(layer).__name__}`."
            )
        return CallableLayer(layer)

    return make_layer


def _argument_names(function: Callable[..., Any]) -> set[str]:
    """The arguments that are not bound yet."""
    bound = getattr(function, "keywords", {})
    return set(inspect.signature(function).parameters) - set(bound)
