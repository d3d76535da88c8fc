"""A model, as decoding sees it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from .._config import MTPConfig
from .._decoder import AbstractCachedDecoder, AbstractCachedDecoderLayer
from .._layer import MultiTokenPredictionLayer, enter_first_depth
from .._model import MTPModel
from ..cross_entropy import LinearHead
from ._arguments import DraftVocab, check_draft_vocab, check_rows, linear_head
from ._sampling import Sampler


def check_cached_steps(model: Any) -> None:
    """**Raises:** `TypeError` if a part has no cached step, or the model is laid out already."""
    if isinstance(model, DecodingModel):
        raise TypeError(
            "`model` must be an `MTPModel`; got a `DecodingModel`, which is laid out already. Give "
            "it to `generate` or `stream` as it is."
        )
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

    `DecodingModel.of(model)` copies the parameters that are stacked, or whose dtype or layout in
    memory is not the one that they are used in. `generate` makes one in each call, unless it is
    given one: for many calls that saves time, and `model` can be deleted. Shard the model first.

    >>> decoding = eqx.filter_jit(emtp.speculative.DecodingModel.of)(model)
    >>> len(decoding.layers), decoding.layer(depth=5) is decoding.layers[-1]
    (2, True)
    >>> generation = emtp.speculative.generate(decoding, [[5, 6], [9, 3]], max_new_tokens=4)

    **Fields:**

    - `decoder`, `layers`: of the main model and of its depths.
    - `draft_vocab`, `draft_head`: the token ids that may be drafted, and the rows of the output
        head for them; `None` for all ids.
    - `config`: the block's conventions.
    """

    decoder: AbstractCachedDecoder
    layers: tuple[MultiTokenPredictionLayer, ...]
    draft_vocab: Int32[Array, "draft_vocab"] | None
    draft_head: LinearHead | None
    config: MTPConfig = eqx.field(static=True)

    @classmethod
    def of(
        cls,
        model: MTPModel,
        draft_vocab: DraftVocab = None,
    ) -> "DecodingModel":
        """A model, laid out.

        **Arguments:**

        - `model`: its parameters are read, and copied where that saves time.
        - `draft_vocab`: the token ids that may be drafted; `None` for all. Inside `jit` ids cannot
            be looked at if they are arguments. Close over them, as in
            `eqx.filter_jit(lambda model: DecodingModel.of(model, ids))`.

        **Raises:** `TypeError` if a part of the model has no cached step; `ValueError` for a
        `draft_vocab` over a head that is neither a matrix nor a `LinearHead`, or with ids that
        are none of the head's.
        """
        check_cached_steps(model)
        decoder, block = model.decoder, model.block
        assert isinstance(decoder, AbstractCachedDecoder)
        num_layers = 1 if block.config.repeated_layer else block.config.num_depths
        one_id = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        dtype = eqx.filter_eval_shape(decoder.embed, one_id, one_id).dtype
        depths = range(1, num_layers + 1)
        layers = tuple(block.layer(depth).for_decoding(dtype) for depth in depths)
        decoder = decoder.for_decoding()
        ids = check_draft_vocab(draft_vocab, decoder.output_head())
        head = None if ids is None else linear_head(decoder.output_head()).rows(ids)
        return cls(decoder, layers, ids, head, block.config)

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

    def choose_drafts(
        self, normed: Float[Array, "batch embed"], sampler: Sampler, key: PRNGKeyArray
    ) -> tuple[Int32[Array, "batch"], Float32[Array, "batch vocab"] | None]:
        """A draft for each row, and the distribution over all ids that it was drawn from.

        The distribution is `None` if greedy.
        """
        if self.draft_head is None or self.draft_vocab is None:
            return sampler.choose(self.logits(normed[:, None])[:, 0], key)
        place, probabilities = sampler.choose(self.draft_head(normed), key)
        ids = jnp.where(place < 0, -1, self.draft_vocab[place])
        if probabilities is None:
            return ids, None
        vocab_size = check_rows(self.decoder.output_head())
        nothing = jnp.zeros((len(normed), vocab_size), probabilities.dtype)
        return ids, nothing.at[:, self.draft_vocab].set(probabilities)


def check_laid_out(model: DecodingModel, draft_vocab: Any) -> None:
    """**Raises:** `ValueError` if `draft_vocab` is given beside a `DecodingModel`."""
    if draft_vocab is not None:
        raise ValueError(
            "`draft_vocab` must be given when a model is laid out; got it beside a "
            "`DecodingModel`. Write `DecodingModel.of(model, draft_vocab)`, and leave it out here."
        )
