"""The loops over the vocabulary, for one tile of tokens on one device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Integer

from ._head import LinearHead


class VocabSums(NamedTuple):
    """What a pass over (a part of) the vocabulary knows of each token.

    `highest` is the highest logit and `scaled_sum` Σ_v exp(logits[v] - highest); `best_id` is the
    first id with the highest logit, or `None` if it was not asked for.
    """

    highest: Float32[Array, "*tokens"]
    scaled_sum: Float32[Array, "*tokens"]
    target_logit: Float32[Array, "*tokens"]
    best_id: Int32[Array, "*tokens"] | None

    @property
    def log_sum_exp(self) -> Float32[Array, "*tokens"]:
        """log Σ_v exp(logits[v])."""
        return self.highest + jnp.log(self.scaled_sum)

    def over_devices(self, axes: tuple[str, ...], first_id: Array | int) -> "VocabSums":
        """Joins what the devices along mesh axes know of their parts, which begin at `first_id`."""
        highest = lax.pmax(self.highest, axes)
        best_id = self.best_id
        if best_id is not None:
            no_id = jnp.iinfo(jnp.int32).max
            best_id = jnp.where(self.highest == highest, best_id + first_id, no_id)
            best_id = lax.pmin(best_id, axes)
        return VocabSums(
            highest=highest,
            scaled_sum=lax.psum(self.scaled_sum * jnp.exp(self.highest - highest), axes),
            target_logit=lax.psum(self.target_logit, axes),
            best_id=best_id,
        )


class HeadGradient(NamedTuple):
    """The gradient of the head, accumulated in float32."""

    weight: Float32[Array, "vocab embed"]
    bias: Float32[Array, "vocab"] | None

    @classmethod
    def zeros(cls, head: LinearHead) -> "HeadGradient":
        """No gradient yet."""
        return cls(*jax.tree.map(_zeros_like, (head.weight, head.bias)))

    def over_devices(self, head: LinearHead) -> tuple[Array, Array | None]:
        """The gradient from all devices' tokens, in the dtype of the head's parameters."""
        total = lax.psum(self, head.token_axes) if head.token_axes else self
        weight = total.weight.astype(head.weight.dtype)
        if head.bias is None or total.bias is None:
            return weight, None
        return weight, total.bias.astype(head.bias.dtype)


class KeptTiles(NamedTuple):
    """A tile of tokens, as the pass over the vocabulary leaves it for the backward pass.

    `values` are exp(logits - highest), with `highest` each tile's own: so the softmax takes no
    second exponential. Under a soft-cap they are the logits, which its derivative needs.
    """

    values: Float32[Array, "tiles batch seq vocab_tile"]
    highest: Float32[Array, "tiles batch seq"]


class _Tile(NamedTuple):
    """A tile's rows of the head, its first id, and which of its ids no tile before it had."""

    weight: Array
    bias: Array | None
    start: Array
    is_new: Array | None


def _zeros_like(x: Array) -> Float32[Array, "..."]:
    # Not `zeros(x.shape)`: in a `shard_map` the type says on which devices `x` differs.
    return jnp.zeros_like(x, jnp.float32)


def _tile_size(head: LinearHead) -> int:
    """The size of `_num_tiles` tiles, as even as can be."""
    return -(-head.weight.shape[0] // _num_tiles(head))


def _num_tiles(head: LinearHead) -> int:
    return -(-head.weight.shape[0] // head.vocab_tile)


def _take_tile(head: LinearHead, index: Array) -> _Tile:
    """If no size divides the vocabulary, the last tile begins earlier and overlaps others."""
    vocab, size = head.weight.shape[0], _tile_size(head)
    start = jnp.minimum(index * size, vocab - size)
    ids = start + jnp.arange(size)
    return _Tile(
        weight=lax.dynamic_slice_in_dim(head.weight, start, size),
        bias=None if head.bias is None else lax.dynamic_slice_in_dim(head.bias, start, size),
        start=start,
        is_new=None if vocab % size == 0 else ids >= index * size,
    )


def _tile_logits(head: LinearHead, hidden_states: Array, tile: _Tile) -> Array:
    logits = head.logits(hidden_states, tile.weight, tile.bias)
    return logits if tile.is_new is None else jnp.where(tile.is_new, logits, -jnp.inf)


def _is_target(target_ids: Array, tile: _Tile, values: Array) -> Array:
    # Not of the targets' dtype, which may be too narrow for all ids of the vocabulary.
    ids = tile.start + lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    is_target = ids == target_ids[..., None]
    return is_target if tile.is_new is None else is_target & tile.is_new


def sum_over_vocabulary(
    head: LinearHead,
    hidden_states: Float[Array, "batch seq embed"],
    target_ids: Integer[Array, "batch seq"],
    *,
    predictions: bool,
    keep_tiles: bool = False,
) -> tuple[VocabSums, KeptTiles | None]:
    """One pass over the vocabulary, with a running maximum."""

    def visit(sums: VocabSums, index: Array) -> tuple[VocabSums, KeptTiles | None]:
        tile = _take_tile(head, index)
        logits = _tile_logits(head, hidden_states, tile)
        # Finite also for a tile whose ids are all ruled out by a bias of -inf.
        tile_highest = jnp.maximum(jnp.max(logits, axis=-1), jnp.finfo(jnp.float32).min)
        exponentials = jnp.exp(logits - tile_highest[..., None])
        highest = jnp.maximum(sums.highest, tile_highest)
        scaled_sum = sums.scaled_sum * jnp.exp(sums.highest - highest)
        scaled_sum += jnp.exp(tile_highest - highest) * jnp.sum(exponentials, axis=-1)
        is_target = _is_target(target_ids, tile, logits)
        target_logit = sums.target_logit + jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        best_id = sums.best_id
        if best_id is not None:
            first = tile.start + _first_index(logits, tile_highest)
            best_id = jnp.where(tile_highest > sums.highest, first, best_id)
        kept = logits if head.soft_cap is not None else exponentials
        return VocabSums(highest, scaled_sum, target_logit, best_id), (
            KeptTiles(kept, tile_highest) if keep_tiles else None
        )

    zeros = _zeros_like(target_ids)
    start = VocabSums(
        highest=jnp.full_like(zeros, jnp.finfo(jnp.float32).min),
        scaled_sum=zeros,
        target_logit=zeros,
        best_id=jnp.zeros_like(target_ids, jnp.int32) if predictions else None,
    )
    return lax.scan(visit, start, jnp.arange(_num_tiles(head), dtype=jnp.int32))


def _first_index(logits: Array, highest: Array) -> Array:
    """`argmax`, as a minimum over ids: unlike a reduction over pairs it runs in vector lanes."""
    size = logits.shape[-1]
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits == highest[..., None], ids, size - 1), axis=-1)


def backward_over_vocabulary(
    head: LinearHead,
    hidden_states: Float[Array, "batch seq embed"],
    target_ids: Integer[Array, "batch seq"],
    log_sum_exp: Float32[Array, "batch seq"],
    *,
    softmax_weight: Float32[Array, "batch seq"],
    target_weight: Float32[Array, "batch seq"],
    head_gradient: HeadGradient,
    head_weight: Float32[Array, ""] | float = 1.0,
    kept_tiles: KeptTiles | None = None,
) -> tuple[Float32[Array, "batch seq embed"], HeadGradient]:
    """Pulls a cotangent of the logits, `softmax_weight · softmax - target_weight · onehot`, back.

    Tiles that were not kept are computed again.

    **Returns:** the hidden states' gradient, and `head_gradient` plus `head_weight` times the
    head's.
    """

    def softmax_and_logits(tile: _Tile, kept: KeptTiles | None) -> tuple[Array, Array | None]:
        if kept is None or head.soft_cap is not None:
            logits = _tile_logits(head, hidden_states, tile) if kept is None else kept.values
            return jnp.exp(logits - log_sum_exp[..., None]), logits
        return kept.values * jnp.exp(kept.highest - log_sum_exp)[..., None], None

    def visit(
        carry: tuple[Array, HeadGradient], inputs: tuple[Array, KeptTiles | None]
    ) -> tuple[tuple[Array, HeadGradient], None]:
        hidden_gradient, head_gradient = carry
        index, kept = inputs
        tile = _take_tile(head, index)
        softmax, logits = softmax_and_logits(tile, kept)
        cotangent = softmax_weight[..., None] * softmax
        is_target = _is_target(target_ids, tile, softmax)
        cotangent -= jnp.where(is_target, target_weight[..., None], 0.0)
        if logits is not None:
            cotangent = head.cotangent(logits, cotangent)
        if tile.is_new is not None:
            cotangent = jnp.where(tile.is_new, cotangent, 0.0)
        low = cotangent.astype(hidden_states.dtype)
        hidden_gradient += jnp.einsum(
            "bsv,ve->bse", low, tile.weight.astype(low.dtype), preferred_element_type=jnp.float32
        )
        weight = jnp.einsum("bsv,bse->ve", low, hidden_states, preferred_element_type=jnp.float32)
        tile_gradient = HeadGradient(
            head_weight * weight,
            None if tile.bias is None else head_weight * jnp.sum(cotangent, axis=(0, 1)),
        )
        return (hidden_gradient, _add_tile(head_gradient, tile_gradient, tile.start)), None

    start = (_zeros_like(hidden_states), head_gradient)
    indices = jnp.arange(_num_tiles(head), dtype=jnp.int32)
    return lax.scan(visit, start, (indices, kept_tiles))[0]


def _add_tile(gradient: HeadGradient, tile: HeadGradient, start: Array) -> HeadGradient:
    """Adds in place: nothing of the head's size is made."""

    def add(total: Array, part: Array) -> Array:
        part += lax.dynamic_slice_in_dim(total, start, part.shape[0])
        return lax.dynamic_update_slice_in_dim(total, part, start, axis=0)

    return jax.tree.map(add, gradient, tile)
