"""Which depths are trained when."""

from typing import Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float32

from ._checks import check_integer
from ._losses import check_not_negative
from ._types import Scalar, checked

Curriculum: TypeAlias = Literal["forward", "reverse"]


@checked
def curriculum_depth_weights(
    num_depths: int, progress: Scalar, order: Curriculum = "forward"
) -> Float32[Array, "depth"]:
    """Depth weights of a curriculum (arXiv 2505.22757): training is cut into D + 1 equal parts.

    - `"forward"`: the main model trains alone in the first part, and each part after it adds a
      depth, so that small models learn to predict one token before they predict several;
    - `"reverse"`: all depths train in the first part, and each part after it leaves one out.

    >>> print(emtp.curriculum_depth_weights(num_depths=2, progress=0.4))
    [1. 0.]
    >>> print(emtp.curriculum_depth_weights(num_depths=2, progress=0.4, order="reverse"))
    [1. 0.]

    **Arguments:**

    - `num_depths`: the number of depths D.
    - `progress`: the share of training that is done, in [0, 1]. May be traced.
    - `order`: see above.

    **Returns:** 1 for depths that train and 0 for others, for `calculate_mtp_loss`.

    **Raises:** `ValueError` if there are fewer than 0 depths, or `progress` is negative or not
    finite.
    """
    num_depths = check_integer("num_depths", num_depths, at_least=0)
    check_not_negative("progress", progress)
    part = jnp.floor(jnp.asarray(progress, jnp.float32) * (num_depths + 1))
    part = jnp.clip(part, 0, num_depths)
    active = part if order == "forward" else num_depths - part
    return (jnp.arange(num_depths) < active).astype(jnp.float32)
