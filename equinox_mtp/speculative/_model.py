"""A model, as decoding sees it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from .._config import MTPConfig
from .._decoder import AbstractCachedDecoder, AbstractCachedDecoderLayer
from .._layer import MultiTokenPredictionLayer, enter_first_depth
from .._model import MTPModel
from ..cross_entropy import LinearHead


def check_cached_steps(model: MTPModel) -> None:
    """**Raises:** `TypeError` if a part of the model has no cached step."""
    parts: list[tuple[str, Any, type]] = [("decoder", model.decoder, AbstractCachedDecoder)]
    if model.block.layers is not None:
        layer = model.block.layers.transformer_layer
        parts.append(("transformer layer", layer, AbstractCachedDecoderLayer))
    for name, part, wanted in parts:
        if not isinstance(part, wanted):
            raise TypeError(
                f"`model` must have a cached step to generate; its {name} is of the class "
                f"`{type(part).__name__}`, not an `{wanted.__name__}`. Derive it from that class, "
                "and add `init_cache` and `decode`."
            )


class DecodingModel(eqx.Module):
    """A decoder and its prediction depths, laid out for many small steps.

    `DecodingModel.of(model)` copies the parameters that are stacked, or of another dtype than they
    are used in; so it is made once, outside of the loop over steps.

    >>> decoding = emtp.speculative.DecodingModel.of(model)
    >>> len(decoding.layers), decoding.layer(depth=5) is decoding.layers[-1]
    (2, True)
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
        one_id = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        dtype = eqx.filter_eval_shape(decoder.embed, one_id, one_id).dtype
        layers = (block.layer(depth).for_decoding(dtype) for depth in range(1, num_layers + 1))
        return cls(decoder.for_decoding(), tuple(layers), block.config)

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
        return enter_first_depth(self.config, hidden_states, self.decoder.final_norm)

    def logits(self, normed: Float[Array, "batch seq embed"]) -> Float32[Array, "batch seq vocab"]:
        """The output head, after the norm."""
        head = self.decoder.output_head()
        return (head if callable(head) else LinearHead(head))(normed)
