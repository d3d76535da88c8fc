import jax
from jaxtyping import Array, Float, PRNGKeyArray

from .._types import checked
from ._linear import Linear
from ._parts import AbstractFeedForward


class SwiGLU(AbstractFeedForward):
    """The gated feed-forward network of arXiv 2002.05202: `(silu(x·gate) * (x·up)) · down`.

    >>> emtp.nn.SwiGLU(16, 32, key=jax.random.key(0))(jnp.ones((2, 8, 16))).shape
    (2, 8, 16)
    """

    gate: Linear
    up: Linear
    down: Linear

    def __init__(
        self, embed_size: int, mlp_size: int, *, out_scale: float = 1.0, key: PRNGKeyArray
    ):
        """**Arguments:**

        - `embed_size`, `mlp_size`: outer and inner number of features.
        - `out_scale`: multiplies the initial `down` kernel.
        - `key`: for the initial values.
        """
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = Linear(embed_size, mlp_size, key=gate_key)
        self.up = Linear(embed_size, mlp_size, key=up_key)
        self.down = Linear(mlp_size, embed_size, scale=out_scale, key=down_key)

    @checked
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Applies the network to the last axis."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
