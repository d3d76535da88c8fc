"""The cross-entropy of an output head, from hidden states to losses, without the logits.

For a matrix or a `LinearHead` there are two strategies. `linear_cross_entropy` gives each token's
loss, and computes the logits in tiles, again in the backward pass. `summed_linear_cross_entropy`
gives a weighted sum, which is all that training needs, and computes gradients along with it.

Any other callable is run on tiles of tokens, and once more in the backward pass.
"""

import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, Integer

from .._platform import accumulation_dtype
from .._types import OutputHead, Scalar, checked
from ..sharding import with_auto_axes
from ._callable_head import callable_token_losses
from ._linear_head import as_linear_head
from ._token_losses import TokenLosses, token_losses
from ._weighted_losses import WeightedLosses, sum_by_depth, weighted_losses


class CrossEntropy(eqx.Module):
    """What the output head says about each token; made by `linear_cross_entropy`.

    >>> hidden_states, head = jnp.zeros((1, 3, 4)), jnp.ones((5, 4))
    >>> token = emtp.linear_cross_entropy(hidden_states, head, jnp.asarray([[0, 3, 4]]))
    >>> print(token.predictions)  # of equal logits the first id
    [[0 0 0]]
    """

    negative_log_likelihood: Float[Array, "*batch"]
    log_sum_exp: Float[Array, "*batch"]
    predictions: Int32[Array, "*batch"] | None


class SummedCrossEntropy(eqx.Module):
    """A weighted sum of token losses; made by `summed_linear_cross_entropy`.

    >>> hidden_states, head = jnp.zeros((1, 3, 4)), jnp.ones((5, 4))
    >>> target_ids, mask = jnp.asarray([[0, 3, 4]]), jnp.asarray([[True, True, False]])
    >>> summed = emtp.summed_linear_cross_entropy(hidden_states, head, target_ids, mask)
    >>> print(f"{summed.loss:.3f}", summed.z_loss)  # 2 · log 5, without a z-loss
    3.219 0.0

    **Fields:**

    - `loss`: Σ weight · (negative log-likelihood + z_loss_weight · log_sum_exp²).
    - `z_loss`: the second part of `loss`, for reports; without gradient.
    - `predictions`: the best id at each token, if asked for.
    """

    loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    predictions: Int32[Array, "*batch"] | None


@checked
def linear_cross_entropy(
    hidden_states: Float[Array, "*batch embed"],
    head: OutputHead,
    target_ids: Integer[Array, "*batch"],
    *,
    predictions: bool = True,
) -> CrossEntropy:
    """Cross-entropy and prediction of each token under an output head.

        logits = head · hidden_states
        log_sum_exp = log Σ_v exp(logits[v])
        negative_log_likelihood = log_sum_exp - logits[target]
        predictions = argmax_v logits[v]

    An offset that all logits share does not round the likelihood away. Both losses are
    differentiable: weights, a z-loss `log_sum_exp²` (PaLM, arXiv 2204.02311, §5) and label
    smoothing, `log_sum_exp - hidden_states · mean_v head[v]`, need nothing else.

    >>> hidden_states, head = jnp.zeros((1, 3, 4)), jnp.ones((5, 4))
    >>> token = emtp.linear_cross_entropy(hidden_states, head, jnp.asarray([[0, 3, 4]]))
    >>> print(np.asarray(token.negative_log_likelihood).round(3))  # log 5
    [[1.609 1.609 1.609]]

    **Arguments:**

    - `hidden_states`: after the final norm. The product with the head is taken in their dtype and
        accumulated in float32.
    - `head`: a matrix `[vocab embed]`, a `LinearHead` (bias, soft-cap, sizes of tiles, sharding),
        or a callable `[batch seq embed] -> [batch seq vocab]`.
    - `target_ids`: in `[0, vocab)`; mask what should not count afterwards. An id outside has
        `log_sum_exp` for a loss.
    - `predictions`: whether to find the best ids, which takes up to 5 % of the time.

    **Returns:** `CrossEntropy`, in nats and float32, or float64 for hidden states of float64.
    Predictions are int32: the first id on ties, -1 where logits are not finite; or `None`.

    **Raises:** `ValueError` if a callable head does not return `[batch seq vocab]`.
    """

    def compute(hidden_states: Array, head: OutputHead, target_ids: Array) -> tuple[Any, ...]:
        hidden = _as_depth_batch_seq(hidden_states, 1)
        token = _token_losses(head, hidden, _as_depth_batch_seq(target_ids), predictions)
        return jax.tree.map(lambda x: x.reshape(target_ids.shape), tuple(token))

    compute = with_auto_axes(compute, lambda tokens: tokens, target_ids)
    return CrossEntropy(*compute(hidden_states, head, target_ids))


@checked
def summed_linear_cross_entropy(
    hidden_states: Float[Array, "*batch embed"],
    head: OutputHead,
    target_ids: Integer[Array, "*batch"],
    weights: Float[Array, "*batch"] | Bool[Array, "*batch"] | Integer[Array, "*batch"],
    *,
    z_loss_weight: Scalar | None = None,
    predictions: bool = True,
) -> SummedCrossEntropy:
    """The weighted sum of token losses, with its gradient computed in the same pass.

        loss = Σ_tokens weight · (negative_log_likelihood + z_loss_weight · log_sum_exp²)

    The same as summing what `linear_cross_entropy` returns, with three products of hidden states
    and head for value and gradient in place of four. It keeps the head's gradient from the forward
    to the backward pass. Over a head that is split along the vocabulary, or a callable, it is that
    sum.

    >>> hidden_states, head = jnp.zeros((1, 3, 4)), jnp.ones((5, 4))
    >>> target_ids, mask = jnp.asarray([[0, 3, 4]]), jnp.asarray([[True, True, False]])
    >>> summed = emtp.summed_linear_cross_entropy(hidden_states, head, target_ids, mask)
    >>> print(f"{summed.loss:.3f}")  # 2 · log 5
    3.219

    **Arguments:**

    - `hidden_states`, `head`, `target_ids`, `predictions`: as in `linear_cross_entropy`.
    - `weights`: of the tokens, a mask for instance. A token of weight 0 adds nothing, neither to
        the loss nor to gradients, even if its hidden states are not finite. (Under a callable head
        finite ones whose logits overflow make gradients NaN.)
    - `z_loss_weight`: of the z-loss; `None` for none.

    **Returns:** `SummedCrossEntropy`, in nats and float32, or float64 for hidden states of float64.

    **Raises:** `ValueError` if a callable head does not return `[batch seq vocab]`.
    """

    def compute(hidden_states: Array, head: OutputHead, *tokens: Array) -> tuple[Any, ...]:
        sums = summed_cross_entropy_by_depth(
            _as_depth_batch_seq(hidden_states, 1),
            head,
            *map(_as_depth_batch_seq, tokens),
            z_loss_weight=z_loss_weight,
            predictions=predictions,
        )
        best_ids = jax.tree.map(lambda x: x.reshape(target_ids.shape), sums.predictions)
        return sums.losses[0], sums.z_losses[0], best_ids

    compute = with_auto_axes(compute, lambda tokens: (P(), P(), tokens), target_ids)
    return SummedCrossEntropy(*compute(hidden_states, head, target_ids, weights))


def summed_cross_entropy_by_depth(
    hidden_states: Float[Array, "depth batch seq embed"],
    head: OutputHead,
    target_ids: Integer[Array, "depth batch seq"],
    weights: Float[Array, "depth batch seq"]
    | Bool[Array, "depth batch seq"]
    | Integer[Array, "depth batch seq"],
    *,
    z_loss_weight: Scalar | None = None,
    predictions: bool = True,
    expected_cotangents: Float[Array, "depth"] | None = None,
) -> WeightedLosses:
    """`summed_linear_cross_entropy` for each depth, as `MultiTokenPredictionBlock` calls it.

    `expected_cotangents` are the sums' cotangents, up to a common factor; all equal if `None`. If
    others come back, the head's gradient takes two more matrix products.

    >>> hidden_states, head = jnp.zeros((2, 1, 3, 4)), jnp.ones((5, 4))
    >>> target_ids, weights = jnp.zeros((2, 1, 3), int), jnp.ones((2, 1, 3))
    >>> sums = emtp.cross_entropy.summed_cross_entropy_by_depth(
    ...     hidden_states, head, target_ids, weights
    ... )
    >>> print(np.asarray(sums.losses).round(3))  # 3 · log 5
    [4.828 4.828]
    """
    dtype = accumulation_dtype(hidden_states)
    z_loss_weight = jnp.asarray(0.0 if z_loss_weight is None else z_loss_weight, dtype)
    # A single depth's are proportional to 1, even if none or NaN were expected.
    if expected_cotangents is None or expected_cotangents.shape == (1,):
        expected_cotangents = jnp.ones(hidden_states.shape[0], dtype)
    sums = with_auto_axes(
        partial(_sums_by_depth, predictions),
        lambda tokens: (P(), P(), tokens),
        target_ids,
    )
    out = sums(head, hidden_states, target_ids, weights, z_loss_weight, expected_cotangents)
    return WeightedLosses(*out)


def _sums_by_depth(
    predictions: bool,
    head: OutputHead,
    hidden_states: Array,
    target_ids: Array,
    weights: Array,
    z_loss_weight: Array,
    expected_cotangents: Array,
) -> tuple[Array, Array, Array | None]:
    weights = weights.astype(accumulation_dtype(hidden_states))
    # 0 · NaN is NaN: what is not finite must not reach a product.
    counts_for_nothing = (weights == 0)[..., None] & ~jnp.isfinite(hidden_states)
    hidden_states = jnp.where(counts_for_nothing, 0, hidden_states)
    linear = as_linear_head(head)
    if linear is None or linear.defers_gradients:
        token = _token_losses(head, hidden_states, target_ids, predictions)
        out = sum_by_depth(token, weights, z_loss_weight)
    else:
        out: Any = weighted_losses(
            predictions,
            linear,
            hidden_states,
            target_ids,
            weights,
            z_loss_weight,
            expected_cotangents,
        )
    return out.losses, jax.lax.stop_gradient(out.z_losses), out.predictions


def _as_depth_batch_seq(x: Array, features: int = 0) -> Array:
    """`[*batch]` to `[1 batch seq]`, whatever the number of leading axes."""
    batch = x.shape[: x.ndim - features]
    seq = batch[-1] if batch else 1
    return x.reshape(1, math.prod(batch[:-1]), seq, *x.shape[len(batch) :])


def _token_losses(
    head: OutputHead, hidden_states: Array, target_ids: Array, predictions: bool
) -> TokenLosses:
    linear = as_linear_head(head)
    if linear is not None:
        return token_losses(predictions, linear, hidden_states, target_ids)
    assert callable(head)
    return callable_token_losses(predictions, head, hidden_states, target_ids)
