"""How many tokens and ids a tile holds by default, and in what dtype its logits are."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import DTypeLike

from .._platform import default_platform, operations_per_byte

_MOST_TRAFFIC = 0.1
"""The time that the head's gradient may take in memory, as a share of that of the products."""
_MOST_BYTES = 2**31
"""The memory for the logits that a tile of tokens keeps."""


def default_token_tile(vocab_size: int) -> int:
    """How many tokens a tile holds, by default, on the platform that JAX runs on.

    On a CPU 256: with 1024 a step took 0.92 of the time on one machine and the same on another, and
    they take the memory of their logits for all ids. On an accelerator as many as
    `tokens_for_traffic` wants; for a large vocabulary as many as have logits of 2 GiB, but 1024 at
    least.
    """
    if default_platform() == "cpu":
        return 256
    that_fit = _MOST_BYTES // (4 * max(vocab_size, 1))
    wanted = tokens_for_traffic(operations_per_byte())
    return min(wanted, max(1024, 2 ** int(math.log2(max(that_fit, 1)))))


def tokens_for_traffic(operations_per_byte: float) -> int:
    """The tokens of a tile for which the head's gradient costs little time in memory.

    For every tile of T tokens the float32 gradient `[vocab embed]` is read and written once, 8
    bytes a number, and there are three products, 6 · T operations a number. With r operations in
    the time of a byte, traffic takes 8 · r / (6 · T) of the products' time: T = 8 · r / (6 · 0.1)
    keeps that at a tenth. Rounded up to a power of two.

    >>> from equinox_mtp.cross_entropy._tile_sizes import tokens_for_traffic
    >>> tokens_for_traffic(operations_per_byte=263)  # an H100: 790 TFLOP/s, 3 TB/s
    4096
    """
    return 2 ** math.ceil(math.log2(8 * operations_per_byte / (6 * _MOST_TRAFFIC)))


def default_vocab_tile(vocab_size: int, *, keeps_logits: bool) -> int:
    """How many ids a tile holds, by default.

    A CPU wants tiles in its caches: with 1024 ids a gradient took 0.9 of the time that it took
    with 2048. An accelerator wants large products: all ids at once, if the logits of all of
    them are kept anyway.
    """
    if default_platform() == "cpu":
        return 1024
    return max(vocab_size, 1) if keeps_logits else 32_768


def unscaled_dtype(dtype: DTypeLike) -> Any:
    """The dtype to keep a gradient of `dtype` in until it is multiplied by the cotangent.

    float16 and float8 have a smaller range than float32: what fits after the multiplication need
    not fit before. bfloat16 has the same.
    """
    has_range = jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp
    return jnp.dtype(dtype) if has_range else jnp.dtype(jnp.float32)
