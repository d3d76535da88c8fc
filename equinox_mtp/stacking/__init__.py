"""Layers of several depths as one.

Stacked layers have one structure in JAX, the first layer's. So whatever is not an array must
mean the same in all of them.
"""

from ._stack_layers import are_alike, layer_shapes, stack_layers

__all__ = [
    "are_alike",
    "layer_shapes",
    "stack_layers",
]
