"""Layers of several depths as one.

JAX has one structure for what is stacked: that of the first layer. So whatever is no array must
mean the same in all of them.
"""

from ._stack_layers import stack_layers as stack_layers
