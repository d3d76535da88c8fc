"""A model, as decoding sees it."""

from typing import Any

import equinox as eqx
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32

from .._config import MTPConfig
from .._decoder import AbstractCachedDecoder, AbstractCachedDecoderLayer
from .._head import LinearHead
from .._layer import MultiTokenPredictionLayer
from .._model import MTPModel


def check_cached_steps(model: MTPModel) -> None:
    """**Raises:** `TypeError` if a part of the model has no cached step."""
    parts: list[tuple[str, Any, type]] = [("decoder", model.decoder, AbstractCachedDecoder)]
    if model.block.layers is not None:
        layer = model.block.layers.transformer_layer
        parts.append(("transformer layers", layer, AbstractCachedDecoderLayer))
    for name, part, wanted in parts:
        if not isinstance(part, wanted):
            raise TypeError(
                f"`model` must have a cached step to generate; its {name} is a "
                f"`{type(part).__name__}`, which is no `{wanted.__name__}`. Derive it from that "
                "class, and add `init_cache` and `decode`."
            )


def vocab_size_of(model: MTPModel) -> int | None:
    """The number of ids that the output head knows, if it is a matrix."""
    head = model.decoder.output_head()
    if isinstance(head, LinearHead):
        return head.weight.shape[0]
    return None if callable(head) else head.shape[0]


def at_hand(array: Any) -> Any:
    """An array as one of NumPy, if its values can be read; itself otherwise."""
    if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True):
        return array
    return np.asarray(array)


class DecodingModel(eqx.Module):
    """A decoder and its prediction depths, laid out for many small steps.

    `DecodingModel.of(model)` copies the parameters that are stacked; so it is made once, outside of
    the loop over steps.
    """

    decoder: AbstractCachedDecoder
    layers: tuple[MultiTokenPredictionLayer, ...]
    config: MTPConfig = eqx.field(static=True)

    @classmethod
    def of(cls, model: MTPModel) -> "DecodingModel":
        """**Raises:** `TypeError` if a part of the model has no cached step."""
        check_cached_steps(model)
        decoder, block = model.decoder, model.block
        assert isinstance(decoder, AbstractCachedDecoder)
        num_layers = 1 if block.config.repeated_layer else block.config.num_depths
        layers = tuple(block.layer(depth) for depth in range(1, num_layers + 1))
        return cls(decoder.for_decoding(), layers, block.config)

    def layer(self, depth: int) -> MultiTokenPredictionLayer:
        """That of a draft; beyond the model's depths its last one, again and again.

        **Raises:** `ValueError` for depths below 1.
        """
        if depth < 1:
            raise ValueError(f"`depth` counts from 1; got {depth}.")
        return self.layers[min(depth, len(self.layers)) - 1]

    def enter(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """The main model's hidden states, as depth 1 takes them."""
        if self.config.input_hidden_state == "after_norm":
            return self.decoder.final_norm(hidden_states)
        return hidden_states

    def logits(self, normed: Float[Array, "batch seq embed"]) -> Float32[Array, "batch seq vocab"]:
        """The output head, after the norm."""
        head = self.decoder.output_head()
        return (head if callable(head) else LinearHead(head))(normed)
