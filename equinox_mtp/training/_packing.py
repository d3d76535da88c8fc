"""Documents, packed into rows.

A row is a pure function of its index, so that a run goes on anywhere, on any mesh. Packing in grain
is an iterator, whose state a checkpoint would have to hold for each process.
"""

import functools
from collections.abc import Iterator

import equinox as eqx
import numpy as np
from jaxtyping import Int32

from .._checks import check_integer
from .._types import HostOrDeviceArray
from ._corpus import Corpus


class Rows(eqx.Module):
    """Packed rows: one token more than positions, so that every position has a target.

    >>> rows = training.PackedRows(corpus, seq_len=6).read(np.arange(2))
    >>> batch = emtp.make_batch(rows.tokens, segment_ids=rows.segment_ids)
    >>> batch.input_ids.shape
    (2, 6)
    """

    tokens: Int32[HostOrDeviceArray, "*microbatch batch tokens"]
    segment_ids: Int32[HostOrDeviceArray, "*microbatch batch tokens"]


class PackedRows:
    """Documents, concatenated and cut into rows; segment ids tell the documents of a row apart.

    A row's last token is the next row's first, so that every pair of neighbours is in one row.
    Segment ids count the documents of a row from 1; 0 is the padding of the last row. Tokens are
    read when their row is.

    >>> rows = training.PackedRows(corpus, seq_len=6)
    >>> first = rows.read(np.arange(1))
    >>> print(first.tokens, first.segment_ids)
    [[0 1 2 3 4 0 1]] [[1 1 1 1 1 2 2]]
    """

    def __init__(self, corpus: Corpus, seq_len: int):
        """**Arguments:**

        - `corpus`: the documents, packed in their order.
        - `seq_len`: positions in a row, at least 1.

        **Raises:** `ValueError` if it is not.
        """
        self._corpus = corpus
        self._seq_len = check_integer("seq_len", seq_len, at_least=1)
        self._ends = np.cumsum(corpus.lengths)
        # A permutation of many rows takes long, and serves for an epoch.
        self._order_of = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return max(1, -(-(self._corpus.num_tokens - 1) // self._seq_len))

    def read(self, rows: np.ndarray) -> Rows:
        """The rows of these indices `[… batch]`, on the host."""
        columns = np.arange(self._seq_len + 1)
        where = rows[..., None] * self._seq_len + columns
        exists = where < self._corpus.num_tokens
        where = np.minimum(where, self._corpus.num_tokens - 1)
        documents = np.searchsorted(self._ends, where, side="right")
        within = where - (self._ends - self._corpus.lengths)[documents]
        starts = np.diff(documents, axis=-1, prepend=documents[..., :1]) != 0
        segment_ids = np.where(exists, 1 + np.cumsum(starts, axis=-1), 0)
        return Rows(
            tokens=np.where(exists, self._corpus.read(documents, within), 0).astype(np.int32),
            segment_ids=segment_ids.astype(np.int32),
        )

    def in_order(self, batch_size: int, max_rows: int) -> Iterator[np.ndarray]:
        """The indices of the first rows, in full batches; a short one ends in padding."""
        num_rows = min(len(self), max_rows)
        for start in range(0, num_rows, batch_size):
            # Rows beyond the end are nothing but padding.
            rows = np.arange(start, start + batch_size)
            yield np.where(rows < num_rows, rows, len(self) + 1)

    def of_step(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """The indices of a step's rows; epochs are shuffled, and all follows from the arguments."""
        indices = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, within = np.divmod(indices, len(self))
        rows = np.empty_like(indices)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            rows[of_epoch] = self._order_of(seed, int(epoch))[within[of_epoch]]
        return rows

    def _shuffled(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(self))
