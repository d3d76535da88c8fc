"""Each token's divergence from a teacher, in tiles; gradients are computed in the forward pass.

A token's divergence depends on its own hidden state alone, and its gradient is known, up to the
cotangent, while its logits are there. So each tile is visited once, and what is kept is an array of
the size of the hidden states. The gradient of the head is a sum over tokens, which the cotangents
weigh: it is summed in the same pass with the weights that are to be expected, and computed again if
others come back, or if none were given.

All depths of a tile are visited together, against one set of the teacher's logits. Arrays have the
axes `batch seq depth`, and `embed`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int32

from .._platform import accumulation_dtype
from ._divergences import FUNCTIONS, acceptance, log_softmax, total_over
from ._linear_head import LinearHead
from ._partitioning import on_devices
from ._tile_sizes import unscaled_dtype
from ._token_losses import head_words, in_dtypes_of
from ._token_tiles import scan_tiles
from ._vocab_tiles import gradient_over_devices, scale_into_range, zero_gradient
from ._weighted_losses import common_factor

TEACHER = "batch seq embed"
TOKENS = "batch seq depth"
HIDDEN = "batch seq depth embed"


class TokenDivergences(NamedTuple):
    """Each token's divergence, and the probability α that a draft is accepted."""

    divergence: Float[Array, "batch seq depth"]
    acceptance: Float[Array, "batch seq depth"]


class _Arguments(NamedTuple):
    head: LinearHead
    hidden_states: Float[Array, "batch seq depth embed"]
    teacher_head: LinearHead
    teacher_hidden_states: Float[Array, "batch seq embed"]
    temperature: Float[Array, ""]
    weights: Float[Array, "batch seq depth"] | None
    draft_vocab: Int32[Array, "draft_vocab"] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_divergences(divergence: str, *arguments: Any) -> TokenDivergences:
    """Of `_Arguments`; differentiable in the first output, by `head` and `hidden_states`.

    `weights` are the cotangents that are to be expected, up to a common factor. Wrong ones, and
    `None`, cost the time of three products if the head has a gradient, and never exactness.
    """
    out, _, _ = _visit_tiles(divergence, _Arguments(*arguments), hidden=False, head=False)
    return out


def _forward(divergence: str, *arguments: Any) -> tuple[TokenDivergences, Any]:
    by_head = jax.tree.leaves(arguments[0], is_leaf=_is_primal)
    needs_head_gradient = any(x.perturbed for x in by_head if _is_primal(x))
    given = _Arguments(*jax.tree.map(_value, arguments, is_leaf=_is_primal))
    keeps = needs_head_gradient and given.weights is not None
    out, hidden_gradient, head_gradient = _visit_tiles(divergence, given, hidden=True, head=keeps)
    return out, (given, hidden_gradient, head_gradient, needs_head_gradient or None)


def _backward(divergence: str, residuals: Any, cotangents: TokenDivergences) -> tuple[Any, ...]:
    given, hidden_gradient, kept, needs_head_gradient = residuals
    nothing = (None,) * (len(given) - 2)
    cotangent = cotangents.divergence
    if isinstance(cotangent, SymbolicZero):
        return None, None, *nothing
    hidden_gradient = (hidden_gradient * cotangent[..., None]).astype(given.hidden_states.dtype)
    if not needs_head_gradient:
        return None, hidden_gradient, *nothing

    def recompute() -> LinearHead:
        again = given._replace(weights=cotangent)
        return _visit_tiles(divergence, again, hidden=False, head=True)[2]

    if kept is None:
        head_gradient = recompute()
    else:
        factor, is_as_expected = common_factor(cotangent, given.weights)
        head_gradient = lax.cond(
            is_as_expected, lambda: jax.tree.map(lambda x: x * factor, kept), recompute
        )
    return in_dtypes_of(given.head, head_gradient), hidden_gradient, *nothing


token_divergences.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _value(x: Any) -> Any:
    return x.value if _is_primal(x) else x


def _visit_tiles(
    divergence: str, given: _Arguments, *, hidden: bool, head: bool
) -> tuple[TokenDivergences, Array | None, Any]:
    """All divergences and, if asked for, the gradients of hidden states and of the head."""
    head_axes = head_words(given.head)
    words = (head_axes, HIDDEN, head_words(given.teacher_head), TEACHER, "", TOKENS, "draft_vocab")
    local = partial(_local_tiles, divergence, hidden=hidden, head=head)
    if not head:
        given = given._replace(weights=None)
    out_words = ((TOKENS, TOKENS), HIDDEN, head_axes if head else "")
    divergences, *gradients = on_devices(given.head.sharding, local, words, out_words)(*given)
    return TokenDivergences(*divergences), *gradients


def _local_tiles(
    divergence: str, *arguments: Any, hidden: bool, head: bool
) -> tuple[tuple[Array, Array], Array | None, Any]:
    given = _Arguments(*arguments)
    dtype = accumulation_dtype(given.hidden_states)
    axes = given.head.vocab_axes

    def visit(gradient: Any, tile: Any, _: Array) -> tuple[Any, Any]:
        teacher_hidden, *of_student = tile
        temperature = given.temperature.astype(dtype)
        log_p = log_softmax(given.teacher_head.logits(teacher_hidden) / temperature, axes)
        unknown: Any = 0.0
        if given.draft_vocab is not None:
            log_p = log_p[..., given.draft_vocab]
            unknown = jnp.maximum(1 - total_over(axes)(jnp.exp(log_p)), 0)

        def visit_depth(gradient: Any, of_depth: Any) -> tuple[Any, Any]:
            hidden_states, weights = of_depth
            logits = given.head.logits(hidden_states)
            outputs, cotangent = _evaluate(
                divergence, log_p, unknown, logits, temperature, axes, differentiate=hidden or head
            )
            if cotangent is None:
                return gradient, (outputs, None)
            cotangent = given.head.cotangent(logits, cotangent)
            hidden_gradient = None
            if hidden:
                hidden_gradient = _hidden_gradient(given.head, hidden_states, cotangent)
            if head:
                gradient = _add_head_gradient(
                    gradient, given.head, hidden_states, cotangent, weights
                )
            return gradient, (outputs, hidden_gradient)

        depth_first = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), tuple(of_student))
        gradient, outputs = lax.scan(visit_depth, gradient, depth_first)
        return gradient, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), outputs)

    inputs = (given.teacher_hidden_states, given.hidden_states, given.weights)
    gradient, (outputs, hidden_gradient) = scan_tiles(
        visit,
        zero_gradient(given.head, dtype) if head else None,
        jax.tree.map(lambda x: x[None], inputs),
        # Half a tile: there are logits of the teacher and of the student.
        tokens=max(1, given.head.tokens_at_a_time // 2),
    )
    outputs, hidden_gradient = jax.tree.map(lambda x: x[0], (outputs, hidden_gradient))
    return outputs, hidden_gradient, gradient_over_devices(gradient, given.head) if head else None


def _evaluate(
    divergence: str,
    log_p: Array,
    unknown: Any,
    logits: Array,
    temperature: Array,
    axes: tuple[str, ...],
    *,
    differentiate: bool,
) -> tuple[tuple[Array, Array], Array | None]:
    """A tile's divergences, and their derivatives by the student's logits."""
    total = total_over(axes)

    def of_logits(logits: Array) -> tuple[Array, Array]:
        log_q = log_softmax(logits / temperature, axes)
        value = FUNCTIONS[divergence](log_p, log_q, total, unknown)
        return value, lax.stop_gradient(acceptance(log_p, log_q, total))

    if not differentiate:
        return of_logits(logits), None
    value, pull_back, accepted = jax.vjp(of_logits, logits, has_aux=True)
    return (value, accepted), pull_back(jnp.ones_like(value))[0]


def _hidden_gradient(head: LinearHead, hidden_states: Array, cotangent: Array) -> Array:
    """The product of a cotangent and the head, in the dtype of the forward pass's product."""
    # Derivatives by logits are 1 at most.
    scale = scale_into_range(hidden_states.dtype, jnp.ones((), cotangent.dtype))
    low = (cotangent * scale).astype(hidden_states.dtype)
    gradient = jnp.einsum(
        "bsv,ve->bse",
        low,
        head.weight.astype(low.dtype),
        preferred_element_type=accumulation_dtype(hidden_states),
    )
    if head.vocab_axes:
        gradient = lax.psum(gradient, head.vocab_axes)
    return (gradient / scale).astype(unscaled_dtype(hidden_states.dtype))


def _add_head_gradient(
    gradient: LinearHead,
    head: LinearHead,
    hidden_states: Array,
    cotangent: Array,
    weights: Array,
) -> LinearHead:
    scale = scale_into_range(hidden_states.dtype, weights)
    cotangent = jnp.where(weights[..., None] == 0, 0.0, cotangent * weights[..., None])
    low = (cotangent * scale).astype(hidden_states.dtype)
    weight = jnp.einsum(
        "bsv,bse->ve",
        low,
        hidden_states,
        preferred_element_type=accumulation_dtype(hidden_states),
    )
    bias = None if head.bias is None else jnp.sum(cotangent, axis=(0, 1))
    return jax.tree.map(jnp.add, gradient, head.with_arrays(weight / scale, bias))
