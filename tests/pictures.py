"""The pictures of README: `python tests/pictures.py` draws them again."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import equinox_mtp as emtp
from equinox_mtp import plot

ALIGNMENT = Path(__file__).parents[1] / "notebooks" / "alignment.svg"
DOCUMENTS = ("the cat sat on the mat", "dogs run far home")


def draw_alignment() -> str:
    """Two documents and padding in one row, at two depths, as SVG."""
    text = " ".join(DOCUMENTS).split()
    words = ["", *sorted(set(text))]
    row = [words.index(word) for word in text]
    segments = [n for n, document in enumerate(DOCUMENTS, start=1) for _ in document.split()]
    # One token of padding, and one that is the last position's target only.
    tokens, segment_ids = np.array([[*row, 0, 0]]), np.array([[*segments, 0, 0]])
    batch = emtp.make_batch(tokens, segment_ids=segment_ids).align(num_depths=2)

    figure = Figure(figsize=(8.6, 3.5))
    # By hand: a layout engine measures text, and differs from version to version.
    axes = figure.add_axes((0.195, 0.14, 0.8, 0.75))
    plot.alignment(batch, to_text=words.__getitem__, ax=axes)
    svg = io.StringIO()
    # Text stays text; ids and dates would be other ones each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "equinox_mtp"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in svg.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    ALIGNMENT.write_text(draw_alignment(), encoding="utf8")
