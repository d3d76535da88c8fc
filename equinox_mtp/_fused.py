"""The cross-entropy of a linear head in tiles, in two strategies with gradients of their own.

`token_losses` gives every token's loss, and computes the logits again in the backward pass: four
matrix products. `weighted_losses` gives weighted sums, and computes the gradients in the forward
pass, while a tile's logits are there: three.

Arrays have the axes `depth batch seq`, and `embed`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Integer

from ._devices import on_devices
from ._head import LinearHead, accumulation_dtype
from ._token_tiles import scan_tiles
from ._vocab_tiles import (
    HeadGradient,
    Normalizer,
    VocabSums,
    backward_over_vocabulary,
    sum_over_vocabulary,
    unscaled_dtype,
)


class TokenLosses(NamedTuple):
    """Each token's negative log-likelihood, log-sum-exp and, if asked for, best id."""

    negative_log_likelihood: Float[Array, "depth batch seq"]
    log_sum_exp: Float[Array, "depth batch seq"]
    predictions: Int32[Array, "depth batch seq"] | None


class WeightedLosses(NamedTuple):
    """Per depth, Σ weight · (nll + z · lse²), the second part of it and, if asked for, best ids."""

    losses: Float[Array, "depth"]
    z_losses: Float[Array, "depth"]
    predictions: Int32[Array, "depth batch seq"] | None


# Each token's loss


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
    local = partial(_local_token_losses, head, predictions)
    words = ("vocab embed", "vocab", "depth batch seq embed", "depth batch seq")
    losses, best_ids, *normalizer = on_devices(
        head.sharding, local, words, ("depth batch seq",) * 4
    )(head.weight, head.bias, hidden_states, target_ids)
    normalizer = Normalizer(*normalizer)
    return TokenLosses(losses, normalizer.log_sum_exp, best_ids), normalizer


def _local_token_losses(
    head: LinearHead, predictions: bool, weight: Array, bias: Array | None, *tokens: Array
) -> tuple[Array, Array | None, Array, Array]:
    head = head.with_arrays(weight, bias)
    first_id = head.first_id

    def visit(carry: None, tile: tuple[Array, Array], depth: Array) -> tuple[None, VocabSums]:
        hidden_states, target_ids = tile
        return None, sum_over_vocabulary(
            head, hidden_states, target_ids - first_id, predictions=predictions
        )[0]

    _, sums = scan_tiles(visit, None, tokens, tokens=head.tokens_at_a_time)
    if head.vocab_axes:
        sums = sums.over_devices(head.vocab_axes, first_id)
    return sums.negative_log_likelihood, sums.predictions, *sums.normalizer


def _token_losses_forward(
    predictions: bool, head: LinearHead, hidden_states: Array, target_ids: Array
) -> tuple[TokenLosses, Any]:
    out, normalizer = _token_losses_and_normalizer(predictions, head, hidden_states, target_ids)
    return out, (head, hidden_states, target_ids, normalizer)


def _token_losses_backward(predictions: bool, residuals: Any, cotangents: TokenLosses) -> Any:
    head, hidden_states, target_ids, normalizer = residuals
    target_weight = cotangents.negative_log_likelihood
    hidden_gradient, head_gradient = _token_gradients(
        head,
        hidden_states,
        target_ids,
        normalizer,
        softmax_weight=target_weight + cotangents.log_sum_exp,
        target_weight=target_weight,
    )
    return head_gradient, hidden_gradient, None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _token_gradients(
    head: LinearHead,
    hidden_states: Array,
    target_ids: Array,
    normalizer: Normalizer,
    *,
    softmax_weight: Array,
    target_weight: Array,
) -> tuple[Array, LinearHead]:
    """The gradients of hidden states and head, from each token's cotangents."""
    tokens = "depth batch seq"
    words = ("vocab embed", "vocab", "depth batch seq embed", *[tokens] * 5)
    out_words = ("depth batch seq embed", "vocab embed", "vocab")
    local = partial(_local_token_gradients, head)
    hidden_gradient, weight, bias = on_devices(head.sharding, local, words, out_words)(
        head.weight,
        head.bias,
        hidden_states,
        target_ids,
        *normalizer,
        softmax_weight,
        target_weight,
    )
    return hidden_gradient, _of_dtypes(head, weight, bias)


def _of_dtypes(head: LinearHead, weight: Array, bias: Array | None) -> LinearHead:
    """A gradient of the head, in the dtypes of its parameters."""
    if head.bias is not None and bias is not None:
        bias = bias.astype(head.bias.dtype)
    return head.with_arrays(weight.astype(head.weight.dtype), bias)


def _local_token_gradients(
    head: LinearHead, weight: Array, bias: Array | None, hidden_states: Array, *rest: Array
) -> tuple[Array, Array, Array | None]:
    head = head.with_arrays(weight, bias)
    first_id = head.first_id

    def visit(
        gradient: HeadGradient, tile: tuple[Array, ...], depth: Array
    ) -> tuple[HeadGradient, Array]:
        hidden, target_ids, max_logit, log_sum, softmax_weight, target_weight = tile
        hidden_gradient, gradient = backward_over_vocabulary(
            head,
            hidden,
            target_ids - first_id,
            Normalizer(max_logit, log_sum),
            softmax_weight=softmax_weight,
            target_weight=target_weight,
            head_gradient=gradient,
        )
        return gradient, hidden_gradient if head.vocab_axes else hidden_gradient.astype(
            hidden.dtype
        )

    gradient, hidden_gradient = scan_tiles(
        visit,
        HeadGradient.zeros(head, accumulation_dtype(hidden_states)),
        (hidden_states, *rest),
        tokens=head.tokens_at_a_time,
    )
    if head.vocab_axes:
        hidden_gradient = lax.psum(hidden_gradient, head.vocab_axes).astype(hidden_states.dtype)
    return hidden_gradient, *gradient.over_devices(head)


# Weighted sums of losses


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_losses(
    predictions: bool,
    head: LinearHead,
    hidden_states: Float[Array, "depth batch seq embed"],
    target_ids: Integer[Array, "depth batch seq"],
    weights: Float[Array, "depth batch seq"],
    z_loss_weight: Float[Array, ""],
    expected: Float[Array, "depth"],
) -> WeightedLosses:
    """Weighted sums of token losses, one for each depth.

    The gradient of the head is summed over depths in the forward pass, before it is known with what
    cotangents the sums will come back: `expected` says it up to a common factor. If they come back
    otherwise the backward pass computes that gradient anew. Hence a wrong `expected` costs time,
    and never exactness.
    """
    token: Any = token_losses(predictions, head, hidden_states, target_ids)
    return sum_by_depth(token, weights, z_loss_weight)


def sum_by_depth(token: TokenLosses, weights: Array, z_loss_weight: Array) -> WeightedLosses:
    """The weighted sums of each depth's token losses."""

    nll, square = _counted(token, weights, z_loss_weight)
    z_losses = z_loss_weight * jnp.sum(weights * square, axis=(1, 2))
    losses = jnp.sum(weights * nll, axis=(1, 2)) + z_losses
    return WeightedLosses(losses, z_losses, token.predictions)


def _counted(token: TokenLosses, weights: Array, z_loss_weight: Any) -> tuple[Array, Array]:
    """Each token's negative log-likelihood and squared log-sum-exp, 0 where 0 · inf is to be 0."""

    def counted(values: Array, is_left_out: Array) -> Array:
        return jnp.where(is_left_out & ~jnp.isfinite(values), 0.0, values)

    square = jnp.square(token.log_sum_exp)
    no_weight = weights == 0
    return (
        counted(token.negative_log_likelihood, no_weight),
        counted(square, no_weight | (z_loss_weight == 0)),
    )


def _weighted_losses_forward(
    predictions: bool,
    head: LinearHead,
    hidden_states: Array,
    target_ids: Array,
    weights: Array,
    z_loss_weight: Array,
    expected: Array,
) -> tuple[WeightedLosses, Any]:
    tokens, hidden = "depth batch seq", "depth batch seq embed"
    words = ("vocab embed", "vocab", hidden, tokens, tokens, "", "depth")
    out_words = (*[tokens] * 4, hidden, "vocab embed", "vocab")
    local = partial(_local_losses_and_gradients, head, predictions)
    losses, best_ids, *normalizer, hidden_gradient, weight, bias = on_devices(
        head.sharding, local, words, out_words
    )(head.weight, head.bias, hidden_states, target_ids, weights, z_loss_weight, expected)
    normalizer = Normalizer(*normalizer)
    token = TokenLosses(losses, normalizer.log_sum_exp, best_ids)
    arguments = (head, hidden_states, target_ids, weights, z_loss_weight, expected)
    residuals = (arguments, token, normalizer, (hidden_gradient, weight, bias))
    return sum_by_depth(token, weights, z_loss_weight), residuals


def _local_losses_and_gradients(
    head: LinearHead,
    predictions: bool,
    weight: Array,
    bias: Array | None,
    hidden_states: Array,
    target_ids: Array,
    weights: Array,
    z_loss_weight: Array,
    expected: Array,
) -> tuple[Any, ...]:
    head = head.with_arrays(weight, bias)

    def visit(
        gradient: HeadGradient, tile: tuple[Array, ...], depth: Array
    ) -> tuple[HeadGradient, Any]:
        hidden, target_ids, weights = tile
        sums, kept_tiles = sum_over_vocabulary(
            head, hidden, target_ids, predictions=predictions, keep_tiles=True
        )
        normalizer = sums.normalizer
        hidden_gradient, gradient = backward_over_vocabulary(
            head,
            hidden,
            target_ids,
            normalizer,
            softmax_weight=weights * (1 + 2 * z_loss_weight * normalizer.log_sum_exp),
            target_weight=weights,
            head_gradient=gradient,
            head_weight=expected[depth],
            kept_tiles=kept_tiles,
        )
        token = (sums.negative_log_likelihood, sums.predictions, *normalizer)
        return gradient, (*token, hidden_gradient.astype(unscaled_dtype(hidden.dtype)))

    gradient, outputs = scan_tiles(
        visit,
        HeadGradient.zeros(head, accumulation_dtype(hidden_states)),
        (hidden_states, target_ids, weights),
        tokens=head.tokens_at_a_time,
    )
    return *outputs, *gradient.over_devices(head)


def _weighted_losses_backward(
    predictions: bool, residuals: Any, cotangents: WeightedLosses
) -> tuple[Any, ...]:
    arguments, token, normalizer, gradients = residuals
    head, hidden_states, target_ids, weights, z_loss_weight, expected = arguments
    by_depth = cotangents.losses
    by_token = by_depth[:, None, None]
    nll, square = _counted(token, weights, z_loss_weight)
    factor, is_as_expected = _proportion(by_depth, expected)

    def scale(gradients: tuple[Array, Array, Array | None]) -> tuple[Array, LinearHead]:
        hidden_gradient, *head_gradient = gradients
        hidden_gradient = (hidden_gradient * by_token[..., None]).astype(hidden_states.dtype)
        weight, bias = jax.tree.map(lambda x: x * factor, tuple(head_gradient))
        return hidden_gradient, _of_dtypes(head, weight, bias)

    def compute_anew(gradients: tuple[Array, Array, Array | None]) -> tuple[Array, LinearHead]:
        scaled = weights * by_token
        _, head_gradient = _token_gradients(
            head,
            hidden_states,
            target_ids,
            normalizer,
            softmax_weight=scaled * (1 + 2 * z_loss_weight * token.log_sum_exp),
            target_weight=scaled,
        )
        return scale(gradients)[0], head_gradient

    if len(by_depth) == 1:
        hidden_gradient, head_gradient = scale(gradients)
    else:
        # Both gradients come out of it: were it for the head's alone, XLA would run it after the
        # layers' backward pass, and hold all that it needs until then.
        hidden_gradient, head_gradient = lax.cond(is_as_expected, scale, compute_anew, gradients)
    return (
        head_gradient,
        hidden_gradient,
        None,
        by_token * (nll + z_loss_weight * square),
        jnp.sum(by_token * weights * square),
        jnp.zeros_like(expected),
    )


weighted_losses.defvjp(_weighted_losses_forward, _weighted_losses_backward)


def _proportion(actual: Array, expected: Array) -> tuple[Array, Array]:
    """The factor between two vectors, and whether there is one, up to rounding."""
    square = jnp.sum(jnp.square(expected))
    factor = jnp.sum(actual * expected) / jnp.where(square == 0, 1.0, square)
    tolerance = 8 * jnp.finfo(actual.dtype).eps * jnp.max(jnp.abs(actual))
    return factor, jnp.all(jnp.abs(actual - factor * expected) <= tolerance)
