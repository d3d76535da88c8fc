"""The loops over the vocabulary, for one tile of tokens on one device.

The forward loop is an online softmax: it keeps, of the ids it has been through, the highest logit m
and s = Σ exp(logit - m). A tile with a higher maximum m' turns s into s · exp(m - m') and adds its
own Σ exp(logit - m'). At the end log s + m is the log-sum-exp, and no exponential has overflowed
(Milakov and Gimelshein, arXiv 1805.02867).

The backward loop has softmax = exp(logit - m) / s and multiplies it, less the onehot of the target,
by the head's rows and by the hidden states. The forward loop may hand it the exponentials.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int32, Integer

from .._platform import accumulation_dtype
from ._linear_head import LinearHead
from ._tile_sizes import unscaled_dtype


class VocabSums(NamedTuple):
    """What a pass over (a part of) the vocabulary knows of each token.

    `max_logit` is the highest logit and `sum_exp` Σ_v exp(logits[v] - max_logit); `best_id` is the
    first id with the highest logit, or `None` if it was not asked for.
    """

    max_logit: Float[Array, "*tokens"]
    sum_exp: Float[Array, "*tokens"]
    target_logit: Float[Array, "*tokens"]
    best_id: Int32[Array, "*tokens"] | None

    @property
    def normalizer(self) -> "Normalizer":
        """What the softmax divides by."""
        return Normalizer(self.max_logit, jnp.log(self.sum_exp))

    @property
    def negative_log_likelihood(self) -> Float[Array, "*tokens"]:
        """log Σ_v exp(logits[v]) - target_logit.

        An offset that all logits share is taken off before the two small numbers are compared:
        in `log_sum_exp - target_logit` it would have rounded the loss away.
        """
        return jnp.log(self.sum_exp) - (self.target_logit - self.max_logit)

    @property
    def predictions(self) -> Int32[Array, "*tokens"] | None:
        """The best ids; -1 where logits are not finite, so that no id is best."""
        if self.best_id is None:
            return None
        return jnp.where(jnp.isfinite(jnp.log(self.sum_exp)), self.best_id, -1)

    def over_devices(self, axes: tuple[str, ...], first_id: Array | int) -> "VocabSums":
        """Joins what the devices along mesh axes know of their parts, which begin at `first_id`."""
        # As in `sum_over_vocabulary`, the maximum needs no derivative; `pmax` has none.
        max_logit = lax.pmax(lax.stop_gradient(self.max_logit), axes)
        best_id = self.best_id
        if best_id is not None:
            no_id = jnp.iinfo(jnp.int32).max
            best_id = jnp.where(self.max_logit == max_logit, best_id + first_id, no_id)
            best_id = lax.pmin(best_id, axes)
        return VocabSums(
            max_logit=max_logit,
            sum_exp=lax.psum(self.sum_exp * jnp.exp(self.max_logit - max_logit), axes),
            target_logit=lax.psum(self.target_logit, axes),
            best_id=best_id,
        )


class Normalizer(NamedTuple):
    """The log-sum-exp of each token's logits, as the sum of two numbers of different size.

    A softmax is exp((logits - max_logit) - log_sum): if all logits are large, `max_logit` is large,
    and their sum would be rounded to its spacing, which may be more than the softmax's exponent.
    """

    max_logit: Float[Array, "*tokens"]
    log_sum: Float[Array, "*tokens"]

    @property
    def log_sum_exp(self) -> Float[Array, "*tokens"]:
        """log Σ_v exp(logits[v])."""
        return self.max_logit + self.log_sum


class TileResiduals(NamedTuple):
    """A tile of tokens, as the pass over the vocabulary leaves it for the backward pass.

    `values` are exp(logits - max_logit), with `max_logit` each tile's own: so the softmax takes no
    second exponential. Under a soft-cap they are the logits, which its derivative needs.
    """

    values: Float[Array, "tiles batch seq vocab_tile"]
    max_logit: Float[Array, "tiles batch seq"]


class _Tile(NamedTuple):
    """A tile's rows of the head, its first id, and which of its ids no tile before it had."""

    head: LinearHead
    start: Array
    is_new: Array | None


def zero_gradient(head: LinearHead, dtype: DTypeLike) -> LinearHead:
    """A gradient of the head to add to, in the dtype in which it is accumulated."""
    return jax.tree.map(lambda x: _zeros_like(x, dtype), head)


def gradient_over_devices(gradient: LinearHead, head: LinearHead) -> LinearHead:
    """The gradient from all devices' tokens, in a dtype that is as wide as it need be.

    That is the dtype of the parameters, unless a factor that is still to come may bring the
    gradient into its range.
    """
    total = lax.psum(gradient, head.token_axes) if head.token_axes else gradient
    return jax.tree.map(lambda x, like: x.astype(unscaled_dtype(like.dtype)), total, head)


def _zeros_like(x: Array, dtype: DTypeLike) -> Float[Array, "..."]:
    # Not `zeros(x.shape)`: in a `shard_map` the type says on which devices `x` differs.
    return jnp.zeros_like(x, dtype)


def _tile_size(head: LinearHead) -> int:
    """The size of `_num_tiles` tiles, as even as can be."""
    return -(-head.weight.shape[0] // _num_tiles(head))


def _num_tiles(head: LinearHead) -> int:
    return -(-head.weight.shape[0] // head.ids_at_a_time)


def _take_tile(head: LinearHead, index: Array) -> _Tile:
    """If no size divides the vocabulary, the last tile begins earlier and overlaps others."""
    vocab, size = head.weight.shape[0], _tile_size(head)
    start = jnp.minimum(index * size, vocab - size)
    ids = start + jnp.arange(size)
    return _Tile(
        head=jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), head),
        start=start,
        is_new=None if vocab % size == 0 else ids >= index * size,
    )


def _tile_logits(hidden_states: Array, tile: _Tile) -> Array:
    logits = tile.head.logits(hidden_states)
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
) -> tuple[VocabSums, TileResiduals | None]:
    """One pass over the vocabulary, with a running maximum."""

    def visit(sums: VocabSums, index: Array) -> tuple[VocabSums, TileResiduals | None]:
        tile = _take_tile(head, index)
        logits = _tile_logits(hidden_states, tile)
        # Finite also for a tile whose ids are all ruled out by a bias of -inf. What is subtracted
        # from all logits alike changes no loss: it needs no derivative.
        tile_max = jnp.maximum(jnp.max(lax.stop_gradient(logits), axis=-1), lowest)
        exponentials = jnp.exp(logits - tile_max[..., None])
        max_logit = jnp.maximum(sums.max_logit, tile_max)
        sum_exp = sums.sum_exp * jnp.exp(sums.max_logit - max_logit)
        sum_exp += jnp.exp(tile_max - max_logit) * jnp.sum(exponentials, axis=-1)
        is_target = _is_target(target_ids, tile, logits)
        target_logit = sums.target_logit + jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        best_id = sums.best_id
        if best_id is not None:
            first = tile.start + _first_index(logits, tile_max)
            best_id = jnp.where(tile_max > sums.max_logit, first, best_id)
        kept = logits if head.soft_cap is not None else exponentials
        return VocabSums(max_logit, sum_exp, target_logit, best_id), (
            TileResiduals(kept, tile_max) if keep_tiles else None
        )

    dtype = accumulation_dtype(hidden_states)
    lowest = jnp.finfo(dtype).min
    zeros = _zeros_like(target_ids, dtype)
    start = VocabSums(
        max_logit=jnp.full_like(zeros, lowest),
        sum_exp=zeros,
        target_logit=zeros,
        best_id=jnp.zeros_like(target_ids, jnp.int32) if predictions else None,
    )
    return lax.scan(visit, start, jnp.arange(_num_tiles(head), dtype=jnp.int32))


def _first_index(logits: Array, max_logit: Array) -> Array:
    """`argmax`, as a minimum over ids: unlike a reduction over pairs it runs in vector lanes."""
    size = logits.shape[-1]
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits == max_logit[..., None], ids, size - 1), axis=-1)


def backward_over_vocabulary(
    head: LinearHead,
    hidden_states: Float[Array, "batch seq embed"],
    target_ids: Integer[Array, "batch seq"],
    normalizer: Normalizer,
    *,
    softmax_weight: Float[Array, "batch seq"],
    target_weight: Float[Array, "batch seq"],
    head_gradient: LinearHead,
    depth_weight: Float[Array, ""] | float = 1.0,
    tile_residuals: TileResiduals | None = None,
) -> tuple[Float[Array, "batch seq embed"], LinearHead]:
    """Pulls a cotangent of the logits, `softmax_weight · softmax - target_weight · onehot`, back.

    Tiles that were not kept are computed again.

    **Returns:** the hidden states' gradient, and `head_gradient` plus `depth_weight` times the
    gradient of the head.
    """
    max_logit, log_sum = normalizer
    scale = scale_into_range(hidden_states.dtype, softmax_weight, target_weight)
    softmax_weight, target_weight = softmax_weight * scale, target_weight * scale

    def softmax_and_logits(tile: _Tile, kept: TileResiduals | None) -> tuple[Array, Array | None]:
        if kept is None or head.soft_cap is not None:
            logits = _tile_logits(hidden_states, tile) if kept is None else kept.values
            return jnp.exp((logits - max_logit[..., None]) - log_sum[..., None]), logits
        return kept.values * jnp.exp((kept.max_logit - max_logit) - log_sum)[..., None], None

    def visit(
        carry: tuple[Array, LinearHead], inputs: tuple[Array, TileResiduals | None]
    ) -> tuple[tuple[Array, LinearHead], None]:
        hidden_gradient, head_gradient = carry
        index, kept = inputs
        tile = _take_tile(head, index)
        softmax, logits = softmax_and_logits(tile, kept)
        cotangent = softmax_weight[..., None] * softmax
        is_target = _is_target(target_ids, tile, softmax)
        cotangent -= jnp.where(is_target, target_weight[..., None], 0.0)
        if logits is not None:
            cotangent = head.cotangent(logits, cotangent)
        # Not left to the factor 0: logits that overflow have a softmax of NaN.
        counts = is_scored if tile.is_new is None else is_scored & tile.is_new
        cotangent = jnp.where(counts, cotangent, 0.0)
        low = cotangent.astype(hidden_states.dtype)
        hidden_gradient += jnp.einsum(
            "bsv,ve->bse", low, tile.head.weight.astype(low.dtype), preferred_element_type=dtype
        )
        weight = jnp.einsum("bsv,bse->ve", low, hidden_states, preferred_element_type=dtype)
        bias = None if head.bias is None else tile_weight * jnp.sum(cotangent, axis=(0, 1))
        tile_gradient = head.with_arrays(tile_weight * weight, bias)
        return (hidden_gradient, _add_tile(head_gradient, tile_gradient, tile.start)), None

    dtype = accumulation_dtype(hidden_states)
    tile_weight = depth_weight / scale
    is_scored = ((softmax_weight != 0) | (target_weight != 0))[..., None]
    start = (_zeros_like(hidden_states, dtype), head_gradient)
    indices = jnp.arange(_num_tiles(head), dtype=jnp.int32)
    (hidden_gradient, head_gradient), _ = lax.scan(visit, start, (indices, tile_residuals))
    return hidden_gradient / scale, head_gradient


def scale_into_range(dtype: DTypeLike, *weights: Array) -> Array | float:
    """A power of two that brings weights times a softmax into the range of `dtype`.

    With the largest weight at 4096, float16 holds the softmax down to 2^-36 of it. Without, a
    weight of one in 8192 tokens would leave nothing of ids that are as likely as one in 2048. The
    power is bounded: of weights as small as 1e-36 it would be infinite in float32.
    """
    if unscaled_dtype(dtype) == dtype:
        return 1.0
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in weights]))
    largest = lax.stop_gradient(jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1.0))
    limit = min(12, jnp.finfo(dtype).maxexp - 3)
    return jnp.exp2(jnp.minimum(limit - jnp.ceil(jnp.log2(largest)), 120))


def _add_tile(gradient: LinearHead, tile: LinearHead, start: Array) -> LinearHead:
    """Adds in place: nothing of the head's size is made."""

    def add(total: Array, part: Array) -> Array:
        part += lax.dynamic_slice_in_dim(total, start, part.shape[0])
        return lax.dynamic_update_slice_in_dim(total, part, start, axis=0)

    return jax.tree.map(add, gradient, tile)
