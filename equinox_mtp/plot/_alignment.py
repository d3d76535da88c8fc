"""Which token each depth reads, and which it predicts."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from .._alignment import MTPTargets
from .._batch import Batch
from .._checks import check_integer
from .._types import HostOrDeviceArray, checked
from ._figure import axes_or_new

_DOCUMENT_COLORS = (
    ("#d6e6f4", "#6baed6"),
    ("#fde3cb", "#fd9a4b"),
    ("#dcefd8", "#74c476"),
    ("#e6e2f0", "#9e9ac8"),
    ("#f9dbe5", "#ee8fb0"),
)
"""Of each document, in turn: of what is read, and of what is predicted."""
_NOT_SCORED = {"facecolor": "#f2f2f2", "edgecolor": "#bdbdbd", "hatch": "////", "linewidth": 0}


class _Lane(NamedTuple):
    """The main model, or a depth: one text for each position, or `None` for no token."""

    name: str
    read: list[str | None]
    predicted: list[str | None]


@checked
def alignment(
    batch: Batch | MTPTargets,
    *,
    row: int | np.integer = 0,
    segment_ids: Integer[HostOrDeviceArray, "batch seq"] | None = None,
    to_text: Callable[[int], str] = str,
    ax: Axes | None = None,
) -> Axes:
    """Draws which token each depth reads and which it predicts, at every position of a row.

    One column for each position, one pair of cells for each depth: above the token t(i+k) that is
    read, below the token t(i+k+1) that is predicted. Colours tell documents apart. Cells are
    hatched where a depth reads no token of the document, and where its prediction is not scored.

        plot.alignment(make_batch(tokens, segment_ids=segment_ids).align(2), to_text=chr)

    **Arguments:**

    - `batch`: a batch with its targets, as `batch.align(num_depths)` returns it; the main model is
        drawn too. Or the targets of the depths alone.
    - `row`: which row of the batch.
    - `segment_ids`: the documents' ids; only for targets alone, as a batch has its own. `None`:
        the row is drawn as one document.
    - `to_text`: from a token id to the text in a cell, as `chr` for bytes.
    - `ax`: where to draw; a new figure if `None`, sized by the number of cells.

    **Returns:** the axes. Position i reaches from i to i + 1, lane by lane from 0 downward. A title
    has room on the left of the legend: `ax.set_title(title, loc="left")`.

    **Raises:** `ValueError` if the batch has no targets, if segment ids have another shape or come
    with a batch, and if there is no such row.
    """
    targets = batch.targets if isinstance(batch, Batch) else batch
    if targets is None:
        raise ValueError(
            "`batch` must have targets; got a `Batch` without. Align it: `batch.align(num_depths)`."
        )
    batch_size, seq = targets.mask.shape[1:]
    row = check_integer("row", row, at_least=0, at_most=batch_size - 1)
    documents = _documents(batch, segment_ids, (batch_size, seq))[row]
    lanes = _lanes(batch, targets, row, to_text)
    texts = [text or "" for lane in lanes for text in (*lane.read, *lane.predicted)]
    longest = max(map(len, texts), default=0)
    ax = axes_or_new(ax, max(0.38, 0.1 * longest + 0.15) * seq + 1.6, 0.8 * len(lanes) + 0.9)
    for top, lane in enumerate(lanes):
        for i, (read, predicted) in enumerate(zip(lane.read, lane.predicted, strict=True)):
            colors = _DOCUMENT_COLORS[(documents[i] - 1) % len(_DOCUMENT_COLORS)]
            _cell(ax, i, top + 0.06, read, colors[0], "normal")
            _cell(ax, i, top + 0.50, predicted, colors[1], "bold")
    _label(ax, seq, [lane.name for lane in lanes])
    _legend(ax, int(documents.max(initial=0)))
    return ax


def _documents(
    batch: Batch | MTPTargets,
    segment_ids: HostOrDeviceArray | None,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Of each position, the number of its document in its row, from 1 on; 0 is padding."""
    if isinstance(batch, Batch):
        if segment_ids is not None:
            raise ValueError(
                "`segment_ids` must be `None` if `batch` is a `Batch`, which has them; got both."
            )
        segment_ids = batch.segment_ids
    if segment_ids is None:
        return np.ones(shape, int)
    if segment_ids.shape != shape:
        raise ValueError(
            f"`segment_ids` must have shape {shape}, the (batch, seq) of the targets; got "
            f"{segment_ids.shape}."
        )
    segments = np.asarray(segment_ids)
    before = np.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    is_start = (segments != before) & (segments != 0)
    return np.where(segments != 0, np.cumsum(is_start, axis=1), 0)


def _lanes(
    batch: Batch | MTPTargets, targets: MTPTargets, row: int, to_text: Callable[[int], str]
) -> list[_Lane]:
    def texts(ids: HostOrDeviceArray, is_there: HostOrDeviceArray) -> list[str | None]:
        pairs = zip(np.asarray(ids)[row].tolist(), np.asarray(is_there)[row], strict=True)
        return [to_text(token) if there else None for token, there in pairs]

    lanes = []
    if isinstance(batch, Batch):
        exists = np.ones(batch.input_ids.shape, bool)
        if batch.segment_ids is not None:
            exists = np.asarray(batch.segment_ids) != 0
        predicted = texts(batch.target_ids, exists & np.asarray(batch.target_mask))
        lanes.append(_Lane("main model", texts(batch.input_ids, exists), predicted))
    is_read = targets.mask if targets.token_mask is None else targets.token_mask
    for k in range(targets.num_depths):
        read = texts(targets.input_ids[k], is_read[k])
        predicted = texts(targets.target_ids[k], targets.mask[k])
        lanes.append(_Lane(f"depth {k + 1}", read, predicted))
    return lanes


def _cell(ax: Axes, i: int, top: float, text: str | None, color: str, weight: str) -> None:
    """One token of a position; hatched if there is none."""
    style = _NOT_SCORED if text is None else {"facecolor": color, "linewidth": 0}
    ax.add_patch(Rectangle((i + 0.03, top), 0.94, 0.42, **style))
    if text is not None:
        # On one baseline, whatever the height of the letters.
        ax.annotate(
            text,
            (i + 0.5, top + 0.21),
            xytext=(0, -3.6),
            textcoords="offset points",
            ha="center",
            fontweight=weight,
            fontsize=10,
        )


def _label(ax: Axes, seq: int, names: list[str]) -> None:
    lanes = np.arange(len(names))
    ax.set(xlim=(0, seq), ylim=(len(names), 0), xlabel="position i")
    ax.set_xticks(np.arange(seq) + 0.5, list(map(str, range(seq))), fontsize=8)
    ax.set_yticks(lanes + 0.5, names, fontsize=10)
    halves = np.ravel(np.column_stack([lanes + 0.28, lanes + 0.72]))
    ax.set_yticks(halves, ["reads", "predicts"] * len(names), minor=True, fontsize=8, color="0.4")
    ax.tick_params(which="both", length=0)
    ax.tick_params(axis="y", which="major", pad=50)
    ax.spines[:].set_visible(False)


def _legend(ax: Axes, num_documents: int) -> None:
    num_colors = len(_DOCUMENT_COLORS)
    handles = []
    for first, (_, color) in enumerate(_DOCUMENT_COLORS[:num_documents], start=1):
        same = [str(n) for n in range(first, num_documents + 1, num_colors)]
        name = "document" if len(same) == 1 else "documents"
        handles.append(Patch(facecolor=color, label=f"{name} {', '.join(same)}"))
    handles.append(Patch(**_NOT_SCORED, label="no token, or not scored"))
    ax.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
    )
