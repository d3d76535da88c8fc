"""The tensors of an array, and where it lies in a tensor that it shares with others."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ._steps import AbstractStep, Part, Shape


@dataclasses.dataclass(frozen=True)
class Place:
    """The tensors of one array of a model.

    **Fields:**

    - `leaf`: the array's dotted name.
    - `names`: the tensor's name; or a list of names, one for each entry of the array's first axis,
        which may be lists in turn.
    - `step`: how each of them lies.
    - `shape`: of the part that one tensor has.
    """

    leaf: str
    names: Any
    step: AbstractStep
    shape: Shape

    @property
    def flat_names(self) -> list[str]:
        """All tensors, in the order of the leading axes."""
        return jax.tree.leaves(self.names)


@dataclasses.dataclass(frozen=True)
class Rows(AbstractStep):
    """A `Part`, once it is known where the array lies.

    The tensor has `num_groups` times `total` rows, of which the array has those from `start` to
    `stop` in each group. They are its first axis; or its first two, if `axis` is 1.
    """

    step: AbstractStep
    num_groups: int
    start: int
    stop: int
    total: int
    axis: int

    def stored_shape(self, shape: Shape) -> Shape:
        """Of the whole tensor."""
        rows = (self.num_groups, self.total) if self.axis else (self.num_groups * self.total,)
        return (*rows, *self.step.stored_shape(shape)[self.axis + 1 :])

    def view(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """See `AbstractStep`; a copy if heads of one group lie apart from those of the next."""
        groups = stored.reshape(self.num_groups, self.total, *stored.shape[self.axis + 1 :])
        return self.step.view(groups[:, self.start : self.stop], shape)

    def stored(self, array: np.ndarray) -> np.ndarray:
        """The array's rows alone, `[num_groups, stop - start, …]`."""
        rows = self.step.stored(array)
        return rows.reshape(self.num_groups, -1, *rows.shape[self.axis + 1 :])


def with_rows(places: Sequence[Place]) -> list[Place]:
    """The places with `Rows` for every `Part`, from the shapes of all that share a tensor."""
    by_leaf = {place.leaf: place for place in places}
    sharing: dict[tuple[str, ...], list[Place]] = defaultdict(list)
    for place in places:
        if isinstance(place.step, Part):
            sharing[tuple(place.flat_names)].append(place)
    found: dict[str, Rows] = {}
    for parts in sharing.values():
        sizes: dict[str, int] = {}
        num_groups = 1
        for place in sorted(parts, key=_order):
            assert isinstance(place.step, Part)
            if place.step.axis:
                num_groups = place.shape[0]
            elif place.step.groups is not None:
                module = place.leaf.rpartition(".")[0]
                num_groups = by_leaf[f"{module}.{place.step.groups}"].shape[-2]
            stored = place.step.stored_shape(place.shape)[: place.step.axis + 1]
            sizes[place.leaf] = math.prod(stored) // num_groups
        total, start = sum(sizes.values()), 0
        for place in sorted(parts, key=_order):
            assert isinstance(place.step, Part)
            stop = start + sizes[place.leaf]
            found[place.leaf] = Rows(
                place.step.step, num_groups, start, stop, total, place.step.axis
            )
            start = stop
    return [dataclasses.replace(place, step=found.get(place.leaf, place.step)) for place in places]


def _order(place: Place) -> int:
    assert isinstance(place.step, Part)
    return place.step.order
