"""MaxText's collections, and the functions that read them."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

from .. import _acceptance, _losses
from .._types import checked
from ._config import read_eval_depth, read_scaling_factor
from ._shift import roll_and_mask
from ._trees import unboxed

BLOCK_NAME = "mtp_block"
"""The name under which MaxText's model holds its block."""


class mtp_losses(eqx.Module):  # noqa: N801
    """The collection `mtp_losses`: per depth, the summed losses and the counts of scored tokens.

    >>> print(linen.mtp_losses.from_variables(collections).weights)
    [14. 12.]
    """

    losses: Float[Array, "depth"]
    weights: Float[Array, "depth"]

    @classmethod
    def from_variables(cls, variables: Mapping[str, Any]) -> "mtp_losses | None":
        """What a block collected, or `None` if that is nothing.

        Takes an array over depths, or the tuple of scalars that a Linen module sows.
        """
        found = _find(cls.__name__, variables, ("losses", "weights"))
        if found is None:
            return None
        losses, weights = map(_concatenated, found)
        return None if losses.size == 0 else cls(losses, weights)


class mtp_acceptance(eqx.Module):  # noqa: N801
    """The collection `mtp_acceptance`: at the depth of interest, predictions and scored positions.

    Predictions are floats, as in MaxText.

    >>> linen.mtp_acceptance.from_variables(collections).mtp_preds.shape
    (1, 2, 8)
    """

    mtp_preds: Float[Array, "one batch seq"]
    mtp_mask: Shaped[Array, "one batch seq"]

    @classmethod
    def from_variables(cls, variables: Mapping[str, Any]) -> "mtp_acceptance | None":
        """What a block collected, or `None` if that is nothing."""
        found = _find(cls.__name__, variables, ("mtp_preds", "mtp_mask"))
        if found is None:
            return None
        predictions, mask = map(_first, found)
        if predictions is None or mask is None:
            return None
        return cls(*(x.reshape(1, *x.shape[-2:]) for x in (predictions, mask)))


@checked
def calculate_mtp_loss(intermediate_outputs: Mapping[str, Any], config: Any) -> Float32[Array, ""]:
    """`equinox_mtp.calculate_mtp_loss`, pooled, of the collection `mtp_losses`.

    λ · Σ_k losses_k / Σ_k weights_k

    >>> loss = linen.calculate_mtp_loss(collections, settings)
    >>> loss.shape
    ()

    **Arguments:**

    - `intermediate_outputs`: with `intermediate_outputs["mtp_losses"]["mtp_block"]["losses"]` and
        `["weights"]`: arrays over depths, or tuples of scalars.
    - `config`: its `mtp_loss_scaling_factor` is λ.

    **Returns:** the loss in nats per token; 0 if nothing was collected or scored.

    **Raises:** `ValueError` if `config` has no λ, or the collection is another block's.
    """
    collected = mtp_losses.from_variables(intermediate_outputs)
    if collected is None:
        return jnp.zeros((), jnp.float32)
    losses = _losses.MTPLosses(
        collected.losses.astype(jnp.float32), collected.weights.astype(jnp.float32)
    )
    return _losses.calculate_mtp_loss(losses, scaling_factor=read_scaling_factor(config))


@checked
def calculate_mtp_acceptance_rate(
    intermediate_outputs: Mapping[str, Any], config: Any
) -> Float32[Array, ""]:
    """How often the depth of interest predicts what the main model predicts, in percent.

    `equinox_mtp.calculate_mtp_acceptance_rate` of the collection `mtp_acceptance`.

    >>> outputs = {**collections, "logits": jnp.zeros((2, 8, 32))}
    >>> rate = linen.calculate_mtp_acceptance_rate(outputs, settings)
    >>> bool(0 <= rate <= 100)
    True

    **Arguments:**

    - `intermediate_outputs`: with `intermediate_outputs["mtp_acceptance"]["mtp_block"]`, and the
        main model's logits `[batch seq vocab]` under `"logits"`.
    - `config`: its `mtp_eval_target_module` is the depth.

    **Returns:** percent; 0 if nothing was collected or scored.

    **Raises:** `ValueError` if there are no logits, or the collection is another block's.
    """
    collected = mtp_acceptance.from_variables(intermediate_outputs)
    if collected is None:
        return jnp.zeros((), jnp.float32)
    if "logits" not in intermediate_outputs:
        raise ValueError(
            "`intermediate_outputs` must hold the main model's logits under 'logits'; got "
            f"{sorted(intermediate_outputs)}. Add `intermediate_outputs['logits'] = logits`."
        )
    main_predictions = jnp.argmax(intermediate_outputs["logits"], axis=-1)
    # The depth alone is there, not those before it: what it is compared with is shifted here.
    reference = roll_and_mask(main_predictions, -read_eval_depth(config))[None]
    acceptance = _acceptance.MTPAcceptance(
        collected.mtp_preds.astype(jnp.int32), reference, collected.mtp_mask != 0
    )
    return _acceptance.calculate_mtp_acceptance_rate(acceptance, None).percent[0]


def _find(
    collection: str, variables: Mapping[str, Any], names: tuple[str, str]
) -> tuple[Any, Any] | None:
    """Two entries of a block's collection, or `None` if one is missing."""
    blocks = variables.get(collection) or {}
    if blocks and BLOCK_NAME not in blocks:
        raise ValueError(
            f"`intermediate_outputs['{collection}']` must hold '{BLOCK_NAME}'; got "
            f"{sorted(blocks)}. Name the block '{BLOCK_NAME}', or pass its part under that name."
        )
    block = blocks.get(BLOCK_NAME) or {}
    if any(name not in block for name in names):
        return None
    first, second = (_unboxed_entries(block[name]) for name in names)
    return first, second


def _unboxed_entries(entry: Any) -> Any:
    return tuple(map(unboxed, entry)) if isinstance(entry, (tuple, list)) else unboxed(entry)


def _concatenated(entry: Any) -> Array:
    if not isinstance(entry, tuple):
        return jnp.atleast_1d(jnp.asarray(entry))
    return jnp.concatenate([jnp.zeros(0), *map(jnp.atleast_1d, entry)])


def _first(entry: Any) -> Array | None:
    if isinstance(entry, tuple):
        entry = entry[0] if entry else None
    return None if entry is None else jnp.asarray(entry)
