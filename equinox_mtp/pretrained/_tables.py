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

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .._decoder import AbstractCachedDecoderLayer
from ..nn import TransformerDecoder
from ._steps import AbstractStep, Same

_AS_STORED = Same()


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A stored tensor's name, and how it lies.

    With `{expert}` in it there is one for each entry of the array's first axis. `other` is how it
    lies in those folders that have a tensor of the other name.

    >>> pretrained.Tensor("mlp.up_proj.weight", pretrained.Kernel()).name
    'mlp.up_proj.weight'
    """

    name: str
    step: AbstractStep = _AS_STORED
    other: "Tensor | None" = None


Table = Mapping[str, Tensor]
"""From the dotted name of an array, in its decoder, layer or depth, to a tensor."""

_MODEL = "model."
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
    - `layers_config`: `layers_config(layers, num_depths)` gives the keys of the configuration that
        describe the depths' layers; `None` if there are none.
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
    layers_config: Callable[[Any, int], dict[str, Any]] | None = None
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
    - `text_prefix`: what tensors' names may begin with in place of `model.`: where the text model
        is one part of several.
    - `other_parts`: what the names of the other parts begin with. They are not read, and are copied
        into a folder that is written like theirs.
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
    text_prefix: str | None = None
    other_parts: tuple[str, ...] = ()

    def layer_table(self, layer: Any) -> Table:
        """The arrays of one layer."""
        of_kind = {} if self.layer_of_kind is None else self.layer_of_kind(layer)
        return {**self.layer, **of_kind}

    def named_as(self, names: Collection[str]) -> "Family":
        """With `text_prefix` in the names of tensors, if it is in those that there are."""
        prefix = self.text_prefix
        if prefix is None or not any(name.startswith(prefix) for name in names):
            return self

        def moved(name: str) -> str:
            return prefix + name.removeprefix(_MODEL) if name.startswith(_MODEL) else name

        decoder = {
            leaf: dataclasses.replace(x, name=moved(x.name)) for leaf, x in self.decoder.items()
        }
        return dataclasses.replace(self, decoder=decoder, layer_prefix=moved(self.layer_prefix))

    def __repr__(self) -> str:
        # Without the tables: families are default values of arguments.
        return f"Family({self.name!r})"
