"""What depends on where JAX runs, and in what dtype sums are kept."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


def default_platform() -> str:
    """The platform that JAX compiles for unless it is told otherwise: cpu, gpu or tpu."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


class _Accelerator(NamedTuple):
    """Of dense bfloat16 products: TFLOP/s as promised; TFLOP/s and TB/s of memory in practice."""

    peak: float
    rate: float
    bandwidth: float


_ACCELERATORS = {
    # Of the makers' data sheets; the rate of an H100 was measured, and is taken for an H200, too.
    "A100": _Accelerator(312, 312, 2.0),
    "H100": _Accelerator(989, 790, 3.0),
    "H200": _Accelerator(989, 790, 4.8),
    "B200": _Accelerator(2250, 2250, 8.0),
    "TPU v4": _Accelerator(275, 275, 1.2),
    "TPU v5 lite": _Accelerator(197, 197, 0.82),
    "TPU v5": _Accelerator(459, 459, 2.77),
    "TPU v6": _Accelerator(918, 918, 1.64),
}
_UNKNOWN = 300.0


def operations_per_byte(device_kind: str | None = None) -> float:
    """How many operations of a bfloat16 product an accelerator does in the time of a byte.

    The byte is read from its memory, or written. `device_kind` is JAX's name of the accelerator;
    `None` for the one that JAX runs on. One that is not in the table counts as 300.
    """
    found = _accelerator(device_kind)
    return _UNKNOWN if found is None else found.rate / found.bandwidth


def peak_flops(device_kind: str | None = None) -> float | None:
    """The operations a second that the maker of an accelerator promises for bfloat16 products.

    `device_kind` is as in `operations_per_byte`. `None` for one that is not in the table.
    """
    found = _accelerator(device_kind)
    return None if found is None else found.peak * 1e12


def _accelerator(device_kind: str | None) -> _Accelerator | None:
    kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    return next((found for name, found in _ACCELERATORS.items() if name in kind), None)


def accumulation_dtype(array: Array) -> Any:
    """The dtype of logits, losses and sums of gradients: float32, or float64 for float64."""
    return array.dtype if array.dtype == jnp.float64 else jnp.dtype(jnp.float32)
