"""Aligning all prediction depths at once: a pure function of integers."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Integer, Shaped

from ._checks import check_ids, check_integer
from ._shift import PADDING_SEGMENT, next_is_same_document, roll_and_mask, same_document_by_depth
from ._types import HostOrDeviceArray, checked

# Positions beyond a document take these values. None of them is ever scored: the mask is `False`
# there. Id 0 keeps the embedding lookup in range.
_FILL_INPUT_ID = 0
_FILL_POSITION_ID = 0
_FILL_TARGET_ID = 0


class MTPTargets(eqx.Module):
    """What every prediction depth reads and is scored on; made by `align_targets`.

    At depth k (index k-1 of the leading axis) and position i:

    - `input_ids`: the token whose embedding enters the layer, t(i+k);
    - `position_ids`: the position of that token;
    - `target_ids`: the token to predict, t(i+k+1);
    - `mask`: whether the prediction is scored. Where it is `False` the other fields may hold fill.
    - `token_mask`: whether t(i+k) is a token of the document of position i. Where it is `False`,
        at the last k positions of a document and in padding, `input_ids` and `position_ids` are
        fill. `None` if it is not known.

    >>> targets = batch.align(num_depths=2).targets
    >>> print(targets.target_ids[:, 0])  # depths 1 and 2 of the first row, 0 1 … 8
    [[2 3 4 5 6 7 8 0]
     [3 4 5 6 7 8 0 0]]

    **Raises:** `ValueError` if the fields differ in shape.
    """

    input_ids: Integer[Array, "depth batch seq"]
    position_ids: Integer[Array, "depth batch seq"]
    target_ids: Integer[Array, "depth batch seq"]
    mask: Bool[Array, "depth batch seq"]
    token_mask: Bool[Array, "depth batch seq"] | None = None

    def __check_init__(self) -> None:
        shapes = {
            field.name: getattr(self, field.name).shape
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        }
        if len(set(shapes.values())) > 1 or len(shapes["mask"]) != 3:
            raise ValueError(
                "`MTPTargets` must have fields of one shape (depth, batch, seq); got "
                f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}."
            )

    @property
    def num_depths(self) -> int:
        """The number of prediction depths D."""
        return self.mask.shape[0]


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
    embeds `input_ids[i+k]` and predicts `target_ids[i+k]`. It is scored where positions i … i+k are
    in the row, all of one id in `segment_ids` that is not 0, and `target_mask[i+k]` is set: so an
    id may come again in a row, and padding may stand inside of a text. This is the alignment
    of Multi-Token Prediction (DeepSeek-V3, arXiv 2412.19437, §2.2, eq. 21–24), right for packed
    documents at every depth. It is a pure function of integers: call it on the global batch, before
    the sequence is reordered or split over devices.

    >>> input_ids, target_ids = np.asarray([[5, 6, 7, 8]]), np.asarray([[6, 7, 8, 9]])
    >>> targets = emtp.align_targets(input_ids, target_ids, num_depths=2)
    >>> print(targets.target_ids[:, 0])  # two and three tokens ahead
    [[7 8 9 0]
     [8 9 0 0]]
    >>> print(targets.mask[1, 0])
    [ True  True False False]

    **Arguments:**

    - `input_ids`, `target_ids`: tokens and their successors, as `inputs_and_targets` makes them.
    - `target_mask`: which targets count. Boolean, 0/1, or segment ids (anything non-zero counts);
        `None` counts all.
    - `num_depths`: the number of depths D; 0 is legal.
    - `segment_ids`: which document each position belongs to; 0 is padding. `None` means that every
        row is one document.
    - `position_ids`: the position of each token; counts from 0 in each document if `None`.
    - `chain_mask`: score depth k at i only where every target of the chain i, i+1, …, i+k counts,
        not just the last. Use it if masked tokens (a prompt, an image) should not be drafted over.

    **Returns:** `MTPTargets` of shape `[depth batch seq]`.

    **Raises:** `ValueError` if `num_depths` is negative, or ids on the host do not fit 32 bits.
    """
    num_depths = check_integer("num_depths", num_depths, at_least=0)
    inputs = jnp.asarray(check_ids("input_ids", input_ids))
    targets = jnp.asarray(check_ids("target_ids", target_ids))
    segments = (
        jnp.ones_like(inputs)
        if segment_ids is None
        else jnp.asarray(check_ids("segment_ids", segment_ids))
    )
    positions = (
        jnp.asarray(default_position_ids(inputs, segments))
        if position_ids is None
        else jnp.asarray(check_ids("position_ids", position_ids))
    )
    # Depth 0 is the main model's own alignment: the start of every chain, dropped at the end.
    token_mask = jnp.stack(same_document_by_depth(segments, num_depths))

    def roll(x: Array, fill_value: bool | int) -> Shaped[Array, "depths_from_zero batch seq"]:
        rolled = [roll_and_mask(x, -k, fill_value=fill_value) for k in range(num_depths + 1)]
        return jnp.where(token_mask, jnp.stack(rolled), jnp.asarray(fill_value, x.dtype))

    mask = roll(scored_targets(targets, target_mask, segments), fill_value=False)
    if chain_mask:
        mask = jnp.logical_and.accumulate(mask, axis=0)
    return MTPTargets(
        input_ids=roll(inputs, _FILL_INPUT_ID)[1:],
        position_ids=roll(positions, _FILL_POSITION_ID)[1:],
        target_ids=roll(targets, _FILL_TARGET_ID)[1:],
        mask=mask[1:],
        token_mask=token_mask[1:],
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

    >>> tokens, segment_ids = np.asarray([[5, 6, 7, 8]]), np.asarray([[1, 1, 2, 2]])
    >>> input_ids, target_ids, mask = emtp.inputs_and_targets(tokens, segment_ids=segment_ids)
    >>> print(input_ids, target_ids, mask)
    [[5 6 7]] [[6 7 8]] [[ True False  True]]

    **Arguments:**

    - `tokens`: `[batch, seq + 1]`.
    - `segment_ids`: which document each of these tokens belongs to; 0 is padding. With `None` every
        row is one document and every target counts.

    **Returns:** `(input_ids, target_ids, target_mask)`, each `[batch seq]`. The segment and
    position ids that go with them are `segment_ids[:, :-1]` and `position_ids[:, :-1]`.

    **Raises:** `ValueError` if a row has fewer than two tokens, or ids on the host do not fit 32
    bits.
    """
    if tokens.shape[1] < 2:
        raise ValueError(
            f"`tokens` must have at least two tokens a row, an input and its target; got shape "
            f"{tokens.shape}. Make rows of `seq + 1` tokens."
        )
    array = jnp.asarray(check_ids("tokens", tokens))
    input_ids, target_ids = array[:, :-1], array[:, 1:]
    if segment_ids is None:
        return input_ids, target_ids, jnp.ones(input_ids.shape, bool)
    segments = jnp.asarray(check_ids("segment_ids", segment_ids))
    return input_ids, target_ids, next_is_same_document(segments)[:, :-1]


@checked
def scored_targets(
    target_ids: Integer[HostOrDeviceArray, "batch seq"],
    target_mask: Integer[HostOrDeviceArray, "batch seq"]
    | Bool[HostOrDeviceArray, "batch seq"]
    | None = None,
    segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None,
) -> Bool[Array, "batch seq"]:
    """Which targets of the main model count: those in `target_mask`, outside padding.

    `MTPModel` sums the losses of these; a loop without `MTPModel` needs them for its own sum.

    >>> target_ids, segment_ids = np.asarray([[6, 7, 0]]), np.asarray([[1, 1, 0]])
    >>> print(emtp.scored_targets(target_ids, segment_ids=segment_ids))
    [[ True  True False]]
    """
    scored = jnp.ones(target_ids.shape, bool)
    if target_mask is not None:
        # On the host, if it is there: an id may be nothing but zeros in its lower 32 bits.
        scored &= jnp.asarray(target_mask != 0)
    if segment_ids is not None:
        segments = jnp.asarray(check_ids("segment_ids", segment_ids))
        scored &= segments != PADDING_SEGMENT
    return scored


def default_position_ids(
    input_ids: Shaped[HostOrDeviceArray, "batch seq"],
    segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None,
) -> Integer[HostOrDeviceArray, "batch seq"]:
    """Positions that count from 0 in every document, that is in every run of one segment id."""
    if segment_ids is None:
        xp = jnp if isinstance(input_ids, Array) else np
        positions = xp.arange(input_ids.shape[1], dtype=np.int32)
        return xp.broadcast_to(positions, input_ids.shape)
    xp = jnp if isinstance(segment_ids, Array) else np
    positions = xp.arange(segment_ids.shape[1], dtype=np.int32)
    is_start = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = xp.pad(xp.where(is_start, positions[1:], 0), ((0, 0), (1, 0)))
    return positions - _running_maximum(starts)


def _running_maximum(x: HostOrDeviceArray) -> HostOrDeviceArray:
    if isinstance(x, Array):
        return lax.cummax(x, axis=1)
    return np.maximum.accumulate(x, axis=1)
