"""Shifting sequences to the left, and aligning all prediction depths at once."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Integer, Shaped

from ._types import HostOrDeviceArray, checked

# Positions beyond a document take these values. None of them is ever scored: the mask is `False`
# there. Id 0 keeps the embedding lookup in range.
_FILL_INPUT_ID = 0
_FILL_POSITION_ID = 0
_FILL_TARGET_ID = 0
_PADDING_SEGMENT = 0


class MTPTargets(eqx.Module):
    """What every prediction depth reads and is scored on; made by `align_targets`.

    At depth k (index k-1 of the leading axis) and position i:

    - `input_ids`: the token whose embedding enters the layer, t(i+k);
    - `position_ids`: the position of that token;
    - `target_ids`: the token to predict, t(i+k+1);
    - `mask`: whether the prediction is scored. Where it is `False` the other fields may hold fill.
    """

    input_ids: Integer[Array, "depth batch seq"]
    position_ids: Integer[Array, "depth batch seq"]
    target_ids: Integer[Array, "depth batch seq"]
    mask: Bool[Array, "depth batch seq"]

    @property
    def num_depths(self) -> int:
        """The number of prediction depths D."""
        return self.mask.shape[0]


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

    **Arguments:**

    - `x`: any dtype; the sequence is the second axis.
    - `shift`: how far to shift, in tokens; zero or negative. 0 returns `x` unchanged; `-seq` and
        beyond leave nothing but fill.
    - `fill_value`: what the freed positions hold, cast to the dtype of `x`.
    - `axis_name`: inside `jax.shard_map`, the mesh axis that the sequence is split over. The shift
        then crosses shards, by one collective-permute of the tokens that move (two if the shift is
        longer than a shard and no multiple of it).

    **Returns:** an array of the shape and dtype of `x`.

    **Raises:** `ValueError` if `shift` is positive.
    """
    if shift > 0:
        raise ValueError(
            f"`shift` must be zero or negative, as sequences are only shifted to the left; got "
            f"{shift}. Did you mean `shift={-shift}`?"
        )
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
    """Receives `x` from the shard `distance` places to the right; zeros where there is none."""
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

    `out[b, i] = x[b, i - shift]` where that position exists and belongs to the same document
    (`segment_ids[b, i] == segment_ids[b, i - shift] != 0`), `fill_value` elsewhere.

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
    same_document = _same_document(jnp.asarray(segment_ids), shift, axis_name)
    same_document = same_document.reshape(*same_document.shape, *(1,) * (rolled.ndim - 2))
    return jnp.where(same_document, rolled, jnp.asarray(fill_value, rolled.dtype))


def _same_document(segment_ids: Array, shift: int, axis_name: str | None) -> Array:
    """Whether positions i and i - shift lie in one document; `[batch seq]`, boolean."""
    rolled = roll_and_mask(segment_ids, shift, fill_value=_PADDING_SEGMENT, axis_name=axis_name)
    return (segment_ids == rolled) & (segment_ids != _PADDING_SEGMENT)


@checked
def align_targets(
    input_ids: Integer[HostOrDeviceArray, "batch seq"],
    target_ids: Integer[HostOrDeviceArray, "batch seq"],
    target_mask: Integer[HostOrDeviceArray, "batch seq"]
    | Bool[HostOrDeviceArray, "batch seq"]
    | None = None,
    *,
    num_depths: int,
    segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None,
    position_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None,
    chain_mask: bool = False,
) -> MTPTargets:
    """Shifts a batch for all prediction depths at once.

    With `input_ids[i]` the token t(i) and `target_ids[i]` the token t(i+1), depth k at position i
    embeds `input_ids[i+k]` and predicts `target_ids[i+k]`. It is scored where i+k is in the row,
    `segment_ids[i] == segment_ids[i+k] != 0`, and `target_mask[i+k]` is set. This is the alignment
    of Multi-Token Prediction (DeepSeek-V3, arXiv 2412.19437, §2.2, eq. 21–24), right for packed
    documents at every depth. It is a pure function of integers: call it on the global batch, before
    the sequence is reordered or split over devices.

    **Arguments:**

    - `input_ids`, `target_ids`: tokens and their successors, as `inputs_and_targets` makes them.
    - `target_mask`: which targets count. Boolean, 0/1, or segment ids (anything non-zero counts);
        `None` counts all.
    - `num_depths`: the number of depths D; 0 is legal.
    - `segment_ids`: which document each position belongs to; 0 is padding. `None` means that every
        row is one document.
    - `position_ids`: the position of each token; counts from 0 in each row if `None`.
    - `chain_mask`: score depth k at i only where every target of the chain i, i+1, …, i+k counts,
        not just the last. Use it if masked tokens (a prompt, an image) should not be drafted over.

    **Returns:** `MTPTargets` of shape `[depth batch seq]`.

    **Raises:** `ValueError` if `num_depths` is negative.
    """
    if num_depths < 0:
        raise ValueError(f"`num_depths` must be zero or positive; got {num_depths}.")
    inputs, targets = jnp.asarray(input_ids), jnp.asarray(target_ids)
    segments = jnp.ones_like(inputs) if segment_ids is None else jnp.asarray(segment_ids)
    positions = jnp.asarray(default_position_ids(inputs) if position_ids is None else position_ids)
    scored = scored_targets(targets, target_mask, segments)

    def roll(x: Array, fill_value: bool | int) -> Shaped[Array, "depths_from_zero batch seq"]:
        # Depth 0 is the main model's own alignment: the start of every chain, dropped at the end.
        depths = range(num_depths + 1)
        return jnp.stack(
            [roll_and_mask_by_segment(x, segments, -k, fill_value=fill_value) for k in depths]
        )

    mask = roll(scored, fill_value=False)
    if chain_mask:
        mask = jnp.logical_and.accumulate(mask, axis=0)
    return MTPTargets(
        input_ids=roll(inputs, _FILL_INPUT_ID)[1:],
        position_ids=roll(positions, _FILL_POSITION_ID)[1:],
        target_ids=roll(targets, _FILL_TARGET_ID)[1:],
        mask=mask[1:],
    )


@checked
def inputs_and_targets(
    tokens: Integer[HostOrDeviceArray, "batch tokens"],
    *,
    segment_ids: Integer[HostOrDeviceArray, "batch tokens"] | None = None,
) -> tuple[
    Integer[Array, "batch seq"],
    Integer[Array, "batch seq"],
    Bool[Array, "batch seq"],
]:
    """Splits rows of `seq + 1` tokens into inputs, targets, and which targets count.

    `input_ids = tokens[:, :-1]`, `target_ids = tokens[:, 1:]`, and a target counts if it lies in
    the same document as its input (`segment_ids[i] == segment_ids[i+1] != 0`).

    **Arguments:**

    - `tokens`: `[batch, seq + 1]`.
    - `segment_ids`: which document each of these tokens belongs to; 0 is padding. With `None` every
        row is one document and every target counts.

    **Returns:** `(input_ids, target_ids, target_mask)`, each `[batch seq]`. The segment and
    position ids that go with them are `segment_ids[:, :-1]` and `position_ids[:, :-1]`.

    **Raises:** `ValueError` if a row has fewer than two tokens.
    """
    if tokens.shape[1] < 2:
        raise ValueError(
            f"`tokens` must have at least two tokens a row, an input and its target; got shape "
            f"{tokens.shape}. Make rows of `seq + 1` tokens."
        )
    array = jnp.asarray(tokens)
    input_ids, target_ids = array[:, :-1], array[:, 1:]
    if segment_ids is None:
        return input_ids, target_ids, jnp.ones(input_ids.shape, bool)
    mask = _same_document(jnp.asarray(segment_ids), -1, None)[:, :-1]
    return input_ids, target_ids, mask


@checked
def scored_targets(
    target_ids: Integer[HostOrDeviceArray, "batch seq"],
    target_mask: Integer[HostOrDeviceArray, "batch seq"]
    | Bool[HostOrDeviceArray, "batch seq"]
    | None = None,
    segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None,
) -> Bool[Array, "batch seq"]:
    """Which targets of the main model count: those in `target_mask`, outside padding."""
    scored = jnp.ones(target_ids.shape, bool)
    if target_mask is not None:
        scored &= jnp.asarray(target_mask) != 0
    if segment_ids is not None:
        scored &= jnp.asarray(segment_ids) != _PADDING_SEGMENT
    return scored


def default_position_ids(input_ids: Shaped[Array, "batch seq"]) -> Integer[Array, "batch seq"]:
    """Positions that count from 0 in every row."""
    return jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
