"""The benchmark scripts run, and write what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def report_of(script: str, arguments: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    """What a benchmark writes, and what it prints."""
    report_file = folder / "report.json"
    # Compiled in half the time: for the rows, not for their numbers.
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments, "--json", str(report_file)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(report_file.read_text()), done.stdout


@pytest.mark.slow
def test_step_rows_of_every_variant_and_depth(tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--depths", "1", "2", "--repeats", "1"]
    report, printed = report_of("mtp_step.py", arguments, tmp_path)
    assert report["preset"] == "tiny"
    assert [(row["depths"], row["variant"]) for row in report["rows"]] == [
        (depths, variant) for depths in (1, 2) for variant in ("fused", "recompute", "naive")
    ]
    for row in report["rows"]:
        assert row["compile_s"] > row["step_s"] > 0
        assert row["temp_bytes"] > 0
        assert row["matmul_fraction"] > 0
        assert row["relative_error"] < 1e-4
        # Each is a row of the printed table.
        assert f"| {row['depths']} | {row['variant']} | {row['compile_s']:.1f} " in printed


@pytest.mark.slow
def test_generation_rows_of_every_batch_and_number_of_drafts(tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--runs", str(tmp_path / "runs")]
    report, printed = report_of("generate.py", arguments, tmp_path)
    assert report["training_seconds"]["tiny"] > 0
    rows = report["rows"]
    assert [(row["batch"], row["drafts"]) for row in rows] == [
        (batch, drafts) for batch in (1, 2) for drafts in (0, 1, 3)
    ]
    for row in rows:
        accepted, drafts = row["accepted_per_position"], row["drafts"]
        assert len(accepted) == drafts
        assert row["tokens_per_pass"] == pytest.approx(1 + sum(accepted), abs=1e-6)
        assert row["same_tokens_as_plain"] == 1
        assert row["prefill_s"] > 0
        plain = next(r for r in rows if (r["batch"], r["drafts"]) == (row["batch"], 0))
        ideal = row["tokens_per_pass"] * plain["verify_s"]
        ideal /= row["verify_s"] + drafts * row["draft_s"]
        assert row["ideal_speedup"] == pytest.approx(ideal)
        assert row["speedup"] == pytest.approx(row["tokens_per_s"] / plain["tokens_per_s"])
        assert f"| tiny | {row['batch']} | {drafts} | {row['tokens_per_s']:,.0f} " in printed
