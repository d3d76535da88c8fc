"""Losses of an output head, from hidden states, without the logits.

    linear_cross_entropy ─────────┐
    summed_linear_cross_entropy ──┼─► _token_losses     each token's loss; logits are computed twice
    summed_cross_entropy_by_depth ┼─► _weighted_losses  sums; gradients come with the forward pass
                                  └─► _callable_head    any callable; JAX's own gradients
    linear_divergence ──────────────► _token_divergences  from a teacher; gradients come with it
                                            │
                                            ▼
                                      _partitioning     each device's own part, on a mesh
                                      _token_tiles      a loop over tiles of tokens
                                      _vocab_tiles      for each of them, loops over tiles of ids
                                      _linear_head      the logits of one tile

`_divergences` has their formulas. `_tile_sizes` says how large tiles are on each platform.
"""

from ._divergences import Divergence
from ._linear_cross_entropy import (
    CrossEntropy,
    SummedCrossEntropy,
    linear_cross_entropy,
    summed_cross_entropy_by_depth,
    summed_linear_cross_entropy,
)
from ._linear_divergence import LinearDivergence, linear_divergence
from ._linear_head import LinearHead, head_vocab_size

__all__ = [
    "CrossEntropy",
    "Divergence",
    "LinearDivergence",
    "LinearHead",
    "SummedCrossEntropy",
    "head_vocab_size",
    "linear_cross_entropy",
    "linear_divergence",
    "summed_cross_entropy_by_depth",
    "summed_linear_cross_entropy",
]
