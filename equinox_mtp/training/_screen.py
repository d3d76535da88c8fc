"""Continued text on a terminal or in a file, with marks around the tokens that were drafted."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from equinox_mtp.speculative import StreamedStep

from ._compare import describe_acceptance
from ._text import ByteText
from ._text_decoders import AbstractTextDecoder

_COLORS = "\033[30;102m", "\033[0m"
_BRACKETS = "⟦", "⟧"
_PLAIN_BRACKETS = "[[", "]]"


def marked_text(
    steps: Iterable[StreamedStep],
    begin: str,
    end: str,
    shown: Callable[[str], str] = str,
    decoder: AbstractTextDecoder | None = None,
) -> Iterator[str]:
    """The text of a single row, step by step, with marks around accepted drafts.

    A character that is cut at the end is U+FFFD. `shown` is applied to the text, not to the marks.
    """
    decoder = ByteText().decoder() if decoder is None else decoder
    for new_ids, num_new, num_accepted in steps:
        ids = new_ids[0, : num_new[0]].tolist()
        drafted = shown(decoder.feed(ids[: num_accepted[0]]))
        rest = shown(decoder.feed(ids[num_accepted[0] :]))
        yield (f"{begin}{drafted}{end}" if drafted else "") + rest
    cut = decoder.finish()
    if cut:
        yield shown(cut)


class Screen:
    """An output stream to which any text can be written safely."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.is_terminal = out.isatty()
        self.encoding = getattr(out, "encoding", None) or "utf8"

    @property
    def marks(self) -> tuple[str, str]:
        """What begins and ends an accepted draft."""
        if self.is_terminal and "NO_COLOR" not in os.environ:
            return _COLORS
        can_show = self._encodable("".join(_BRACKETS)) == "".join(_BRACKETS)
        return _BRACKETS if can_show else _PLAIN_BRACKETS

    def shown(self, text: str) -> str:
        """Text of a prompt or a model, with the terminal's control characters escaped."""
        if self.is_terminal:
            text = "".join(_escaped(c) if _is_control(c) else c for c in text)
        return self._encodable(text)

    def write(self, text: str) -> None:
        """Writes it at once."""
        self.out.write(text)
        self.out.flush()

    def _encodable(self, text: str) -> str:
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)


_TURNS = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))


def _is_control(character: str) -> bool:
    # Those that turn the direction of writing can make a text look like another.
    turns = unicodedata.bidirectional(character) in _TURNS
    return (unicodedata.category(character) == "Cc" and character not in "\n\t") or turns


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class Counts:
    """Counts the steps of a single row that pass through."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_drafts = 0
        self.accepted: list[int] = []

    def of(self, steps: Iterable[StreamedStep]) -> Iterator[StreamedStep]:
        for index, step in enumerate(steps):
            self.num_tokens += int(step.num_new[0])
            self.num_drafts = step.new_ids.shape[1] - 1
            if index:  # the first token is of the prompt's pass
                self.accepted.append(int(step.num_accepted[0]))
            yield step

    def __str__(self) -> str:
        num_steps = len(self.accepted)
        text = f"{self.num_tokens} tokens in {1 + num_steps} forward passes"
        if not num_steps:
            return text
        rates = [sum(n > k for n in self.accepted) / num_steps for k in range(self.num_drafts)]
        described = describe_acceptance((self.num_tokens - 1) / num_steps, rates)
        return f"{text}; not counting the prompt's, {described}"
