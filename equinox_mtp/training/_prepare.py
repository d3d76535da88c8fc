"""What a run needs before its first step: data, model, devices and folder, each checked."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import optax

import equinox_mtp as emtp
from equinox_mtp.speculative import frequent_ids

from ._architecture import read_architecture
from ._checkpoint import CheckpointInfo
from ._checkpoint_files import checkpoints
from ._config import TrainConfig, options, without_devices
from ._corpus import Corpus, load_corpus
from ._hidden_states import HiddenStateLayout, check_room, hidden_state_layout
from ._packing import PackedRows
from ._placement import Placement
from ._processes import all_gather, broadcast
from ._released import (
    check_vocabulary,
    digest_of_frozen,
    model_text,
    released_model,
    split_model,
)
from ._routers import check_routers
from ._self_generate import check_self_generate
from ._sources import holds_tokens
from ._step import make_optimizer
from ._text import TokenizerText, read_text
from ._token_counts import count_tokens

RUNS = Path("runs")


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same in all steps of a run.

    `released` is what trains of a released model, before the first step, and `frozen` what does
    not; `None` for a model from scratch, and for one that trains as a whole. `draft_vocab` are the
    ids that depths learn to draft from, `None` for all; `hidden_states` are those that are kept on
    disk, `None` for none.
    """

    config: TrainConfig
    info: CheckpointInfo
    released: emtp.MTPModel | None
    frozen: emtp.MTPModel | None
    optimizer: optax.GradientTransformation
    placement: Placement
    corpus: Corpus
    train_corpus: Corpus
    held_out_corpus: Corpus
    train_rows: PackedRows
    held_out_rows: PackedRows
    draft_vocab: np.ndarray | None
    hidden_states: HiddenStateLayout | None
    out: Path

    @property
    def hidden_states_folder(self) -> Path:
        """Where hidden states are kept."""
        return self.out / "hidden_states"


def prepare(config: TrainConfig) -> Run:
    """Reads the data, and fits everything to it; nothing is compiled or written."""
    check_agreement(config)
    text, options = text_of(config), without_devices(config)
    if text is not None:
        # `generate` ends a text with it, too; the run keeps the tokenizer alone.
        options = dataclasses.replace(options, end_of_document=text.end_id)
    corpus = load_corpus(
        config.data,
        vocab_size=config.vocab_size,
        end_of_document=config.end_of_document,
        text=text,
        text_field=config.text_field,
    )
    train_corpus, held_out_corpus = corpus.split(config.seed)
    if config.seq_len > train_corpus.num_tokens:
        raise ValueError(
            f"`seq_len` must be at most the {train_corpus.num_tokens} tokens of the training data; "
            f"got {config.seq_len}. Take shorter rows, or more text."
        )
    check_self_generate(config, train_corpus)
    architecture = read_architecture(config, corpus.vocab_size)
    vocab_size = corpus.vocab_size if architecture is None else architecture.vocab_size
    placement = Placement.of(config, vocab_size)
    train_rows = PackedRows(train_corpus, config.seq_len)
    released, frozen = None, None
    if config.model is not None:
        model = released_model(config, placement)
        check_vocabulary(model, corpus.vocab_size)
        released, frozen = split_model(model, config)
    check_routers(config, architecture.shapes if architecture is not None else released)
    info = CheckpointInfo(
        0,
        corpus.vocab_size,
        corpus.fingerprint,
        options,
        model_digest=digest_of_frozen(frozen),
        architecture=None if architecture is None else architecture.json,
    )
    run = Run(
        config=config,
        info=info,
        released=released,
        frozen=frozen,
        optimizer=make_optimizer(config),
        placement=placement,
        corpus=corpus,
        train_corpus=train_corpus,
        held_out_corpus=held_out_corpus,
        train_rows=train_rows,
        held_out_rows=PackedRows(held_out_corpus, config.seq_len),
        draft_vocab=draft_vocab_of(config, corpus),
        hidden_states=None,
        out=config.out or new_run_folder(),
    )
    if config.self_generate is not None:  # their rows are known once they are made
        return run
    return with_hidden_states(run, corpus.fingerprint)


def draft_vocab_of(config: TrainConfig, corpus: Corpus) -> np.ndarray | None:
    """The ids that depths learn to draft from; `None` for all."""
    if config.draft_vocab is None:
        return None
    return frequent_ids(count_tokens(corpus), config.draft_vocab)


def text_of(config: TrainConfig) -> TokenizerText | None:
    """The tokenizer that reads the data; `None` for bytes and for token ids."""
    if config.tokenizer is not None:
        return read_text(config.tokenizer, config.end_of_document)
    if config.model is not None and not holds_tokens(config.data):
        return model_text(config.model, config.end_of_document)
    return None


def with_hidden_states(run: Run, data_fingerprint: str) -> Run:
    """The run, with a place on disk for the main model's hidden states, if they are to be kept.

    `data_fingerprint` is of what its rows are made of.

    **Raises:** `OSError` if there is not enough room for them.
    """
    if not run.config.cache_hidden_states:
        return run
    assert run.frozen is not None
    assert run.info.model_digest is not None
    layout = hidden_state_layout(
        run.frozen.decoder,
        model=run.info.model_digest,
        data=data_fingerprint,
        seed=run.config.seed,
        num_rows=len(run.train_rows),
        seq_len=run.config.seq_len,
    )
    check_room(run.hidden_states_folder, layout)
    return dataclasses.replace(run, hidden_states=layout)


def check_agreement(config: TrainConfig) -> None:
    """**Raises:** in all processes, `ValueError` if one of them has other options."""
    values = {field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)}
    of_first, *others = [json.loads(m) for m in all_gather(json.dumps(values).encode())]
    for process, of_process in enumerate(others, start=1):
        for name, value in of_process.items():
            if value != of_first[name] and not options()[name].may_differ:
                raise ValueError(
                    f"`{name}` must be the same in every process; it is {of_first[name]} in the "
                    f"first, and {value} in process {process}."
                )


def new_run_folder() -> Path:
    """The next free of runs/0001, runs/0002, …"""
    last = newest_run_folder()
    number = broadcast(1 if last is None else int(last.name) + 1)
    return RUNS / f"{number:04d}"


def newest_run_folder(*, with_checkpoint: bool = False) -> Path | None:
    """The last of runs/0001, runs/0002, …, if there is one."""
    found = sorted(path for path in RUNS.glob("[0-9]" * 4) if path.is_dir())
    if with_checkpoint:
        found = [path for path in found if checkpoints(path / "checkpoints")]
    return found[-1] if found else None
