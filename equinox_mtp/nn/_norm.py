import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._checks import check_integer, check_number
from .._types import checked
from ._linear import check_features


class RMSNorm(eqx.Module):
    r"""Root-mean-square normalisation: `x / sqrt(mean(x²) + epsilon) * (scale + scale_offset)`.

    Computed in float32, returned in the dtype of its input. See arXiv 1910.07467. Some models, such
    as Gemma and Qwen3-Next, store the scale less 1: their `scale_offset` is 1.

    >>> print(np.asarray(emtp.nn.RMSNorm(2)(jnp.asarray([3.0, 4.0]))).round(3))
    [0.849 1.131]
    """

    scale: Float[Array, "embed"]
    epsilon: float = eqx.field(static=True)
    scale_offset: float = eqx.field(static=True, default=0.0)

    def __init__(self, embed_size: int, *, epsilon: float = 1e-5, scale_offset: float = 0.0):
        """**Arguments:**

        - `embed_size`: size of the last axis.
        - `epsilon`: added to the mean square.
        - `scale_offset`: added to the scale, which is `1 - scale_offset` at first.

        **Raises:** `ValueError` for a size below 1, an epsilon that is negative or not finite, or
        an offset that is not finite.
        """
        size = check_integer("embed_size", embed_size, at_least=1)
        self.epsilon = check_number("epsilon", epsilon, at_least=0)
        self.scale_offset = check_number("scale_offset", scale_offset)
        self.scale = jnp.full(size, 1 - self.scale_offset, jnp.float32)

    @checked
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Normalises the last axis.

        **Raises:** `ValueError` if it has not as many features as `scale`.
        """
        check_features(x, self.scale.shape[0], "the norm")
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scale = self.scale
        if self.scale_offset:
            # In float32: bfloat16 has 1.0078 next to 1.
            scale = scale.astype(jnp.float32) + self.scale_offset
        return (x32 * lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)
