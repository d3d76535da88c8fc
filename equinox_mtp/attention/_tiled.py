"""Attention by tiles as one function with its own derivative, over one device or a ring of them.

If positions are split over devices, each keeps its queries, and keys and values go around: in every
round a device attends to the keys that it has, and passes them on to the next (ring attention,
arXiv 2310.01889). In the backward pass their gradients go around with them, and are home after the
last round. No device ever holds more than two parts of the keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .._config import ATTENDED
from .._platform import accumulation_dtype
from ._tiles import (
    FAR,
    Places,
    Softmax,
    attend,
    attend_backward,
    finish,
    join_heads,
    split_heads,
    split_places,
    start,
)


class Plan(NamedTuple):
    """What is known before any number is: the softmax, the size of a tile, the ring's mesh axes."""

    softmax: Softmax
    tile: int
    ring: tuple[str, ...] = ()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled_attention(
    plan: Plan,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    places: Places,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention of queries to the keys of their segment whose order is not after theirs.

    `places` are `[batch seq]`. In a ring all arrays are a device's own part of the positions.
    """
    return _forward(plan, query, key, value, places)[0]


def _forward(plan: Plan, query: Array, key: Array, value: Array, places: Places) -> Any:
    softmax, size, ring = plan
    tiles, key_tiles, value_tiles, queries, keys = _split(plan, query, key, value, places)

    def visit(running: Any, of_keys: tuple[Array, Array, Places]) -> tuple[Any, tuple[()]]:
        key, value, keys = of_keys
        return attend(softmax, running, tiles, key, value, queries, keys), ()

    running = start(tiles, value.shape[-1])
    running, _ = _over_ring(ring, visit, running, (key_tiles, value_tiles, keys), ())
    attended, log_sum_exp = finish(running)
    attended = join_heads(attended, size, query.shape[1]).astype(query.dtype)
    attended = checkpoint_name(attended, ATTENDED)
    log_sum_exp = checkpoint_name(log_sum_exp, ATTENDED)
    return attended, (query, key, value, places, attended, log_sum_exp)


def _backward(plan: Plan, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    softmax, size, ring = plan
    query, key, value, places, attended, log_sum_exp = residuals
    tiles, key_tiles, value_tiles, queries, keys = _split(plan, query, key, value, places)
    dtype = accumulation_dtype(query)
    offset = jnp.sum(cotangent.astype(dtype) * attended.astype(dtype), axis=-1)
    of_queries = (
        split_heads(cotangent, size, key.shape[2]),
        log_sum_exp,
        split_heads(offset, size, key.shape[2]),
        queries,
    )

    def visit(query_gradient: Array, of_keys: Any) -> tuple[Array, tuple[Array, Array]]:
        key, value, keys = of_keys
        gradients = attend_backward(softmax, query_gradient, tiles, key, value, *of_queries, keys)
        return gradients[0], gradients[1:]

    zeros = tuple(jnp.zeros_like(x, dtype) for x in (key_tiles, value_tiles))
    query_gradient, (key_gradient, value_gradient) = _over_ring(
        ring, visit, jnp.zeros_like(tiles, dtype), (key_tiles, value_tiles, keys), zeros
    )

    def joined(gradient: Array, like: Array) -> Array:
        return join_heads(gradient, size, like.shape[1]).astype(like.dtype)

    return (
        joined(query_gradient, query),
        joined(key_gradient, key),
        joined(value_gradient, value),
        None,
    )


_tiled_attention.defvjp(_forward, _backward)
# As a whole: outside of `jit` its loops would be compiled again at every call.
tiled_attention = jax.jit(_tiled_attention, static_argnums=0)


def _split(plan: Plan, query: Array, key: Array, value: Array, places: Places) -> tuple[Any, ...]:
    """Tiles of queries, keys and values, and where the queries' and the keys' positions stand."""
    size, num_kv_heads = plan.tile, key.shape[2]
    return (
        split_heads(query, size, num_kv_heads),
        split_heads(key, size, num_kv_heads),
        split_heads(value, size, num_kv_heads),
        split_places(places, size, fill=-FAR),
        split_places(places, size, fill=FAR),
    )


def _over_ring(
    ring: tuple[str, ...], visit: Callable[..., Any], carry: Any, of_keys: Any, gradients: Any
) -> tuple[Any, Any]:
    """Calls `visit(carry, of_keys)` with every device's keys, and adds up their gradients.

    **Returns:** the last carry, and the gradients of this device's own keys.
    """
    if not ring:
        carry, new = visit(carry, of_keys)
        return carry, jax.tree.map(jnp.add, gradients, new)
    devices = lax.axis_size(ring)
    to_next = [(device, (device + 1) % devices) for device in range(devices)]

    def send(tree: Any) -> Any:
        return jax.tree.map(lambda x: lax.ppermute(x, ring, to_next), tree)

    def run_round(state: tuple[Any, Any, Any], _: None) -> tuple[Any, None]:
        carry, of_keys, gradients = state
        # Sent before it is computed with, so that both may happen at once.
        of_next_keys = send(of_keys)
        carry, new = visit(carry, of_keys)
        return (carry, of_next_keys, send(jax.tree.map(jnp.add, gradients, new))), None

    state = (carry, of_keys, gradients)
    (carry, _, gradients), _ = lax.scan(run_round, state, None, length=devices)
    return carry, gradients
