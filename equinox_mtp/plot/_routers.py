"""Curves of the load of experts over training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes

from .._checks import check_integer
from .._types import HostOrDeviceArray, checked
from ._figure import ARRAYS, as_array, axes_or_new, depth_color, finish_curves


@checked
def router_load(
    steps: Integer[HostOrDeviceArray, "steps"] | Sequence[Any],
    max_load: Float[HostOrDeviceArray, "steps layers"] | Sequence[Any],
    *,
    num_depths: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draws how much the busiest expert of each layer has to do, over the steps of a training run.

    1 is a balanced layer: as many tokens for each of its experts.

        load = nn.router_statistics_in(output.auxiliary)[0].load  # [layers experts]
        plot.router_load([1], [load.max(axis=1) / load.mean(axis=1)])

    **Arguments:** arrays, or lists of numbers.

    - `steps`: when each load was measured.
    - `max_load`: the largest load of a layer's experts over their mean load.
    - `num_depths`: how many of the layers, the last ones, are prediction depths; they have the
        colours of their losses, and the main model's layers are shades of grey.
    - `ax`: where to draw; a new figure if `None`.

    **Returns:** the axes.

    **Raises:** `ValueError` for more depths than layers.
    """
    if not (isinstance(steps, ARRAYS) and isinstance(max_load, ARRAYS)):
        return router_load(
            as_array("steps", steps),
            as_array("max_load", max_load, float),
            num_depths=num_depths,
            ax=ax,
        )
    num_depths = check_integer("num_depths", num_depths, at_least=0, at_most=max_load.shape[1])
    ax = axes_or_new(ax, 6.0, 3.5)
    num_layers = max_load.shape[1] - num_depths
    greys = [f"{x:.2f}" for x in np.linspace(0.2, 0.75, max(num_layers, 1))][:num_layers]
    names = [f"layer {i + 1} with experts" for i in range(num_layers)]
    names += [f"depth {k + 1}" for k in range(num_depths)]
    colors = [*greys, *(depth_color(k + 1) for k in range(num_depths))]
    # A deep model has too many layers to name.
    shown = {0, num_layers - 1, *range(num_layers, num_layers + num_depths)}
    for index, curve in enumerate(np.asarray(max_load).T):
        label = names[index] if index in shown else None
        ax.plot(np.asarray(steps), curve, color=colors[index], alpha=0.8, label=label)
    ax.axhline(1, color="0.85", zorder=0)
    ax.set(xlabel="step", ylabel="largest load / mean load")
    finish_curves(ax)
    return ax
