"""Signals to the processes of a run: it stops with its last step kept, goes on, and ends with the same bits."""

import json
import re
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from clusters import Run, ray_head, ray_node, results_of, small
from mlflow import MlflowClient

pytestmark = pytest.mark.ray

# Arms long enough to be caught in the middle though a line comes every 5 s only; their only regular checkpoint is
# their last step.
STEPS = 600
SETTINGS = small(
    training__steps=STEPS,
    training__checkpoint_every=STEPS,
    cluster__hang_timeout_s=10,
    cluster__max_failures=1,
)
IN_AN_ARM = re.compile(rf"arms/(\S+) step (\d+)/{STEPS}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed")
    Run(["train", "quickstart", "--json", *SETTINGS], home, {"MIXFLOW_WORKSPACE": str(home / "ws")}).answer()
    return home / "ws"


def _amid(run: Run, arm: str) -> bool:
    """Whether its last line is of the middle of this arm: an earlier arm's stands there until this one has a line."""
    lines = IN_AN_ARM.findall(run.err.read_text())
    return bool(lines) and lines[-1][0] == arm and 0 < int(lines[-1][1]) < STEPS - 100


def _kept(workspace: Path) -> list[int]:
    """Steps at which checkpoints of arms are kept."""
    return sorted(int(path.parent.name[5:14]) for path in workspace.glob("checkpoints/arms-*/step-*/manifest.json"))


def test_sigterm_keeps_the_last_step_and_a_hung_worker_is_found(undisturbed: Path, tmp_path: Path) -> None:
    workspace, command = tmp_path / "ws", ["train", "quickstart", "--json", *SETTINGS]
    environment = {"MIXFLOW_WORKSPACE": str(workspace)}
    run = Run(command, tmp_path, environment)

    # A node that is taken away ends its processes: all ranks stop after one step, which is no failure.
    run.until(lambda: _amid(run, "standard/0"), "the middle of the first arm")
    run.find("RayTrainWorker")[-1].send_signal(signal.SIGTERM)
    run.until(lambda: "the workers were asked to stop, all stopped after step" in run.said(), "the group stops")
    step = int(re.findall(r"all stopped after step (\d+), whose state is kept", run.said())[-1])
    assert step in _kept(workspace)

    # A worker that hangs: its stack is shown, and the group starts again.
    run.until(lambda: _amid(run, "mixflow/0"), "the middle of the second arm")
    run.find("RayTrainWorker")[0].send_signal(signal.SIGSTOP)
    run.until(lambda: "post_train (" in run.err.read_text(), "the hung worker is found, and its stack shown", 60)
    said = run.err.read_text()
    assert re.search(r"worker [01] on \S+, pid \d+ has been silent for 1\d s and was killed; it was at", said)

    # The driver is asked to end.
    run.until(lambda: _amid(run, "matched/0"), "the middle of the third arm")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 1
    last = run.said().strip().splitlines()[-1]
    found = re.fullmatch(r"stopped after step (\d+), whose state is kept; the same command goes on from there", last)
    assert found, run.said()
    assert int(found[1]) in _kept(workspace)
    client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    assert {run.info.status for run in runs} <= {"KILLED", "FINISHED"}, "nothing is left running"

    answer = Run(command, tmp_path / "again", environment).answer()
    assert answer["tracking"]["pending"] == 0
    assert results_of(workspace) == results_of(undisturbed)
    for path in workspace.glob("arms/*/history.jsonl"):
        rows = [json.loads(line)["step"] for line in path.read_text().splitlines() if "train/loss" in line]
        assert rows == list(range(10, STEPS + 1, 10))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_to_a_node_moves_its_worker_after_a_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    workspace, log = tmp_path / "ws", tmp_path / "nodes.log"
    # No failure is allowed: what happens here is none.
    command = ["train", "quickstart", "--json", *SETTINGS, "--set", "cluster.max_failures=0"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}  # as docker/compose.yaml has it
    with ray_head("nodes", tmp_path / "head.log", cpus=0, **token) as head, ExitStack() as stack:
        nodes = [stack.enter_context(ray_node(head, log)) for _ in range(3)]
        run = Run(command, tmp_path, {"MIXFLOW_WORKSPACE": str(workspace), "RAY_ADDRESS": head["GCS"], **token})
        run.until(lambda: _amid(run, "standard/0"), "the middle of the first arm", 400)
        node = next(n for n in nodes if any("RayTrainWorker" in p.cmdline()[0] for p in n.children(recursive=True)))
        node.send_signal(signal.SIGTERM)
        run.until(lambda: "the workers were asked to stop, all stopped after step" in run.said(), "the group stops")
        node.wait(60)
        assert "Local node finished draining" in log.read_text(), "its workers were gone before its time was over"
        step = int(re.findall(r"all stopped after step (\d+), whose state is kept", run.said())[-1])
        assert step in _kept(workspace)
        assert run.answer()["tracking"]["pending"] == 0
    assert results_of(workspace) == results_of(undisturbed)
