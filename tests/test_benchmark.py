"""The benchmark script runs, and writes what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "mtp_step.py"


@pytest.mark.slow
def test_rows_of_every_variant_and_depth(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    arguments = ["--preset", "tiny", "--depths", "1", "2", "--repeats", "1"]
    # Compiled in half the time: for the rows, not for their numbers.
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--json", str(report_file)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(report_file.read_text())
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
        assert f"| {row['depths']} | {row['variant']} | {row['compile_s']:.1f} " in done.stdout
