"""Curves of the losses over training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes

from .._types import HostOrDeviceArray, checked
from ._figure import ARRAYS, MAIN_MODEL_COLOR, as_array, axes_or_new, depth_color, finish_curves


@checked
def losses(
    steps: Integer[HostOrDeviceArray, "steps"] | Sequence[Any],
    main_losses: Float[HostOrDeviceArray, "steps"] | Sequence[Any],
    depth_losses: Float[HostOrDeviceArray, "steps depth"] | Sequence[Any],
    *,
    as_points: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws the losses of the main model and of each depth over the steps of a training run.

        ax = plot.losses(steps, main_losses, depth_losses)
        plot.losses(held_out_steps, held_out_main, held_out_depths, as_points=True, ax=ax)

    **Arguments:** arrays, or lists of numbers.

    - `steps`: when each loss was measured.
    - `main_losses`: `output.main.mean` of each step, in nats per token.
    - `depth_losses`: `output.mtp.losses.mean` of each step.
    - `as_points`: whether to draw points without names, in the colours of the curves; for text that
        is held out.
    - `ax`: where to draw; a new figure if `None`.

    **Returns:** the axes.
    """
    if not (
        isinstance(steps, ARRAYS)
        and isinstance(main_losses, ARRAYS)
        and isinstance(depth_losses, ARRAYS)
    ):
        return losses(
            as_array("steps", steps),
            as_array("main_losses", main_losses, float),
            as_array("depth_losses", depth_losses, float),
            as_points=as_points,
            ax=ax,
        )
    ax = axes_or_new(ax, 6.0, 3.5)
    names = ["main model", *(f"depth {k + 1}" for k in range(depth_losses.shape[1]))]
    colors = [MAIN_MODEL_COLOR, *(depth_color(k + 1) for k in range(depth_losses.shape[1]))]
    curves = np.column_stack([main_losses, depth_losses]).T
    for name, color, curve in zip(names, colors, curves, strict=True):
        if as_points:
            ax.plot(np.asarray(steps), curve, color=color, marker="o", linestyle="none")
        else:
            ax.plot(np.asarray(steps), curve, color=color, alpha=0.8, label=name)
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    finish_curves(ax)
    return ax
