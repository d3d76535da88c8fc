import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._types import checked


class RMSNorm(eqx.Module):
    r"""Root-mean-square normalisation: `x / sqrt(mean(x²) + epsilon) * scale`.

    Computed in float32, returned in the dtype of its input. See arXiv 1910.07467.
    """

    scale: Float[Array, "embed"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, embed_size: int, *, epsilon: float = 1e-5):
        """**Arguments:**

        - `embed_size`: size of the last axis.
        - `epsilon`: added to the mean square.
        """
        self.scale = jnp.ones(embed_size, jnp.float32)
        self.epsilon = epsilon

    @checked
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Normalises the last axis."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * lax.rsqrt(mean_square + self.epsilon) * self.scale).astype(x.dtype)
