"""Initial values of parameters."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray


def fan_in_normal(
    key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int, scale: float = 1.0
) -> Float32[Array, "..."]:
    """Normal values of standard deviation `scale / sqrt(fan_in)`, which keep a signal's scale."""
    return (scale / math.sqrt(fan_in)) * jax.random.normal(key, shape, jnp.float32)
