"""The cross-entropy of a linear output head, from hidden states to per-token losses."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Integer

from ._types import OutputHead, checked


class CrossEntropy(eqx.Module):
    """What the output head says about each token; made by `linear_cross_entropy`."""

    negative_log_likelihood: Float32[Array, "*batch"]
    log_sum_exp: Float32[Array, "*batch"]
    predictions: Int32[Array, "*batch"]


@checked
def linear_cross_entropy(
    hidden_states: Float[Array, "*batch embed"],
    head: OutputHead,
    target_ids: Integer[Array, "*batch"],
) -> CrossEntropy:
    """Cross-entropy and prediction of each token under an output head.

        logits = head · hidden_states
        log_sum_exp = log Σ_v exp(logits[v])
        negative_log_likelihood = log_sum_exp - logits[target]
        predictions = argmax_v logits[v]

    **Arguments:**

    - `hidden_states`: after the final norm. The product with the head is taken in their dtype and
        accumulated in float32.
    - `head`: a matrix `[vocab embed]`, or a callable `[*batch embed] -> [*batch vocab]`.
    - `target_ids`: in `[0, vocab)`; mask what should not count afterwards. The likelihood of an id
        outside may be NaN.

    **Returns:** `CrossEntropy`, in nats and float32 (predictions: int32, the first id on ties).
    """
    logits = _logits(hidden_states, head)
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, target_ids[..., None], axis=-1)[..., 0]
    return CrossEntropy(
        negative_log_likelihood=log_sum_exp - target_logits,
        log_sum_exp=log_sum_exp,
        predictions=jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


def _logits(
    hidden_states: Float[Array, "*batch embed"], head: OutputHead
) -> Float32[Array, "*batch vocab"]:
    if callable(head):
        return head(hidden_states).astype(jnp.float32)
    return jnp.einsum(
        "...e,ve->...v",
        hidden_states,
        head.astype(hidden_states.dtype),
        preferred_element_type=jnp.float32,
    )
