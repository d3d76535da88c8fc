"""Text as token ids: its bytes, or the tokens of a tokenizer."""

import abc
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equinox_mtp.pretrained import load_tokenizer

from ._sources import TEXT_END, TEXT_VOCAB
from ._text_decoders import AbstractTextDecoder, ByteDecoder, TokenDecoder

TOKENIZER_FILE = "tokenizer.json"


class AbstractText(abc.ABC):
    """How text and token ids become one another."""

    vocab_size: int
    end_ids: tuple[int, ...]
    """Each ends a text."""

    @property
    def end_id(self) -> int | None:
        """Ends a document, the first of those that end a text; `None` if there is no such token."""
        return self.end_ids[0] if self.end_ids else None

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32."""

    @abc.abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, of any integer type; no text has half of a surrogate pair."""

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """The same where all texts have the same token ids."""

    @abc.abstractmethod
    def decoder(self) -> AbstractTextDecoder:
        """Decodes ids as they come."""


class ByteText(AbstractText):
    """The bytes of UTF-8, and those of the command line that are none."""

    vocab_size = TEXT_VOCAB
    end_ids = (TEXT_END,)

    def encode(self, text: str) -> np.ndarray:
        """See `AbstractText`."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `AbstractText`."""
        return [np.frombuffer(text.encode("utf8"), np.uint8) for text in texts]

    @property
    def digest(self) -> str:
        """See `AbstractText`."""
        return "bytes"

    def decoder(self) -> AbstractTextDecoder:
        """See `AbstractText`."""
        return ByteDecoder()


class TokenizerText(AbstractText):
    """The tokens of a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]):
        self._tokenizer = tokenizer
        # Not the number of tokens: their ids may leave gaps.
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.end_ids = tuple(end_ids)

    def encode(self, text: str) -> np.ndarray:
        """See `AbstractText`."""
        text = _utf8(text).decode("utf8", "replace")
        return np.asarray(self._tokenizer.encode(text).ids, np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `AbstractText`; on all cores."""
        encodings = self._tokenizer.encode_batch_fast(texts)
        return [np.asarray(encoding.ids, np.int64) for encoding in encodings]

    @property
    def digest(self) -> str:
        """See `AbstractText`."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def decoder(self) -> AbstractTextDecoder:
        """See `AbstractText`."""
        return TokenDecoder(self._tokenizer, self.end_ids)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError("`prompt` must be text; it holds half of a surrogate pair.") from None


def read_text(path: Path, end_id: int | None = None) -> TokenizerText:
    """The tokenizer of a folder, or of its file.

    The end of documents is `end_id`, or what the folder names.

    **Raises:** `FileNotFoundError` if there is none; `ModuleNotFoundError` without the extra `hf`;
    `ValueError` for a damaged file.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"`tokenizer`: there is no file {file}. Name a {TOKENIZER_FILE}, or its folder."
        )
    tokenizer = load_tokenizer(file)
    end_ids = end_tokens(tokenizer, file.parent) if end_id is None else (end_id,)
    return TokenizerText(tokenizer, end_ids)


def end_tokens(tokenizer: Any, folder: Path) -> tuple[int, ...]:
    """The ids that end a text, as a folder's configuration says; by their usual names otherwise."""
    if ids := configured_ends(folder):
        return ids
    token = read_settings(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    for name in (token, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>"):
        found = tokenizer.token_to_id(name) if isinstance(name, str) else None
        if found is not None:
            return (found,)
    return ()


def configured_ends(folder: Path) -> tuple[int, ...]:
    """The ids that end a text, as a folder's configuration says; none if it does not."""
    for name in ("generation_config.json", "config.json"):
        found = read_settings(folder / name).get("eos_token_id")
        found = found if isinstance(found, list) else [found]
        ids = tuple(x for x in found if type(x) is int and x >= 0)
        if ids:
            return ids
    return ()


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with what a nested `text_config` says; empty if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    found = found if isinstance(found, dict) else {}
    nested = found.get("text_config")
    return {**found, **nested} if isinstance(nested, dict) else found


def keep_tokenizer(path: Path, folder: Path) -> None:
    """Copies a tokenizer into a run's folder: with it `generate` reads the run's text."""
    shutil.copyfile(path / TOKENIZER_FILE if path.is_dir() else path, folder / TOKENIZER_FILE)
