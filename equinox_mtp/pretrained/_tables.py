"""A family of checkpoints as data: which tensor is which array of the tree, and how it is laid out.

A family is one file with one `Family` in it; nothing else changes. For instance, a layer whose
feed-forward network has experts, which are stored one by one (`_moe.py` has such families):

    LAYER = {
        **llama.layer,
        "feed_forward.router.kernel": Tensor("mlp.gate.weight", Kernel()),
        "feed_forward.experts.up": Tensor("mlp.experts.{expert}.up_proj.weight", Kernel()),
    }
    FAMILY = Family(
        name="my_moe",
        architectures=("MyMoeForCausalLM",),
        make_layer=make_layer,  # of the configuration: a `TransformerDecoderLayer.of` its parts
        config_of=config_of,  # the inverse, for writing
        layer=LAYER,
    )
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from .._decoder import AbstractCachedDecoderLayer
from ..nn import TransformerDecoder

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
    `[heads head_dim embed]`.

    >>> stored = np.arange(12).reshape(4, 3)  # two heads of two features, of three inputs
    >>> pretrained.Kernel().view(stored, (3, 2, 2))[0]
    array([[0, 3],
           [6, 9]])
    """

    num_inputs: int = 1

    def stored_shape(self, shape: Shape) -> Shape:
        """See `AbstractStep`."""
        return (math.prod(shape[self.num_inputs :]), math.prod(shape[: self.num_inputs]))

    def view(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """See `AbstractStep`."""
        inputs, outputs = shape[: self.num_inputs], shape[self.num_inputs :]
        split = stored.reshape(*outputs, *inputs)
        return np.moveaxis(split, range(len(outputs)), range(len(inputs), len(shape)))

    def stored(self, array: np.ndarray) -> np.ndarray:
        """See `AbstractStep`."""
        outputs = range(self.num_inputs, array.ndim)
        moved = np.moveaxis(array, outputs, range(array.ndim - self.num_inputs))
        return moved.reshape(self.stored_shape(array.shape))


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
    """One of several arrays of a module that share a tensor, along whose first axis they follow.

    >>> gate = pretrained.Part(1, groups="query_kernel")  # of each head: its query, then its gate
    >>> gate.stored_shape((6, 4, 2))  # by itself
    (8, 6)

    **Fields:**

    - `order`: which of them the array is, from 0.
    - `step`: how it lies by itself.
    - `groups`: they follow within each head in turn, of as many heads as the array of this name in
        the module has; `None` if each of them is whole.
    """

    order: int
    step: AbstractStep = Kernel()
    groups: str | None = None

    def stored_shape(self, shape: Shape) -> Shape:
        """Of this array's part."""
        return self.step.stored_shape(shape)

    def view(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """From this array's part."""
        return self.step.view(stored, shape)

    def stored(self, array: np.ndarray) -> np.ndarray:
        """This array's part."""
        return self.step.stored(array)


class Tensor(NamedTuple):
    """A stored tensor's name, and how it lies.

    With `{expert}` in it there is one for each entry of the array's first axis.

    >>> pretrained.Tensor("mlp.up_proj.weight", pretrained.Kernel()).name
    'mlp.up_proj.weight'
    """

    name: str
    step: AbstractStep = Same()


Table = Mapping[str, Tensor]
"""From the dotted name of an array, in its decoder, layer or depth, to a tensor."""

DECODER: Table = {
    "embedding": Tensor("model.embed_tokens.weight"),
    "norm.scale": Tensor("model.norm.weight"),
    "head": Tensor("lm_head.weight"),
}


@dataclasses.dataclass(frozen=True)
class MTPTable:
    """Where the layers of the prediction depths are, and by which conventions they were trained.

    >>> mimo = next(family for family in pretrained.FAMILIES if family.name == "mimo")
    >>> mimo.mtp.prefix
    'model.mtp_layers.{depth}.'

    **Fields:**

    - `prefix`: of a depth's tensors, with `{depth}`, from 0, or `{layer}`, which counts on from the
        main model's layers.
    - `table`: arrays of `MultiTokenPredictionLayer` but for its transformer layer, whose names are
        those of the family's layers.
    - `layer_prefix`: of the transformer layer's tensors, behind `prefix`.
    - `config`: fields of `MTPConfig`.
    - `copies`: tensors that each depth may hold once more, from their names behind `prefix` to the
        arrays of the decoder, `"embedding"` or `"head"`. They are read if they are the same, and
        written.
    - `count_key`: of the configuration: how many depths there are; 0 without it.
    - `any_input`: whether readers differ in the main hidden state that enters depth 1.
    - `is_implied`: whether there is one without it, if there are tensors of it.
    """

    prefix: str
    table: Table
    config: Mapping[str, Any]
    count_key: str = "num_nextn_predict_layers"
    layer_prefix: str = ""
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    any_input: bool = True
    is_implied: bool = False

    @property
    def is_single(self) -> bool:
        """Whether there is a place for one depth alone."""
        return "{" not in self.prefix


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of released checkpoints.

    >>> llama = next(family for family in pretrained.FAMILIES if family.name == "llama")
    >>> llama.layer["attention.query_kernel"].name
    'self_attn.q_proj.weight'

    **Fields:**

    - `name`: as `layout=` of `save` takes it.
    - `architectures`: the names that `config.json` may have for it.
    - `make_layer`: `make_layer(settings, index, names, key=key)` builds the layer of an index, of
        parts; `names` are the tensors there are, which tell of optional ones.
    - `config_of`: the keys of `config.json` that describe a decoder: the inverse.
    - `layer`: the arrays of a layer, by their tensors' names behind `layer_prefix`.
    - `layer_of_kind`: a function of a layer that gives those of its arrays that have other tensors
        than `layer` says, where layers are of several kinds; `None` if they are of one.
    - `decoder`, `layer_prefix`: the arrays outside of layers; `{layer}` counts from 0.
    - `mtp`: the prediction depths; `None` if the family has none.
    - `needs_biases`: whether attention has biases, of 0 if a model has none.
    - `scale_offset`: of all norms, but those inside of a `nn.GatedDeltaNet`; see `nn.RMSNorm`.
    - `ignored`: the last parts of names that hold no parameter.
    """

    name: str
    architectures: tuple[str, ...]
    make_layer: Callable[..., AbstractCachedDecoderLayer]
    config_of: Callable[[TransformerDecoder], dict[str, Any]]
    layer: Table
    layer_of_kind: Callable[[Any], Table] | None = None
    decoder: Table = dataclasses.field(default_factory=lambda: DECODER)
    layer_prefix: str = "model.layers.{layer}."
    mtp: MTPTable | None = None
    needs_biases: bool = False
    scale_offset: float = 0.0
    ignored: Collection[str] = ("rotary_emb.inv_freq",)

    def layer_table(self, layer: Any) -> Table:
        """The arrays of one layer."""
        of_kind = {} if self.layer_of_kind is None else self.layer_of_kind(layer)
        return {**self.layer, **of_kind}

    def __repr__(self) -> str:
        # Without the tables: families are default values of arguments.
        return f"Family({self.name!r})"
