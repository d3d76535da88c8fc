"""How often each token occurs in a run's data: drafts may come from the frequent ones alone."""

from pathlib import Path

import numpy as np

from equinox_mtp.speculative import frequent_ids

from .._whole_file import whole_file
from ._corpus import Corpus

_FILE = "token_counts.npy"
_PART = 1 << 22
"""Tokens that are counted at a time."""


def count_tokens(corpus: Corpus) -> np.ndarray:
    """How often each id occurs, int64 `[vocab]`."""
    counts = np.zeros(corpus.vocab_size, np.int64)
    size = len(corpus.stream)
    for start in range(0, size, _PART):
        for _, _, tokens in corpus.stream.chunks(start, min(start + _PART, size)):
            counts += np.bincount(tokens, minlength=corpus.vocab_size)
    return counts


def keep_token_counts(corpus: Corpus, folder: Path) -> None:
    """Writes the counts into a run's folder."""
    with whole_file(folder / _FILE) as file:
        np.save(file, count_tokens(corpus))


def draft_vocabulary(run: Path, size: int) -> np.ndarray:
    """The most frequent ids of the text that a run was trained on.

    **Raises:** `FileNotFoundError` if the run keeps no counts.
    """
    if not (run / _FILE).is_file():
        raise FileNotFoundError(
            f"`draft_vocab`: {run} has no {_FILE}, which says what tokens are frequent. Leave "
            "--draft-vocab out, or name a run of this version."
        )
    return frequent_ids(np.load(run / _FILE, allow_pickle=False), size)
