"""Prompts and end tokens, as users give them, to arrays."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from .._checks import check_draft_ids, check_ids, check_integer
from .._types import HostOrDeviceArray, at_hand
from ..cross_entropy import LinearHead, head_vocab_size

EndIds: TypeAlias = int | np.integer | Sequence[Any] | Integer[HostOrDeviceArray, "*ends"] | None
"""The token that ends a row, or several, or none."""

DraftVocab: TypeAlias = Sequence[Any] | Integer[HostOrDeviceArray, "draft_vocab"] | None
"""The token ids that may be drafted; `None` for all."""


def check_draft_vocab(draft_vocab: Any, head: Any) -> Array | None:
    """Checked, as int32."""
    if draft_vocab is None:
        return None
    vocab_size = check_rows(head)
    ids = _integers("draft_vocab", draft_vocab, 1)
    if isinstance(ids, np.ndarray) or ids.size == 0:
        check_draft_ids(np.asarray(ids), vocab_size)
    return jnp.asarray(ids, jnp.int32)


def check_rows(head: Any) -> int:
    """How many rows an output head has.

    **Raises:** `ValueError` for a head that is neither a matrix nor a `LinearHead`.
    """
    vocab_size = head_vocab_size(head)
    if vocab_size is None:
        raise ValueError(
            "`draft_vocab` needs an output head that is a matrix or a `LinearHead`; got a "
            f"`{type(head).__name__}`. Leave it out to draft from all ids."
        )
    return vocab_size


def linear_head(head: Any) -> LinearHead:
    """**Raises:** `ValueError` for a head that is neither a matrix nor a `LinearHead`."""
    check_rows(head)
    return head if isinstance(head, LinearHead) else LinearHead(head)


def check_end_ids(eos_id: Any, vocab_size: int | None) -> Array:
    """One id, or an axis of several; -1 for none."""
    at_most = 2**31 - 1 if vocab_size is None else vocab_size - 1
    if isinstance(eos_id, jax.Array | np.ndarray):
        eos_id = at_hand(eos_id)
        if not isinstance(eos_id, np.ndarray):
            return eos_id.astype(jnp.int32)
        eos_id = eos_id.tolist()
    several = eos_id if isinstance(eos_id, Sequence) else () if eos_id is None else (eos_id,)
    ids = [check_integer("eos_id", x, at_least=0, at_most=at_most) for x in several]
    return jnp.asarray(ids if len(ids) > 1 else ids[0] if ids else -1, jnp.int32)


def check_prompts(
    prompt_ids: Any, prompt_lengths: Any, vocab_size: int | None
) -> tuple[Array, Array]:
    """Checked, as int32."""
    rows = _integers("prompt_ids", prompt_ids, 2)
    batch, prompt = rows.shape
    if prompt < 1:
        raise ValueError(
            "`prompt_ids` must have at least one token a row; got rows of none. Begin with a token "
            "such as the end of a document."
        )
    if prompt_lengths is None:
        prompt_lengths = np.full(batch, prompt, np.int32)
    lengths = _integers("prompt_lengths", prompt_lengths, 1)
    if lengths.shape != (batch,):
        raise ValueError(
            f"`prompt_lengths` must be one a row of `prompt_ids`, {batch}; got {lengths.shape[0]}."
        )
    if isinstance(lengths, np.ndarray):
        low, high = int(np.min(lengths, initial=prompt)), int(np.max(lengths, initial=1))
        if low < 1 or high > prompt:
            raise ValueError(
                f"`prompt_lengths` must lie in 1 … {prompt}, the length of the rows; got {low} … "
                f"{high}."
            )
        is_prompt = np.arange(prompt) < lengths[:, None]
        if isinstance(rows, np.ndarray):
            check_ids("prompt_ids", rows[is_prompt], vocab_size)
            rows = np.where(is_prompt, rows, 0)
    return jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32)


def _integers(name: str, values: Any, num_axes: int) -> Any:
    """An array of NumPy if its values can be read, and of JAX otherwise."""
    if _has_text(values):
        raise ValueError(
            f"`{name}` must be integers, such as token ids; got text. Encode it first: with a "
            "`tokenizers.Tokenizer` by `[tokenizer.encode(text).ids]`."
        )
    try:
        array = at_hand(values)
    except ValueError:  # rows that differ in length
        raise ValueError(
            f"`{name}` must have rows of one length. Pad them at their ends, and give "
            "`prompt_lengths`."
        ) from None
    if array.ndim != num_axes:
        shape = (
            "one axis, such as [3, 7]" if num_axes == 1 else "two axes, such as [[5, 6], [9, 3]]"
        )
        raise ValueError(f"`{name}` must have {shape}; got the shape {array.shape}.")
    if array.size == 0 and not np.issubdtype(array.dtype, np.integer):
        return array.astype(np.int32)  # an empty list is one of floats
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"`{name}` must be integers; got {array.dtype}.")
    return array


def _has_text(values: Any) -> bool:
    if isinstance(values, str | bytes):
        return True
    return isinstance(values, list | tuple) and any(map(_has_text, values))
