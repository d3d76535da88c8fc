"""Which implementation attends, from the platform and what it is asked for."""

from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from .._platform import default_platform

AttentionImplementation: TypeAlias = Literal["dense", "tiled", "cudnn", "splash"]
"""How attention is computed; see `attention_implementation`."""


class AttentionCall(NamedTuple):
    """What a call of attention asks for, as far as the choice of an implementation depends on it.

    >>> call = emtp.attention.AttentionCall(seq=4096, head_dim=128, value_dim=128, dtype="bfloat16")
    >>> emtp.attention.attention_implementation(call, platform="cpu")
    'tiled'

    **Fields:**

    - `seq`: positions per row.
    - `head_dim`, `value_dim`: features of queries and keys, and of values, in each head.
    - `dtype`: of the queries.
    - `in_order`: whether causal order is that of the row.
    - `packed`: whether there are segment ids.
    - `soft_cap`: whether logits are capped.
    - `split`: whether positions are split over devices.
    """

    seq: int
    head_dim: int
    value_dim: int
    dtype: str
    in_order: bool = True
    packed: bool = False
    soft_cap: bool = False
    split: bool = False


def attention_implementation(
    call: AttentionCall, platform: str | None = None
) -> AttentionImplementation:
    """What `causal_attention` runs if it is not told: the first of these that fits.

    | implementation | where | for |
    |---|---|---|
    | `"tiled"`, in a ring | any | positions split over devices |
    | `"cudnn"` | NVIDIA GPUs | bfloat16 and float16; up to 128 features per head, a multiple of 8, as many of values; rows in order, of one document; no soft-cap |
    | `"splash"` | TPUs | a multiple of 128 positions in order; as many features of values |
    | `"dense"` | any | rows no longer than a tile: 128 positions on a CPU, 512 elsewhere |
    | `"tiled"` | any | everything else |

    `"cudnn"` is `jax.nn.dot_product_attention(implementation="cudnn")`, `"splash"` the Pallas kernel
    that comes with JAX, `"dense"` the formula as it stands, with memory for all pairs of positions.

    >>> call = emtp.attention.AttentionCall(seq=4096, head_dim=128, value_dim=128, dtype="bfloat16")
    >>> [emtp.attention.attention_implementation(call, platform=p) for p in ("cuda", "tpu", "cpu")]
    ['cudnn', 'splash', 'tiled']

    **Arguments:**

    - `call`: what is asked for.
    - `platform`: `"cpu"`, `"cuda"`, `"tpu"` or another; `None` for the one that JAX runs on, where
        `"cudnn"` is chosen only if JAX finds the library, in a version that fits.

    **Returns:** the implementation.
    """  # noqa: E501
    is_here = platform is None
    platform = _current_platform() if platform is None else platform
    if call.split:
        return "tiled"
    fits_cudnn = platform == "cuda" and why_not("cudnn", call) is None
    if fits_cudnn and not (is_here and _lacks_cudnn(call)):
        return "cudnn"
    if platform == "tpu" and why_not("splash", call) is None:
        return "splash"
    return "dense" if call.seq <= largest_tile(platform) else "tiled"


def why_not(implementation: AttentionImplementation, call: AttentionCall) -> str | None:
    """What an implementation lacks for a call; `None` if it lacks nothing."""
    if implementation == "tiled":
        return None
    if call.split:
        return "positions that are split over devices"
    if implementation == "dense":
        return None
    if not call.in_order:
        return "rows in any order"
    if call.value_dim != call.head_dim:
        return "values with another number of features than keys"
    if implementation == "splash":
        return "rows that are no multiple of 128 positions" if call.seq % 128 else None
    if call.packed:
        return "segment ids"
    if call.soft_cap:
        return "a soft-cap"
    if jnp.dtype(call.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{call.dtype}"
    if call.head_dim % 8 or call.head_dim > 128:
        return f"{call.head_dim} features per head"
    return None


def largest_tile(platform: str | None = None) -> int:
    """How many queries, and keys, a tile holds at most.

    On a CPU the logits of 128 by 128 positions stay in the caches: at 2,048 positions a gradient
    took 0.15 of the time of `"dense"` on two cores, and 0.2 with 512. The size for other platforms
    is larger, as their products want it, and not measured.
    """
    return 128 if (platform or default_platform()) == "cpu" else 512


def tile_size(seq: int) -> int:
    """The size of as few tiles as are needed, as even as can be, in steps of 8."""
    num_tiles = max(1, -(-seq // largest_tile()))
    size = -(-seq // num_tiles)
    return max(1, size if num_tiles == 1 else -(-size // 8) * 8)


def _lacks_cudnn(call: AttentionCall) -> bool:
    """Whether JAX refuses cuDNN's kernel here: without the library, or with one that is too old."""
    shape = jax.ShapeDtypeStruct((1, call.seq, 1, call.head_dim), call.dtype)
    kernel = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.eval_shape(kernel, shape, shape, shape)
    except RuntimeError:  # and `NotImplementedError`, for a GPU that wants a newer one
        return True
    return False


def _current_platform() -> str:
    platform = default_platform()
    if platform == "gpu" and "cuda" in get_backend().platform_version:
        return "cuda"
    return platform
