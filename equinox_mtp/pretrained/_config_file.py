"""The `config.json` of what is written: of a family, of a folder that it is like, and notes."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from .._config import MTPConfig
from ..nn import TransformerDecoder
from ._folder import CONFIG_FILE, CheckpointFolder
from ._settings import COMPUTE_DTYPE, HINTS, Settings
from ._tables import Family, MTPTable
from ._transformers import COUNT_KEY

_QUANTIZED = ("quantization_config", "compression_config")


def config_of(
    family: Family, decoder: TransformerDecoder, origin: CheckpointFolder | None
) -> dict[str, Any]:
    """A decoder's `config.json`; of another folder's what is not known here."""
    stored = {} if origin is None else Settings(origin.config, origin.path).config
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


_COUNTED = (
    *("tie_word_embeddings", "num_nextn_predict_layers", "mtp_num_hidden_layers", COUNT_KEY),
    HINTS,
)


def merged_config(
    stored: dict[str, Any], written: dict[str, Any], of_depths: Collection[str]
) -> dict[str, Any]:
    """A folder's configuration, where it still says what the model is.

    `of_depths` are the keys that describe the depths' layers.
    """
    config = without(stored, *_QUANTIZED, HINTS)
    nested = config.get("text_config")
    target = without(nested, HINTS) if isinstance(nested, dict) else config
    said = {**config, **target}
    for name in (*_COUNTED, *of_depths):
        if name in written and written[name] != said.get(name, False if "tie" in name else 0):
            target[name] = written[name]
            if name in config:
                config[name] = written[name]
    for name in ("dtype", "torch_dtype"):
        for part in (config, target):
            if name in part:
                part[name] = written["torch_dtype"]
    return {**config, "text_config": target} if target is not config else config


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: x for name, x in config.items() if name not in names}


def hints_of(mtp: MTPTable, config: MTPConfig) -> dict[str, Any]:
    """What a layout does not tell of the conventions, for `load`."""
    kept = {name: getattr(config, name) for name in ("input_hidden_state", "carried_hidden_state")}
    hints = {name: value for name, value in kept.items() if mtp.config.get(name) != value}
    if config.repeated_layer:
        hints |= {"repeated_layer": True, "num_depths": config.num_depths}
    return hints


def with_compute_dtype(
    config: dict[str, Any], compute_dtype: str, followed: dict[str, Any]
) -> dict[str, Any]:
    """A configuration that notes the compute dtype, if `load` would choose another one.

    `followed` is the configuration that `load` follows without a note.
    """
    if Settings(followed, Path(CONFIG_FILE)).compute_dtype == compute_dtype:
        return config
    nested = config.get("text_config")
    target = nested if isinstance(nested, dict) else config
    noted = {**target, HINTS: {**target.get(HINTS, {}), COMPUTE_DTYPE: compute_dtype}}
    return noted if target is config else {**config, "text_config": noted}
