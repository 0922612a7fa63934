"""Nodes that are cut off, killed and added while a run goes on: it shrinks, grows, and ends with the same bits."""

import re
from pathlib import Path

import pytest
from clusters import Run, results_of, small
from netns_nodes import cluster_of

pytestmark = pytest.mark.ray

SETTINGS = small(
    base__train__steps=40,
    training__steps=1200,
    training__log_every=20,
    training__checkpoint_every=100,
    base__train__reproducible=True,
    training__reproducible=True,
    cluster__hang_timeout_s=30,
    cluster__max_failures=5,
)
COMMAND = ["train", "quickstart", "--json", *SETTINGS]


def _starts(run: Run) -> int:
    return max(map(int, re.findall(r"started again \((\d+)\)", run.err.read_text())), default=0)


def _steps(run: Run) -> int:
    """Steps of the arms that the log tells of, by the last line."""
    found = re.findall(r"stage (\d+)/\d+  arms/\S+ step (\d+)/", run.err.read_text())
    return int(found[-1][0]) * 10_000 + int(found[-1][1]) if found else 0


def test_a_node_is_cut_off_and_another_comes(tmp_path: Path) -> None:
    alone, workspace = tmp_path / "a" / "ws", tmp_path / "b" / "ws"
    Run([*COMMAND, "--set", "cluster.num_workers=1"], tmp_path / "a", {"MIXFLOW_WORKSPACE": str(alone)}).answer()
    with cluster_of(tmp_path / "nodes.log", 2, 3) as nodes:
        environment = {"MIXFLOW_WORKSPACE": str(workspace), "RAY_ADDRESS": nodes.address, "RAY_AUTH_MODE": "disabled"}
        run = Run([*COMMAND, "--set", "cluster.num_workers=[1,2]"], tmp_path / "b", environment)
        run.until(lambda: _steps(run) > 0, "the first arm")
        nodes.cut(3)
        run.until(lambda: _starts(run) >= 1, "the group starts again with one worker", 240)
        before = _steps(run)
        run.until(lambda: _steps(run) > before, "it goes on")
        nodes.add(4)
        run.until(lambda: _starts(run) >= 2, "the group grows", 240)
        before = _steps(run)
        run.until(lambda: _steps(run) > before, "it goes on")
        nodes.kill(4)
        answer = run.answer()
        assert answer["tracking"]["pending"] == 0
    assert results_of(workspace) == results_of(alone)
