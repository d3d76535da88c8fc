"""From an `MTPModel` to a folder that others read."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._block import MultiTokenPredictionBlock
from .._checks import check_integer
from .._config import MTPConfig
from .._model import MTPModel
from .._types import checked
from ..nn import GroupedQueryAttention, TransformerDecoder
from ._dense import LLAMA, QWEN2, QWEN3
from ._fitting import fit_depths, with_biases
from ._folder import CONFIG_FILE, CheckpointFolder
from ._load import HINTS
from ._places import Layout
from ._registry import FAMILIES, family_of
from ._settings import Settings
from ._speculators import head_config, head_table
from ._tables import Family, MTPTable
from ._tokenizer import TOKENIZER_FILES
from ._transformers import COUNT_KEY, transformers_table
from ._write import (
    StoredTensor,
    new_folder,
    stored_tensors,
    write_file,
    write_index,
    write_json,
    write_tensors,
)

_ALIASES = {"llama3": "llama"}
_OTHER_LAYOUTS = ("transformers", "speculators", "stitched")
_MTP_FILE = "mtp.safetensors"


@checked
def save(
    folder: str | Path,
    model: MTPModel,
    *,
    layout: str | Path | None = None,
    source: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    families: Sequence[Family] = FAMILIES,
) -> None:
    """Writes a model into a new folder, in a layout that other engines read.

    | layout | what is written | read by |
    |---|---|---|
    | a folder, or `None` with `source` | as it came from there | what read that |
    | `"llama"`, `"qwen2"`, `"qwen3"` | the main model | transformers, vLLM, SGLang |
    | `"mimo"` | main model and depths | vLLM, SGLang |
    | `"transformers"` | main model and depths (`num_mtp_layers`) | transformers |
    | `"speculators"` | one depth alone | speculators, vLLM |
    | `"stitched"` | the depths as `mtp.*` beside links to the files of `source` | transformers |

        pretrained.save("out", model, layout="mimo", source="Qwen2-7B")

    >>> pretrained.save("out", main_model, layout="llama")
    >>> sorted(path.name for path in Path("out").iterdir())
    ['config.json', 'model.safetensors']

    The folder gets its name when all is in it. What a layout says in another way is rewritten
    exactly: the halves of the projection change places, a shared norm is copied, biases of 0 are
    added.

    **Arguments:**

    - `folder`: a name that is free, in a folder that exists.
    - `model`: with a `TransformerDecoder`.
    - `layout`: one of the above.
    - `source`: the folder that the model came from. Its tokenizer is copied, and of its
        `config.json` whatever this library does not know of, such as `eos_token_id`.
    - `max_shard_bytes`: files are at most of this size, or hold a single tensor.
    - `families`: the architectures that are known, as in `load`.

    **Raises:** `ValueError`, before anything is written, for a model that the layout cannot hold;
    `FileExistsError` if `folder` is not free; `OSError` if it cannot be written.
    """
    max_bytes = check_integer("max_shard_bytes", max_shard_bytes, at_least=1)
    if not isinstance(model.decoder, TransformerDecoder):
        raise ValueError(
            "`model` must have a `nn.TransformerDecoder` to be written in a released layout; got a "
            f"{type(model.decoder).__name__}. `equinox_mtp.save` writes any model."
        )
    named = {family.name: family for family in families}
    layout = _ALIASES.get(str(layout), layout)
    if layout not in (*_OTHER_LAYOUTS, *named):
        if layout is not None and not Path(layout).is_dir():
            known = ", ".join(map(repr, (*named, *_OTHER_LAYOUTS)))
            raise ValueError(f"`layout` must be {known}, or a folder; got {str(layout)!r:.80}.")
        source = layout if layout is not None else source
        if source is None:
            raise ValueError(
                "`layout` must be given, or `source`, the folder whose layout is to be taken."
            )
        layout = "source"
    origin = None if source is None else CheckpointFolder(Path(source))
    contents = _contents(str(layout), model, origin, families)
    with new_folder(Path(folder)) as temporary:
        if layout == "stitched":
            assert origin is not None
            _link_files(temporary, origin, contents)
        else:
            write_tensors(temporary, contents.tensors, max_bytes)
        write_json(temporary / CONFIG_FILE, contents.config)
        if origin is not None:
            for name in TOKENIZER_FILES:
                if (origin.path / name).is_file():
                    shutil.copyfile(origin.path / name, temporary / name)


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What is to be written."""

    tensors: list[StoredTensor]
    config: dict[str, Any]


def _contents(
    layout: str, model: MTPModel, origin: CheckpointFolder | None, families: Sequence[Family]
) -> _Contents:
    if layout == "source":
        assert origin is not None
        return _like(model, origin, families)
    if layout == "speculators":
        return _head(model, origin)
    if layout in ("transformers", "stitched"):
        return _with_transformers_depths(layout, model, origin)
    family = next(family for family in families if family.name == layout)
    return _family(family, model, origin)


def _decoder_tensors(family: Family, model: MTPModel) -> list[StoredTensor]:
    decoder = model.decoder
    assert isinstance(decoder, TransformerDecoder)
    return stored_tensors(decoder, Layout(family, None).decoder_places(decoder))


def _depth_tensors(
    family: Family, mtp: MTPTable, block: MultiTokenPredictionBlock, num_layers: int
) -> list[StoredTensor]:
    return stored_tensors(block.layers, Layout(family, mtp).block_places(block.layers, num_layers))


def _family(family: Family, model: MTPModel, origin: CheckpointFolder | None) -> _Contents:
    """A family's own layout; without a place for depths they must be none."""
    if family.needs_biases:
        model = with_biases(model)
    decoder, config = model.decoder, model.block.config
    assert isinstance(decoder, TransformerDecoder)
    tensors = _decoder_tensors(family, model)
    written = _config(family, decoder, origin)
    if family.mtp is None:
        if config.num_depths:
            raise ValueError(
                f"`layout` {family.name!r} has no place for prediction depths, and `model` has "
                f"{config.num_depths}. Take 'transformers', 'stitched', or 'speculators' for the "
                "depths alone; or load the model with `num_depths=0`."
            )
        return _Contents(tensors, written)
    repeats = config.repeated_layer
    block = fit_depths(model, family.mtp, family.name, any_input=True, may_repeat=repeats)
    tensors += _depth_tensors(family, family.mtp, block, decoder.num_layers)
    written[family.mtp.count_key] = 1 if repeats else config.num_depths
    hints = _hints(family.mtp, config)
    return _Contents(tensors, {**written, **({HINTS: hints} if hints else {})})


def _hints(mtp: MTPTable, config: MTPConfig) -> dict[str, Any]:
    """What a layout does not tell of the conventions, for `load`."""
    kept = {name: getattr(config, name) for name in ("input_hidden_state", "carried_hidden_state")}
    hints = {name: value for name, value in kept.items() if mtp.config.get(name) != value}
    if config.repeated_layer:
        hints |= {"repeated_layer": True, "num_depths": config.num_depths}
    return hints


def _like(model: MTPModel, origin: CheckpointFolder, families: Sequence[Family]) -> _Contents:
    """As it came from a folder: with its configuration, whatever is in it."""
    settings = Settings(origin.config, origin.path / CONFIG_FILE)
    family = family_of(settings, families)
    if family.mtp is None and model.block.config.num_depths and settings.get(COUNT_KEY):
        return _with_transformers_depths("transformers", model, origin)
    contents = _family(family, model, origin)
    config = dict(origin.config)
    for name in ("quantization_config", "compression_config"):
        config.pop(name, None)
    extra = {HINTS: contents.config[HINTS]} if HINTS in contents.config else {}
    return _Contents(contents.tensors, {**config, **extra})


def _head(model: MTPModel, origin: CheckpointFolder | None) -> _Contents:
    """The depths alone, for the format of speculators."""
    decoder = model.decoder
    assert isinstance(decoder, TransformerDecoder)
    family, mtp = _dense_family(decoder), head_table()
    block = fit_depths(model, mtp, "speculators", any_input=False, may_repeat=True)
    written = _config(family, decoder, origin)
    name = "." if origin is None else str(origin.path)
    config = head_config(written, name, model.block.config.num_depths)
    return _Contents(_depth_tensors(family, mtp, block, decoder.num_layers), config)


def _with_transformers_depths(
    layout: str, model: MTPModel, origin: CheckpointFolder | None
) -> _Contents:
    decoder, num_depths = model.decoder, model.block.config.num_depths
    assert isinstance(decoder, TransformerDecoder)
    family, mtp = _dense_family(decoder), transformers_table(num_depths)
    if family.needs_biases:
        model = with_biases(model)
    block = fit_depths(model, mtp, layout, any_input=False, may_repeat=False)
    depths = _depth_tensors(family, mtp, block, decoder.num_layers)
    if layout == "stitched":
        if origin is None:
            raise ValueError(
                "`source` must be given for `layout='stitched'`: the folder of the main model, "
                "whose files are linked."
            )
        tensors, config = depths, dict(origin.config)
    else:
        tensors = _decoder_tensors(family, model) + depths
        config = _config(family, decoder, origin)
    config[COUNT_KEY] = num_depths
    # transformers gives Qwen's configurations `layer_types`, and then wants the depths' too.
    if family is not LLAMA or "layer_types" in config:
        config["mtp_layer_types"] = ["full_attention"] * num_depths
    return _Contents(tensors, config)


def _dense_family(decoder: TransformerDecoder) -> Family:
    """The family of layers like these."""
    attention = getattr(decoder.layer(0), "attention", None)
    if isinstance(attention, GroupedQueryAttention):
        if attention.query_norm is not None:
            return QWEN3
        return LLAMA if attention.query_bias is None else QWEN2
    raise ValueError(
        "`model` must have layers of grouped-query attention for this layout; got "
        f"{type(attention).__name__}."
    )


def _config(
    family: Family, decoder: TransformerDecoder, origin: CheckpointFolder | None
) -> dict[str, Any]:
    """A decoder's `config.json`; of another folder's what is not known here."""
    stored = dict(origin.config) if origin is not None else {}
    kept = {
        name: value
        for name, value in stored.items()
        if name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    }
    return {
        "architectures": [family.architectures[0]],
        "model_type": family.name,
        "max_position_embeddings": 4096,
        **family.config_of(decoder),
        "torch_dtype": str(decoder.embedding.dtype),
        **kept,
    }


def _link_files(temporary: Path, origin: CheckpointFolder, contents: _Contents) -> None:
    """Links to the source's tensor files (copies on other disks), and one file more."""
    files = {name: origin.where_file(name) for name in origin}
    # Readers take a file of this name for the whole model, and look for no index.
    renamed = {"model.safetensors": "model-00001-of-00002.safetensors"}
    for file in sorted(set(files.values())):
        target = temporary / renamed.get(file, file)
        try:
            os.link((origin.path / file).resolve(), target)
        except OSError:
            shutil.copyfile(origin.path / file, target)
    write_file(temporary / _MTP_FILE, contents.tensors)
    taken = {tensor.name for tensor in contents.tensors} & set(files)
    if taken or _MTP_FILE in set(files.values()):
        raise ValueError(
            f"{origin.path}: it has depths already, such as `{sorted(taken or [_MTP_FILE])[0]}`. "
            "Take the folder of the main model alone."
        )
    files = {name: renamed.get(file, file) for name, file in files.items()}
    files |= {tensor.name: _MTP_FILE for tensor in contents.tensors}
    size = sum(origin.info(name).stop - origin.info(name).start for name in origin)
    write_index(temporary, files, size + sum(tensor.num_bytes for tensor in contents.tensors))
