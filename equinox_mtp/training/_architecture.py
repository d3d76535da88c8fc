"""A run's model from a `config.json`: read once, and kept with every checkpoint."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

import equinox_mtp as emtp
from equinox_mtp import pretrained

from ._config import TrainConfig

_FOLDER = Path(__file__).parent / "architectures"


def read_architecture(config: TrainConfig, text_vocab_size: int) -> str | None:
    """The configuration that `config.architecture` names, as JSON; `None` if it names none.

    One that says nothing of a vocabulary gets that of the text.

    **Raises:** `FileNotFoundError` if there is no such file; `ValueError` if no model can be made
    of it, or none for this text.
    """
    if config.architecture is None:
        return None
    path = _find(config.architecture)
    try:
        stored = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"`architecture`: {path} is no JSON object. Name a config.json.")
    architecture = json.dumps({"vocab_size": text_vocab_size, **stored}, sort_keys=True)
    try:
        model = architecture_shapes(architecture, config)
    except ValueError as error:
        raise ValueError(f"`architecture`: {path.parent}/{error}") from None
    assert model is not None
    assert isinstance(model.decoder, emtp.nn.TransformerDecoder)
    vocab_size = model.decoder.embedding.shape[0]
    if text_vocab_size > vocab_size:
        raise ValueError(
            f"`architecture`: {path} has {vocab_size} token ids (`vocab_size`), and the text "
            f"{text_vocab_size}. Leave the key out to take those of the text."
        )
    return architecture


def architecture_model(architecture: str, config: TrainConfig) -> emtp.MTPModel:
    """A fresh model of a configuration, with the depths that a run asks for."""
    described: dict[str, Any] = json.loads(architecture)
    return pretrained.from_config(
        described,
        num_depths=config.depths,
        preset=config.preset if config.depths else None,
        compute_dtype=config.dtype,
        key=jax.random.key(config.seed),
    )


def architecture_shapes(architecture: str | None, config: TrainConfig) -> emtp.MTPModel | None:
    """The same with shapes in place of arrays; `None` without a configuration."""
    if architecture is None:
        return None
    return eqx.filter_eval_shape(architecture_model, architecture, config)


def _find(path: Path) -> Path:
    """A file, the config.json of a folder, or one of those that come with the library."""
    shipped = {file.stem: file for file in sorted(_FOLDER.glob("*.json"))}
    for file in (path, path / "config.json", shipped.get(str(path), path)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"`architecture`: there is no file {path}. Name a config.json, a folder of one, or one of "
        f"{', '.join(shipped)}."
    )


def differences(one: str | None, other: str | None) -> list[str]:
    """The keys in which two configurations differ; `architectures` if one of them is not there."""
    first, second = (json.loads(x) if x is not None else {} for x in (one, other))
    if not first or not second:
        return ["architectures"]
    return sorted(name for name in first | second if first.get(name) != second.get(name))
