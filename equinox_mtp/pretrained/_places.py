"""Where each array of a model stands in a checkpoint: the walk that reading and writing share."""

import dataclasses
import itertools
from collections.abc import Collection
from typing import Any

import jax

from .._config import MTPConfig
from .._types import dotted_name, is_array_or_shape
from ..nn import LayerRun, TransformerDecoder
from ._array_place import Place, with_rows
from ._steps import Shape
from ._tables import Family, MTPTable, Table, Tensor

_EXPERT = "{expert}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A family's tables, and with them the places of a model's arrays.

    **Fields:**

    - `family`: of the decoder, and of the depths' transformer layers.
    - `mtp`: the tables of the depths; `None` if only the decoder has places.
    - `names`: the tensors there are, which tell how those lie that may lie in two ways.
    - `called`: what messages call the layout, if not by the family's name.
    """

    family: Family
    mtp: MTPTable | None
    names: Collection[str] = ()
    called: str | None = None

    def decoder_places(self, decoder: TransformerDecoder) -> list[Place]:
        """The places of a decoder's arrays, in the order of its leaves.

        **Raises:** `ValueError` for an array that the family has no tensor for.
        """
        runs = decoder.layers if isinstance(decoder.layers, tuple) else (decoder.layers,)
        lengths = [run.num_layers if isinstance(run, LayerRun) else 1 for run in runs]
        if not isinstance(decoder.layers, tuple):
            lengths = [decoder.num_layers]
        starts = [0, *itertools.accumulate(lengths)]
        layers_of = [run.layers if isinstance(run, LayerRun) else run for run in runs]
        tables = [self.family.layer_table(layer) for layer in layers_of]
        places = []
        for leaf, x in _leaves(decoder):
            first, *rest = leaf.split(".")
            if first != "layers":
                tensor = self._find(self.family.decoder, leaf, "", {})
                places.append(_place(leaf, tensor, x.shape, []))
                continue
            run, is_run = 0, True
            if isinstance(decoder.layers, tuple):
                run, rest = int(rest[0]), rest[1:]
                is_run = isinstance(decoder.layers[run], LayerRun)
                rest = rest[1:] if is_run else rest
            numbers = range(starts[run], starts[run] + lengths[run])
            layers = [{"layer": number} for number in numbers]
            prefix = self.family.layer_prefix
            tensor = self._find(tables[run], ".".join(rest), prefix, layers[0])
            place = _place(leaf, tensor, x.shape, layers)
            places.append(dataclasses.replace(place, names=place.names[0]) if not is_run else place)
        return with_rows(places)

    def block_places(self, layers: Any, num_layers: int) -> list[Place]:
        """The places of the arrays of a block's layers, behind `num_layers` of a decoder."""
        places = []
        for leaf, x in _leaves(layers):
            assert self.mtp is not None
            depths = [{"depth": k, "layer": num_layers + k} for k in range(x.shape[0])]
            part, _, rest = leaf.partition(".")
            if part == "transformer_layer":
                prefix = self.mtp.prefix + self.mtp.layer_prefix
                table = self.family.layer_table(layers.transformer_layer)
                tensor = self._find(table, rest, prefix, depths[0])
            else:
                tensor = self._find(self.mtp.table, leaf, self.mtp.prefix, depths[0])
            places.append(_place(leaf, tensor, x.shape, depths))
        return with_rows(places)

    def _find(self, table: Table, name: str, prefix: str, numbers: dict[str, int]) -> Tensor:
        """The tensor of an array, with its prefix; `numbers` are those of the first layer."""
        if name not in table:
            raise ValueError(
                f"`layout` {self.called or self.family.name!r} has no tensor for `{name}`. Take "
                "the layout of the folder that the model came from, or another one that has."
            )
        tensor = table[name]
        if tensor.other is not None:
            other = (prefix + tensor.other.name).format(**numbers, expert=0)
            tensor = tensor.other if other in self.names else tensor
        return dataclasses.replace(tensor, name=prefix + tensor.name)


def _place(leaf: str, tensor: Tensor, shape: Shape, numbers: list[dict[str, int]]) -> Place:
    """Numbers for the layers of a stack; empty outside of stacks."""
    shape = shape[1:] if numbers else shape
    name = tensor.name
    experts = range(shape[0]) if _EXPERT in name else None

    def names_of(values: dict[str, int]) -> Any:
        if experts is None:
            return name.format(**values)
        return [name.format(**values, expert=expert) for expert in experts]

    names = [names_of(values) for values in numbers] if numbers else names_of({})
    return Place(leaf, names, tensor.step, shape[1:] if experts else shape)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(dotted_name(path), x) for path, x in leaves if is_array_or_shape(x)]


def conventions(mtp: MTPTable, num_depths: int, **changes: Any) -> MTPConfig:
    """The `MTPConfig` of a family's depths."""
    return MTPConfig(num_depths, **{**mtp.config, **changes})
