"""Causal attention without the square of logits in memory.

    causal_attention ─────────────┐
    causal_attention_by_position ─┴─► _choice           which implementation, from platform and call
                                            │
                                            ▼
                                      _partitioning     each device's own part, on a mesh
                                            │
                                ┌───────────┴───────────┐
                                ▼                       ▼
                        _implementations             _tiled     the derivative, and the ring
                      dense, cuDNN, splash              │
                                                        ▼
                                                     _tiles     the loops over tiles

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
