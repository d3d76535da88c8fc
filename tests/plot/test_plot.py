"""What the pictures hold: texts, bars, curves and colours, against plain loops over the data."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pictures
import pytest
from helpers import assert_rejects
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

import equinox_mtp as emtp
from equinox_mtp import plot
from equinox_mtp.training._report import MetricsFile, plot_curves

# Two documents and padding; then one document, an end of another, and no padding.
TOKENS = np.array([[3, 4, 5, 6, 7, 8, 9, 0, 0], [3, 4, 5, 6, 7, 8, 9, 10, 11]])
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5, 5, 9, 9]])
NUM_DEPTHS = 2


@pytest.fixture(autouse=True)
def agg() -> Iterator[None]:
    plt.switch_backend("agg")
    yield
    plt.close("all")


def packed() -> emtp.Batch:
    return emtp.make_batch(TOKENS, segment_ids=SEGMENTS).align(NUM_DEPTHS)


def cells(ax: Axes) -> dict[tuple[int, int, str], tuple[str, str]]:
    """Of each lane, position and half: the text, and the colour; `""` for hatched cells."""
    found = {}
    for patch in ax.patches:
        assert isinstance(patch, Rectangle)
        lane, above = divmod(patch.get_y(), 1)
        where = (int(lane), int(patch.get_x()), "reads" if above < 0.5 else "predicts")
        color = "hatched" if patch.get_hatch() else to_hex(patch.get_facecolor())
        found[where] = ("", color)
    for text in ax.texts:
        assert isinstance(text, Annotation)
        x, y = text.xy
        where = (int(y), int(x), "reads" if y % 1 < 0.5 else "predicts")
        assert found[where][0] == ""
        found[where] = (text.get_text(), found[where][1])
    return found


def cells_oracle(row: int, first_depth: int = 0) -> dict[tuple[int, int, str], str]:
    """t(i+k) and t(i+k+1), where they are in the document of position i; one cell at a time."""
    tokens, segments = TOKENS[row], SEGMENTS[row]
    seq = len(tokens) - 1
    found = {}
    for depth in range(first_depth, NUM_DEPTHS + 1):
        for i in range(seq):
            for half, j in (("reads", i + depth), ("predicts", i + depth + 1)):
                # The last token of a row is a target only.
                exists = j < seq or (half == "predicts" and j == seq)
                inside = exists and segments[j] == segments[i] != 0
                found[depth - first_depth, i, half] = str(tokens[j]) if inside else ""
    return found


@pytest.mark.parametrize("row", [0, 1])
def test_alignment_shows_what_each_depth_reads_and_predicts(row: int) -> None:
    shown = cells(plot.alignment(packed(), row=row))
    assert {where: text for where, (text, _) in shown.items()} == cells_oracle(row)
    for (_, i, half), (text, color) in shown.items():
        first = SEGMENTS[row, i] == SEGMENTS[row, 0]
        pale, strong = ("#d6e6f4", "#6baed6") if first else ("#fde3cb", "#fd9a4b")
        assert color == ("hatched" if not text else pale if half == "reads" else strong)


def test_alignment_of_targets_alone_has_no_main_model() -> None:
    batch = packed()
    assert batch.targets is not None
    ax = plot.alignment(batch.targets, segment_ids=batch.segment_ids)
    shown = cells(ax)
    assert {where: text for where, (text, _) in shown.items()} == cells_oracle(0, first_depth=1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["depth 1", "depth 2"]
    assert shown[0, 4, "reads"] == ("8", "#fde3cb")
    # Without ids all of it is one document.
    assert cells(plot.alignment(batch.targets))[0, 4, "reads"] == ("8", "#d6e6f4")


def test_alignment_names_its_lanes_positions_and_documents() -> None:
    figure, given = plt.subplots()
    ax = plot.alignment(packed(), to_text=lambda token: f"<{token}>", ax=given)
    assert ax is given
    assert ax.get_figure() is figure
    assert cells(ax)[1, 0, "predicts"] == ("<5>", "#6baed6")
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["main model", "depth 1", "depth 2"]
    halves = [label.get_text() for label in ax.get_yticklabels(minor=True)]
    assert halves == ["reads", "predicts"] * 3
    assert [label.get_text() for label in ax.get_xticklabels()] == list("01234567")
    legend = ax.get_legend()
    assert legend is not None
    entries = [text.get_text() for text in legend.get_texts()]
    assert entries == ["document 1", "document 2", "no token, or not scored"]


def test_colours_come_again_after_five_documents() -> None:
    segments = np.repeat(np.arange(1, 8), 2)[None]
    batch = emtp.make_batch(np.arange(14)[None], segment_ids=segments).align(1)
    ax = plot.alignment(batch)
    legend = ax.get_legend()
    assert legend is not None
    entries = [text.get_text() for text in legend.get_texts()]
    assert entries[:3] == ["documents 1, 6", "documents 2, 7", "document 3"]
    shown = cells(ax)
    assert shown[0, 0, "predicts"][1] == shown[0, 10, "predicts"][1] != shown[0, 2, "predicts"][1]


def test_alignment_follows_masks_that_were_changed() -> None:
    tokens = np.arange(9)[None]
    batch = emtp.make_batch(tokens)
    mask = np.array([[True, False, True, True, True, True, True, True]])
    masked = emtp.Batch(batch.input_ids, batch.target_ids, mask, batch.position_ids).align(1)
    shown = cells(plot.alignment(masked))
    assert shown[0, 1, "reads"][0] == "1"
    assert shown[0, 1, "predicts"] == ("", "hatched")
    assert shown[1, 0, "predicts"] == ("", "hatched")  # The same target, a depth further.
    assert shown[1, 1, "predicts"][0] == "3"


def test_alignment_says_what_is_wrong() -> None:
    batch = packed()
    with pytest.raises(ValueError, match=r"`batch` must have targets.*batch\.align\(num_depths\)"):
        plot.alignment(emtp.make_batch(TOKENS))
    with pytest.raises(ValueError, match="`row` must be at least 0 and at most 1; got 2"):
        plot.alignment(batch, row=2)
    with pytest.raises(ValueError, match="`segment_ids` must be `None` if `batch` is a `Batch`"):
        plot.alignment(batch, segment_ids=SEGMENTS[:, :-1])
    assert batch.targets is not None
    with pytest.raises(ValueError, match=r"`segment_ids` must have shape \(2, 8\).*got \(2, 9\)"):
        plot.alignment(batch.targets, segment_ids=SEGMENTS)
    assert_rejects("batch", plot.alignment, TOKENS)
    assert not plt.get_fignums()


def rate() -> emtp.MTPAcceptanceRate:
    counts = [[80, 60], [100, 90], [80, 52], [100, 80], [100, 64]]
    return emtp.MTPAcceptanceRate(*map(np.array, counts))


def bars_of(ax: Axes) -> dict[str, tuple[Rectangle, ...]]:
    containers = [group for group in ax.containers if isinstance(group, BarContainer)]
    return {str(group.get_label()): tuple(group.patches) for group in containers}


def test_acceptance_has_three_bars_for_each_depth() -> None:
    ax = plot.acceptance(rate())
    groups = bars_of(ax)
    bars = {name: [bar.get_height() for bar in group] for name, group in groups.items()}
    assert list(bars) == ["independent", "joint", "conditional"]
    np.testing.assert_allclose(bars["independent"], [80, 100 * 60 / 90], rtol=1e-6)
    np.testing.assert_allclose(bars["joint"], [80, 100 * 52 / 80], rtol=1e-6)
    np.testing.assert_allclose(bars["conditional"], [80, 100 * 52 / 64], rtol=1e-6)
    assert ax.get_title() == "τ = 2.45 tokens per pass"  # 1 + 0.8 + 0.65
    labels = [text.get_text() for text in ax.texts]
    assert labels == ["80", "67", "80", "65", "80", "81"]
    for depth, group in enumerate(zip(*groups.values(), strict=True), start=1):
        middles = [bar.get_x() + bar.get_width() / 2 for bar in group]
        assert np.mean(middles) == pytest.approx(depth)


def curves(ax: Axes) -> list[tuple[str, str, Any]]:
    return [(str(x.get_label()), to_hex(x.get_color()), x.get_xydata()) for x in ax.lines]


def test_losses_has_a_curve_for_the_main_model_and_for_each_depth() -> None:
    steps, main = np.array([1, 5, 9]), np.array([3.0, 2.0, 1.0])
    depths = np.array([[4.0, 5.0], [3.0, 4.0], [2.0, 3.0]])
    ax = plot.losses(steps, main, depths)
    plot.losses(steps[1:], main[1:] + 1, depths[1:] + 1, as_points=True, ax=ax)
    drawn = curves(ax)
    assert [name for name, _, _ in drawn[:3]] == ["main model", "depth 1", "depth 2"]
    np.testing.assert_array_equal(drawn[0][2], [[1, 3], [5, 2], [9, 1]])
    np.testing.assert_array_equal(drawn[2][2], [[1, 5], [5, 4], [9, 3]])
    np.testing.assert_array_equal(drawn[4][2], [[5, 4], [9, 3]])
    assert [color for _, color, _ in drawn[:3]] == [color for _, color, _ in drawn[3:]]
    assert [line.get_linestyle() for line in ax.lines] == ["-"] * 3 + ["None"] * 3
    legend = ax.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 3
    assert_rejects("main_losses", plot.losses, steps, main[1:], depths)


def test_curves_of_lists() -> None:
    steps, main, depths = [1, 5], [3, 2.0], [[4.0, 5.0], [3.0, 4.0]]
    drawn = curves(plot.losses(steps, main, depths))
    np.testing.assert_array_equal(drawn[0][2], [[1, 3], [5, 2]])
    np.testing.assert_array_equal(drawn[2][2], [[1, 5], [5, 4]])
    drawn = curves(plot.joint_acceptance(steps, [[0.5, 0.25], [1, 1]]))
    np.testing.assert_array_equal(drawn[1][2], [[1, 25], [5, 100]])
    assert_rejects("main_losses", plot.losses, steps, main[1:], depths)
    for ragged in ([[4.0, 5.0], [3.0]], ["a", "b"]):
        with pytest.raises(ValueError, match=r"^`depth_losses` must be an array.*`jnp.asarray`"):
            plot.losses(steps, main, ragged)


def test_joint_acceptance_is_in_percent() -> None:
    joint = np.array([[0.5, 0.25], [0.75, 0.5]])
    losses = plot.losses(np.array([1, 2]), np.array([1.0, 1.0]), joint)
    ax = plot.joint_acceptance(np.array([10, 20]), joint)
    (first, first_color, first_data), (second, second_color, second_data) = curves(ax)
    assert (first, second) == ("depth 1", "depths 1 … 2")
    np.testing.assert_array_equal(first_data, [[10, 50], [20, 75]])
    np.testing.assert_array_equal(second_data, [[10, 25], [20, 50]])
    assert ax.get_ylim() == (0, 100)
    # A depth has one colour in all pictures.
    assert [first_color, second_color] == [color for _, color, _ in curves(losses)[1:]]


def test_router_load_has_a_curve_for_each_layer() -> None:
    load = [[3.0, 2.0, 1.5, 2.5], [2.0, 1.5, 1.25, 1.0]]
    ax = plot.router_load([10, 20], load, num_depths=1)
    drawn = curves(ax)[:4]
    for index, (_, _, data) in enumerate(drawn):
        np.testing.assert_array_equal(data, [[10, load[0][index]], [20, load[1][index]]])
    legend = ax.get_legend()
    assert legend is not None
    # The first and the last layer of the main model, and depths in their colours.
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["layer 1 with experts", "layer 3 with experts", "depth 1"]
    assert drawn[3][1] == curves(plot.losses([1], [1.0], [[1.0]]))[1][1]
    assert_rejects("max_load", plot.router_load, [10], load)
    with pytest.raises(ValueError, match="`num_depths` must be"):
        plot.router_load([10, 20], load, num_depths=5)


def test_curves_of_a_run_with_experts(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", last_step=0, depths=1, writes=False)
    for step in (1, 2):
        losses = {"main_loss": 5.0 - step, "mtp_losses": [6.0 - step]}
        record = {
            "split": "train",
            "step": step,
            **losses,
            "router_max_load": [1.5, 2.0],
            "router_depths": 1,
        }
        metrics.write(record)
    plot_curves(metrics, tmp_path / "curves.png")
    wide = plt.imread(tmp_path / "curves.png").shape
    for record in metrics.records:
        record.pop("router_max_load")
    plot_curves(metrics, tmp_path / "curves.png")
    assert wide[1] > 1.4 * plt.imread(tmp_path / "curves.png").shape[1]


def test_curves_of_a_run_are_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", last_step=0, depths=2, writes=False)
    for step in (1, 2, 3):
        losses = {"main_loss": 5.0 - step, "mtp_losses": [6.0 - step, 7.0 - step]}
        metrics.write({"split": "train", "step": step, **losses})
    losses = {"main_loss": 2.5, "mtp_losses": [3.5, 4.5]}
    metrics.write({"split": "held_out", "step": 3, **losses, "joint_acceptance": [0.5, 0.25]})
    plot_curves(metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    loss_axes, acceptance_axes = saved[0].axes
    data = [points.tolist() for _, _, points in curves(loss_axes)]
    assert data[:3] == [[[1, y - 1], [2, y - 2], [3, y - 3]] for y in (5, 6, 7)]
    assert data[3:] == [[[3, 2.5]], [[3, 3.5]], [[3, 4.5]]]
    assert [points.tolist() for _, _, points in curves(acceptance_axes)] == [[[3, 50]], [[3, 25]]]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_curves_need_no_records_of_one_kind(split: str, tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", last_step=0, depths=0, writes=False)
    record = {"split": split, "step": 1, "main_loss": 2.5, "mtp_losses": []}
    metrics.write({**record, "joint_acceptance": []})
    plot_curves(metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_only_those_who_draw_import_matplotlib() -> None:
    code = """
import sys
import equinox_mtp
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None
try:
    from equinox_mtp import plot
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "`equinox_mtp.plot` needs matplotlib" in done.stdout
    assert "pip install -e '.[train]'" in done.stdout


SVG = "{http://www.w3.org/2000/svg}"


def svg_texts(svg: str) -> list[tuple[str, float, float]]:
    """Every text, and where it stands."""
    texts = ET.fromstring(svg).iter(f"{SVG}text")
    return [(x.text or "", float(x.attrib["x"]), float(x.attrib["y"])) for x in texts]


def svg_fills(svg: str) -> list[str]:
    """The fill of every area, in order; ids of hatches differ from version to version."""
    styles = [x.attrib.get("style", "") for x in ET.fromstring(svg).iter(f"{SVG}path")]
    fills = [style.split("fill: ")[1].split(";")[0] for style in styles if "fill: " in style]
    return ["hatched" if fill.startswith("url") else fill for fill in fills]


def test_the_picture_in_readme_is_what_the_code_draws() -> None:
    committed, drawn = pictures.ALIGNMENT.read_text(encoding="utf8"), pictures.draw_alignment()
    assert drawn == pictures.draw_alignment()
    ours, theirs = svg_texts(drawn), svg_texts(committed)
    assert [text for text, _, _ in ours] == [text for text, _, _ in theirs]
    # Two points: the width of a letter differs from version to version.
    np.testing.assert_allclose([x[1:] for x in ours], [x[1:] for x in theirs], atol=2)
    assert svg_fills(drawn) == svg_fills(committed)
    assert svg_fills(drawn).count("#6baed6") == 5 + 4 + 3 + 1  # with the legend's
    assert svg_fills(drawn).count("#fd9a4b") == 3 + 2 + 1 + 1


def test_a_figure_of_ones_own_is_used() -> None:
    figure = Figure()
    ax = plot.acceptance(rate(), ax=figure.subplots())
    assert ax.get_figure() is figure
    assert not plt.get_fignums()
