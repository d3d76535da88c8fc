"""The cross-entropy of an output head, from hidden states to losses, without the logits.

For a matrix or a `LinearHead` there are two strategies. `linear_cross_entropy` gives each token's
loss, and computes the logits in tiles, again in the backward pass. `summed_linear_cross_entropy`
gives a weighted sum, which is all that training needs, and computes gradients along with it. On two
CPU cores (4 × 512 tokens, 512 features, 32 000 ids, float32) value and gradient take 1.2 and 1.0
times as long as a plain loss with full logits, and 35 and 155 MiB in place of 500.

Any other callable is run on tiles of tokens, and once more in the backward pass.
"""

import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, Integer

from ._devices import tokens_on_all_devices, with_auto_axes
from ._fused import TokenLosses, WeightedLosses, sum_by_depth, token_losses, weighted_losses
from ._head import LinearHead, accumulation_dtype, default_token_tile
from ._token_tiles import scan_tiles
from ._types import OutputHead, Scalar, checked


class CrossEntropy(eqx.Module):
    """What the output head says about each token; made by `linear_cross_entropy`."""

    negative_log_likelihood: Float[Array, "*batch"]
    log_sum_exp: Float[Array, "*batch"]
    predictions: Int32[Array, "*batch"] | None


class SummedCrossEntropy(eqx.Module):
    """A weighted sum of token losses; made by `summed_linear_cross_entropy`.

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

    **Arguments:**

    - `hidden_states`, `head`, `target_ids`, `predictions`: as in `linear_cross_entropy`.
    - `weights`: of the tokens, a mask for instance. A token of weight 0 adds nothing, neither to
        the loss nor to gradients, even if its hidden states are not finite.
    - `z_loss_weight`: of the z-loss; `None` for none.

    **Returns:** `SummedCrossEntropy`, in nats and float32, or float64 for hidden states of float64.

    **Raises:** `ValueError` if a callable head does not return `[batch seq vocab]`.
    """

    def compute(hidden_states: Array, head: OutputHead, *tokens: Array) -> tuple[Any, ...]:
        sums = depth_sums(
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


def depth_sums(
    hidden_states: Float[Array, "depth batch seq embed"],
    head: OutputHead,
    target_ids: Integer[Array, "depth batch seq"],
    weights: Float[Array, "depth batch seq"]
    | Bool[Array, "depth batch seq"]
    | Integer[Array, "depth batch seq"],
    *,
    z_loss_weight: Scalar | None = None,
    predictions: bool = True,
    expected: Float[Array, "depth"] | None = None,
) -> WeightedLosses:
    """`summed_linear_cross_entropy` for each depth.

    `expected`: with what cotangents the sums will come back, up to a common factor; all the same if
    `None`. Otherwise the head's gradient takes two more matrix products.
    """
    dtype = accumulation_dtype(hidden_states)
    z_loss_weight = jnp.asarray(0.0 if z_loss_weight is None else z_loss_weight, dtype)
    # A single depth's are proportional to 1, even if none or NaN were expected.
    if expected is None or expected.shape == (1,):
        expected = jnp.ones(hidden_states.shape[0], dtype)
    sums = with_auto_axes(
        partial(_depth_sums, predictions),
        lambda tokens: (P(), P(), tokens),
        target_ids,
    )
    out = sums(head, hidden_states, target_ids, weights, z_loss_weight, expected)
    return WeightedLosses(*out)


def _depth_sums(
    predictions: bool,
    head: OutputHead,
    hidden_states: Array,
    target_ids: Array,
    weights: Array,
    z_loss_weight: Array,
    expected: Array,
) -> tuple[Array, Array, Array | None]:
    weights = weights.astype(accumulation_dtype(hidden_states))
    # 0 · NaN is NaN: what is not finite must not reach a product.
    counts_for_nothing = (weights == 0)[..., None] & ~jnp.isfinite(hidden_states)
    hidden_states = jnp.where(counts_for_nothing, 0, hidden_states)
    linear = _as_linear_head(head)
    if linear is None or linear.defers_gradients:
        token = _token_losses(head, hidden_states, target_ids, predictions)
        out = sum_by_depth(token, weights, z_loss_weight)
    else:
        out: Any = weighted_losses(
            predictions, linear, hidden_states, target_ids, weights, z_loss_weight, expected
        )
    return out.losses, jax.lax.stop_gradient(out.z_losses), out.predictions


def _as_depth_batch_seq(x: Array, features: int = 0) -> Array:
    """`[*batch]` to `[1 batch seq]`, whatever the number of leading axes."""
    batch = x.shape[: x.ndim - features]
    seq = batch[-1] if batch else 1
    return x.reshape(1, math.prod(batch[:-1]), seq, *x.shape[len(batch) :])


def _as_linear_head(head: OutputHead) -> LinearHead | None:
    if isinstance(head, LinearHead):
        return head
    return None if callable(head) else LinearHead(head)


def _token_losses(
    head: OutputHead, hidden_states: Array, target_ids: Array, predictions: bool
) -> TokenLosses:
    linear = _as_linear_head(head)
    if linear is not None:
        return token_losses(predictions, linear, hidden_states, target_ids)
    assert callable(head)

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
