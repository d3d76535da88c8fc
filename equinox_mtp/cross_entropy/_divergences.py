"""Divergences between a teacher's and a student's distribution over the vocabulary.

Each is a plain function of log-probabilities, of a tile of tokens and all ids that one device
holds; `total` sums over the ids, on all devices. `unknown` is the teacher's probability of ids that
the student does not know, which are not among them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Divergence: TypeAlias = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "negative_log_acceptance",
    "hybrid",
]

Total: TypeAlias = Callable[[Float[Array, "*tokens vocab"]], Float[Array, "*tokens"]]
Unknown: TypeAlias = Float[Array, "*tokens"] | float
Function: TypeAlias = Callable[
    [Float[Array, "*tokens vocab"], Float[Array, "*tokens vocab"], Total, Unknown],
    Float[Array, "*tokens"],
]

_HYBRID_DECAY = 3.0


def acceptance(log_p: Array, log_q: Array, total: Total) -> Float[Array, "*tokens"]:
    """α = Σ_v min(p, q): the probability that a draft from q is accepted by p."""
    return total(jnp.minimum(jnp.exp(log_p), jnp.exp(log_q)))


def forward_kl(
    log_p: Array, log_q: Array, total: Total, unknown: Unknown
) -> Float[Array, "*tokens"]:
    """Σ_v p · log(p / q), over the ids that the student knows."""
    del unknown
    return total(_times_log_ratio(log_p, log_q))


def reverse_kl(
    log_p: Array, log_q: Array, total: Total, unknown: Unknown
) -> Float[Array, "*tokens"]:
    """Σ_v q · log(q / p)."""
    del unknown
    return total(_times_log_ratio(log_q, log_p))


def jensen_shannon(
    log_p: Array, log_q: Array, total: Total, unknown: Unknown
) -> Float[Array, "*tokens"]:
    """½ KL(p ‖ m) + ½ KL(q ‖ m), with m = (p + q) / 2."""
    m = 0.5 * (jnp.exp(log_p) + jnp.exp(log_q))
    log_m = jnp.log(jnp.maximum(m, jnp.finfo(m.dtype).tiny))
    known = 0.5 * total(_times_log_ratio(log_p, log_m) + _times_log_ratio(log_q, log_m))
    return known + 0.5 * math.log(2) * unknown


def total_variation(
    log_p: Array, log_q: Array, total: Total, unknown: Unknown
) -> Float[Array, "*tokens"]:
    """½ Σ_v |p - q|, which is 1 - α."""
    return 0.5 * (total(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))) + unknown)


def negative_log_acceptance(
    log_p: Array, log_q: Array, total: Total, unknown: Unknown
) -> Float[Array, "*tokens"]:
    """-log α."""
    del unknown
    accepted = acceptance(log_p, log_q, total)
    return -jnp.log(jnp.maximum(accepted, jnp.finfo(accepted.dtype).tiny))


def hybrid(log_p: Array, log_q: Array, total: Total, unknown: Unknown) -> Float[Array, "*tokens"]:
    """λ · KL(p ‖ q) + (1 - λ) · TV, with λ = exp(-3 α), which has no gradient."""
    weight = jnp.exp(-_HYBRID_DECAY * lax.stop_gradient(acceptance(log_p, log_q, total)))
    divergence = forward_kl(log_p, log_q, total, unknown)
    variation = total_variation(log_p, log_q, total, unknown)
    return weight * divergence + (1 - weight) * variation


FUNCTIONS: dict[str, Function] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        jensen_shannon,
        total_variation,
        negative_log_acceptance,
        hybrid,
    )
}


def _times_log_ratio(log_x: Array, log_y: Array) -> Array:
    """x · log(x / y); 0 where x is."""
    x = jnp.exp(log_x)
    return x * jnp.where(x > 0, log_x - log_y, 0.0)


def log_softmax(logits: Array, axes: tuple[str, ...]) -> Float[Array, "*tokens vocab"]:
    """Log-probabilities of the ids of one device, normalised over those of all."""
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    if axes:
        largest = lax.pmax(largest, axes)
    shifted = logits - largest
    log_sum = jnp.log(total_over(axes)(jnp.exp(shifted)))
    return shifted - jnp.expand_dims(_spread(axes, log_sum) if axes else log_sum, -1)


def total_over(axes: tuple[str, ...]) -> Total:
    """The sum over the last axis, and over the devices along mesh axes."""
    if not axes:
        return partial(jnp.sum, axis=-1)
    return lambda x: _sum_over_devices(axes, jnp.sum(x, axis=-1))


# A sum over devices is known to all of them, and so is its cotangent: it is what the cotangent of
# each term is, without another sum. What all devices know and use has, for a cotangent, the sum of
# theirs. A `shard_map` without `check_vma` does not tell the two apart.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_devices(axes: tuple[str, ...], x: Array) -> Array:
    return lax.psum(x, axes)


def _sum_forward(axes: tuple[str, ...], x: Array) -> tuple[Array, None]:
    return lax.psum(x, axes), None


def _sum_backward(axes: tuple[str, ...], _: None, cotangent: Array) -> tuple[Array]:
    return (cotangent,)


_sum_over_devices.defvjp(_sum_forward, _sum_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(axes: tuple[str, ...], x: Array) -> Array:
    return x


def _spread_forward(axes: tuple[str, ...], x: Array) -> tuple[Array, None]:
    return x, None


def _spread_backward(axes: tuple[str, ...], _: None, cotangent: Array) -> tuple[Array]:
    return (lax.psum(cotangent, axes),)


_spread.defvjp(_spread_forward, _spread_backward)
