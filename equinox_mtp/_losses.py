"""Losses as sums and counts, divided once, at the end."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from ._types import checked

Reduction: TypeAlias = Literal["pooled", "mean_of_depths"]

Objective: TypeAlias = Callable[["MTPLosses"], Array]
"""From the depths' losses to a scalar, as `functools.partial(calculate_mtp_loss, ...)`."""


class TokenLoss(eqx.Module):
    """A cross-entropy summed over tokens, and the number of tokens; `+` joins batches.

    `z_loss` is the part of `loss` that is a z-loss, for reports, without gradient.
    """

    loss: Float32[Array, ""]
    weight: Float32[Array, ""]
    z_loss: Float32[Array, ""] = eqx.field(default_factory=lambda: jnp.zeros((), jnp.float32))

    def __add__(self, other: "TokenLoss") -> "TokenLoss":
        return jax.tree.map(jnp.add, self, other)

    @property
    def mean(self) -> Float32[Array, ""]:
        """The loss per token in nats; 0 if there are no tokens."""
        return _safe_divide(self.loss, self.weight)


class MTPLosses(eqx.Module):
    """Per depth, the summed cross-entropy and the number of scored tokens; `+` joins batches.

    `z_losses` are the part of `losses` that is a z-loss, for reports, without gradient.
    """

    losses: Float32[Array, "depth"]
    weights: Float32[Array, "depth"]
    z_losses: Float32[Array, "depth"]

    def __init__(
        self,
        losses: Float32[Array, "depth"],
        weights: Float32[Array, "depth"],
        *,
        z_losses: Float32[Array, "depth"] | None = None,
    ):
        """`z_losses` are zero if `None`."""
        self.losses = losses
        self.weights = weights
        self.z_losses = jnp.zeros_like(losses) if z_losses is None else z_losses

    def __add__(self, other: "MTPLosses") -> "MTPLosses":
        return jax.tree.map(jnp.add, self, other)

    @property
    def mean(self) -> Float32[Array, "depth"]:
        """The loss per token in nats at each depth; 0 where no token is scored."""
        return _safe_divide(self.losses, self.weights)


@checked
def sum_token_losses(
    negative_log_likelihood: Float[Array, "batch seq"], mask: Bool[Array, "batch seq"]
) -> TokenLoss:
    """Sums the losses of the tokens that count, in float32; the others have no gradient."""
    loss = jnp.sum(jnp.where(mask, negative_log_likelihood.astype(jnp.float32), 0.0))
    return TokenLoss(loss=loss, weight=jnp.sum(mask, dtype=jnp.float32))


@checked
def calculate_mtp_loss(
    losses: MTPLosses,
    *,
    scaling_factor: float | int | Float[Array, ""] = 0.1,
    depth_weights: Float[Array, "_"] | None = None,
    reduction: Reduction = "pooled",
    total_weights: Float[Array, "_"] | None = None,
) -> Float32[Array, ""]:
    """The loss that Multi-Token Prediction adds to the main model's.

    With the sums S_k and counts C_k of depth k, and normalised depth weights w_k (Σ w_k = 1; by
    default all equal):

    - `"pooled"`: λ · Σ_k w_k S_k / Σ_k w_k C_k, as MaxText does: every token counts the same;
    - `"mean_of_depths"`: λ · Σ_k w_k · S_k / C_k, as in DeepSeek-V3 (arXiv 2412.19437, §2.2, eq.
        25) and Megatron-LM: every depth counts the same.

    **Arguments:**

    - `losses`: of one batch, or the sum of several.
    - `scaling_factor`: λ. Pass an array into a compiled function, so that a schedule does not
        compile anew.
    - `depth_weights`: one weight for each depth, not negative; need not add up to 1. May be traced.
        `exponential_depth_weights` gives those of FastMTP.
    - `reduction`: see above.
    - `total_weights`: the counts C_k to divide by, if not `losses.weights`. For exact gradient
        accumulation: give each microbatch the counts of the whole batch, and add up gradients.

    **Returns:** the loss, in nats a token; 0, with gradient 0, where nothing is scored.

    **Raises:** `ValueError` if weights are not one a depth.
    """
    num_depths = losses.losses.shape[0]
    for name, array in (("depth_weights", depth_weights), ("total_weights", total_weights)):
        if array is not None and array.shape != (num_depths,):
            raise ValueError(
                f"`{name}` must hold one number for each of the {num_depths} depths in `losses`; "
                f"got shape {array.shape}."
            )
    counts = losses.weights if total_weights is None else total_weights.astype(jnp.float32)
    if depth_weights is None:
        depth_weights = jnp.ones(num_depths, jnp.float32)
    depth_weights = depth_weights.astype(jnp.float32)
    weights = _safe_divide(depth_weights, jnp.sum(depth_weights))
    if reduction == "pooled":
        mean = _safe_divide(jnp.sum(weights * losses.losses), jnp.sum(weights * counts))
    else:
        mean = jnp.sum(weights * _safe_divide(losses.losses, counts))
    return (scaling_factor * mean).astype(jnp.float32)


def loss_weights(objective: Objective, counts: Float32[Array, "depth"]) -> Float32[Array, "depth"]:
    """With what weights the depths' summed losses enter an objective, the largest being 1.

    They are its derivative at losses of 0; constants for `calculate_mtp_loss`, which is linear.
    """
    counts = jax.lax.stop_gradient(counts)
    weights = jax.grad(lambda losses: objective(MTPLosses(losses, counts)))(jnp.zeros_like(counts))
    return jax.lax.stop_gradient(_safe_divide(weights, jnp.max(jnp.abs(weights))))


@checked
def exponential_depth_weights(
    num_depths: int, decay: float | int | Float[Array, ""]
) -> Float32[Array, "depth"]:
    """Depth weights β^(k-1) / Σ_j β^(j-1), as in FastMTP (arXiv 2509.18362, eq. 2).

    **Arguments:**

    - `num_depths`: the number of depths D.
    - `decay`: β; 1 weighs all depths the same.
    """
    weights = jnp.asarray(decay, jnp.float32) ** jnp.arange(num_depths, dtype=jnp.float32)
    return _safe_divide(weights, jnp.sum(weights))


def _safe_divide(
    numerator: Float[Array, "*shape"], denominator: Float[Array, "*shape2"]
) -> Float[Array, "*shape"]:
    """A quotient that is 0, with gradient 0, where the denominator is 0."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0.0, numerator / jnp.where(is_zero, 1.0, denominator))
