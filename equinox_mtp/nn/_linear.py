from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_integer
from .._types import checked
from ._init import fan_in_normal
from ._kernels import multiply


class Linear(eqx.Module):
    """A linear map of the last axis, without bias: `x @ kernel`.

    Works on any number of leading axes, in the dtype of its input.

    >>> emtp.nn.Linear(3, 5, key=jax.random.key(0))(jnp.ones((2, 8, 3))).shape
    (2, 8, 5)
    """

    # What `outputs_first` lays out; the field holds an `OutputsFirst` then.
    _kernels: ClassVar = ("kernel",)

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
        return multiply(x, self.kernel)


def check_features(x: Array, wanted: int, whose: str) -> None:
    """**Raises:** `ValueError` if the last axis of `x` is of another size."""
    if x.shape[-1] != wanted:
        raise ValueError(
            f"`x` must have the {wanted} features of {whose} in its last axis; got an array "
            f"{x.shape}."
        )
