"""Text from a checkpoint, drafted by the prediction depths and verified by the model."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import equinox_mtp as emtp
from equinox_mtp.speculative import Sampler, stream

from .._checks import check_integer
from ._checkpoint import load_info
from ._compare import compare
from ._load_model import load_model, newest_checkpoint
from ._screen import Counts, Screen, marked_text
from ._text import (
    TOKENIZER_FILE,
    AbstractText,
    ByteText,
    TokenizerText,
    end_tokens,
    read_settings,
    read_text,
)
from ._token_counts import draft_vocabulary

_PADDED_TO = 64


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continues a text with a trained model, and marks the tokens that were drafted.

    They stand on green on a terminal, and in ⟦⟧ elsewhere. On a terminal control characters of the
    text are shown as `\\x1b`.
    """

    prompt: str
    """The text to continue."""
    checkpoint: Path | None = None
    """A checkpoint, or the folder of a run: its last one."""
    model: Path | None = None
    """The folder of a released model, in place of a checkpoint: config.json, *.safetensors,
    tokenizer.json."""
    heads: Path | None = None
    """The run, or its checkpoint, that trained prediction depths over the model."""
    drafts: int | None = None
    """Drafts per step; 0 decodes plainly. Default: the model's depths."""
    draft_vocab: int | None = None
    """Draft only the so many most frequent tokens of the text that the depths were trained on: a
    draft then reads a part of the output head. Default: those they were trained to draft."""
    temperature: float = 0.0
    """The temperature of the draws; 0 takes the best token."""
    top_k: int | None = None
    """Draw from the k best tokens only."""
    top_p: float | None = None
    """Draw from the best tokens that hold this much probability only."""
    max_new_tokens: int = 160
    """How many tokens to add, at most."""
    seed: int = 0
    """The seed of the draws."""
    compare: bool = False
    """Also measure the speed-up over plain decoding, both greedy."""


def generate_text(config: GenerateConfig) -> None:
    """Streams a continuation to standard output, then reports its passes and acceptance.

    **Raises:** `ValueError` or `FileNotFoundError` for a checkpoint or options that do not fit;
    `ValueError`, too, if there is not enough memory for so many tokens; `FloatingPointError` if the
    model's logits are not finite.
    """
    if not config.prompt:
        raise ValueError("`prompt` must hold at least one character; got none.")
    if (config.checkpoint is None) == (config.model is None):
        raise ValueError(
            "`checkpoint` or `model` must be given, one of them: a run of `train`, or the folder "
            "of a released model."
        )
    if config.heads is not None and config.model is None:
        raise ValueError(
            f"`heads` are of a released model; got {config.heads} alone. Name its folder with "
            "--model, or the run with --checkpoint."
        )
    if not 0 <= config.seed < 2**32:  # JAX's keys would take no more than 32 bits of it
        raise ValueError(f"`seed` must lie in 0 … {2**32 - 1}; got {config.seed}.")
    _ = ByteText().encode(config.prompt)
    model, text, longest = _open(config)
    prompt = text.encode(config.prompt)
    try:
        _continue_text(config, text, prompt, model, longest)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"there is not enough memory for a prompt of {len(prompt)} tokens and "
            f"{config.max_new_tokens} new ones. Shorten `prompt`, or lower `max_new_tokens`."
        ) from None


def _continue_text(
    config: GenerateConfig,
    text: AbstractText,
    prompt: np.ndarray,
    model: emtp.MTPModel,
    longest: int,
) -> None:
    screen, vocab = Screen(sys.stdout), _draft_vocabulary(config)
    # Padded, so that prompts of about the same length share a compiled program.
    padded = np.zeros((1, -(-len(prompt) // _PADDED_TO) * _PADDED_TO), np.int32)
    padded[0, : len(prompt)] = prompt
    try:
        steps = stream(
            model,
            padded,
            np.asarray([len(prompt)]),
            max_new_tokens=config.max_new_tokens,
            num_drafts=config.drafts,
            draft_vocab=vocab,
            sampler=Sampler(config.temperature, config.top_k, config.top_p),
            eos_id=text.end_ids,
            key=jax.random.key(config.seed),
        )
    except ValueError as error:  # of arguments, one of which has another name here
        raise ValueError(str(error).replace("`num_drafts`", "`drafts`")) from None
    wanted = len(prompt) + config.max_new_tokens
    if wanted > longest:
        screen.write(
            f"note: up to {wanted} tokens are asked for; the model was trained on rows of "
            f"{longest}, and may not do well beyond\n\n"
        )
    decoder = text.decoder()
    shown = decoder.feed(prompt.tolist())
    screen.write(
        screen.shown(shown if isinstance(text, TokenizerText) else shown + decoder.finish())
    )
    counts = Counts()
    for part in marked_text(counts.of(steps), *screen.marks, screen.shown, decoder):
        screen.write(part)
    screen.write(f"\n\n{counts}\n")
    if config.compare:
        comparison = compare(
            model,
            [prompt],
            max_new_tokens=config.max_new_tokens,
            num_drafts=config.drafts,
            draft_vocab=vocab,
            eos_id=text.end_ids,
        )
        screen.write(f"greedily: {comparison}\n")


def _draft_vocabulary(config: GenerateConfig) -> np.ndarray | None:
    """The ids that may be drafted; `None` for all."""
    run, size = config.heads or config.checkpoint, config.draft_vocab
    if size is not None:
        check_integer("draft_vocab", size, at_least=1)
    if run is None:
        if size is None:
            return None
        raise ValueError(
            "`draft_vocab` goes with depths of a run, which knows what tokens are frequent; got "
            f"the model {config.model} alone. Name the run with --heads, or leave it out."
        )
    checkpoint = newest_checkpoint(run)
    size = load_info(checkpoint).config.draft_vocab if size is None else size
    return None if size is None else draft_vocabulary(checkpoint.parent.parent, size)


def _open_model(folder: Path, heads: Path | None) -> tuple[emtp.MTPModel, Any]:
    """A released model with its own depths, or with those that a run has trained over it."""
    if heads is None:
        return emtp.pretrained.load(folder)
    model, _ = load_model(heads, model=folder)
    return model, emtp.pretrained.load_tokenizer(folder)


def _open(config: GenerateConfig) -> tuple[emtp.MTPModel, AbstractText, int]:
    """The model, its text, and how long the rows were that it was trained on."""
    if config.model is not None:
        model, tokenizer = _open_model(config.model, config.heads)
        if tokenizer is None:
            raise ValueError(
                f"`model`: {config.model} has no {TOKENIZER_FILE}. Load it in Python by "
                "`equinox_mtp.pretrained.load`, and continue token ids by "
                "`equinox_mtp.speculative.generate`."
            )
        folder = emtp.pretrained.model_folder(config.model)
        longest = read_settings(folder / "config.json").get("max_position_embeddings")
        vocab_size = emtp.cross_entropy.head_vocab_size(model.decoder.output_head())
        # A configuration may name tokens that this model has no logits of.
        ends = [x for x in end_tokens(tokenizer, folder) if vocab_size is None or x < vocab_size]
        text = TokenizerText(tokenizer, ends)
        return model, text, longest if isinstance(longest, int) else 2**31
    assert config.checkpoint is not None
    checkpoint = newest_checkpoint(config.checkpoint)
    tokenizer_file = checkpoint.parent.parent / TOKENIZER_FILE
    info = load_info(checkpoint)
    text, vocab_size = ByteText(), info.vocab_size
    if tokenizer_file.is_file():
        text = read_text(tokenizer_file, info.config.end_of_document)
    if vocab_size != text.vocab_size:
        raise ValueError(
            f"`checkpoint` must be of a model of text, with {text.vocab_size} token ids; the one "
            f"in {config.checkpoint} has {vocab_size}. In Python load it by "
            "`equinox_mtp.training.load_model`, and continue token ids by "
            "`equinox_mtp.speculative.generate`."
        )
    model, info = load_model(config.checkpoint)
    return model, text, info.config.seq_len if info.config.model is None else 2**31
