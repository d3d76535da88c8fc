"""The axis words that every annotation and docstring of the library uses.

| word | meaning |
|---|---|
| `batch` | rows of a batch |
| `seq` | positions in a row |
| `embed` | features of a hidden state |
| `vocab` | token ids |
| `depth` | prediction depths 1 … D of Multi-Token Prediction, always the leading axis |
| `heads` | query heads of attention |
| `kv_heads` | key and value heads of attention |
| `head_dim` | features of one head |
| `mlp` | features inside the feed-forward network |
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from beartype import beartype
from jax import Array
from jaxtyping import Float, jaxtyped

AXIS_WORDS = frozenset(
    ("batch", "seq", "embed", "vocab", "depth", "heads", "kv_heads", "head_dim", "mlp")
)
"""Those of the table above."""

checked = jaxtyped(typechecker=beartype)
"""Checks the annotated shapes, dtypes and types of every call; free inside a cached jit."""

HostOrDeviceArray: TypeAlias = Array | np.ndarray
"""Integer batches come from data pipelines, where they are often NumPy arrays still."""

OutputHead: TypeAlias = Float[Array, "vocab embed"] | Callable[[Array], Array]
"""From final hidden states to logits: a matrix, a `LinearHead`, or a callable
`[batch seq embed] -> [batch seq vocab]`."""

MakeLayer: TypeAlias = Callable[..., Any]
"""`make_layer(key=key)` builds a fresh `AbstractDecoderLayer`."""
