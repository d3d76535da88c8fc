"""How often the depths' predictions would be accepted as drafts."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Integer

from ._losses import add_counts, check_same_depths
from ._shift import roll_and_mask
from ._types import HostOrDeviceArray, checked


class MTPAcceptance(eqx.Module):
    """Per depth: what was predicted, what the truth was, and whether it is scored.

    Depth k at position i predicts token t(i+k+1). A prediction of -1 is none: the logits were not
    finite.

    >>> acceptance = emtp.MTPAcceptance(
    ...     predictions=jnp.asarray([[[7, 8]], [[8, 1]]]),
    ...     target_ids=jnp.asarray([[[7, 8]], [[8, 9]]]),
    ...     mask=jnp.ones((2, 1, 2), bool),
    ... )
    >>> print(emtp.calculate_mtp_acceptance_rate(acceptance, None).joint)
    [1.  0.5]

    **Raises:** `ValueError` if the fields differ in shape.
    """

    predictions: Int32[Array, "depth batch seq"]
    target_ids: Integer[Array, "depth batch seq"]
    mask: Bool[Array, "depth batch seq"]

    def __check_init__(self) -> None:
        shapes = [x.shape for x in (self.predictions, self.target_ids, self.mask)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 3:
            raise ValueError(
                "`predictions`, `target_ids` and `mask` must have one shape (depth, batch, seq); "
                f"got {', '.join(map(str, shapes))}."
            )


class MTPAcceptanceRate(eqx.Module):
    """Acceptance as integer counts; `+` joins batches, the rates are properties.

    Outside of `jit`, `+` adds in 64 bits on the host, and waits for the arrays; while tracing it
    adds in 32 bits, which hold 2^31 - 1 positions.

    A depth is accepted where it predicts the reference token. Depths 1 … k are **jointly** accepted
    where all of them are: what happens to a draft of k tokens in speculative decoding.

    >>> counts = [np.asarray(x) for x in ([6, 4], [8, 8], [6, 3], [8, 8], [8, 6])]
    >>> rate = emtp.MTPAcceptanceRate(*counts)
    >>> print(rate.independent, rate.joint, rate.conditional, rate.expected_accepted_length)
    [0.75 0.5 ] [0.75  0.375] [0.75 0.5 ] 2.125

    **Fields**, for each depth:

    - `accepted`, `scored`: accepted positions, of those scored at depth k.
    - `joint_accepted`, `joint_scored`: positions where depths 1 … k are all accepted, of those
        scored at all of them.
    - `joint_reached`: of the latter, those where depths 1 … k-1 are all accepted.
    """

    accepted: Integer[HostOrDeviceArray, "depth"]
    scored: Integer[HostOrDeviceArray, "depth"]
    joint_accepted: Integer[HostOrDeviceArray, "depth"]
    joint_scored: Integer[HostOrDeviceArray, "depth"]
    joint_reached: Integer[HostOrDeviceArray, "depth"]

    def __check_init__(self) -> None:
        check_one_a_depth(self)

    def __add__(self, other: "MTPAcceptanceRate") -> "MTPAcceptanceRate":
        check_same_depths(self.scored, other.scored, "MTPAcceptanceRate")
        return jax.tree.map(add_counts, self, other)

    @property
    def independent(self) -> Float32[Array, "depth"]:
        """P(depth k accepted), in [0, 1]; 0 where nothing is scored."""
        return rate_of(self.accepted, self.scored)

    @property
    def percent(self) -> Float32[Array, "depth"]:
        """`independent` in percent, as MaxText reports it for one depth."""
        return 100 * self.independent

    @property
    def joint(self) -> Float32[Array, "depth"]:
        """P(depths 1 … k all accepted), in [0, 1]; 0 where nothing is scored."""
        return rate_of(self.joint_accepted, self.joint_scored)

    @property
    def conditional(self) -> Float32[Array, "depth"]:
        """P(depth k accepted | depths 1 … k-1 accepted), in [0, 1]; 0 where never reached."""
        return rate_of(self.joint_accepted, self.joint_reached)

    @property
    def expected_accepted_length(self) -> Float32[Array, ""]:
        """τ = 1 + Σ_k joint_k: tokens committed by a forward pass of the main model."""
        return 1 + jnp.sum(self.joint)


@checked
def calculate_mtp_acceptance_rate(
    acceptance: MTPAcceptance | None,
    main_predictions: Integer[Array, "batch seq"] | None,
) -> MTPAcceptanceRate:
    """Compares every depth's predictions with the main model's, or with the ground truth.

    A prediction of -1, from logits that are not finite, is never accepted.

    Depth k at position i is accepted where its prediction equals `main_predictions[i+k]`: both are
    about token t(i+k+1). Teacher-forced: both saw the true tokens before it.

    >>> rate = emtp.calculate_mtp_acceptance_rate(output.mtp.acceptance, output.predictions)
    >>> print(rate.scored, rate.joint.shape)
    [14 12] (2,)

    **Arguments:**

    - `acceptance`: of a block's output.
    - `main_predictions`: the main model's argmax at each position. `None` compares with the ground
        truth instead.

    **Returns:** `MTPAcceptanceRate`, with counts that add up over batches.

    **Raises:** `ValueError` if `main_predictions` is of another batch, or `acceptance` is `None`.
    """
    if acceptance is None:
        raise ValueError(
            "`acceptance` is `None`: the model or block was called with `predictions=False`. Call "
            "it with `predictions=True` where acceptance is wanted."
        )
    num_depths, *batch_shape = acceptance.mask.shape
    if main_predictions is None:
        reference = acceptance.target_ids
    elif main_predictions.shape != tuple(batch_shape):
        raise ValueError(
            f"`main_predictions` must have shape {tuple(batch_shape)}, the (batch, seq) of "
            f"`acceptance`; got {main_predictions.shape}. Take both from the same batch."
        )
    else:
        depths = range(num_depths + 1)
        reference = jnp.stack([roll_and_mask(main_predictions, -k) for k in depths])[1:]
    accepted = (acceptance.predictions == reference) & (acceptance.predictions >= 0)
    joint_accepted = jnp.logical_and.accumulate(accepted, axis=0)
    joint_mask = jnp.logical_and.accumulate(acceptance.mask, axis=0)
    reached = jnp.concatenate([jnp.ones_like(accepted[:1]), joint_accepted])[:num_depths]

    def count(condition: Bool[Array, "depth batch seq"]) -> Int32[Array, "depth"]:
        return jnp.sum(condition, axis=(1, 2), dtype=jnp.int32)

    return MTPAcceptanceRate(
        accepted=count(accepted & acceptance.mask),
        scored=count(acceptance.mask),
        joint_accepted=count(joint_accepted & joint_mask),
        joint_scored=count(joint_mask),
        joint_reached=count(reached & joint_mask),
    )


def check_one_a_depth(module: eqx.Module) -> None:
    """**Raises:** `ValueError` if the fields of a module are not of the same depths."""
    names = [field.name for field in dataclasses.fields(module)]
    shapes = {name: getattr(module, name).shape for name in names}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"`{type(module).__name__}` must have fields of the same depths; got "
            f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}."
        )


def rate_of(
    numerator: Integer[HostOrDeviceArray, "depth"] | Float[HostOrDeviceArray, "depth"],
    denominator: Integer[HostOrDeviceArray, "depth"] | Float[HostOrDeviceArray, "depth"],
) -> Array:
    """A share, of each depth; 0 where the denominator is."""
    # By way of `asarray`: counts of 64 bits, on the host, must not be cut to 32.
    denominator = jnp.maximum(jnp.asarray(denominator, jnp.float32), 1)
    return jnp.asarray(numerator, jnp.float32) / denominator
