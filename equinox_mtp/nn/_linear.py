from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._checks import check_integer
from .._types import checked
from ._init import fan_in_normal

Tree = TypeVar("Tree")


class Linear(eqx.Module):
    """A linear map of the last axis, without bias: `x @ kernel`.

    Works on any number of leading axes, in the dtype of its input.

    >>> emtp.nn.Linear(3, 5, key=jax.random.key(0))(jnp.ones((2, 8, 3))).shape
    (2, 8, 5)
    """

    kernel: Float[Array, "in_features out_features"]

    def __init__(
        self, in_features: int, out_features: int, *, scale: float = 1.0, key: PRNGKeyArray
    ):
        """**Arguments:**

        - `in_features`, `out_features`: sizes of the last axis.
        - `scale`: initial values have standard deviation `scale / sqrt(in_features)`.
        - `key`: for the initial values.

        **Raises:** `ValueError` for a size below 1.
        """
        in_features = check_integer("in_features", in_features, at_least=1)
        out_features = check_integer("out_features", out_features, at_least=1)
        self.kernel = fan_in_normal(key, (in_features, out_features), in_features, scale)

    @checked
    def __call__(
        self, x: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        """Maps `[*batch in_features]` to `[*batch out_features]`.

        **Raises:** `ValueError` if `x` has not `in_features` features.
        """
        check_features(x, self.kernel.shape[0], "the linear map")
        return jnp.matmul(x, self.kernel.astype(x.dtype))


def check_features(x: Array, wanted: int, whose: str) -> None:
    """**Raises:** `ValueError` if the last axis of `x` is of another size."""
    if x.shape[-1] != wanted:
        raise ValueError(
            f"`x` must have the {wanted} features of {whose} in its last axis; got an array "
            f"{x.shape}."
        )


def cast_matrices(tree: Tree, dtype: DTypeLike) -> Tree:
    """A module whose kernels and embeddings are of `dtype`; norms and biases stay as they are.

    For modules that cast these parameters to the dtype of their input anyway: their results do not
    change, and less memory is read. Floating-point arrays of two axes and more are cast.

    >>> layer = emtp.nn.cast_matrices(decoder.layer(0), jnp.bfloat16)
    >>> print(layer.attention.query_kernel.dtype, layer.attention_norm.scale.dtype)
    bfloat16 float32
    """

    def cast(x: Any) -> Any:
        return x.astype(dtype) if eqx.is_inexact_array(x) and x.ndim >= 2 else x

    return jax.tree.map(cast, tree)
