"""Shifting sequences to the left, within rows and within documents."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Integer, Shaped

from ._checks import check_ids
from ._types import HostOrDeviceArray, checked

PADDING_SEGMENT = 0


@checked
def roll_and_mask(
    x: Shaped[HostOrDeviceArray, "batch seq *rest"],
    shift: int = -1,
    *,
    fill_value: bool | int | float = 0,
    axis_name: str | None = None,
) -> Shaped[Array, "batch seq *rest"]:
    """Shifts a sequence to the left and fills what becomes free at its end.

    `out[b, i] = x[b, i - shift]` where that position exists, `fill_value` elsewhere.

    >>> print(emtp.roll_and_mask(jnp.asarray([[5, 6, 7, 8]]), -1, fill_value=-1))
    [[ 6  7  8 -1]]

    **Arguments:**

    - `x`: any dtype; the sequence is the second axis.
    - `shift`: how far to shift, in tokens; zero or negative. 0 returns `x` unchanged; `-seq` and
        beyond leave nothing but fill.
    - `fill_value`: what the freed positions hold, cast to the dtype of `x`.
    - `axis_name`: inside `jax.shard_map`, the mesh axis that the sequence is split over. The shift
        then crosses shards, by one collective-permute of the tokens that move (two if the shift is
        longer than a shard and no multiple of it).

    **Returns:** an array of the shape and dtype of `x`; int32 for 64-bit integers of NumPy.

    **Raises:** `ValueError` if `shift` is positive, or integers of NumPy do not fit 32 bits.
    """
    if shift > 0:
        raise ValueError(
            f"`shift` must be zero or negative, as sequences are only shifted to the left; got "
            f"{shift}. Did you mean `shift={-shift}`?"
        )
    if isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.dtype.itemsize == 8:
        x = check_ids("x", x)
    array = jnp.asarray(x)
    if shift == 0:
        return array
    if axis_name is None:
        return _shift_left(array, -shift, fill_value)
    return _shift_left_across_shards(array, -shift, fill_value, axis_name)


def _shift_left(x: Array, distance: int, fill_value: bool | int | float) -> Array:
    # A negative low padding is a shift which XLA partitions into one small collective-permute.
    distance = min(distance, x.shape[1])
    padding = [(0, 0, 0)] * x.ndim
    padding[1] = (-distance, distance, 0)
    return lax.pad(x, jnp.asarray(fill_value, x.dtype), padding)


def _shift_left_across_shards(
    x: Array, distance: int, fill_value: bool | int | float, axis_name: str
) -> Array:
    shard_len, num_shards = x.shape[1], lax.axis_size(axis_name)
    whole_shards, remainder = divmod(distance, shard_len)
    near = _from_shard_to_the_right(x[:, remainder:], whole_shards, num_shards, axis_name)
    far = _from_shard_to_the_right(x[:, :remainder], whole_shards + 1, num_shards, axis_name)
    shifted = jnp.concatenate([near, far], axis=1)
    source = lax.axis_index(axis_name) * shard_len + jnp.arange(shard_len) + distance
    exists = (source < num_shards * shard_len).reshape(1, shard_len, *(1,) * (x.ndim - 2))
    return jnp.where(exists, shifted, jnp.asarray(fill_value, x.dtype))


def _from_shard_to_the_right(x: Array, distance: int, num_shards: int, axis_name: str) -> Array:
    """Receives `x` from the shard `distance` to the right; zeros where there is none."""
    if distance == 0 or x.shape[1] == 0:
        return x
    sources = range(distance, num_shards)
    return lax.ppermute(x, axis_name, [(source, source - distance) for source in sources])


@checked
def roll_and_mask_by_segment(
    x: Shaped[HostOrDeviceArray, "batch seq *rest"],
    segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None,
    shift: int = -1,
    *,
    fill_value: bool | int | float = 0,
    axis_name: str | None = None,
) -> Shaped[Array, "batch seq *rest"]:
    """Shifts to the left within documents: nothing crosses from one document into another.

    `out[b, i] = x[b, i - shift]` where that position exists and belongs to the same document,
    `fill_value` elsewhere. A document is a run of equal ids that are not 0: an id may come again
    later in the row, for another document.

    >>> segment_ids = jnp.asarray([[1, 1, 2, 2]])
    >>> print(emtp.roll_and_mask_by_segment(jnp.asarray([[5, 6, 7, 8]]), segment_ids))
    [[6 0 8 0]]

    **Arguments:**

    - `x`, `shift`, `fill_value`, `axis_name`: as in `roll_and_mask`. A shift of 0 fills padding.
    - `segment_ids`: which document each position belongs to; 0 is padding. With `None` every row is
        one document, and this is `roll_and_mask`.

    **Returns:** an array of the shape and dtype of `x`.

    **Raises:** `ValueError` if `shift` is positive.
    """
    rolled = roll_and_mask(x, shift, fill_value=fill_value, axis_name=axis_name)
    if segment_ids is None:
        return rolled
    segments = jnp.asarray(check_ids("segment_ids", segment_ids))
    same_document = _same_document(segments, -shift, axis_name)
    same_document = same_document.reshape(*same_document.shape, *(1,) * (rolled.ndim - 2))
    return jnp.where(same_document, rolled, jnp.asarray(fill_value, rolled.dtype))


def next_is_same_document(segment_ids: Array, axis_name: str | None = None) -> Array:
    """Whether positions i and i + 1 lie in one document; `[batch seq]`, boolean."""
    rolled = roll_and_mask(segment_ids, -1, fill_value=PADDING_SEGMENT, axis_name=axis_name)
    return (segment_ids == rolled) & (segment_ids != PADDING_SEGMENT)


def _same_document(segment_ids: Array, distance: int, axis_name: str | None) -> Array:
    """Whether positions i … i + distance lie in one document; `[batch seq]`, boolean.

    By doubling: `same` holds for 1, 2, 4, … positions ahead, and `out` for the bits of `distance`
    so far.
    """
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    distance = min(distance, shards * segment_ids.shape[1])
    out = segment_ids != PADDING_SEGMENT
    same, ahead, done = next_is_same_document(segment_ids, axis_name), 1, 0
    while done < distance:
        if distance & ahead:
            out &= roll_and_mask(same, -done, fill_value=False, axis_name=axis_name)
            done += ahead
        if done < distance:
            same &= roll_and_mask(same, -ahead, fill_value=False, axis_name=axis_name)
        ahead *= 2
    return out


def same_document_by_depth(segment_ids: Array, num_depths: int) -> list[Array]:
    """`_same_document` for distances 0 … `num_depths`, one shift each."""
    next_is_same = next_is_same_document(segment_ids)
    same = [segment_ids != PADDING_SEGMENT]
    for k in range(num_depths):
        same.append(same[k] & roll_and_mask(next_is_same, -k, fill_value=False))
    return same
