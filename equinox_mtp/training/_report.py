"""A run's metrics, curves and summary."""

import json
import math
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from equinox_mtp import plot

from .._whole_file import whole_file
from ._compare import Comparison
from ._corpus import Corpus
from ._step import Evaluation, StepMetrics

Record = dict[str, Any]


_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": ((), ("mtp_losses",)),
    "held_out": (
        ("main_loss", "tokens", "expected_accepted_length"),
        (
            *("mtp_losses", "acceptance", "joint_acceptance", "conditional_acceptance"),
            "ground_truth_acceptance",
        ),
    ),
}
"""The numbers of each kind of record, and its lists with one number for each depth."""
_OPTIONAL = ("main_loss",)
"""The numbers that a record may lack: a step over a frozen model has no main loss."""


class MetricsFile:
    """`metrics.jsonl`, one record a line, flushed line by line."""

    def __init__(self, path: Path, *, last_step: int, depths: int, writes: bool = True):
        """Opens the file; of an older run only the records up to `last_step` are kept.

        A damaged file is renamed, and its readable records are kept. One of several processes
        `writes`; the others keep their records in memory.
        """
        records, num_damaged = _read(path, depths)
        self.records = [record for record in records if record["step"] <= last_step]
        self._stream = None
        if not writes:
            return
        if num_damaged:
            aside = path.with_name(f"damaged-{path.name}")
            os.replace(path, aside)
            print(f"note: {num_damaged} line(s) of {path} cannot be read; it is kept as {aside}")
        with whole_file(path) as file:
            file.write("".join(_line(record) for record in self.records).encode())
        self._stream = path.open("a", encoding="utf8")

    def write(self, record: Record) -> None:
        """Appends a record."""
        self.records.append(record)
        if self._stream is not None:
            self._stream.write(_line(record))
            self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()

    def of(self, split: str) -> list[Record]:
        """The records of `"train"` or `"held_out"`."""
        return [record for record in self.records if record["split"] == split]


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _read(path: Path, depths: int) -> tuple[list[Record], int]:
    """The records of a file, and how many of its lines are none."""
    if not path.exists():
        return [], 0
    # A process that is killed may leave half a line at the end, which is no damage.
    *lines, rest = path.read_bytes().split(b"\n")
    found = [_parse(line, depths) for line in lines]
    last = _parse(rest, depths)
    records = [record for record in [*found, last] if record is not None]
    return records, found.count(None)


def _parse(line: bytes, depths: int) -> Record | None:
    """A record that has all that curves and summaries are made of."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    numbers, lists = _FIELDS.get(str(record.get("split")), (("",), ()))
    values = [record.get(name) for name in numbers]
    values += [record[name] for name in _OPTIONAL if name in record]
    for name in lists:
        of_depths = record.get(name)
        if not isinstance(of_depths, list) or len(of_depths) != depths:
            return None
        values += of_depths
    of_routers = record.get("router_max_load", [])
    values += of_routers if isinstance(of_routers, list) else [None]
    return record if all(type(x) in (int, float) for x in values) else None


def plot_curves(metrics: MetricsFile, path: Path) -> None:
    """Draws losses and acceptance over steps, and replaces the picture at `path`."""
    train, held_out = metrics.of("train"), metrics.of("held_out")
    of_routers = [record for record in train if "router_max_load" in record]
    num_plots = 3 if of_routers else 2
    figure = Figure(figsize=(5.5 * num_plots, 4), layout="constrained")
    loss_axes, acceptance_axes, *router_axes = figure.subplots(1, num_plots)
    for records, as_points in ((train, False), (held_out, True)):
        steps, main_losses = _column(records, "step"), _column(records, "main_loss")
        depth_losses = _by_depth(records, "mtp_losses")
        plot.losses(steps, main_losses, depth_losses, as_points=as_points, ax=loss_axes)
    joint = _by_depth(held_out, "joint_acceptance")
    plot.joint_acceptance(_column(held_out, "step"), joint, ax=acceptance_axes)
    loss_axes.set_title("Loss: training (line), held out (dots)")
    acceptance_axes.set_title("Held-out drafts accepted by the main model")
    for ax in router_axes:
        num_depths = of_routers[-1].get("router_depths", 0)
        max_load = _by_depth(of_routers, "router_max_load")
        plot.router_load(_column(of_routers, "step"), max_load, num_depths=num_depths, ax=ax)
        ax.set_title("Load of the busiest expert")
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _column(records: list[Record], name: str) -> np.ndarray:
    """The numbers of this name; NaN, which no curve shows, where a record has none."""
    values = [record.get(name, math.nan) for record in records]
    return np.array(values, int if name == "step" else float)


def _by_depth(records: list[Record], name: str) -> np.ndarray:
    """A row for each record and a column for each depth; no columns if there are no records."""
    num_depths = len(records[0][name]) if records else 0
    values = [record[name] for record in records]
    return np.array(values, float).reshape(len(records), num_depths)


def summary(
    record: Record,
    comparisons: list[Comparison],
    seconds: float,
    tokens_per_second: float | None,
    utilization: float | None,
    out: Path,
) -> str:
    """The closing lines of a run, from its last evaluation."""
    lines = [
        f"held-out text after step {record['step']} ({record['tokens']} tokens)",
        f"  main loss            {record['main_loss']:.4f} nats per token",
    ]
    rows = zip(
        record["mtp_losses"],
        record["acceptance"],
        record["joint_acceptance"],
        record["conditional_acceptance"],
        record["ground_truth_acceptance"],
        strict=True,
    )
    for depth, (loss, alone, joint, conditional, truth) in enumerate(rows, start=1):
        lines.append(
            f"  depth {depth}: loss {loss:.4f}, accepted by the main model {alone:.1%} "
            f"(jointly {joint:.1%}, conditionally {conditional:.1%}), right {truth:.1%}"
        )
    lines.append(
        f"  expected accepted length τ = {record['expected_accepted_length']:.3f} tokens per pass"
    )
    if comparisons:
        lines.append("held-out prompts continued greedily")
        lines += [textwrap.indent(str(comparison), "  ") for comparison in comparisons]
    lines += [
        f"{seconds:.0f} s in all"
        + ("" if tokens_per_second is None else f", {tokens_per_second:,.0f} tokens/s in training")
        + ("" if utilization is None else f", model FLOPs utilisation {utilization:.1%}"),
        f"files: {out}/metrics.jsonl, {out}/curves.png, {out}/checkpoints",
        f"next:  python -m equinox_mtp generate --checkpoint {out} --prompt 'Once upon a time'",
    ]
    return "\n".join(lines)


def train_record(step: int, metrics: StepMetrics) -> Record:
    """One line of metrics; raises `FloatingPointError` if the loss is not finite."""
    main = {} if metrics.main is None else {"main_loss": float(metrics.main.mean)}
    mtp_losses, grad_norm = metrics.mtp.mean.tolist(), float(metrics.grad_norm)
    found = {**main, "mtp_losses": mtp_losses, "grad_norm": grad_norm}
    if not all(math.isfinite(x) for x in (*main.values(), *mtp_losses, grad_norm)):
        named = ", ".join(f"{name} {value}" for name, value in found.items())
        raise FloatingPointError(
            f"the loss or its gradient is not finite at step {step}: {named}. Checkpoints are of "
            "earlier, finite steps. Try a lower --learning-rate or more --warmup-steps."
        )
    scaling_factor = float(metrics.scaling_factor)
    routers = metrics.routers.record()
    return {"split": "train", "step": step, **found, "scaling_factor": scaling_factor, **routers}


def held_out_record(step: int, evaluation: Evaluation) -> Record:
    """One line of metrics on held-out text.

    **Raises:** `FloatingPointError` if a loss is not finite: no acceptance means anything then.
    """
    main_model, ground_truth = evaluation.main_model, evaluation.ground_truth
    main_loss, mtp_losses = float(evaluation.main.mean), evaluation.mtp.mean.tolist()
    if not all(math.isfinite(x) for x in (main_loss, *mtp_losses)):
        raise FloatingPointError(
            f"the loss on held-out text is not finite after step {step}: main loss {main_loss}, "
            f"depths {mtp_losses}. Checkpoints are of earlier, finite steps. Try a lower "
            "--learning-rate or more --warmup-steps."
        )
    return {
        "split": "held_out",
        "step": step,
        "tokens": int(evaluation.main.weight),
        "main_loss": main_loss,
        "mtp_losses": mtp_losses,
        "acceptance": main_model.independent.tolist(),
        "joint_acceptance": main_model.joint.tolist(),
        "conditional_acceptance": main_model.conditional.tolist(),
        "ground_truth_acceptance": ground_truth.independent.tolist(),
        "expected_accepted_length": float(main_model.expected_accepted_length),
    }


def describe_corpus(corpus: Corpus, held_out: Corpus, depths: int) -> str:
    """The size of the data, and a note if its documents are too short for the depths."""
    text = (
        f"{corpus.num_tokens:,} tokens in {len(corpus):,} document(s), {held_out.num_tokens:,} of "
        "them held out"
    )
    # Position i has a target at depth k if i + k + 1 is in its document.
    too_short = float(np.mean(corpus.lengths < depths + 2))
    if depths and too_short > 0.25:
        text += (
            f"\nnote: {too_short:.0%} of the documents have no target at depth {depths}: they have "
            f"fewer than {depths + 2} tokens. Are dtype and end of document those of the data?"
        )
    return text


def describe(record: Record) -> str:
    """A few words for the progress bar."""
    parts = [f"main {record['main_loss']:.3f}"] if "main_loss" in record else []
    if record["mtp_losses"]:
        parts.append("depths " + ", ".join(f"{loss:.3f}" for loss in record["mtp_losses"]))
    return ", ".join(parts)
