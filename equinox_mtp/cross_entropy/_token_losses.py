"""Each token's loss, with a gradient of its own: the logits are computed twice, in tiles.

Four products of hidden states and head: one in the forward pass; in the backward pass the logits
again, and one product each for the gradients of hidden states and head. Arrays have the axes
`depth batch seq`, and `embed`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jaxtyping import Array, Float, Int32, Integer

from .._platform import accumulation_dtype
from ._linear_head import LinearHead
from ._partitioning import on_devices
from ._token_tiles import scan_tiles
from ._vocab_tiles import (
    Normalizer,
    VocabSums,
    backward_over_vocabulary,
    gradient_over_devices,
    sum_over_vocabulary,
    zero_gradient,
)

TOKENS = "depth batch seq"
HIDDEN = "depth batch seq embed"


class TokenLosses(NamedTuple):
    """Each token's negative log-likelihood, log-sum-exp and, if asked for, best id."""

    negative_log_likelihood: Float[Array, "depth batch seq"]
    log_sum_exp: Float[Array, "depth batch seq"]
    predictions: Int32[Array, "depth batch seq"] | None


def head_words(head: LinearHead) -> LinearHead:
    """The axis words of a head's arrays, in its structure."""
    return head.with_arrays("vocab embed", "vocab" if head.bias is not None else None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_losses(
    predictions: bool,
    head: LinearHead,
    hidden_states: Float[Array, "depth batch seq embed"],
    target_ids: Integer[Array, "depth batch seq"],
) -> TokenLosses:
    """Every token's loss; differentiable in both of its parts."""
    return _token_losses_and_normalizer(predictions, head, hidden_states, target_ids)[0]


def _token_losses_and_normalizer(
    predictions: bool, head: LinearHead, hidden_states: Array, target_ids: Array
) -> tuple[TokenLosses, Normalizer]:
    """For both rules: a forward rule that called `token_losses` had no derivative of its own."""
    losses, best_ids, normalizer = on_devices(
        head.sharding,
        partial(_local_token_losses, predictions),
        (head_words(head), HIDDEN, TOKENS),
        (TOKENS, TOKENS, TOKENS),
    )(head, hidden_states, target_ids)
    return TokenLosses(losses, normalizer.log_sum_exp, best_ids), normalizer


def _local_token_losses(
    predictions: bool, head: LinearHead, hidden_states: Array, target_ids: Array
) -> tuple[Array, Array | None, Normalizer]:
    first_id = head.first_id

    def visit(carry: None, tile: tuple[Array, Array], depth: Array) -> tuple[None, VocabSums]:
        hidden_states, target_ids = tile
        return None, sum_over_vocabulary(
            head, hidden_states, target_ids - first_id, predictions=predictions
        )[0]

    _, sums = scan_tiles(visit, None, (hidden_states, target_ids), tokens=head.tokens_at_a_time)
    if head.vocab_axes:
        sums = sums.over_devices(head.vocab_axes, first_id)
    return sums.negative_log_likelihood, sums.predictions, sums.normalizer


def _token_losses_forward(
    predictions: bool, head: LinearHead, hidden_states: Array, target_ids: Array
) -> tuple[TokenLosses, Any]:
    out, normalizer = _token_losses_and_normalizer(predictions, head, hidden_states, target_ids)
    return out, (head, hidden_states, target_ids, normalizer)


def _token_losses_backward(predictions: bool, residuals: Any, cotangents: TokenLosses) -> Any:
    # With nll = lse - target_logit, d lse / d logits = softmax and d target_logit / d logits =
    # onehot: the softmax is weighted by both cotangents, and the onehot by the first.
    target_weight = cotangents.negative_log_likelihood
    hidden_gradient, head_gradient = token_gradients(
        *residuals,
        softmax_weight=target_weight + cotangents.log_sum_exp,
        target_weight=target_weight,
    )
    return head_gradient, hidden_gradient, None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def token_gradients(
    head: LinearHead,
    hidden_states: Float[Array, "depth batch seq embed"],
    target_ids: Integer[Array, "depth batch seq"],
    normalizer: Normalizer,
    *,
    softmax_weight: Float[Array, "depth batch seq"],
    target_weight: Float[Array, "depth batch seq"],
) -> tuple[Float[Array, "depth batch seq embed"], LinearHead]:
    """Pulls `softmax_weight · softmax - target_weight · onehot` back to hidden states and head."""
    hidden_gradient, head_gradient = on_devices(
        head.sharding,
        _local_token_gradients,
        (head_words(head), HIDDEN, TOKENS, TOKENS, TOKENS, TOKENS),
        (HIDDEN, head_words(head)),
    )(head, hidden_states, target_ids, normalizer, softmax_weight, target_weight)
    return hidden_gradient, in_dtypes_of(head, head_gradient)


def in_dtypes_of(head: LinearHead, gradient: LinearHead) -> LinearHead:
    """A gradient of the head, in the dtypes of its parameters."""
    return jax.tree.map(lambda x, parameter: x.astype(parameter.dtype), gradient, head)


def _local_token_gradients(
    head: LinearHead, hidden_states: Array, *rest: Any
) -> tuple[Array, LinearHead]:
    first_id = head.first_id

    def visit(
        gradient: LinearHead, tile: tuple[Any, ...], depth: Array
    ) -> tuple[LinearHead, Array]:
        hidden, target_ids, normalizer, softmax_weight, target_weight = tile
        hidden_gradient, gradient = backward_over_vocabulary(
            head,
            hidden,
            target_ids - first_id,
            normalizer,
            softmax_weight=softmax_weight,
            target_weight=target_weight,
            head_gradient=gradient,
        )
        # Over a split vocabulary it is a part of a sum, to be rounded once it is complete.
        return gradient, hidden_gradient if head.vocab_axes else hidden_gradient.astype(
            hidden.dtype
        )

    gradient, hidden_gradient = scan_tiles(
        visit,
        zero_gradient(head, accumulation_dtype(hidden_states)),
        (hidden_states, *rest),
        tokens=head.tokens_at_a_time,
    )
    if head.vocab_axes:
        hidden_gradient = lax.psum(hidden_gradient, head.vocab_axes).astype(hidden_states.dtype)
    return hidden_gradient, gradient_over_devices(gradient, head)
