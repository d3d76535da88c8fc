"""What all pictures share: a figure where none is given, and one colour for each depth."""

from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

MAIN_MODEL_COLOR = "0.2"
"""A dark grey: the colours are for the depths."""

ARRAYS = (jax.Array, np.ndarray)


def as_array(name: str, values: Any, dtype: type | None = None) -> np.ndarray:
    """Numbers in lists as an array.

    **Raises:** `ValueError` if they are no numbers, or in lists of several lengths.
    """
    try:
        return np.asarray(values, dtype)
    except (ValueError, TypeError):
        raise ValueError(
            f"`{name}` must be an array, or lists of numbers of one length. Make one by "
            "`jnp.asarray`."
        ) from None


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
