"""Losses as sums and counts, divided once, at the end."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Integer

from ._checks import check_integer
from ._types import HostOrDeviceArray, Scalar, checked, on_host

Reduction: TypeAlias = Literal["pooled", "mean_of_depths"]

DepthWeights: TypeAlias = (
    Float[HostOrDeviceArray, "_"]
    | Integer[HostOrDeviceArray, "_"]
    | Sequence[float | int | np.floating | np.integer]
)
"""One number for each depth."""


class TokenLoss(eqx.Module):
    """A cross-entropy summed over tokens, and the number of tokens; `+` joins batches.

    Outside of `jit`, `+` is exact to 2^53 tokens: it adds on the host, in 64 bits, and waits for
    the arrays. While tracing it adds in float32, where a count is exact to 2^24.

    To minimise is `mean`; `loss` grows with the batch.

    >>> losses = emtp.TokenLoss(jnp.float32(6), jnp.float32(2))
    >>> print(losses.mean, (losses + losses).weight)
    3.0 4.0

    **Fields:**

    - `loss`: the sum over all scored tokens, in nats.
    - `weight`: how many tokens were scored.
    - `z_loss`: the part of `loss` that is a z-loss, for reports, without gradient.
    """

    loss: Float[HostOrDeviceArray, ""]
    weight: Float[HostOrDeviceArray, ""]
    z_loss: Float[HostOrDeviceArray, ""] = eqx.field(
        default_factory=lambda: jnp.zeros((), jnp.float32)
    )

    def __add__(self, other: "TokenLoss") -> "TokenLoss":
        return jax.tree.map(add_counts, self, other)

    @property
    def mean(self) -> Float[Array, ""]:
        """The loss per token in nats; 0 if there are no tokens."""
        return _safe_divide(self.loss, self.weight)


class MTPLosses(eqx.Module):
    """Per depth, the summed cross-entropy and the number of scored tokens; `+` joins batches.

    Outside of `jit`, `+` is exact to 2^53 tokens, as for `TokenLoss`. `z_losses` are the part of
    `losses` that is a z-loss, for reports, without gradient.

    >>> losses = emtp.MTPLosses(losses=jnp.asarray([8.0, 9.0]), weights=jnp.asarray([4.0, 3.0]))
    >>> print(losses.mean, (losses + losses).weights)
    [2. 3.] [8. 6.]

    **Raises:** `ValueError` if the fields, or the terms of a sum, are of different depths.
    """

    losses: Float[HostOrDeviceArray, "depth"]
    weights: Float[HostOrDeviceArray, "depth"]
    z_losses: Float[HostOrDeviceArray, "depth"]

    def __init__(
        self,
        losses: Float[HostOrDeviceArray, "depth"],
        weights: Float[HostOrDeviceArray, "depth"],
        *,
        z_losses: Float[HostOrDeviceArray, "depth"] | None = None,
    ):
        """`z_losses` are zero if `None`."""
        self.losses = losses
        self.weights = weights
        self.z_losses = jnp.zeros_like(losses) if z_losses is None else z_losses
        shapes = [jnp.shape(x) for x in (self.losses, self.weights, self.z_losses)]
        if len(set(shapes)) > 1:
            raise ValueError(
                "`losses`, `weights` and `z_losses` must hold one number a depth; got shapes "
                f"{', '.join(map(str, shapes))}."
            )

    def __add__(self, other: "MTPLosses") -> "MTPLosses":
        check_same_depths(self.losses, other.losses, "MTPLosses")
        return jax.tree.map(add_counts, self, other)

    @property
    def mean(self) -> Float[Array, "depth"]:
        """The loss per token in nats at each depth; 0 where no token is scored."""
        return _safe_divide(self.losses, self.weights)


Objective: TypeAlias = Callable[[MTPLosses], Array]
"""From the depths' losses to a scalar, as `functools.partial(calculate_mtp_loss, ...)`."""


@checked
def sum_token_losses(
    negative_log_likelihood: Float[Array, "batch seq"], mask: Bool[Array, "batch seq"]
) -> TokenLoss:
    """Sums the losses of the tokens that count, in float32 (float64 for float64).

    The others have no gradient. For a main model whose losses are not those of `MTPModel`.

    >>> losses, mask = jnp.asarray([[1.0, 2.0, 4.0]]), jnp.asarray([[True, False, True]])
    >>> print(emtp.sum_token_losses(losses, mask).mean)
    2.5
    """
    dtype = jnp.promote_types(negative_log_likelihood.dtype, jnp.float32)
    loss = jnp.sum(jnp.where(mask, negative_log_likelihood.astype(dtype), 0.0))
    return TokenLoss(loss=loss, weight=jnp.sum(mask, dtype=jnp.float32))


@checked
def calculate_mtp_loss(
    losses: MTPLosses,
    *,
    scaling_factor: Scalar = 0.1,
    depth_weights: DepthWeights | None = None,
    reduction: Reduction = "pooled",
    total_weights: DepthWeights | None = None,
) -> Float[Array, ""]:
    """The loss that Multi-Token Prediction adds to the main model's.

    With the sums S_k and counts C_k of depth k, and normalised depth weights w_k (Σ w_k = 1; by
    default all equal):

    - `"pooled"`: λ · Σ_k w_k S_k / Σ_k w_k C_k, as MaxText does: every token counts the same;
    - `"mean_of_depths"`: λ · Σ_k w_k · S_k / C_k, as in DeepSeek-V3 (arXiv 2412.19437, §2.2, eq.
        25) and Megatron-LM: every depth counts the same.

    >>> losses = emtp.MTPLosses(jnp.asarray([8.0, 9.0]), jnp.asarray([4.0, 2.0]))
    >>> print(f"{emtp.calculate_mtp_loss(losses, scaling_factor=0.3):.3f}")  # 0.3 · 17 / 6
    0.850
    >>> print(emtp.calculate_mtp_loss(losses, scaling_factor=1.0, reduction="mean_of_depths"))
    3.25

    **Arguments:**

    - `losses`: of one batch, or the sum of several.
    - `scaling_factor`: λ, not negative. Pass an array into a compiled function, so that a schedule
        does not recompile.
    - `depth_weights`: one weight for each depth, not negative; need not add up to 1. May be traced.
        `exponential_depth_weights` gives FastMTP's.
    - `reduction`: see above.
    - `total_weights`: the counts C_k to divide by, if not `losses.weights`. For exact gradient
        accumulation: give each microbatch the counts of the whole batch, and add up gradients.

    **Returns:** the loss, in nats per token; 0, with gradient 0, where nothing is scored.

    **Raises:** `ValueError` if weights are not one a depth, or if λ or a weight is negative or not
    finite. What is traced is not looked at: a negative or non-finite one enters the formula.
    """
    num_depths = losses.losses.shape[0]
    check_not_negative("scaling_factor", scaling_factor)
    counts = jnp.asarray(losses.weights)
    if total_weights is not None:
        counts = _one_a_depth("total_weights", total_weights, num_depths)
    weights = jnp.ones(num_depths, jnp.float32)
    if depth_weights is not None:
        weights = _one_a_depth("depth_weights", depth_weights, num_depths)
    weights = _safe_divide(weights, jnp.sum(weights))
    if reduction == "pooled":
        mean = _safe_divide(jnp.sum(weights * losses.losses), jnp.sum(weights * counts))
    else:
        mean = jnp.sum(weights * _safe_divide(losses.losses, counts))
    return jnp.asarray(scaling_factor, mean.dtype) * mean


def _one_a_depth(name: str, weights: DepthWeights, num_depths: int) -> Array:
    check_not_negative(name, weights)
    array = jnp.asarray(weights)
    if array.shape != (num_depths,):
        raise ValueError(
            f"`{name}` must hold one number for each of the {num_depths} depths in `losses`; got "
            f"shape {array.shape}."
        )
    return array.astype(jnp.float32)


def check_not_negative(name: str, numbers: Any) -> None:
    """**Raises:** `ValueError` if a number at hand is negative or not finite."""
    values = on_host(numbers)
    if values is not None and not np.all(np.isfinite(values) & (values >= 0)):
        raise ValueError(f"`{name}` must be finite and not negative; got {values.tolist()!s:.80}.")


def check_same_depths(one: HostOrDeviceArray, other: HostOrDeviceArray, what: str) -> None:
    """**Raises:** `ValueError` if two sums are not of the same depths."""
    if one.shape != other.shape:
        raise ValueError(
            f"`{what}` to be added must have the same number of depths; got {one.shape[0]} and "
            f"{other.shape[0]}."
        )


def add_counts(one: Any, other: Any) -> Any:
    """Adds sums or counts: in 64 bits on the host where they are at hand, as they are otherwise."""
    values = on_host(one), on_host(other)
    if values[0] is None or values[1] is None:
        return one + other
    dtype = np.int64 if np.issubdtype(values[0].dtype, np.integer) else np.float64
    return np.asarray(values[0].astype(dtype) + values[1].astype(dtype))


def loss_weights(objective: Objective, counts: Float32[Array, "depth"]) -> Float32[Array, "depth"]:
    """With what weights the depths' summed losses enter an objective, the largest being 1.

    They are its derivative at losses of 0; constants for `calculate_mtp_loss`, which is linear.
    """
    counts = jax.lax.stop_gradient(counts)
    shape = jax.eval_shape(lambda losses: objective(MTPLosses(losses, counts)), counts)
    if getattr(shape, "shape", None) != ():
        raise ValueError(
            "`objective` must reduce `MTPLosses` to one number; it made "
            f"{getattr(shape, 'shape', type(shape).__name__)}. Pass `calculate_mtp_loss`, or a "
            "`functools.partial` of it."
        )
    weights = jax.grad(lambda losses: objective(MTPLosses(losses, counts)))(jnp.zeros_like(counts))
    return jax.lax.stop_gradient(_safe_divide(weights, jnp.max(jnp.abs(weights))))


@checked
def exponential_depth_weights(num_depths: int, decay: Scalar) -> Float32[Array, "depth"]:
    """Depth weights β^(k-1) / Σ_j β^(j-1), as in FastMTP (arXiv 2509.18362, eq. 2).

    >>> print(emtp.exponential_depth_weights(num_depths=2, decay=0.25))
    [0.8 0.2]

    **Arguments:**

    - `num_depths`: the number of depths D.
    - `decay`: β, not negative; 1 weighs all depths the same.

    **Raises:** `ValueError` if there are fewer than 0 depths, or β is negative or not finite.
    """
    num_depths = check_integer("num_depths", num_depths, at_least=0)
    check_not_negative("decay", decay)
    decay = jnp.asarray(decay, jnp.float32)
    # The largest weight is 1: β^(k-1), or for β above 1 the same over β^(D-1), which may overflow.
    index = jnp.arange(num_depths, dtype=jnp.float32)
    falls = decay <= 1
    base = jnp.where(falls, decay, 1 / jnp.where(falls, 1.0, decay))
    weights = base ** jnp.where(falls, index, num_depths - 1 - index)
    return _safe_divide(weights, jnp.sum(weights))


def _safe_divide(
    numerator: Float[HostOrDeviceArray, "*shape"], denominator: Float[HostOrDeviceArray, "*shape2"]
) -> Float[Array, "*shape"]:
    """A quotient that is 0, with gradient 0, where the denominator is 0."""
    numerator, denominator = jnp.asarray(numerator), jnp.asarray(denominator)
    is_zero = denominator == 0
    return jnp.where(is_zero, 0.0, numerator / jnp.where(is_zero, 1.0, denominator))
