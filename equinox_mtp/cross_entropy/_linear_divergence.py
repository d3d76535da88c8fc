"""Distillation through output heads, from hidden states to divergences, without the logits."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Integer

from .._checks import check_draft_ids, check_number
from .._platform import accumulation_dtype
from .._types import HostOrDeviceArray, OutputHead, Scalar, checked, on_host
from ..sharding import with_auto_axes
from ._divergences import Divergence
from ._linear_head import LinearHead, as_linear_head
from ._token_divergences import token_divergences


class LinearDivergence(eqx.Module):
    """How far each token's distribution is from a teacher's; made by `linear_divergence`.

    >>> hidden_states, head = jnp.zeros((1, 3, 4)), jnp.ones((5, 4))
    >>> token = emtp.linear_divergence(hidden_states, hidden_states, head)
    >>> print(token.acceptance.round(3))  # of the same distribution all drafts are accepted
    [[1. 1. 1.]]

    **Fields:**

    - `divergence`: of the kind asked for, in nats, or a probability for the total variation.
    - `acceptance`: α = Σ_v min(p, q), the probability that a draft of the student is accepted;
        without gradient.
    """

    divergence: Float[Array, "*batch"]
    acceptance: Float[Array, "*batch"]


@checked
def linear_divergence(
    hidden_states: Float[Array, "*batch embed"],
    teacher_hidden_states: Float[Array, "*teacher_batch teacher_embed"],
    head: OutputHead,
    *,
    divergence: Divergence = "forward_kl",
    teacher_head: Float[Array, "vocab teacher_embed"] | Callable[[Array], Array] | None = None,
    draft_vocab: Integer[HostOrDeviceArray, "draft_vocab"] | None = None,
    temperature: Scalar = 1.0,
    weights: Float[Array, "*batch"]
    | Bool[Array, "*batch"]
    | Integer[Array, "*batch"]
    | None = None,
) -> LinearDivergence:
    """The divergence between the student's and the teacher's next-token distributions.

        p = softmax(teacher_head · teacher_hidden_states / temperature)
        q = softmax(head · hidden_states / temperature)
        α = Σ_v min(p, q)

    | `divergence` | value |
    |---|---|
    | `"forward_kl"` | KL(p ‖ q) = Σ p · log(p / q) |
    | `"reverse_kl"` | KL(q ‖ p) |
    | `"jensen_shannon"` | ½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2 |
    | `"total_variation"` | ½ Σ \\|p - q\\| = 1 - α |
    | `"negative_log_acceptance"` | -log α |
    | `"hybrid"` | λ · KL(p ‖ q) + (1 - λ) · TV, λ = exp(-3 α) without gradient |

    α is the probability that speculative sampling accepts a draft from q (arXiv 2211.17192, §3.2);
    the last two are those of LK losses (arXiv 2602.23881): the total variation alone has weak
    gradients where the two distributions hardly overlap.

    Logits exist for a tile of tokens at a time. Each tile is visited once: gradients are computed
    along with values, with three products of hidden states and head, one of them the teacher's
    (four with the head's gradient). Only the student has gradients.

    >>> hidden_states, head = jnp.eye(4)[None], 3 * jnp.eye(4)
    >>> teacher_hidden_states = 0.5 * hidden_states
    >>> token = emtp.linear_divergence(
    ...     hidden_states, teacher_hidden_states, head, divergence="total_variation"
    ... )
    >>> print(np.asarray(token.divergence + token.acceptance).round(3))
    [[1. 1. 1. 1.]]

    **Arguments:**

    - `hidden_states`: the student's, after its final norm: `[*batch embed]`.
    - `teacher_hidden_states`: the teacher's, after its final norm, of the same positions. With one
        leading axis less they are those of all depths: `[depth batch seq embed]` against `[batch
        seq embed]`; the teacher's logits are then computed once.
    - `head`: the student's: a matrix `[vocab embed]` or a `LinearHead`.
    - `teacher_head`: the same as `head` if `None`. It must have as many ids.
    - `draft_vocab`: the ids that the student drafts from; `None` for all. Its
        logits are of these alone, so that q is 0 elsewhere, and its products take less time.
        `"forward_kl"`, which is infinite then, and that of `"hybrid"`, are sums over these ids.
    - `temperature`: positive; of both. May be traced.
    - `weights`: what the divergences will be multiplied by, up to a common factor; a mask for
        instance. For speed alone, and only if the head has a gradient: it then comes with the
        forward pass, and is computed again, by three products, if it was wrong or `None`.

    **Returns:** `LinearDivergence`, in float32, or float64 for hidden states of float64.

    **Raises:** `ValueError` for a temperature that is not positive, a head
    that is another callable, heads or hidden states that do not fit each other, or a `draft_vocab`
    over a vocabulary that is split over devices, without ids, with an id twice, or outside of it.
    """
    _check_temperature(temperature)
    student = _linear(head, "head")
    teacher = student if teacher_head is None else _linear(teacher_head, "teacher_head")
    _check_shapes(hidden_states, teacher_hidden_states, student, teacher)
    ids = None
    if draft_vocab is not None:
        ids = _checked_draft_vocab(draft_vocab, student)
        student = student.rows(ids)
    shares_teacher = hidden_states.ndim == teacher_hidden_states.ndim + 1

    def compute(
        head: LinearHead,
        hidden: Array,
        teacher: LinearHead,
        teacher_hidden: Array,
        weights: Any,
        ids: Any,
    ) -> Any:
        hidden = _as_batch_seq_depth(hidden, 1, shares_teacher)
        dtype = accumulation_dtype(hidden)
        if weights is not None:
            weights = _as_batch_seq_depth(weights.astype(dtype), 0, shares_teacher)
        out: Any = token_divergences(
            divergence,
            head,
            hidden,
            teacher,
            _as_batch_seq(teacher_hidden, 1),
            jnp.asarray(temperature, dtype),
            weights,
            ids,
        )
        return tuple(_from_batch_seq_depth(x, hidden_states.shape[:-1]) for x in out)

    tokens = hidden_states[..., 0]
    compute = with_auto_axes(compute, lambda tokens: tokens, tokens)
    teacher, teacher_hidden_states = jax.lax.stop_gradient((teacher, teacher_hidden_states))
    weights = jax.lax.stop_gradient(weights)
    return LinearDivergence(
        *compute(student, hidden_states, teacher, teacher_hidden_states, weights, ids)
    )


def _check_temperature(temperature: Scalar) -> None:
    value = on_host(temperature)
    if value is not None:
        check_number("temperature", float(np.asarray(value)), above=0)


def _linear(head: OutputHead, name: str) -> LinearHead:
    linear = as_linear_head(head)
    if linear is None:
        raise ValueError(
            f"`{name}` must be a matrix or a `LinearHead`; got `{type(head).__name__}`, whose "
            "logits cannot be computed a tile at a time. Compute the divergence from its logits."
        )
    return linear


def _check_shapes(
    hidden: Array,
    teacher_hidden: Array,
    head: LinearHead,
    other: LinearHead,
) -> None:
    if teacher_hidden.shape[:-1] not in (hidden.shape[:-1], hidden.shape[1:-1]):
        raise ValueError(
            "`teacher_hidden_states` must be of the same positions as `hidden_states`, or of those "
            f"of each depth; got {teacher_hidden.shape} and {hidden.shape}."
        )
    if head.weight.shape[0] != other.weight.shape[0]:
        raise ValueError(
            f"`teacher_head` must have the {head.weight.shape[0]} ids of `head`; got "
            f"{other.weight.shape[0]}. Take the rows of the ids that both know."
        )
    for name, hidden_states, owner in (
        ("hidden_states", hidden, head),
        ("teacher_hidden_states", teacher_hidden, other),
    ):
        if hidden_states.shape[-1] != owner.weight.shape[1]:
            raise ValueError(
                f"`{name}` must have the {owner.weight.shape[1]} features of its head; got "
                f"{hidden_states.shape[-1]}."
            )


def _checked_draft_vocab(draft_vocab: Any, head: LinearHead) -> Int32[Array, "draft_vocab"]:
    if head.vocab_axes:
        raise ValueError(
            "`draft_vocab` is for a vocabulary that is whole on each device; got one that is split "
            f"over the mesh axes {head.vocab_axes}. Leave it out, or give the rule `vocab` no axis."
        )
    if isinstance(draft_vocab, np.ndarray) or draft_vocab.size == 0:
        check_draft_ids(np.asarray(draft_vocab), head.weight.shape[0])
    return jnp.asarray(draft_vocab, jnp.int32)


def _as_batch_seq(x: Array, features: int) -> Array:
    """`[*batch …]` to `[batch seq …]`, whatever the number of leading axes."""
    batch, rest = x.shape[: x.ndim - features], x.shape[x.ndim - features :]
    return x.reshape(math.prod(batch[:-1]), batch[-1] if batch else 1, *rest)


def _as_batch_seq_depth(x: Array, features: int, has_depth: bool) -> Array:
    """`[depth *batch …]` or `[*batch …]` to `[batch seq depth …]`."""
    by_depth = jax.vmap(partial(_as_batch_seq, features=features))(x if has_depth else x[None])
    return jnp.moveaxis(by_depth, 0, 2)


def _from_batch_seq_depth(x: Array, shape: tuple[int, ...]) -> Array:
    """`[batch seq depth]` to the leading axes of the student's hidden states."""
    return jnp.moveaxis(x, 2, 0).reshape(shape)
