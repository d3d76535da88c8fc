"""Transformer layers as MaxText makes and calls them."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from .._decoder import AbstractDecoderLayer, HiddenStates
from .._types import MakeLayer
from ..nn import TransformerDecoderLayer
from ._config import read_transformer
from ._nnx import is_nnx_module, loaded_nnx

TRAIN = "train"
"""MaxText's name for the mode in which losses are collected."""


class CallableLayer(AbstractDecoderLayer):
    """A layer with MaxText's call convention:

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
    """`make_layer(key=key)` from what MaxText takes as `transformer_layer_module`.

    That is the class `nn.TransformerDecoderLayer`, with sizes from `config`; a class or factory,
    called with those of `config`, `mesh`, `model_mode`, `rngs` and `key` that it has arguments for
    (`rngs` is the key, too, or Flax's `Rngs` for a module of NNX); or a function that is a layer by
    itself, as it has an argument `inputs`.

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
    if _is_subclass(transformer_layer_module, TransformerDecoderLayer):
        return partial(transformer_layer_module, read_transformer(config))
    names = _argument_names(transformer_layer_module)
    if names is not None and "inputs" in names:
        return lambda *, key: CallableLayer(transformer_layer_module)

    def make_layer(*, key: PRNGKeyArray) -> AbstractDecoderLayer:
        rngs = _rngs_for(transformer_layer_module, key)
        offered = {"config": config, "mesh": mesh, "model_mode": TRAIN, "rngs": rngs, "key": key}
        layer: Any = transformer_layer_module(
            **{name: value for name, value in offered.items() if names is None or name in names}
        )
        if isinstance(layer, AbstractDecoderLayer):
            return layer
        _check_layer(layer)
        return CallableLayer(layer)

    return make_layer


def _argument_names(function: Callable[..., Any]) -> set[str] | None:
    """The arguments that are not bound yet; `None` if any are taken."""
    bound = set(getattr(function, "keywords", {}))
    # Flax's metaclass hides the constructor's arguments.
    constructor = function.__init__ if isinstance(function, type) else function
    parameters = inspect.signature(constructor).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return set(parameters) - bound


def _rngs_for(module: Any, key: PRNGKeyArray) -> Any:
    """Modules of NNX want their own kind, and others a key."""
    return loaded_nnx().Rngs(key) if is_nnx_module(module) else key


def _is_subclass(module: Any, wanted: type) -> bool:
    return isinstance(module, type) and issubclass(module, wanted)


def _check_layer(layer: Any) -> None:
    """**Raises:** `TypeError` for what cannot be called, or hides its arrays from JAX."""
    name = type(layer).__name__
    if not callable(layer):
        raise TypeError(
            f"`transformer_layer_module` must make a layer that can be called; got a `{name}`."
        )
    is_pytree = jax.tree.leaves(layer) != [layer]
    if is_pytree:
        return
    if hasattr(layer, "apply") and hasattr(layer, "init"):
        raise TypeError(
            f"`transformer_layer_module` must make a layer that holds its parameters; got the "
            f"Linen module `{name}`. Bind it, wrap it in an `equinox.Module` with its parameters "
            "in a field, or use its NNX form."
        )
    if any(eqx.is_array(leaf) for leaf in jax.tree.leaves(getattr(layer, "__dict__", {}))):
        raise TypeError(
            f"`transformer_layer_module` must make a layer whose arrays JAX can see; got a "
            f"`{name}`, which is no pytree. Derive it from `equinox.Module`."
        )
