"""How often drafts are accepted: by depth, and over training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes

from .._acceptance import MTPAcceptanceRate
from .._types import HostOrDeviceArray, checked
from ._figure import ARRAYS, as_array, axes_or_new, depth_color, finish_curves

_COLORS = {"independent": "#9ecae1", "joint": "#2171b5", "conditional": "#fdae6b"}


@checked
def acceptance(rate: MTPAcceptanceRate, *, ax: Axes | None = None) -> Axes:
    """Draws three bars for each depth: how often its predictions are accepted, in percent.

    The bars are `rate.independent`, `rate.joint` and `rate.conditional`; the title holds τ, the
    expected number of tokens that a pass of the main model commits.

        rate = calculate_mtp_acceptance_rate(output.mtp.acceptance, output.predictions)
        plot.acceptance(rate)

    **Arguments:**

    - `rate`: of one batch, or the sum of several.
    - `ax`: where to draw; a new figure if `None`.

    **Returns:** the axes.
    """
    ax = axes_or_new(ax, 6.0, 3.5)
    depths = np.arange(1, rate.scored.shape[0] + 1)
    for index, (name, color) in enumerate(_COLORS.items()):
        percent = 100 * np.asarray(getattr(rate, name))
        bars = ax.bar(depths + 0.27 * (index - 1), percent, width=0.25, color=color, label=name)
        ax.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    ax.set(xlabel="depth", ylabel="accepted (%)", xticks=depths, ylim=(0, 125))
    ax.set_yticks(range(0, 101, 20))
    ax.set_title(f"τ = {float(rate.expected_accepted_length):.2f} tokens per pass")
    finish_curves(ax)
    ax.grid(visible=False, axis="x")
    ax.legend(
        frameon=False,
        loc="upper center",
        ncols=len(_COLORS),
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.2,
    )
    return ax


@checked
def joint_acceptance(
    steps: Integer[HostOrDeviceArray, "steps"] | Sequence[Any],
    joint: Float[HostOrDeviceArray, "steps depth"] | Sequence[Any],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draws over the steps of a training run how often depths 1 … k are all accepted, in percent.

        plot.joint_acceptance(steps, joint)

    **Arguments:** arrays, or lists of numbers.

    - `steps`: when each rate was measured.
    - `joint`: `MTPAcceptanceRate.joint` of each step, in [0, 1].
    - `ax`: where to draw; a new figure if `None`.

    **Returns:** the axes.
    """
    if not (isinstance(steps, ARRAYS) and isinstance(joint, ARRAYS)):
        return joint_acceptance(as_array("steps", steps), as_array("joint", joint, float), ax=ax)
    ax = axes_or_new(ax, 6.0, 3.5)
    marker = "o" if len(steps) <= 30 else ""
    for k, curve in enumerate(100 * np.asarray(joint).T, start=1):
        label = "depth 1" if k == 1 else f"depths 1 … {k}"
        ax.plot(np.asarray(steps), curve, color=depth_color(k), marker=marker, label=label)
    ax.set(xlabel="step", ylabel="accepted (%)", ylim=(0, 100))
    finish_curves(ax)
    return ax
