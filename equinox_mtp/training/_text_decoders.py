"""Token ids to text as they come, a few at a time."""

import abc
import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ._sources import TEXT_END


class AbstractTextDecoder(abc.ABC):
    """Text of token ids that come a few at a time.

    All parts together are the text of all ids at once.
    """

    @abc.abstractmethod
    def feed(self, ids: Sequence[int]) -> str:
        """What of the text is complete now, and was not before."""

    @abc.abstractmethod
    def finish(self) -> str:
        """The rest: U+FFFD for a character that is cut."""


class ByteDecoder(AbstractTextDecoder):
    """Of the bytes of UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        """See `AbstractTextDecoder`."""
        # A model may have more ids than there are bytes; those say nothing, as the end of a text.
        return self._decoder.decode(bytes(x for x in ids if x < TEXT_END))

    def finish(self) -> str:
        """See `AbstractTextDecoder`."""
        return self._decoder.decode(b"", final=True)


class TokenDecoder(AbstractTextDecoder):
    """Of the tokens of a `tokenizers.Tokenizer`.

    It decodes all ids again at each step, since how a token is written depends on those before it,
    and gives out what no later token can change. Held back are the bytes of a character that is not
    complete; a run of tokens that are a byte each, which becomes U+FFFD as a whole if it is no
    UTF-8; and all of the text, up to the end, with the rare tokenizers that edit across tokens.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._end_ids = tokenizer, end_ids
        self._ids: list[int] = []
        self._shown = ""
        steps = [*_steps(json.loads(tokenizer.to_str())["decoder"])]
        self._edits = _edit_across_tokens(steps)
        self._has_bytes = any(step["type"] == "ByteFallback" for step in steps)
        added = tokenizer.get_added_tokens_decoder().items()
        self._silent = {x for x, token in added if token.special}

    def feed(self, ids: Sequence[int]) -> str:
        """See `AbstractTextDecoder`."""
        self._ids += [x for x in ids if x not in self._end_ids]
        if self._edits:
            return ""
        stop = len(self._ids)
        while self._has_bytes and stop and self._is_open(self._ids[stop - 1]):
            stop -= 1
        text = self._decode(self._ids[:stop]).rstrip("\ufffd")
        new = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown += new
        return new

    def finish(self) -> str:
        """See `AbstractTextDecoder`."""
        text = self._decode(self._ids)
        pairs = enumerate(zip(text, self._shown, strict=False))
        same = min(len(text), len(self._shown))
        return text[next((i for i, (one, other) in pairs if one != other), same) :]

    def _decode(self, ids: list[int]) -> str:
        # Of no tokens at all some decoders panic.
        return self._tokenizer.decode(ids) if ids else ""

    def _is_open(self, token_id: int) -> bool:
        """Whether a run of bytes goes on behind a token: it is a byte, or is not written at all."""
        token = self._tokenizer.id_to_token(token_id)
        return token is None or token_id in self._silent or bool(_BYTE.fullmatch(token))


_BYTE = re.compile("<0x..>")
_BY_TOKEN = ("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "WordPiece")


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, as tokenizer.json has it; without one, tokens are joined."""
    if decoder is not None and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder is not None:
        yield decoder


def _edit_across_tokens(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether steps may change text because of the tokens behind it."""
    is_one_text = False
    for step in steps:
        kind = step["type"]
        # Of one text they act on single characters, or on its ends; others find what tokens make
        # together.
        pattern = step.get("pattern", {}).get("String", "") if kind == "Replace" else ""
        is_local = kind in ("Fuse", "Strip") or len(pattern) == 1
        if not is_local and (is_one_text or kind not in (*_BY_TOKEN, "Replace")):
            return True
        is_one_text |= kind in ("ByteLevel", "Fuse")
    return False
