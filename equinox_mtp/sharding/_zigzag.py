"""Orders of positions that give all devices of a split sequence the same work."""

from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from .._types import checked

Tree = TypeVar("Tree")


@checked
def zigzag_order(seq: int, num_shards: int) -> Int[np.ndarray, "seq"]:
    """Which position stands where, if a row lies on `num_shards` devices.

    The row is cut into `2 · num_shards` chunks; device i gets the i-th from the front and the i-th
    from the back. Under causal attention the one has as much less to attend to as the other has
    more (the dual-chunk ordering of Llama 3, arXiv 2407.21783, §3.3.2, and of Megatron-LM).

    >>> print(emtp.sharding.zigzag_order(8, num_shards=2))  # of each device its four
    [0 1 6 7 2 3 4 5]

    **Raises:** `ValueError` if `seq` is no multiple of `2 · num_shards`.
    """
    if num_shards < 1 or seq % (2 * num_shards):
        raise ValueError(
            f"`seq` must be a multiple of twice `num_shards`; got {seq} and {num_shards}. Pad the "
            "rows, or choose another length."
        )
    chunks = np.arange(seq, dtype=np.int32).reshape(2 * num_shards, -1)
    front, back = chunks[:num_shards], chunks[num_shards:][::-1]
    return np.stack((front, back), axis=1).reshape(seq)


@checked
def reorder(tree: Tree, order: Int[np.ndarray, "seq"]) -> Tree:
    """Puts the last axis of every array in this order; `None` stays.

    For integers, on the host, before they are split: inputs, targets, masks, positions, segment
    ids, and the `MTPTargets` of `align_targets`. These are aligned before they are put in another
    order: which token a depth predicts follows from the order of the text.

    >>> order = emtp.sharding.zigzag_order(8, num_shards=2)
    >>> reordered = emtp.sharding.reorder(batch.align(num_depths=2), order)
    >>> print(reordered.input_ids[0])
    [0 1 6 7 2 3 4 5]

    **Arguments:**

    - `tree`: a pytree of arrays `[… seq]`.
    - `order`: of `zigzag_order`, or another permutation.

    **Returns:** the same tree, with `x[..., order]` in place of each `x`.

    **Raises:** `ValueError` if a last axis has another length than `order`, or `order` is not a
    permutation.
    """
    return _along_last_axis(tree, order)


@checked
def restore(tree: Tree, order: Int[np.ndarray, "seq"]) -> Tree:
    """The inverse of `reorder`, with its arguments: puts predictions in the order of the text.

    >>> order = emtp.sharding.zigzag_order(8, num_shards=2)
    >>> print(emtp.sharding.restore(np.asarray([0, 1, 6, 7, 2, 3, 4, 5]), order))
    [0 1 2 3 4 5 6 7]
    """
    _along_last_axis((), order)  # for its check
    return _along_last_axis(tree, np.argsort(order))


def _along_last_axis(tree: Any, order: np.ndarray) -> Any:
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError(
            f"`order` must hold each of 0 … {len(order) - 1} once; got {order.tolist()!s:.80}. "
            "Make it with `zigzag_order`."
        )

    def take(x: Any) -> Any:
        if x.shape[-1] != len(order):
            raise ValueError(
                f"`tree` must hold arrays whose last axis has the {len(order)} positions of "
                f"`order`; got shape {x.shape}."
            )
        return x[..., order]

    return jax.tree.map(take, tree)
