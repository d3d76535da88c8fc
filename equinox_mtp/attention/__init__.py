"""Causal attention without the square of logits in memory.

    causal_attention ─────────────┐
    causal_attention_by_position ─┴─► _choice           which implementation, from platform and call
                                            │
                      ┌─────────────────────┼──────────────────┐
                      ▼                     ▼                  ▼
                  _partitioning      _implementations      (a mesh: each
                      │              dense, cuDNN, splash   device's part)
                      ▼
                  _tiled                the derivative, and the ring of devices
                  _tiles                the loops over tiles of queries and keys

Both functions are `nn`'s too.
"""

from ._choice import AttentionCall, AttentionImplementation, attention_implementation
from ._functions import AttentionFunction, causal_attention, causal_attention_by_position

__all__ = [
    "AttentionCall",
    "AttentionFunction",
    "AttentionImplementation",
    "attention_implementation",
    "causal_attention",
    "causal_attention_by_position",
]
