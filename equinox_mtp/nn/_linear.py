import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._types import checked
from ._init import fan_in_normal


class Linear(eqx.Module):
    """A linear map of the last axis, without bias: `x @ kernel`.

    Works on any number of leading axes, in the dtype of its input.
    """

    kernel: Float[Array, "in_features out_features"]

    def __init__(
        self, in_features: int, out_features: int, *, scale: float = 1.0, key: PRNGKeyArray
    ):
        """**Arguments:**

        - `in_features`, `out_features`: sizes of the last axis.
        - `scale`: initial values have standard deviation `scale / sqrt(in_features)`.
        - `key`: for the initial values.
        """
        self.kernel = fan_in_normal(key, (in_features, out_features), in_features, scale)

    @checked
    def __call__(
        self, x: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        """Maps `[*batch in_features]` to `[*batch out_features]`."""
        return jnp.matmul(x, self.kernel.astype(x.dtype))
