"""Nodes with addresses of their own, of which some are killed, cut off or added: the same bits in the end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "nodes_campaign.py"
pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(1500)]


def _round(directory: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(CAMPAIGN), "--rounds", "1", "--results", str(directory / "results"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = map(json.loads, (directory / "results").read_text().splitlines())
    assert entry["files"] > 10
    assert entry["equal"]
    return dict(entry)


def _may_make_networks() -> bool:
    probe = ["unshare", "--net", "ip", "link", "add", "mixflow-probe", "type", "bridge"]
    return os.getuid() == 0 and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_make_networks(), reason="needs root, iproute2 and network namespaces")
def test_a_run_outlives_a_node_of_two(tmp_path: Path) -> None:
    assert [lost["how"] for lost in _round(tmp_path, "--small")["lost"]] == ["killed"]


@pytest.mark.slow
def test_a_run_outlives_its_nodes_and_takes_in_new_ones(tmp_path: Path) -> None:
    assert sorted(lost["how"] for lost in _round(tmp_path)["lost"]) == ["cut", "killed"]
