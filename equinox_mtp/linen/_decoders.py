"""Decoders as MaxText lends them to its block."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Integer

from .._decoder import AbstractDecoder
from .._types import OutputHead
from ._config import Settings
from ._trees import unboxed

_HOW_TO_LEND = (
    "Pass an `AbstractDecoder`, or an object with the methods "
    "`_apply_embedding(shared_embedding, input_ids, position_ids, deterministic, model_mode=)` and "
    "`apply_output_head(shared_embedding, hidden_states, deterministic, model_mode)`, or "
    "`apply_output_projection`, without norm, for depths with their own (`config.mtp_final_norm`)."
)

_DEFAULT_AXIS_RULES = (
    ("activation_batch", ("data", "fsdp")),
    ("activation_length", ("context",)),
    ("activation_embed", ("tensor",)),
)
_EMBEDDING_AXES = ("activation_batch", "activation_length", "activation_embed")


class BorrowedDecoder(AbstractDecoder):
    """A decoder whose embeddings have the dtype and the sharding of the shim."""

    decoder: AbstractDecoder
    sharding: NamedSharding | None = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)

    def embed(
        self, input_ids: Integer[Array, "batch seq"], position_ids: Integer[Array, "batch seq"]
    ) -> Float[Array, "batch seq embed"]:
        embeddings = self.decoder.embed(input_ids, position_ids).astype(self.dtype)
        if self.sharding is None:
            return embeddings
        return jax.lax.with_sharding_constraint(embeddings, self.sharding)

    def __call__(self, input_ids: Integer[Array, "batch seq"], **arguments: Any) -> Any:
        return self.decoder(input_ids, **arguments)

    def final_norm(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        return self.decoder.final_norm(hidden_states)

    def output_head(self) -> OutputHead:
        return self.decoder.output_head()


class OriginalHead(eqx.Module):
    """One of the methods of MaxText's decoder from hidden states to logits."""

    decoder: Any
    shared_embedding: Any
    method: str = eqx.field(static=True)
    deterministic: bool = eqx.field(static=True)
    model_mode: str = eqx.field(static=True)

    def __call__(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq vocab"]:
        return getattr(self.decoder, self.method)(
            self.shared_embedding, hidden_states, self.deterministic, self.model_mode
        )


class OriginalDecoder(AbstractDecoder):
    """An object with the methods of MaxText's decoder.

    Its output head holds the final norm, unless the MTP layers have one of their own.
    """

    head: OriginalHead

    def embed(
        self, input_ids: Integer[Array, "batch seq"], position_ids: Integer[Array, "batch seq"]
    ) -> Float[Array, "batch seq embed"]:
        return self.head.decoder._apply_embedding(
            self.head.shared_embedding,
            input_ids,
            position_ids,
            self.head.deterministic,
            model_mode=self.head.model_mode,
        )

    def __call__(self, input_ids: Integer[Array, "batch seq"], **arguments: Any) -> Any:
        raise NotImplementedError("the block is given the main model's hidden states")

    def final_norm(
        self, hidden_states: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        return hidden_states

    def output_head(self) -> OutputHead:
        return self.head


def check_decoder(decoder: Any, *, own_norm: bool) -> None:
    """**Raises:** `TypeError` if a block cannot borrow from `decoder`."""
    if isinstance(decoder, AbstractDecoder):
        return
    for name in ("_apply_embedding", _head_method(own_norm)):
        if not callable(getattr(decoder, name, None)):
            raise TypeError(
                f"`decoder` must have the method `{name}`; got a `{type(decoder).__name__}` "
                f"without it. {_HOW_TO_LEND}"
            )


def borrow_decoder(
    decoder: Any,
    shared_embedding: Any,
    settings: Settings,
    sharding: NamedSharding | None,
    *,
    deterministic: bool,
    model_mode: str,
) -> AbstractDecoder:
    """The decoder as the block borrows it.

    Into an `AbstractDecoder` a `shared_embedding` is put in place of its field `embedding`.
    """
    if isinstance(decoder, AbstractDecoder):
        borrowed = _with_embedding(decoder, shared_embedding)
    else:
        method = _head_method(settings.own_norm)
        borrowed = OriginalDecoder(
            OriginalHead(decoder, shared_embedding, method, deterministic, model_mode)
        )
    return BorrowedDecoder(borrowed, sharding, settings.dtype)


def _head_method(own_norm: bool) -> str:
    return "apply_output_projection" if own_norm else "apply_output_head"


def _with_embedding(decoder: AbstractDecoder, shared_embedding: Any) -> AbstractDecoder:
    if shared_embedding is None:
        return decoder
    table = unboxed(getattr(shared_embedding, "embedding", shared_embedding))
    kind = type(shared_embedding).__name__
    own: Any = getattr(decoder, "embedding", None)
    if not eqx.is_array(own):
        raise TypeError(
            "`shared_embedding` must be `None` for a decoder without an array `embedding`; got a "
            f"`{kind}` for a `{type(decoder).__name__}`. Its own embedding is used then; pass the "
            "decoder's weights under `params['decoder']` to differentiate them."
        )
    if not isinstance(table, (jax.Array, np.ndarray)):
        raise TypeError(
            "`shared_embedding` must be an array `[vocab embed]`, a module that holds one as "
            f"`embedding`, or `None`; got a `{kind}`."
        )
    if table.shape != own.shape:
        raise ValueError(
            f"`shared_embedding` must have the shape {own.shape} of the decoder's `embedding`; got "
            f"{table.shape}."
        )
    table = jnp.asarray(table)
    return eqx.tree_at(lambda d: d.embedding, decoder, table)


# Sharding


def sharding_of_embeddings(mesh: Mesh | AbstractMesh | None, config: Any) -> NamedSharding | None:
    """How embeddings `[batch seq embed]` lie on a mesh; `None` to leave them where they are.

    `config.logical_axis_rules` says over which mesh axes, as in MaxText. On a mesh with
    explicit axes nothing is said: JAX tracks them in the arrays' types.

    **Raises:** `ValueError` for rules that are not pairs.
    """
    if mesh is None or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    rules = getattr(config, "logical_axis_rules", None) or _DEFAULT_AXIS_RULES
    if isinstance(rules, str) or not _are_pairs(rules):
        raise ValueError(
            "`config.logical_axis_rules` must be pairs of a logical axis and mesh axes, such as "
            f"`('activation_batch', ('data', 'fsdp'))`; got {rules!r}."
        )
    return NamedSharding(mesh, _partition_spec(mesh, rules))  # pyright: ignore[reportArgumentType]


def _are_pairs(rules: Any) -> bool:
    try:
        return all(not isinstance(rule, str) and len(rule) == 2 for rule in rules)
    except TypeError:
        return False


def _partition_spec(mesh: Mesh | AbstractMesh, rules: Sequence[Any]) -> P:
    used: set[str] = set()

    def axes_of(word: str) -> tuple[str, ...] | None:
        for logical, axes in rules:
            names = (axes,) if isinstance(axes, str) else tuple(axes or ())
            names = tuple(name for name in names if name in mesh.axis_names)
            if logical == word and names and not used & set(names):
                used.update(names)
                return names
        return None

    return P(*map(axes_of, _EMBEDDING_AXES))
