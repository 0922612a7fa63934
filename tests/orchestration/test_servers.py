"""The quickstart against real servers: S3 (Ceph RADOS Gateway), MLflow on PostgreSQL, and Ray's job server."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Run, ray_head, small
from mlflow import MlflowClient
from mlflow_servers import MlflowServer

from orchestration.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.mlflow]


@pytest.mark.s3
def test_the_same_recipe_on_s3_and_a_tracking_server(ceph_s3: str, mlflow_server: MlflowServer, tmp_path: Path) -> None:
    mlflow_server.start()
    environment = {"MIXFLOW_WORKSPACE": ceph_s3, "MLFLOW_TRACKING_URI": mlflow_server.uri}
    answer = Run(["run", "quickstart", "--json", *small()], tmp_path, environment).answer()
    storage = open_storage(ceph_s3)
    assert storage.read(answer["report"].removeprefix(f"{ceph_s3}/")).startswith(b"<!doctype html>")
    weights = [path for path in storage.list("arms") if path.endswith("weights.safetensors")]
    assert len(weights) == 6
    assert all(storage.manifest(path.rpartition("/")[0]) for path in weights)
    client = MlflowClient(mlflow_server.uri)
    run = client.get_run(answer["tracking"]["parent_run"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["mixflow.verdict.mixflow"] in ("promote", "reject", "inconclusive")
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert len(children) == 9
    kept = [child.data.tags["mixflow.checkpoints"] for child in children if child.data.tags["mixflow.arm"] != "none"]
    assert {uri.partition("/checkpoints/")[0] for uri in kept} == {ceph_s3}
    again = Run(["run", "quickstart", "--json", *small()], tmp_path / "again", environment).answer()
    assert {stage["state"] for stage in again["stages"]} == {"reused"}
    mlflow_server.kill()


@pytest.mark.slow
def test_mlflow_never_there_and_replayed_later(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    mlflow_server.kill()
    environment = {"MIXFLOW_WORKSPACE": str(tmp_path / "ws"), "MLFLOW_TRACKING_URI": mlflow_server.uri}
    settings = small(name="replayed")
    answer = Run(["train", "quickstart", "--json", *settings], tmp_path, environment).answer()
    assert answer["tracking"]["pending"] > 0
    mlflow_server.start()
    replayed = Run(["replay", "--json"], tmp_path / "replay", environment).answer()
    assert [spool["pending"] for spool in replayed["spools"]] == [0]
    client = MlflowClient(mlflow_server.uri)
    found = client.search_runs([client.get_experiment_by_name("replayed").experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == 8
    run = runs["mixflow/0"]
    history = [json.loads(line) for line in _beside(run.data.tags["mixflow.weights"]).read_text().splitlines()]
    there = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(there) == [(row["step"], row["train/loss"]) for row in history if "train/loss" in row]


def _beside(weights: str) -> Path:
    return Path(weights).parent / "history.jsonl"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running head node with a job server; the environment that a user of it sets."""
    with ray_head("ray", tmp_path_factory.mktemp("head") / "log", RAY_AUTH_MODE="disabled") as environment:
        yield environment


def _submit(environment: dict[str, str], variables: dict[str, str], arguments: list[str]) -> tuple[int, str]:
    """`ray job submit` of a clone of the project; its exit code and what it printed."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(root)]
    command += ["--runtime-env-json", json.dumps({"env_vars": variables, "excludes": [".venv", ".git"]})]
    command += ["--address", environment["RAY_API_SERVER_ADDRESS"]]
    command += ["--", sys.executable, "-m", "orchestration", *arguments]
    for _ in range(30):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        if "No available agent" not in done.stdout + done.stderr:  # the head is up before its agent is
            break
        time.sleep(2)
    return done.returncode, done.stdout + done.stderr


def test_a_ray_job_does_the_same(head: dict[str, str], tmp_path: Path) -> None:
    workspace = {"MIXFLOW_WORKSPACE": str(tmp_path / "ws")}
    code, said = _submit(head, workspace, ["run", "quickstart", *small()])
    assert code == 0, said
    assert "succeeded" in said
    assert list((tmp_path / "ws").glob("experiments/quickstart-*/report.html"))


def test_a_ray_job_fails_when_the_run_does(head: dict[str, str], tmp_path: Path) -> None:
    code, said = _submit(
        head, {"MIXFLOW_WORKSPACE": str(tmp_path / "ws")}, ["run", "quickstart", "--set", "mixture.gamma=1.5"]
    )
    assert code == 1
    assert "gamma must lie in [0, 1], got 1.5" in said
    assert "failed" in said.lower()


def test_a_job_needs_a_workspace_that_all_nodes_see(head: dict[str, str]) -> None:
    code, said = _submit(head, {}, ["run", "quickstart"])
    assert code == 1
    assert "MIXFLOW_WORKSPACE must be an s3:// URI or an absolute path on a shared disk inside a Ray job" in said
