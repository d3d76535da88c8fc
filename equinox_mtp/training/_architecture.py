"""A run's model from a `config.json`: read once, and kept with every checkpoint."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax

import equinox_mtp as emtp
from equinox_mtp import pretrained

from ._config import TrainConfig

_FOLDER = Path(__file__).parent / "architectures"


class Architecture(NamedTuple):
    """A configuration as JSON, and the model that it describes, with shapes in place of arrays."""

    json: str
    shapes: emtp.MTPModel

    @property
    def vocab_size(self) -> int:
        """The model's."""
        assert isinstance(self.shapes.decoder, emtp.nn.TransformerDecoder)
        return self.shapes.decoder.embedding.shape[0]


def read_architecture(config: TrainConfig, text_vocab_size: int) -> Architecture | None:
    """What `config.architecture` names; `None` if it names nothing.

    A configuration that says nothing of a vocabulary gets that of the text.

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
    content = json.dumps({"vocab_size": text_vocab_size, **stored}, sort_keys=True)
    try:
        shapes = eqx.filter_eval_shape(architecture_model, content, config)
    except ValueError as error:
        # It knows the content alone.
        reason = str(error).removeprefix("config.json: ")
        raise ValueError(f"`architecture`: {path}: {reason}") from None
    architecture = Architecture(content, shapes)
    if text_vocab_size > architecture.vocab_size:
        raise ValueError(
            f"`architecture`: {path} has {architecture.vocab_size} token ids (`vocab_size`), and "
            f"the text {text_vocab_size}. Leave the key out to take those of the text."
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


def _find(path: Path) -> Path:
    """A file, the config.json of a folder, or one of those that come with the library."""
    shipped = {file.stem: file for file in sorted(_FOLDER.glob("*.json"))}
    for file in (path, path / "config.json", shipped.get(str(path), path)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"`architecture`: there is no file {path}. Name a config.json, a folder of one, or one of "
        f"{', '.join(shipped)}. A run that goes on takes another name for the file it began with."
    )


def differences(one: str | None, other: str | None) -> list[str]:
    """The keys in which two configurations differ; all of one if the other is not there."""
    first, second = (json.loads(x) if x is not None else {} for x in (one, other))
    return sorted(name for name in first | second if first.get(name) != second.get(name))
