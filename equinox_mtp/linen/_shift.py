"""MaxText's shifting functions, which find the mesh axis "context" by themselves."""

import jax
from jaxtyping import Array, Integer, Shaped

from .. import _shift
from .._types import HostOrDeviceArray, checked

_CONTEXT_AXIS = "context"


@checked
def roll_and_mask(
    x: Shaped[HostOrDeviceArray, "batch seq *rest"], shift: int = -1
) -> Shaped[Array, "batch seq *rest"]:
    """`equinox_mtp.roll_and_mask` with zeros for fill.

    Inside a `shard_map` over a mesh axis named `"context"` the sequence is taken to be split over
    it, and the shift crosses shards.

    >>> print(linen.roll_and_mask(jnp.asarray([[5, 6, 7, 8]])))
    [[6 7 8 0]]

    **Arguments:**

    - `x`: any dtype; the sequence is the second axis.
    - `shift`: how far to shift, in tokens; zero or negative.

    **Raises:** `ValueError` if `shift` is positive.
    """
    return _shift.roll_and_mask(x, shift, axis_name=_context_axis())


@checked
def roll_and_mask_by_segment(
    x: Shaped[HostOrDeviceArray, "batch seq *rest"],
    segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None,
    shift: int = -1,
) -> Shaped[Array, "batch seq *rest"]:
    """`equinox_mtp.roll_and_mask_by_segment` with zeros for fill, across shards as `roll_and_mask`.

    MaxText takes only a shift of -1; here any shift is right within documents.

    >>> segment_ids = jnp.asarray([[1, 1, 2, 2]])
    >>> print(linen.roll_and_mask_by_segment(jnp.asarray([[5, 6, 7, 8]]), segment_ids))
    [[6 0 8 0]]

    **Arguments:**

    - `x`, `shift`: as in `roll_and_mask`.
    - `segment_ids`: which document each position belongs to; 0 is padding. `None` means one
        document a row.

    **Raises:** `ValueError` if `shift` is positive.
    """
    return _shift.roll_and_mask_by_segment(x, segment_ids, shift, axis_name=_context_axis())


def _context_axis() -> str | None:
    manual_axes = jax.sharding.get_abstract_mesh().manual_axes
    return _CONTEXT_AXIS if _CONTEXT_AXIS in manual_axes else None
