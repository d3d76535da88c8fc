"""The loss under an output head that is any callable."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from .._platform import accumulation_dtype
from ._partitioning import tokens_on_all_devices
from ._tile_sizes import default_token_tile
from ._token_losses import TokenLosses
from ._token_tiles import scan_tiles


def callable_token_losses(
    predictions: bool,
    head: Callable[[Array], Array],
    hidden_states: Float[Array, "depth batch seq embed"],
    target_ids: Integer[Array, "depth batch seq"],
) -> TokenLosses:
    """Every token's loss; the head is run on tiles of tokens, and again in the backward pass."""

    @jax.checkpoint
    def losses_of_tile(hidden_states: Array, target_ids: Array) -> TokenLosses:
        logits = head(hidden_states)
        logits = logits.astype(accumulation_dtype(logits))
        max_logit = lax.stop_gradient(jnp.max(logits, axis=-1))
        max_logit = jnp.where(jnp.isfinite(max_logit), max_logit, 0)
        log_sum = jnp.log(jnp.sum(jnp.exp(logits - max_logit[..., None]), axis=-1))
        ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        is_target = ids == target_ids[..., None]
        target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        best_id = None
        if predictions:
            best_id = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            best_id = jnp.where(jnp.isfinite(log_sum), best_id, -1)
        return TokenLosses(log_sum - (target_logit - max_logit), max_logit + log_sum, best_id)

    return scan_tiles(
        lambda carry, tile, depth: (carry, losses_of_tile(*tile)),
        None,
        (hidden_states, target_ids),
        tokens=tokens_on_all_devices(default_token_tile(_vocab_size(head, hidden_states))),
        # The gradient of a head may be NaN at zeros, if it normalises.
        pad_with="last_token",
    )[1]


def _vocab_size(head: Any, hidden_states: Array) -> int:
    """How many logits a callable makes of a token."""
    one_token = jax.ShapeDtypeStruct((1, 1, hidden_states.shape[-1]), hidden_states.dtype)
    logits = eqx.filter_eval_shape(head, one_token)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 3 or shape[:2] != (1, 1) or shape[2] == 0:
        came = type(logits).__name__ if shape is None else f"an array {shape}"
        raise ValueError(
            "`head` must make logits [batch seq vocab] of hidden states [batch seq embed]; of an "
            f"array {one_token.shape} it made {came}. Wrap it in a function that does."
        )
    return shape[2]
