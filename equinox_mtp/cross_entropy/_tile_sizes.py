"""How many tokens and ids a tile holds by default, and in what dtype its logits are."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import DTypeLike

from .._platform import default_platform


def default_token_tile(vocab_size: int) -> int:
    """How many tokens a tile holds, by default, on the platform that JAX runs on.

    On a CPU 1024 tokens keep a tile of logits in its caches. On an accelerator the head's gradient
    is read and written once for every tile of tokens: with more tokens that costs less, compared
    with the products. 4096 tokens are enough on an H100; more take memory and save no time. Their
    logits are kept for all ids: for a large vocabulary there are as many tokens as fit in 2 GiB.
    """
    if default_platform() == "cpu":
        return 1024
    in_two_gib = 2**29 // max(vocab_size, 1)
    return min(4096, max(1024, 2 ** int(math.log2(max(in_two_gib, 1)))))


def default_vocab_tile(vocab_size: int, *, keeps_logits: bool) -> int:
    """How many ids a tile holds, by default.

    A CPU wants tiles in its caches. An accelerator wants large products: all ids at once, if the
    logits of all of them are kept anyway.
    """
    if default_platform() == "cpu":
        return 2048
    return max(vocab_size, 1) if keeps_logits else 32_768


def unscaled_dtype(dtype: DTypeLike) -> Any:
    """The dtype to keep a gradient of `dtype` in until it is multiplied by the cotangent.

    float16 and float8 have a smaller range than float32: what fits after the multiplication need
    not fit before. bfloat16 has the same.
    """
    has_range = jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp
    return jnp.dtype(dtype) if has_range else jnp.dtype(jnp.float32)
