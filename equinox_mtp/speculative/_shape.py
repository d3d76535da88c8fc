"""What a compiled decoding step is for."""

import dataclasses
from typing import Literal, TypeAlias, get_args

from .._checks import check_choice, check_integer
from ._model import DecodingModel

_MAX_DRAFTS = 64

Recursion: TypeAlias = Literal["by_depth", "extended"]
"""How drafts beyond a model's own layers are made; see `generate`."""


@dataclasses.dataclass(frozen=True)
class DecodingShape:
    """What a compiled decoding step is for; everything else is an array.

    >>> shape = emtp.speculative.DecodingShape(num_drafts=2, max_new_tokens=4)
    >>> shape.window
    3

    **Fields:**

    - `num_drafts`, `max_new_tokens`: see `generate`, as for `recursion`.

    **Raises:** `ValueError` unless 0 ≤ `num_drafts` ≤ 64 (a step is compiled with a layer for every
    draft) and `max_new_tokens` ≥ 1.
    """

    num_drafts: int
    max_new_tokens: int
    recursion: Recursion = "by_depth"

    def __post_init__(self) -> None:
        check_choice("recursion", self.recursion, get_args(Recursion))
        check_integer("num_drafts", self.num_drafts, at_least=0, at_most=_MAX_DRAFTS)
        check_integer("max_new_tokens", self.max_new_tokens, at_least=1, at_most=2**31 - 1)

    @property
    def window(self) -> int:
        """Positions before the last token that the draft layers recompute in each step.

        With n the last token's position, a drafts accepted and m ≤ a+1 tokens committed: at depth k
        the positions after n+a-k saw a refused draft, and the m new ones were not run; that is
        max(m, `num_drafts`) positions in all.
        """
        return self.num_drafts + 1 if self.num_drafts else 0

    @property
    def main_rollback(self) -> int:
        """How far `verify` begins before the end of its last pass; farthest in rows that are done.

        It has run the last token and all drafts, and begins at that token again if none is
        committed. Without drafts the cache of a row that is done may be of no use.
        """
        return self.window

    def draft_rollback(self, model: DecodingModel) -> int:
        """How far a depth begins before the end of its last pass.

        By its window if nothing is committed, and by the positions that drafts beyond the last
        depth have extended it by.
        """
        return self.window + self.num_drafts - self.num_depths(model)

    def num_depths(self, model: DecodingModel) -> int:
        """How many drafts are of a depth with a cache of its own; the others extend the last."""
        num_layers = len(model.layers) if self.recursion == "extended" else self.num_drafts
        return min(self.num_drafts, num_layers)
