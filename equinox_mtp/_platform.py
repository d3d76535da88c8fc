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


_OPERATIONS_PER_BYTE = {
    # Dense bfloat16 products in TFLOP/s over memory in TB/s, of the makers' data sheets.
    "A100": 312 / 2.0,
    "H100": 790 / 3.0,  # measured: 989 and 3.35 are promised
    "H200": 790 / 4.8,
    "B200": 2250 / 8.0,
    "TPU v4": 275 / 1.2,
    "TPU v5 lite": 197 / 0.82,
    "TPU v5": 459 / 2.77,
    "TPU v6": 918 / 1.64,
}
_UNKNOWN = 300.0


def operations_per_byte(device_kind: str | None = None) -> float:
    """How many operations of a bfloat16 product an accelerator does in the time of a byte.

    The byte is read from its memory, or written. `device_kind` is JAX's name of the accelerator;
    `None` for the one that JAX runs on. One that is not in the table counts as 300.
    """
    kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    return next((ratio for name, ratio in _OPERATIONS_PER_BYTE.items() if name in kind), _UNKNOWN)


def accumulation_dtype(array: Array) -> Any:
    """The dtype of logits, losses and sums of gradients: float32, or float64 for float64."""
    return array.dtype if array.dtype == jnp.float64 else jnp.dtype(jnp.float32)
