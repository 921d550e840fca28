"""Nodes come, go, and are killed under load, and no client notices: a short run of the ten-minute benchmark."""

import json
import subprocess
import sys
from pathlib import Path

from tests.cluster.harness import ROOT


def test_nodes_that_come_and_go_cost_no_request_and_leave_nothing_behind(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    # This seed kills a decode and a prefill node at once, and starts them again.
    options = ["--minutes", "0.25", "--pause", "1", "--clients", "4", "--seed", "237", "--json", str(report)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.churn", *options], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert report.exists(), done.stdout + done.stderr
    result = json.loads(report.read_text())
    assert result["problems"] == [], done.stdout
    assert done.returncode == 0
    assert {"decode: kill", "prefill: kill"} <= result["actions"].keys(), result["actions"]
    assert result["answers"]["streamed"] > 0
    assert result["answers"]["whole"] > 0
    assert result["router"]["node_joins_total"] >= 4
    assert result["router"]["node_losses_total"] >= 2
