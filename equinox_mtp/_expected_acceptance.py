"""How often sampled drafts would be accepted, as expected values."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from ._acceptance import check_one_a_depth, rate_of
from ._losses import add_counts, check_same_depths
from ._types import HostOrDeviceArray, checked


class ExpectedAcceptance(eqx.Module):
    """The expected acceptance of sampling, as sums and counts; `+` joins batches.

    Speculative sampling accepts a draft from q with probability α = Σ_v min(p, q) (arXiv
    2211.17192, §3.2). Where `MTPAcceptanceRate` counts positions, this adds up probabilities.
    Outside of `jit`, `+` adds in 64 bits on the host, and waits for the arrays.

    >>> sums = [np.asarray(x, np.float32) for x in ([6, 4], [8, 8], [6, 3], [8, 8])]
    >>> acceptance = emtp.ExpectedAcceptance(*sums)
    >>> print(acceptance.independent, acceptance.joint, acceptance.expected_accepted_length)
    [0.75 0.5 ] [0.75  0.375] 2.125

    **Fields**, for each depth:

    - `accepted`, `scored`: Σ α_k over the positions scored at depth k, and their number.
    - `joint_accepted`, `joint_scored`: Σ Π_{j≤k} α_j over the positions scored at all depths up to
        k, and their number.
    """

    accepted: Float[HostOrDeviceArray, "depth"]
    scored: Float[HostOrDeviceArray, "depth"]
    joint_accepted: Float[HostOrDeviceArray, "depth"]
    joint_scored: Float[HostOrDeviceArray, "depth"]

    def __check_init__(self) -> None:
        check_one_a_depth(self)

    def __add__(self, other: "ExpectedAcceptance") -> "ExpectedAcceptance":
        check_same_depths(self.scored, other.scored, "ExpectedAcceptance")
        return jax.tree.map(add_counts, self, other)

    @property
    def independent(self) -> Float32[Array, "depth"]:
        """P(a draft of depth k is accepted), in [0, 1]; 0 where nothing is scored."""
        return rate_of(self.accepted, self.scored)

    @property
    def joint(self) -> Float32[Array, "depth"]:
        """P(the drafts of depths 1 … k are all accepted), in [0, 1]; 0 where nothing is scored."""
        return rate_of(self.joint_accepted, self.joint_scored)

    @property
    def expected_accepted_length(self) -> Float32[Array, ""]:
        """τ = 1 + Σ_k joint_k: tokens committed by a forward pass of the main model."""
        return 1 + jnp.sum(self.joint)


@checked
def calculate_expected_acceptance(
    acceptance: Float[Array, "depth batch seq"], mask: Bool[Array, "depth batch seq"]
) -> ExpectedAcceptance:
    """Sums the probabilities with which drafts are accepted.

    >>> alpha, mask = jnp.asarray([[[0.5, 0.5]], [[0.5, 0.0]]]), jnp.ones((2, 1, 2), bool)
    >>> print(emtp.calculate_expected_acceptance(alpha, mask).joint)
    [0.5   0.125]

    **Arguments:**

    - `acceptance`: α of each depth, at the position where the drafts begin.
    - `mask`: which positions are scored.

    **Returns:** `ExpectedAcceptance`.
    """
    joint_mask = jnp.logical_and.accumulate(mask, axis=0)

    def total(values: Any, where: Array) -> Array:
        return jnp.sum(jnp.where(where, values, 0), axis=(1, 2), dtype=jnp.float32)

    return ExpectedAcceptance(
        accepted=total(acceptance, mask),
        scored=total(1, mask),
        joint_accepted=total(jnp.cumprod(acceptance, axis=0), joint_mask),
        joint_scored=total(1, joint_mask),
    )
