"""How a stored tensor and an array of the tree lie to one another."""

import abc
import dataclasses
import math

import numpy as np

Shape = tuple[int, ...]


class AbstractStep(abc.ABC):
    """How a stored tensor and an array of the tree lie to one another; without a copy to read.

    >>> isinstance(pretrained.Kernel(), pretrained.AbstractStep)
    True
    """

    @abc.abstractmethod
    def stored_shape(self, shape: Shape) -> Shape:
        """The stored tensor's shape, from that of the array."""

    @abc.abstractmethod
    def view(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """The array, as a view of the stored tensor."""

    @abc.abstractmethod
    def stored(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `view`."""


@dataclasses.dataclass(frozen=True)
class Same(AbstractStep):
    """The array as it is stored.

    >>> pretrained.Same().stored_shape((4, 3))
    (4, 3)
    """

    def stored_shape(self, shape: Shape) -> Shape:
        """See `AbstractStep`."""
        return shape

    def view(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """See `AbstractStep`."""
        return stored

    def stored(self, array: np.ndarray) -> np.ndarray:
        """See `AbstractStep`."""
        return array


@dataclasses.dataclass(frozen=True)
class Flat(AbstractStep):
    """A bias of heads `[heads head_dim]`, stored with one axis.

    >>> pretrained.Flat().stored_shape((4, 3))
    (12,)
    """

    def stored_shape(self, shape: Shape) -> Shape:
        """See `AbstractStep`."""
        return (math.prod(shape),)

    def view(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """See `AbstractStep`."""
        return stored.reshape(shape)

    def stored(self, array: np.ndarray) -> np.ndarray:
        """See `AbstractStep`."""
        return array.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Kernel(AbstractStep):
    """A matrix, stored `[outputs, inputs]`: transposed here, and its heads on an axis of their own.

    `num_inputs` axes of the array are its inputs: 1 for `[embed heads head_dim]`, 2 for
    `[heads head_dim embed]`. `num_stacked` axes before them stay where they are: 1 for matrices
    `[experts embed mlp]` in one tensor `[experts, mlp, embed]`.

    >>> stored = np.arange(12).reshape(4, 3)  # two heads of two features, of three inputs
    >>> pretrained.Kernel().view(stored, (3, 2, 2))[0]
    array([[0, 3],
           [6, 9]])
    """

    num_inputs: int = 1
    num_stacked: int = 0

    def stored_shape(self, shape: Shape) -> Shape:
        """See `AbstractStep`."""
        stack, inputs, outputs = self._split(shape)
        return (*stack, math.prod(outputs), math.prod(inputs))

    def view(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """See `AbstractStep`."""
        stack, inputs, outputs = self._split(shape)
        split = stored.reshape(*stack, *outputs, *inputs)
        return np.moveaxis(split, *self._output_axes(shape)[::-1])

    def stored(self, array: np.ndarray) -> np.ndarray:
        """See `AbstractStep`."""
        moved = np.moveaxis(array, *self._output_axes(array.shape))
        return moved.reshape(self.stored_shape(array.shape))

    def _split(self, shape: Shape) -> tuple[Shape, Shape, Shape]:
        """The axes that are stacked, of inputs, and of outputs."""
        start = self.num_stacked
        stop = start + self.num_inputs
        return shape[:start], shape[start:stop], shape[stop:]

    def _output_axes(self, shape: Shape) -> tuple[range, range]:
        """Where the axes of outputs are in the array, and where in the tensor."""
        start = self.num_stacked + self.num_inputs
        return range(start, len(shape)), range(self.num_stacked, len(shape) - self.num_inputs)


@dataclasses.dataclass(frozen=True)
class Convolution(AbstractStep):
    """The kernel of a convolution of single features, stored `[features, 1, width]`.

    >>> pretrained.Convolution().stored_shape((4, 3, 2))  # `[width heads head_dim]`
    (6, 1, 4)
    """

    def stored_shape(self, shape: Shape) -> Shape:
        """See `AbstractStep`."""
        return (math.prod(shape[1:]), 1, shape[0])

    def view(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """See `AbstractStep`."""
        return np.moveaxis(stored.reshape(*shape[1:], shape[0]), -1, 0)

    def stored(self, array: np.ndarray) -> np.ndarray:
        """See `AbstractStep`."""
        return np.moveaxis(array, 0, -1).reshape(self.stored_shape(array.shape))


@dataclasses.dataclass(frozen=True)
class Part(AbstractStep):
    """One of several arrays of a module that share a tensor, along one of whose axes they follow.

    >>> gate = pretrained.Part(1, groups="query_kernel")  # of each head: its query, then its gate
    >>> gate.stored_shape((6, 4, 2))  # by itself
    (8, 6)

    **Fields:**

    - `order`: which of them the array is, from 0.
    - `step`: how it lies by itself.
    - `groups`: they follow within each head in turn, of as many heads as the array of this name in
        the module has; `None` if each of them is whole.
    - `axis`: of the tensor, along which they follow: 0, or 1 behind an axis of experts.
    """

    order: int
    step: AbstractStep = Kernel()
    groups: str | None = None
    axis: int = 0

    def stored_shape(self, shape: Shape) -> Shape:
        """Of this array's part."""
        return self.step.stored_shape(shape)

    def view(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """From this array's part."""
        return self.step.view(stored, shape)

    def stored(self, array: np.ndarray) -> np.ndarray:
        """This array's part."""
        return self.step.stored(array)
