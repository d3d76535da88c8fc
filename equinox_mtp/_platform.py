"""What depends on where JAX runs, and in what dtype sums are kept."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def default_platform() -> str:
    """The platform that JAX compiles for unless it is told otherwise: cpu, gpu or tpu."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def accumulation_dtype(array: Array) -> Any:
    """The dtype of logits, losses and sums of gradients: float32, or float64 for float64."""
    return array.dtype if array.dtype == jnp.float64 else jnp.dtype(jnp.float32)
