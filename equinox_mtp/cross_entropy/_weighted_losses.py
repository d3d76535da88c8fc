"""Weighted sums of token losses, with gradients computed in the forward pass.

A sum's gradient is known before its cotangent is, up to that one factor: weight · (softmax -
onehot) needs the token's own weight and logits alone. So each tile's gradients are taken while its
logits are there, and only multiplied in the backward pass: three products of hidden states and head
in place of four. The price is one array of the head's size, kept from one pass to the other.

With several depths there is one factor for each. Their gradients of the head are summed into one
array, weighted by the cotangents that are to be expected; if others come back that gradient is
computed again.

Arrays have the axes `depth batch seq`, and `embed`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Integer

from .._platform import accumulation_dtype
from ._linear_head import LinearHead
from ._partitioning import on_devices
from ._tile_sizes import unscaled_dtype
from ._token_losses import (
    HIDDEN,
    TOKENS,
    TokenLosses,
    head_words,
    in_dtypes_of,
    token_gradients,
    token_losses,
)
from ._token_tiles import scan_tiles
from ._vocab_tiles import (
    Normalizer,
    backward_over_vocabulary,
    gradient_over_devices,
    sum_over_vocabulary,
    zero_gradient,
)


class WeightedLosses(NamedTuple):
    """Per depth, Σ weight · (nll + z · lse²), the second part of it and, if asked for, best ids."""

    losses: Float[Array, "depth"]
    z_losses: Float[Array, "depth"]
    predictions: Int32[Array, "depth batch seq"] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_losses(
    predictions: bool,
    head: LinearHead,
    hidden_states: Float[Array, "depth batch seq embed"],
    target_ids: Integer[Array, "depth batch seq"],
    weights: Float[Array, "depth batch seq"],
    z_loss_weight: Float[Array, ""],
    expected_cotangents: Float[Array, "depth"],
) -> WeightedLosses:
    """Weighted sums of token losses, one for each depth.

    `expected_cotangents` are the sums' cotangents, up to a common factor. Wrong ones cost the time
    of two products, and never exactness.
    """
    token: Any = token_losses(predictions, head, hidden_states, target_ids)
    return sum_by_depth(token, weights, z_loss_weight)


def sum_by_depth(
    token: TokenLosses, weights: Float[Array, "depth batch seq"], z_loss_weight: Float[Array, ""]
) -> WeightedLosses:
    """The weighted sums of each depth's token losses."""
    nll, square = _without_unscored(token, weights, z_loss_weight)
    z_losses = z_loss_weight * jnp.sum(weights * square, axis=(1, 2))
    losses = jnp.sum(weights * nll, axis=(1, 2)) + z_losses
    return WeightedLosses(losses, z_losses, token.predictions)


def _without_unscored(
    token: TokenLosses, weights: Array, z_loss_weight: Any
) -> tuple[Array, Array]:
    """Each token's negative log-likelihood and squared log-sum-exp, 0 where 0 · inf is to be 0."""

    def without(values: Array, is_unscored: Array, is_finite: Array) -> Array:
        return jnp.where(is_unscored & ~is_finite, 0.0, values)

    nll, log_sum_exp = token.negative_log_likelihood, token.log_sum_exp
    no_weight = weights == 0
    # Before it is squared: the square of infinity has a derivative that no factor 0 takes away.
    is_finite = jnp.isfinite(jnp.square(log_sum_exp))
    log_sum_exp = without(log_sum_exp, no_weight | (z_loss_weight == 0), is_finite)
    return without(nll, no_weight, jnp.isfinite(nll)), jnp.square(log_sum_exp)


def _softmax_weight(weights: Array, z_loss_weight: Array, log_sum_exp: Array) -> Array:
    """d(nll + z · lse²) / d logits = (1 + 2 · z · lse) · softmax - onehot: the softmax's factor."""
    return jnp.where(weights == 0, 0.0, weights * (1 + 2 * z_loss_weight * log_sum_exp))


def _weighted_losses_forward(
    predictions: bool,
    head: LinearHead,
    hidden_states: Array,
    target_ids: Array,
    weights: Array,
    z_loss_weight: Array,
    expected_cotangents: Array,
) -> tuple[WeightedLosses, Any]:
    arguments = (head, hidden_states, target_ids, weights, z_loss_weight, expected_cotangents)
    losses, best_ids, normalizer, *gradients = on_devices(
        head.sharding,
        partial(_local_losses_and_gradients, predictions),
        (head_words(head), HIDDEN, TOKENS, TOKENS, "", "depth"),
        (TOKENS, TOKENS, TOKENS, HIDDEN, head_words(head)),
    )(*arguments)
    token = TokenLosses(losses, normalizer.log_sum_exp, best_ids)
    residuals = (arguments, token, normalizer, tuple(gradients))
    return sum_by_depth(token, weights, z_loss_weight), residuals


def _local_losses_and_gradients(
    predictions: bool,
    head: LinearHead,
    hidden_states: Array,
    target_ids: Array,
    weights: Array,
    z_loss_weight: Array,
    expected_cotangents: Array,
) -> tuple[Array, Array | None, Normalizer, Array, LinearHead]:
    def visit(
        gradient: LinearHead, tile: tuple[Array, ...], depth: Array
    ) -> tuple[LinearHead, Any]:
        hidden, target_ids, weights = tile
        sums, tile_residuals = sum_over_vocabulary(
            head, hidden, target_ids, predictions=predictions, keep_tiles=True
        )
        normalizer = sums.normalizer
        hidden_gradient, gradient = backward_over_vocabulary(
            head,
            hidden,
            target_ids,
            normalizer,
            softmax_weight=_softmax_weight(weights, z_loss_weight, normalizer.log_sum_exp),
            target_weight=weights,
            head_gradient=gradient,
            depth_weight=expected_cotangents[depth],
            tile_residuals=tile_residuals,
        )
        hidden_gradient = hidden_gradient.astype(unscaled_dtype(hidden.dtype))
        token = (sums.negative_log_likelihood, sums.predictions, normalizer)
        return gradient, (*token, hidden_gradient)

    gradient, outputs = scan_tiles(
        visit,
        zero_gradient(head, accumulation_dtype(hidden_states)),
        (hidden_states, target_ids, weights),
        tokens=head.tokens_at_a_time,
    )
    return *outputs, gradient_over_devices(gradient, head)


def _weighted_losses_backward(
    predictions: bool, residuals: Any, cotangents: WeightedLosses
) -> tuple[Any, ...]:
    arguments, token, normalizer, gradients = residuals
    head, hidden_states, target_ids, weights, z_loss_weight, expected_cotangents = arguments
    by_depth = cotangents.losses
    by_token = by_depth[:, None, None]
    nll, square = _without_unscored(token, weights, z_loss_weight)
    factor, is_as_expected = common_factor(by_depth, expected_cotangents)

    def scale(gradients: tuple[Array, LinearHead]) -> tuple[Array, LinearHead]:
        hidden_gradient, head_gradient = gradients
        hidden_gradient = (hidden_gradient * by_token[..., None]).astype(hidden_states.dtype)
        head_gradient = jax.tree.map(lambda x: x * factor, head_gradient)
        return hidden_gradient, in_dtypes_of(head, head_gradient)

    def recompute(gradients: tuple[Array, LinearHead]) -> tuple[Array, LinearHead]:
        scaled = weights * by_token
        _, head_gradient = token_gradients(
            head,
            hidden_states,
            target_ids,
            normalizer,
            softmax_weight=_softmax_weight(scaled, z_loss_weight, token.log_sum_exp),
            target_weight=scaled,
        )
        return scale(gradients)[0], head_gradient

    if len(by_depth) == 1:
        hidden_gradient, head_gradient = scale(gradients)
    else:
        # Both gradients come out of it: were it for the head's alone, XLA would run it after the
        # layers' backward pass, and hold all that it needs until then.
        hidden_gradient, head_gradient = lax.cond(is_as_expected, scale, recompute, gradients)
    return (
        head_gradient,
        hidden_gradient,
        None,
        by_token * (nll + z_loss_weight * square),
        jnp.sum(by_token * weights * square),
        jnp.zeros_like(expected_cotangents),
    )


weighted_losses.defvjp(_weighted_losses_forward, _weighted_losses_backward)


def common_factor(actual: Array, expected: Array) -> tuple[Array, Array]:
    """The factor between two arrays, and whether there is one, up to rounding."""
    square = jnp.sum(jnp.square(expected))
    factor = jnp.sum(actual * expected) / jnp.where(square == 0, 1.0, square)
    tolerance = 8 * jnp.finfo(actual.dtype).eps * jnp.max(jnp.abs(actual))
    return factor, jnp.all(jnp.abs(actual - factor * expected) <= tolerance)
