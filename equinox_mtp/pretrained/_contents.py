"""What is to be written of a model in each layout: its tensors, and its `config.json`."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .._config import MTPConfig
from .._layer import MultiTokenPredictionLayer
from .._model import MTPModel
from ..nn import GroupedQueryAttention, TransformerDecoder
from ._comparison import difference, layers_of
from ._config_file import config_of, hints_of, merged_config, with_compute_dtype, without
from ._dense import LLAMA, QWEN2, QWEN3
from ._fitting import fit_depths, with_biases
from ._folder import CONFIG_FILE, CheckpointFolder
from ._moe import QWEN3_MOE, has_experts
from ._places import Layout
from ._registry import family_of
from ._settings import HINTS, Settings
from ._shapes import decoder_shapes, depth_shapes
from ._speculators import head_config, head_table
from ._tables import Family, MTPTable
from ._transformers import COUNT_KEY, transformers_table
from ._write import StoredTensor, stored_tensors

_KINDS = {True: "full_attention", False: "sliding_attention"}
_DEPTH_PARTS = (
    *("embedding_norm", "hidden_state_norm", "projection_layer", "transformer_layer"),
    "output_norm",
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is to be written: tensors and `config.json`, and the modules that they are of."""

    family: Family
    tensors: list[StoredTensor]
    config: dict[str, Any]
    decoder: TransformerDecoder
    layers: MultiTokenPredictionLayer | None = None

    def check(self, layout: str, linked: Sequence[str]) -> None:
        """**Raises:** `ValueError` if readers would build another model of these.

        `linked` are the tensors that lie in the folder beside those to be written.
        """
        described = self.config.get("transformer_layer_config", self.config)
        settings = Settings(described, Path(CONFIG_FILE))
        names = [*linked, *(tensor.name for tensor in self.tensors)]
        wanted = decoder_shapes(settings, self.family, names, None)
        numbers = self.decoder.num_layers, wanted.num_layers
        found = [
            None if numbers[0] == numbers[1] else f"It has {numbers[0]} layers, not {numbers[1]}"
        ]
        found += [
            difference(getattr(self.decoder, part), getattr(wanted, part))
            for part in ("embedding", "head", "norm")
        ]
        ours, theirs = layers_of(self.decoder), layers_of(wanted)
        found += [difference(*layers) for layers in zip(ours, theirs, strict=False)]
        if self.layers is not None:
            depths = self.layers.embedding_norm.scale.shape[0]
            config = MTPConfig(depths, output_norm="own")
            described_layers = depth_shapes(settings, self.family, names, config)
            found += [
                difference(getattr(self.layers, part), getattr(described_layers, part))
                for part in _DEPTH_PARTS
            ]
        for what in found:
            if what is not None:
                raise ValueError(
                    f"`layout` {layout!r} cannot hold `model`: its readers would build another "
                    f"one. {what}."
                )


def contents_of(
    layout: str, model: MTPModel, origin: CheckpointFolder | None, families: Sequence[Family]
) -> Contents:
    """A model in a layout; `"source"` is that of `origin`.

    **Raises:** `ValueError` for what the layout cannot say.
    """
    if layout == "source":
        assert origin is not None
        contents = _like(model, origin, families)
    elif layout == "speculators":
        contents = _head(model, origin)
    elif layout in ("transformers", "stitched"):
        contents = _with_transformers_depths(layout, model, origin)
    else:
        family = next(family for family in families if family.name == layout)
        contents = _family(family, model, origin)
    # The folder of a head says nothing of how its model computes.
    followed = contents.config
    if layout == "speculators" and origin is not None:
        followed = origin.config
    config = with_compute_dtype(contents.config, contents.decoder.dtype, followed)
    return dataclasses.replace(contents, config=config)


def _decoder_tensors(layout: Layout, decoder: TransformerDecoder) -> list[StoredTensor]:
    return stored_tensors(decoder, layout.decoder_places(decoder))


def _depth_tensors(layout: Layout, layers: Any, num_layers: int) -> list[StoredTensor]:
    return stored_tensors(layers, layout.block_places(layers, num_layers))


def _family(
    family: Family,
    model: MTPModel,
    origin: CheckpointFolder | None,
    like: CheckpointFolder | None = None,
) -> Contents:
    """A family's own layout; without a place for depths they must be none.

    `like` is a folder whose tensors tell how those lie that may lie in two ways, and which copies
    of embedding and head are written.
    """
    if family.needs_biases:
        model = with_biases(model)
    decoder, config = model.decoder, model.block.config
    assert isinstance(decoder, TransformerDecoder)
    layout = Layout(family, family.mtp, () if like is None else like)
    tensors = _decoder_tensors(layout, decoder)
    written = config_of(family, decoder, origin)
    if family.mtp is None:
        if config.num_depths:
            raise ValueError(
                f"`layout` {family.name!r} has no place for prediction depths, and `model` has "
                f"{config.num_depths}. Take 'transformers', 'stitched', or 'speculators' for the "
                "depths alone; or load the model with `num_depths=0`."
            )
        return Contents(family, tensors, written, decoder)
    mtp, repeats = family.mtp, config.repeated_layer
    if not config.num_depths:
        written[mtp.count_key] = 0
        return Contents(family, tensors, written, decoder)
    may_repeat = repeats or mtp.is_single
    block = fit_depths(model, mtp, family.name, any_input=mtp.any_input, may_repeat=may_repeat)
    num_depths = 1 if repeats else config.num_depths
    copies = _copies(tensors, family, mtp, num_depths, decoder.num_layers)
    tensors += _depth_tensors(layout, block.layers, decoder.num_layers)
    tensors += [copy for copy in copies if like is None or copy.name in like]
    if mtp.layers_config is not None:
        written |= mtp.layers_config(block.layers, num_depths)
    if not mtp.is_implied or (origin is not None and mtp.count_key in origin.config):
        written[mtp.count_key] = num_depths
    hints = hints_of(mtp, config)
    written |= {HINTS: hints} if hints else {}
    return Contents(family, tensors, written, decoder, block.layers)


def _copies(
    tensors: Sequence[StoredTensor], family: Family, mtp: MTPTable, num_depths: int, num_layers: int
) -> list[StoredTensor]:
    """Embedding and head among a decoder's tensors once more, where a depth's readers look."""
    named = {tensor.name: tensor for tensor in tensors}
    embedding, head = (family.decoder[part].name for part in ("embedding", "head"))
    named.setdefault(head, named[embedding])  # if it is tied
    return [
        named[family.decoder[part].name]._replace(
            name=mtp.prefix.format(depth=k, layer=num_layers + k) + name
        )
        for k in range(num_depths)
        for name, part in mtp.copies.items()
    ]


def _like(model: MTPModel, origin: CheckpointFolder, families: Sequence[Family]) -> Contents:
    """As it came from a folder: with its configuration, whatever is in it."""
    settings = Settings(origin.config, origin.path / CONFIG_FILE)
    family = family_of(settings, families, origin)
    if family.mtp is None and model.block.config.num_depths and settings.get(COUNT_KEY):
        return _with_transformers_depths("transformers", model, origin)
    contents = _family(family, model, origin, like=origin)
    tensors = [*contents.tensors, *_other_parts(family, origin)]
    depths, described = contents.layers, None if family.mtp is None else family.mtp.layers_config
    keys = () if depths is None or described is None else tuple(described(depths, 0))
    config = merged_config(origin.config, contents.config, keys)
    return dataclasses.replace(contents, tensors=tensors, config=config)


def _other_parts(family: Family, origin: CheckpointFolder) -> list[StoredTensor]:
    """The tensors of a folder that are no part of the text model; dequantized, as all others."""

    def stored(name: str) -> StoredTensor:
        info = origin.info(name)
        dtype = np.dtype(np.float32) if origin.is_quantized(name) else info.dtype
        return StoredTensor(name, dtype, info.shape, partial(origin.view, name))

    names = [name for name in origin if name.startswith(family.other_parts)]
    return [stored(name) for name in names if not origin.is_scale(name)]


def _head(model: MTPModel, origin: CheckpointFolder | None) -> Contents:
    """The depths alone, for the format of speculators."""
    decoder = model.decoder
    assert isinstance(decoder, TransformerDecoder)
    family, mtp = _plain_family("speculators", decoder), head_table()
    block = fit_depths(model, mtp, "speculators", any_input=False, may_repeat=True)
    written = config_of(family, decoder, origin)
    name = "." if origin is None else str(origin.path.resolve())
    config = head_config(written, name, model.block.config.num_depths)
    described = Layout(family, mtp, called="speculators")
    tensors = _depth_tensors(described, block.layers, decoder.num_layers)
    return Contents(family, tensors, config, decoder, block.layers)


def _with_transformers_depths(
    layout: str, model: MTPModel, origin: CheckpointFolder | None
) -> Contents:
    decoder, num_depths = model.decoder, model.block.config.num_depths
    assert isinstance(decoder, TransformerDecoder)
    family = _plain_family(layout, decoder)
    mtp = transformers_table(num_depths)
    if family.needs_biases:
        model = with_biases(model)
        decoder = model.decoder
        assert isinstance(decoder, TransformerDecoder)
    block = fit_depths(model, mtp, layout, any_input=False, may_repeat=False)
    described = Layout(family, mtp, called=layout)
    depths = _depth_tensors(described, block.layers, decoder.num_layers)
    if layout == "stitched":
        if origin is None:
            raise ValueError(
                "`source` must be given for `layout='stitched'`: the folder of the main model, "
                "whose files are linked."
            )
        tensors, config = depths, without(origin.config, HINTS)
    else:
        tensors = _decoder_tensors(described, decoder) + depths
        config = config_of(family, decoder, origin)
    config[COUNT_KEY] = num_depths
    # transformers gives Qwen's configurations `layer_types`, and then wants the depths' too.
    if family is not LLAMA or "layer_types" in config:
        attention = getattr(getattr(block.layers, "transformer_layer", None), "attention", None)
        window = getattr(attention, "window", None)
        config["mtp_layer_types"] = [_KINDS[window is None]] * num_depths
        if window is not None and config.get("sliding_window") is None:
            config["sliding_window"] = window
    return Contents(family, tensors, config, decoder, block.layers)


def _plain_family(layout: str, decoder: TransformerDecoder) -> Family:
    """The family of layers like these.

    **Raises:** `ValueError` if they are of another kind than layouts without a family have.
    """
    attention = getattr(decoder.layer(0), "attention", None)
    if not isinstance(attention, GroupedQueryAttention):
        raise ValueError(
            f"`layout` {layout!r} is for models of grouped-query attention alone; `model` has a "
            f"{type(attention).__name__}. Take the layout of its family, or the folder it came "
            "from."
        )
    if layout != "speculators" and has_experts(decoder):
        return QWEN3_MOE
    if attention.query_norm is not None:
        return QWEN3
    is_llama = attention.query_bias is None or attention.out_bias is not None
    return LLAMA if is_llama else QWEN2
