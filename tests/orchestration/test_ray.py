"""The whole workflow on a real Ray cluster: complete, resumable, exact after kill -9 of any process."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from clusters import Run, results_of, small
from mlflow import MlflowClient

pytestmark = pytest.mark.ray
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("controller", "raylet", "reporter")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A small quickstart that nobody disturbed: its workspace and its answer."""
    home = tmp_path_factory.mktemp("undisturbed")
    run = Run(["run", "quickstart", "--json", *small()], home, {"MIXFLOW_WORKSPACE": str(home / "ws")})
    return home / "ws", run.answer()


def test_the_answer_names_everything(finished: tuple[Path, dict]) -> None:
    workspace, answer = finished
    assert answer["workspace"] == str(workspace)
    assert Path(answer["report"]).read_text().startswith("<!doctype html>")
    assert {stage["state"] for stage in answer["stages"]} == {"done"}
    assert {arm["name"] for arm in answer["arms"]} == {"none", "standard", "mixflow", "matched"}
    for arm in answer["arms"]:
        assert arm["seeds"] == [0, 1]
        assert arm["verdict"] in ("promote", "reject", "inconclusive")
        interval = arm["metrics"]["euler20/s1"]["fd_digits"]
        assert interval["low"] <= interval["mean"] <= interval["high"]
    assert answer["tracking"]["pending"] == 0


def test_mlflow_holds_every_run_and_every_metric_once(finished: tuple[Path, dict]) -> None:
    answer = finished[1]
    client = MlflowClient(answer["tracking"]["uri"])
    experiment = client.get_experiment_by_name("quickstart")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    arms = [f"{arm}/{k}" for arm in ("none", "standard", "mixflow", "matched") for k in (0, 1)]
    parent = client.get_run(answer["tracking"]["parent_run"])
    assert sorted(runs) == sorted([*arms, "base", parent.info.run_name])
    del runs[parent.info.run_name]
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} >= {"report.html", "results.json"}
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    run = runs["mixflow/1"]
    weights = Path(run.data.tags["mixflow.weights"])
    history = [json.loads(line) for line in (weights.parent / "history.jsonl").read_text().splitlines()]
    for key in ("train/loss", "train/grad_norm", "eval/loss"):
        there = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        assert sorted(there) == [(row["step"], row[key]) for row in history if key in row]
    of_arm = next(arm for arm in answer["arms"] if arm["name"] == "mixflow")
    value = of_arm["metrics"]["heun10/s1"]["recall_digits"]["values"][1]
    assert run.data.metrics["eval/recall_digits/heun10/s1"] == value
    assert run.data.params["mixture.gamma"] == "0.8"
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} >= {"euler4-s1.png"}


def test_a_second_run_reuses_everything_and_a_change_only_what_precedes_it(finished: tuple[Path, dict]) -> None:
    workspace, answer = finished
    environment = {"MIXFLOW_WORKSPACE": str(workspace)}
    again = Run(["run", "quickstart", "--resume", "--json", *small()], workspace.parent / "again", environment).answer()
    assert {stage["state"] for stage in again["stages"]} == {"reused"}
    assert again["arms"] == answer["arms"]
    assert again["tracking"]["parent_run"] == answer["tracking"]["parent_run"]
    other = Run(["plan", "quickstart", "--json", *small(mixture__gamma=0.3)], workspace.parent / "plan", environment)
    states = {stage["name"]: stage["state"] for stage in other.answer()["stages"]}
    assert states["base"] == states["arms/standard/0"] == states["metrics/none/1"] == "done"
    assert states["arms/mixflow/0"] == states["arms/matched/1"] == states["metrics/mixflow/0"] == "to do"


def _alter_a_checkpoint(workspace: Path) -> str:
    """Turns one byte of the newest checkpoint of the arm that was interrupted; returns what names it."""
    manifests = workspace.glob("checkpoints/arms-*/step-*/manifest.json")
    newest = max(manifests, key=lambda path: path.stat().st_mtime).parent
    if (workspace / newest.parent.name.replace("-", "/", 1) / "manifest.json").exists():
        return ""  # that arm was finished just before the kill: nobody reads its checkpoints any more
    if len(list(newest.parent.glob("step-*/manifest.json"))) == 1:
        return ""  # nor may the only one be spoilt: training would not begin anew without being told
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return f"{newest} is set aside: "


@pytest.mark.parametrize("victim", ["worker", "driver", *SLOW])
def test_kill_9_changes_nothing(victim: str, finished: tuple[Path, dict], tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    command = ["run", "quickstart", "--json", *small()]
    environment = {"MIXFLOW_WORKSPACE": str(workspace)}
    run = Run(command, tmp_path, environment)
    # In the middle of an arm: its second checkpoint of three is there, its end is not.
    run.until(lambda: list(workspace.glob("checkpoints/arms-*/step-*40-*/manifest.json")), "an arm's second checkpoint")
    titles = {"worker": "RayTrainWorker", "controller": "TrainController", "raylet": "raylet", "reporter": "Reporter"}
    victims = [run.process] if victim == "driver" else run.find(titles[victim])
    family = run.process.children(recursive=True)
    assert victims, [p.cmdline()[:1] for p in family]
    victims[0].kill()
    altered = ""
    if run.wait() != 0:
        # A worker without its driver lives on for a moment, and may even finish its arm.
        for process in psutil.wait_procs(family, timeout=20)[1]:
            process.kill()
        if victim == "driver":
            altered = _alter_a_checkpoint(workspace)
        run = Run(command, tmp_path / "again", environment)
    answer = run.answer()
    assert altered in run.said()
    assert answer["tracking"]["pending"] == 0
    assert results_of(workspace) == results_of(finished[0])


def test_one_worker_draws_the_same_samples(finished: tuple[Path, dict], tmp_path: Path) -> None:
    settings = small(cluster__num_workers=1)
    Run(["train", "quickstart", "--json", *settings], tmp_path, {"MIXFLOW_WORKSPACE": str(tmp_path / "ws")}).answer()

    def losses(workspace: Path) -> dict[tuple[str, int], float]:
        found = {}
        for path in workspace.glob("arms/*/manifest.json"):
            stage = json.loads(path.read_text())["meta"]["stage"]
            rows = map(json.loads, (path.parent / "history.jsonl").read_text().splitlines())
            found |= {(stage, row["step"]): row["train/loss"] for row in rows if "train/loss" in row}
        return found

    two, one = losses(finished[0]), losses(tmp_path / "ws")
    assert len(two) == 3 * 2 * 6
    assert one == pytest.approx(two, rel=1e-5)


ASKS = """
import ray
from orchestration.cluster import connect

@ray.remote(num_cpus=0)
def ask():
    from ray.util.state import get_actor
    from ray.util.state.exception import RayStateApiException
    try:
        return get_actor("f" * 32, timeout=5)
    except RayStateApiException:  # the cleaner then goes on
        return "no answer"

connect({})
print(ray.get(ask.remote()))
"""


@pytest.fixture
def another_dashboard() -> Iterator[list[str]]:
    """Who asks port 8265 for an actor is told that there is none; the paths that were asked for. Where a dashboard is
    there already, it says the same."""
    asked: list[str] = []

    class Nobody(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            found = {"total": 0, "num_after_truncation": 0, "num_filtered": 0, "result": [], "warnings": []}
            answer = {"result": True, "msg": "", "data": {"result": {**found, "partial_failure_warning": ""}}}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", 8265), Nobody)
    except OSError:
        yield asked
        return
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield asked
    server.shutdown()
    server.server_close()


def test_the_dashboard_of_another_cluster_is_not_asked(another_dashboard: list[str]) -> None:
    """It would say that the run's controller is dead, and Ray Train's cleaner would take the workers' places away."""
    found = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True, timeout=120)
    assert found.stdout == "no answer\n", found.stdout + found.stderr
    assert not another_dashboard
