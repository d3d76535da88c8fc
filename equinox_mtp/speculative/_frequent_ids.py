"""Which token ids are worth drafting."""

import numpy as np
from jaxtyping import Int32, Integer

from .._checks import check_integer
from .._types import HostOrDeviceArray, checked


@checked
def frequent_ids(
    counts: Integer[HostOrDeviceArray, "vocab"], size: int | np.integer
) -> Int32[np.ndarray, "draft_vocab"]:
    """The `size` most frequent token ids of a text, in ascending order, for `draft_vocab`.

    Few ids make up most of a text: drafts from them alone are nearly as often right, and read a
    part of the output head (FR-Spec, arXiv 2502.14856).

    >>> counts = np.bincount([7, 2, 7, 3, 2, 7, 9])
    >>> emtp.speculative.frequent_ids(counts, size=2)
    array([2, 7], dtype=int32)

    **Arguments:**

    - `counts`: how often each token id occurs, as `np.bincount(tokens)` tells.
    - `size`: how many ids, at least 1.

    **Returns:** that many ids, or all that occur if these are fewer. Of ids that are equally
    frequent the lowest are taken.

    **Raises:** `ValueError` for a size below 1, or counts of which none is positive.
    """
    size = check_integer("size", size, at_least=1)
    counts = np.asarray(counts)
    most_frequent_first = np.argsort(-counts.astype(np.int64), kind="stable")[:size]
    ids = most_frequent_first[counts[most_frequent_first] > 0]
    if ids.size == 0:
        raise ValueError(
            "`counts` must count at least one token; got none. Make them by `np.bincount(tokens)`."
        )
    return np.sort(ids).astype(np.int32)
