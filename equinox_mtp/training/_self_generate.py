"""Texts that a released model writes itself, for its depths to be trained on.

A draft is accepted where it is what the model itself would say, which data of others need not be.
"""

import dataclasses
import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from tqdm.auto import tqdm

import equinox_mtp as emtp
from equinox_mtp.pretrained import model_folder
from equinox_mtp.speculative import DecodingModel, Sampler, generate

from .._whole_file import whole_file
from ._checkpoint import CheckpointInfo
from ._config import TrainConfig
from ._corpus import Corpus
from ._interrupt import Interrupted, interruptible
from ._options import shorten
from ._sources import Stream, TokenFile
from ._text import configured_ends

FOLDER = "self_generated"
_ORIGIN = "origin.json"
_DIGITS = 16
NO_TOKEN = -1
"""After the end of a text."""
_TOKENS_AT_ONCE = 16_384
"""In the texts of a batch: a step reads all parameters, for however many texts."""


def check_self_generate(config: TrainConfig, documents: Corpus) -> None:
    """**Raises:** `ValueError` if the texts that a run asks for cannot be made."""
    if config.self_generate is None:
        return
    if jax.process_count() > 1:
        raise ValueError(
            f"`self_generate` works in one process; got {jax.process_count()}. Leave --distributed "
            "out: --mesh splits a run over the devices of one machine."
        )
    is_greedy = Sampler(config.self_generate_temperature).is_greedy
    if is_greedy and config.self_generate > len(documents):
        raise ValueError(
            f"`self_generate` must be at most {len(documents)}, the number of training documents, "
            "where `self_generate_temperature` is 0: a second text of a document would be the "
            f"first; got {config.self_generate}. Ask for fewer texts, or for a temperature."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class OwnTexts:
    """A model's own texts, in the folder of a run; those that are missing are made.

    Text i continues training document i; the first document follows the last, with other draws. A
    batch follows from its index, so that a run that was stopped goes on with the next one.
    `batch_00000.npy`, … have a text in each row, and -1 after its end.

    **Fields:**

    - `config`: says how many texts there are, and how they are drawn.
    - `documents`: of the training data.
    - `end_ids`: each ends a text.
    - `vocab_size`: the model's.
    - `folder`: of the texts.
    """

    config: TrainConfig
    documents: Corpus
    end_ids: tuple[int, ...]
    vocab_size: int
    folder: Path

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        info: CheckpointInfo,
        documents: Corpus,
        model: emtp.MTPModel,
        out: Path,
    ) -> "OwnTexts":
        """The texts of a run; none is read or made yet.

        **Raises:** `ValueError` if there are texts of other options.
        """
        assert config.model is not None
        head_size = emtp.cross_entropy.head_vocab_size(model.decoder.output_head())
        vocab_size = documents.vocab_size if head_size is None else head_size
        end = info.config.end_of_document
        ends = {*configured_ends(model_folder(config.model)), *(() if end is None else (end,))}
        # A configuration may name tokens that this model has no logits of.
        end_ids = tuple(sorted(x for x in ends if x < vocab_size))
        texts = cls(config, documents, end_ids, vocab_size, out / FOLDER)
        names = ("self_generate_temperature", "seed", "seq_len")
        origin = {
            "model": str(info.model_digest)[:_DIGITS],
            "data": info.data_fingerprint[:_DIGITS],
            "documents": len(documents),
            "self_generate": config.self_generate,
            "texts_at_once": texts.num_rows,
            **{name: getattr(config, name) for name in names},
            "end_of_document": list(end_ids),
        }
        _check_origin(texts.folder, origin)
        return texts

    def corpus(self, model: emtp.MTPModel) -> Corpus:
        """All texts, each a document; missing ones are made by the model, on one device.

        **Raises:** `Interrupted` after Ctrl-C or SIGTERM, once the batch in flight is stored;
        `FloatingPointError` if logits are not finite; `OSError` if texts cannot be written.
        """
        sources, lengths, digest = [], [], hashlib.sha256()
        laid_out = None
        with progress_bar(self.num_texts) as bar, interruptible() as interrupted:
            for batch in range(-(-self.num_texts // self.num_rows)):
                tokens = self._read(batch)
                if tokens is None:
                    laid_out = laid_out or eqx.filter_jit(DecodingModel.of)(model)
                    tokens = self._make(batch, laid_out, bar)
                bar.update(len(tokens))
                sources.append(TokenFile(self._file(batch), tokens.size, self.config.seq_len))
                lengths.append(np.sum(tokens != NO_TOKEN, axis=1))
                digest.update(tokens.tobytes())
                if interrupted(batch):
                    bar.close()
                    print(self._describe_interruption(sum(map(len, lengths))))
                    raise Interrupted
        starts = np.arange(self.num_texts) * self.config.seq_len
        ends = np.concatenate(lengths)
        return Corpus(Stream(sources), starts, ends, self.vocab_size, digest.hexdigest())

    def generate(self, batch: int, model: emtp.MTPModel | DecodingModel) -> np.ndarray:
        """The texts of a batch `[batch seq]`; of the last one some may be too many."""
        seq_len, (prompt_ids, lengths) = self.config.seq_len, self.prompts(batch)
        width = prompt_ids.shape[1]
        # Two programs at most: a short prompt has more to come, and what the others have is cut.
        begins = width if lengths.min() == width else 1
        generation = generate(
            model,
            prompt_ids,
            lengths,
            max_new_tokens=seq_len - begins,
            num_drafts=0,  # fresh depths draft nothing that would be accepted
            sampler=Sampler(self.config.self_generate_temperature),
            eos_id=self.end_ids,
            key=jax.random.fold_in(jax.random.key(self.config.seed), batch),
        )
        is_token = np.arange(seq_len) < np.asarray(generation.lengths)[:, None]
        return np.where(is_token, np.asarray(generation.tokens)[:, :seq_len], np.int32(NO_TOKEN))

    def prompts(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The beginnings of a batch's documents `[batch prompt]`, and their lengths."""
        documents, width = self.documents, max(1, self.config.seq_len // 4)
        index = (batch * self.num_rows + np.arange(self.num_rows)) % len(documents)
        lengths = documents.lengths[index]
        # A text that goes on is not at its end.
        lengths = lengths - np.isin(documents.read(index, lengths - 1), self.end_ids)
        lengths = np.clip(lengths, 1, width)
        within = np.minimum(np.arange(width), lengths[:, None] - 1)
        return documents.read(index[:, None], within), lengths

    @property
    def num_texts(self) -> int:
        """In all batches."""
        return self.config.self_generate or 0

    @property
    def num_rows(self) -> int:
        """Texts that are made at once: at least as many as rows are trained on at once."""
        config = self.config
        rows = max(config.batch_size // config.accumulate, _TOKENS_AT_ONCE // config.seq_len)
        return min(rows, self.num_texts)

    def _file(self, batch: int) -> Path:
        return self.folder / f"batch_{batch:05d}.npy"

    def _shape(self, batch: int) -> tuple[int, int]:
        return min(self.num_rows, self.num_texts - batch * self.num_rows), self.config.seq_len

    def _read(self, batch: int) -> np.ndarray | None:
        """Stored texts; `None` if there are none, or they are damaged."""
        try:
            tokens = np.load(self._file(batch), mmap_mode="r")
        except Exception:  # for a damaged header NumPy has errors of many kinds
            return None
        is_batch = isinstance(tokens, np.ndarray) and tokens.shape == self._shape(batch)
        if not is_batch or tokens.dtype != np.int32:
            return None
        is_in_range = tokens.min() >= NO_TOKEN and tokens.max() < self.vocab_size
        return tokens if is_in_range else None

    def _make(self, batch: int, model: DecodingModel, bar: tqdm) -> np.ndarray:
        """Generates texts, and stores them."""
        started, num_rows = time.perf_counter(), self._shape(batch)[0]
        tokens = self.generate(batch, model)[:num_rows]
        content = io.BytesIO()
        np.save(content, tokens)
        _write(self._file(batch), content.getvalue())
        speed = np.sum(tokens != NO_TOKEN) / (time.perf_counter() - started)
        bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        return tokens

    def _describe_interruption(self, num_done: int) -> str:
        out, config = self.folder.parent, self.config
        options = "--resume" if config.resume else f"--config {out}"
        mesh = "" if config.mesh is None else f" --mesh {config.mesh}"
        return (
            f"interrupted after {num_done} of {self.num_texts} texts; continue with {options} "
            f"--out {out}{mesh}"
        )


def describe_texts(texts: Corpus, documents: Corpus, seq_len: int) -> str:
    """The size of the texts, and a note if several begin alike."""
    ended = float(np.mean(texts.lengths < seq_len))
    text = f"{len(texts):,} texts by the model itself, {texts.num_tokens:,} tokens; {ended:.0%} "
    text += "ended before a row did"
    if len(texts) > len(documents):
        text += f"\nnote: some begin alike, as there are {len(documents):,} training document(s)"
    return text


def progress_bar(num_texts: int) -> tqdm:
    """A bar as that of steps, for what takes more than a moment."""
    return tqdm(
        total=num_texts,
        desc="generating",
        unit="text",
        dynamic_ncols=True,
        mininterval=0.5,
        delay=1,
    )


# Files


def _check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Writes down what the texts of a folder come from, or compares it with what stands there.

    **Raises:** `ValueError` if that is something else.
    """
    path = folder / _ORIGIN
    try:
        stored = dict(json.loads(path.read_bytes()))
    except (OSError, TypeError, ValueError, RecursionError):
        stored = {}
    if stored == origin:
        return
    if any(folder.glob("batch_*.npy")):
        name = next((x for x in origin if stored.get(x) != origin[x]), "self_generate")
        raise ValueError(
            f"`{name}` of the texts in {folder} was {shorten(stored.get(name, 'unknown'))}, and is "
            f"{shorten(origin[name])} now. Leave it as it was, choose another --out, or delete "
            "that folder to have other texts."
        )
    _write(path, (json.dumps(origin, indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all; `OSError` of one line that names it."""
    try:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(
            f"`self_generate`: {path} cannot be written: {error.strerror or error}. The texts "
            "before it are as they were; make room, and start again."
        ) from error
