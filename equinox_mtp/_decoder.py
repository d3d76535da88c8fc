"""The two small interfaces through which any language model is plugged in."""

import abc
from typing import Any, TypeAlias

import equinox as eqx
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from ._types import OutputHead

HiddenStates: TypeAlias = (
    Float[Array, "batch seq embed"] | tuple[Float[Array, "batch seq embed"], Any]
)
"""Hidden states, or a pair of them and a pytree of auxiliary outputs (a router's balance loss)."""


class AbstractDecoderLayer(eqx.Module):
    """One transformer layer: from hidden states to hidden states of the same shape."""

    @abc.abstractmethod
    def __call__(
        self,
        hidden_states: Float[Array, "batch seq embed"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> HiddenStates:
        """Runs the layer: causal, and within documents if `segment_ids` are given.

        **Arguments:**

        - `hidden_states`: in the compute dtype, which the result keeps.
        - `position_ids`: positions for the positional encoding.
        - `segment_ids`: which document each position belongs to; 0 is padding.
        - `key`, `inference`: for dropout, as everywhere in Equinox.

        **Returns:** hidden states, or `(hidden_states, auxiliary)`.
        """


class AbstractDecoder(eqx.Module):
    """A language model, as Multi-Token Prediction sees it.

    `output_head() · final_norm(decoder(input_ids))` are its logits. The MTP layers share `embed`,
    `final_norm` and `output_head` with it, so that its pytree holds every weight once.
    """

    @abc.abstractmethod
    def embed(
        self, input_ids: Integer[Array, "batch seq"], position_ids: Integer[Array, "batch seq"]
    ) -> Float[Array, "batch seq embed"]:
        """Looks tokens up, in the compute dtype.

        `position_ids` are for models that add learned positions to the embedding; others ignore
        them.
        """

    @abc.abstractmethod
    def __call__(
        self,
        input_ids: Integer[Array, "batch seq"],
        *,
        position_ids: Integer[Array, "batch seq"],
        segment_ids: Integer[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> HiddenStates:
        """Embeds and runs all layers, up to the hidden states **before** the final norm.

        The arguments are those of `AbstractDecoderLayer`. **Returns:** hidden states, or
        `(hidden_states, auxiliary)`.
        """

    @abc.abstractmethod
    def final_norm(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """The norm between the last layer and the output head."""

    @abc.abstractmethod
    def output_head(self) -> OutputHead:
        """The output head: a matrix `[vocab embed]`, or a callable from final hidden states
        `[*batch embed]` to logits `[*batch vocab]` for a head with a bias or a soft-cap.
        """


def split_auxiliary(output: HiddenStates) -> tuple[Float[Array, "batch seq embed"], Any]:
    """`(hidden_states, auxiliary)`, with `None` for a layer that has no auxiliary outputs."""
    return output if isinstance(output, tuple) else (output, None)
