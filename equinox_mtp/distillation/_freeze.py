"""Training the depths of a model that stays as it is."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._model import MTPModel
from .._types import checked


@checked
def freeze_model(model: MTPModel) -> tuple[PyTree[Any], PyTree[Any]]:
    """The depths' parameters, and everything else.

    Take gradients, and make optimizer states, of the first; `eqx.combine` the two for a call. No
    gradient of the main model is computed then, and nothing of its forward pass kept.

    >>> heads, frozen = emtp.distillation.freeze_model(model)
    >>> optimizer = optax.adamw(3e-4, mask=emtp.weight_decay_mask)
    >>> optimizer_state = optimizer.init(heads)
    >>> emtp.count_parameters(heads) == emtp.count_parameters(model.block)
    True

    **Arguments:**

    - `model`: a decoder, and the depths over it.

    **Returns:** two models with `None` in place of what the other one holds.
    """
    nothing = jax.tree.map(lambda _: False, model)
    trains = eqx.tree_at(
        lambda mask: mask.block, nothing, jax.tree.map(eqx.is_inexact_array, model.block)
    )
    return eqx.partition(model, trains)
