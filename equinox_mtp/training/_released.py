"""A run over a released model: what it starts from, and which of it trains."""

from pathlib import Path
from typing import Any

import jax

import equinox_mtp as emtp
from equinox_mtp import pretrained
from equinox_mtp.distillation import freeze_model

from ._checkpoint import CheckpointInfo
from ._config import TrainConfig
from ._model_digest import model_digest
from ._placement import Placement
from ._text import TOKENIZER_FILE, TokenizerText, read_text


def released_model(config: TrainConfig, placement: Placement) -> emtp.MTPModel:
    """The model in `config.model`, with fresh prediction depths.

    **Raises:** as `pretrained.load` does.
    """
    assert config.model is not None
    model, _ = pretrained.load(
        config.model,
        num_depths=config.depths,
        preset=config.preset if config.depths else None,
        key=jax.random.key(config.seed),
        mesh=placement.mesh,
        rules=placement.rules,
        tokenizer=False,
    )
    return model


def split_model(
    model: emtp.MTPModel, config: TrainConfig
) -> tuple[emtp.MTPModel, emtp.MTPModel | None]:
    """What trains, and what does not: `None` if all of it trains."""
    parts: tuple[Any, Any] = freeze_model(model) if config.freeze_model else (model, None)
    return parts


def model_text(folder: Path, end_of_document: int | None) -> TokenizerText:
    """A released model's own tokenizer.

    **Raises:** `FileNotFoundError` if its folder has none.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(
            f"`model`: {folder} has no {TOKENIZER_FILE}. Name one with --tokenizer."
        )
    return read_text(folder, end_of_document)


def check_vocabulary(model: emtp.MTPModel, text_vocab_size: int) -> None:
    """**Raises:** `ValueError` if the text has tokens that the model does not know."""
    vocab_size = emtp.cross_entropy.head_vocab_size(model.decoder.output_head())
    if vocab_size is not None and text_vocab_size > vocab_size:
        raise ValueError(
            f"`tokenizer` must be that of the model, which has {vocab_size} token ids; got one of "
            f"{text_vocab_size}. Leave --tokenizer out to take the model's own."
        )


def digest_of_frozen(frozen: emtp.MTPModel | None) -> str | None:
    """A digest of the main model that depths are trained over; `None` if all of a model trains."""
    return None if frozen is None else model_digest(frozen.decoder)


def check_same_model(trained_over: CheckpointInfo, digest: str | None, folder: Path | None) -> None:
    """**Raises:** `ValueError` if depths were trained over another model than that of `folder`."""
    was = trained_over.model_digest
    # Earlier versions stored none.
    if was is not None and was != digest:
        raise ValueError(
            f"`model` must be the one that the depths were trained over, of the digest {was:.12}, "
            f"which was in {trained_over.config.model}; that in {folder} has the digest "
            f"{digest or 'none':.12}. Name the folder of the former, or train depths over the "
            "latter."
        )
