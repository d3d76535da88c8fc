import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .._types import checked


@checked
def rotary_embedding(
    x: Float[Array, "batch seq heads head_dim"],
    position_ids: Integer[Array, "batch seq"],
    *,
    theta: float = 10_000.0,
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary position embedding (arXiv 2104.09864), in half-split pairs.

    Rotates the pair `(x[i], x[i + head_dim/2])` by the angle `position · theta^(-2i/head_dim)`.
    Computed in float32, returned in the dtype of `x`.

    >>> x = jnp.asarray([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> rotated = emtp.nn.rotary_embedding(x, jnp.asarray([[1]]))  # by one radian
    >>> print(np.asarray(rotated).round(3))
    [[[[0.54  0.841]]]]

    **Raises:** `ValueError` if `head_dim` is odd.
    """
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"`head_dim` must be even for rotary embeddings; got {head_dim}.")
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = position_ids[..., None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
