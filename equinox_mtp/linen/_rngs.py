"""Keys, from the forms in which Flax takes them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray


def key_for(rngs: Any, stream: str) -> PRNGKeyArray | None:
    """The key of a stream (`"params"`, `"dropout"`), or `None` if there is none.

    `rngs` is a key, which serves every stream; a mapping from streams to keys; or like
    `flax.nnx.Rngs`, with a method for each stream that returns the next key.

    **Raises:** `TypeError` if it is none of these.
    """
    if rngs is None:
        return None
    if isinstance(rngs, Mapping):
        return key_for(rngs.get(stream, rngs.get("default")), stream)
    if isinstance(rngs, (jax.Array, np.ndarray)):
        if jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key) and rngs.shape == ():
            return jnp.asarray(rngs)
        if rngs.dtype == jnp.uint32 and rngs.ndim == 1:
            return jax.random.wrap_key_data(jnp.asarray(rngs))
    elif hasattr(type(rngs), "fork"):
        next_key = getattr(rngs, stream, None)
        return None if next_key is None else key_for(next_key(), stream)
    raise TypeError(
        "`rngs` must be a key, a mapping such as `{'params': key}`, or a `flax.nnx.Rngs`; got a "
        f"`{type(rngs).__name__}`."
    )


def initial_key(rngs: Any) -> PRNGKeyArray:
    """The key for initial values.

    **Raises:** `ValueError` if there is none.
    """
    key = key_for(rngs, "params")
    if key is None:
        raise ValueError(
            "`rngs` must hold a key for the stream 'params', from which initial values are drawn; "
            f"got {_described(rngs)}. Pass `jax.random.key(0)`, or a mapping with 'params'."
        )
    return key


def _described(rngs: Any) -> str:
    return f"the streams {sorted(rngs)}" if isinstance(rngs, Mapping) else type(rngs).__name__
