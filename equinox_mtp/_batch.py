"""One batch of rows of text, with everything that a model reads of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Integer

from ._alignment import MTPTargets, align_targets, default_position_ids
from ._checks import check_ids
from ._types import HostOrDeviceArray, checked


class Batch(eqx.Module):
    """Rows of text as a model reads them; made by `make_batch`.

    A pytree of integer arrays, all `[batch seq]`: `sharding.reorder` and `sharding.shard_batch`
    take it whole.

    >>> batch.input_ids.shape
    (2, 8)
    >>> batch.align(num_depths=2).targets.mask.shape
    (2, 2, 8)

    **Fields:**

    - `input_ids`, `target_ids`: each token, and its successor.
    - `target_mask`: which targets count.
    - `position_ids`: each token's position in its document.
    - `segment_ids`: which document each token belongs to; 0 is padding. `None` means that every row
        is one document.
    - `targets`: what each prediction depth reads and is scored on, `[depth batch seq]`, or `None`:
        then the model aligns them when it is called.

    **Raises:** `ValueError` if the fields differ in shape.
    """

    input_ids: Integer[HostOrDeviceArray, "batch seq"]
    target_ids: Integer[HostOrDeviceArray, "batch seq"]
    target_mask: Bool[HostOrDeviceArray, "batch seq"]
    position_ids: Integer[HostOrDeviceArray, "batch seq"]
    segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None
    targets: MTPTargets | None = None

    def __check_init__(self) -> None:
        names = ("input_ids", "target_ids", "target_mask", "position_ids", "segment_ids")
        fields = {name: getattr(self, name) for name in names}
        shapes = {name: x.shape for name, x in fields.items() if x is not None}
        if self.targets is not None:
            shapes["targets"] = self.targets.mask.shape[1:]
        if len(set(shapes.values())) > 1:
            raise ValueError(
                "`Batch` must have fields of one shape (batch, seq); got "
                f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}."
            )

    @checked
    def align(self, num_depths: int, *, chain_mask: bool = False) -> "Batch":
        """The same batch with `targets` for this many depths; see `align_targets`.

        Needed before positions are put in another order, or split over devices by hand: which token
        a depth predicts follows from the order of the text.
        """
        targets = align_targets(
            self.input_ids,
            self.target_ids,
            self.target_mask,
            num_depths=num_depths,
            segment_ids=self.segment_ids,
            position_ids=self.position_ids,
            chain_mask=chain_mask,
        )
        return dataclasses.replace(self, targets=targets)


@checked
def make_batch(
    tokens: Integer[HostOrDeviceArray, "batch tokens"] | Sequence[Any],
    *,
    segment_ids: Integer[HostOrDeviceArray, "batch tokens"] | Sequence[Any] | None = None,
) -> Batch:
    """Makes a batch of rows of `seq + 1` tokens.

    Inputs are `tokens[:, :-1]` and targets `tokens[:, 1:]`. A target counts if it lies in the same
    document as its input, `segment_ids[i] == segment_ids[i+1] != 0`. Positions count from 0 in each
    document, that is in each run of one segment id.

    >>> tokens, segment_ids = np.asarray([[5, 6, 7, 8, 9]]), np.asarray([[1, 1, 1, 2, 2]])
    >>> packed = emtp.make_batch(tokens, segment_ids=segment_ids)
    >>> print(packed.target_ids, packed.target_mask, packed.position_ids)
    [[6 7 8 9]] [[ True  True False  True]] [[0 1 2 0]]

    **Arguments:**

    - `tokens`: `[batch, seq + 1]`; an array, or lists of equal length.
    - `segment_ids`: which document each of these tokens belongs to; 0 is padding. An array or lists
        of the same shape. With `None` every row is one document.

    **Returns:** `Batch`; of NumPy arrays, if the arguments are, or lists.

    **Raises:** `ValueError` if a row has fewer than two tokens, lists differ in length, or ids on
    the host do not fit 32 bits.
    """
    rows: Any = check_ids("tokens", tokens)
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise ValueError(
            f"`tokens` must have at least two tokens a row, an input and its target; got shape "
            f"{rows.shape}. Make rows of `seq + 1` tokens."
        )
    input_ids, target_ids = rows[:, :-1], rows[:, 1:]
    on_host = isinstance(rows, np.ndarray)
    if segment_ids is None:
        xp = np if on_host else jnp
        return Batch(
            input_ids,
            target_ids,
            target_mask=xp.ones(input_ids.shape, bool),
            position_ids=default_position_ids(input_ids),
        )
    segments: Any = check_ids("segment_ids", segment_ids)
    if segments.shape != rows.shape:
        raise ValueError(
            f"`segment_ids` must have the shape of `tokens`, {rows.shape}; got {segments.shape}."
        )
    is_next_same = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
    return Batch(
        input_ids,
        target_ids,
        target_mask=is_next_same,
        position_ids=default_position_ids(input_ids, segments[:, :-1]),
        segment_ids=segments[:, :-1],
    )
