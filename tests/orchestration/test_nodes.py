"""Nodes with addresses of their own, of which one is killed, one is cut off, and two come: the same bits in the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "nodes_campaign.py"
pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_run_outlives_its_nodes(tmp_path: Path) -> None:
    command = [sys.executable, str(CAMPAIGN), "--rounds", "1", "--results", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = map(json.loads, (tmp_path / "results").read_text().splitlines())
    assert sorted(lost["how"] for lost in entry["lost"]) == ["cut", "killed"]
    assert entry["files"] > 10
    assert entry["equal"]
