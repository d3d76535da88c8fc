"""What all pictures share: a figure where none is given, and one colour for each depth."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MAIN_MODEL_COLOR = "0.2"
"""A dark grey: the colours are for the depths."""


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes that were given, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def depth_color(depth: int) -> str:
    """The colour of depth 1, 2, … in all pictures; it comes again after ten depths."""
    return f"C{(depth - 1) % 10}"


def finish_curves(ax: Axes) -> None:
    """A pale grid, no frame above and on the right, and a legend if a curve has a name."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
