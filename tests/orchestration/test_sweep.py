"""Sweeps on a real Ray cluster: complete accounts, the same after kill -9, extended without doing anything again."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import Run, small
from mlflow import MlflowClient

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

# A perturbation of 1e39 is infinite in single precision: those trials diverge. ASHA lets one of two go on.
SWEEP = "{scheduler: asha, reduction_factor: 2, objective: fd_digits/euler4/s1}"
SPACE = ["--space", "mixture.gamma=grid(0.2,1.0)", "--space", "corrective.input_perturbation=grid(0,1e39)"]
WIDER = ["--space", "mixture.gamma=grid(0.2,0.4,1.0)", "--space", "corrective.input_perturbation=grid(0)"]
CONTROLS = ("standard", "matched")


def command(*space: str) -> list[str]:
    # One trial at a time on two CPUs: what ASHA decides depends on who is first.
    settings = small(sweep=SWEEP, cluster__num_workers=1, cluster__cpus_per_worker=2)
    return ["sweep", "quickstart", "--json", *settings, *space]


def told(answer: dict[str, Any]) -> dict[str, Any]:
    """What a sweep found, by label, in whatever space."""
    rows = [*answer["controls"], *answer["trials"]]
    return {row["label"]: {key: value for key, value in row.items() if key != "in_space"} for row in rows}


def trained(workspace: Path) -> dict[str, str]:
    """SHA-256 of the weights and history of every trial that finished, by the trial's stage."""
    found = {}
    for manifest in workspace.glob("trials/*/manifest.json"):
        content = json.loads(manifest.read_text())
        for name in ("weights.safetensors", "history.jsonl"):
            found[f"{content['meta']['stage']}/{name}"] = content["files"][name]["sha256"]
    return found


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A sweep that nobody disturbed: its workspace and its answer."""
    home = tmp_path_factory.mktemp("quiet")
    run = Run(command(*SPACE), home, {"MIXFLOW_WORKSPACE": str(home / "ws")})
    assert run.wait(900) == 0, run.said()
    return home / "ws", run.answer()


def test_every_trial_is_accounted_for(quiet):
    answer = quiet[1]
    rows = told(answer)
    assert list(rows) == ["standard", "matched", "t000", "t001", "t002", "t003"]
    points = [(0.2, 0), (0.2, 1e39), (1.0, 0), (1.0, 1e39)]
    assert [tuple(row["params"].values()) for row in answer["trials"]] == points
    states = {label: (row["state"], row["step"]) for label, row in rows.items()}
    assert states["standard"] == states["matched"] == states["t000"] == ("finished", 60)
    assert states["t001"] == states["t003"] == ("failed", 0)
    assert "is not finite" in rows["t001"]["reason"]
    assert states["t002"] == ("pruned", 20)
    for label in (*CONTROLS, "t000"):
        assert [step for step, _ in rows[label]["history"]] == [20, 40, 60]
    assert answer["best"]["label"] == "t000"
    gap = rows["t000"]["objective"] - rows["standard"]["objective"]
    assert answer["best"]["differences"] == {"standard": pytest.approx(gap)}, "matched has another gamma"
    assert answer["budget"]["trials"] == 4
    assert answer["budget"]["steps"] == 6 * 60
    assert Path(answer["figure"]).read_bytes().startswith(b"\x89PNG")
    assert "t002" in answer["table"]


def test_mlflow_has_a_parent_and_a_child_for_each_trial(quiet):
    answer = quiet[1]
    client = MlflowClient(answer["tracking"]["uri"])
    assert answer["tracking"]["pending"] == 0
    parent = client.get_run(answer["tracking"]["parent_run"])
    assert parent.data.tags["mixflow.kind"] == "sweep"
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} == {"sweep.json", "sweep.png"}
    where = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    runs = {run.info.run_name: run for run in client.search_runs([parent.info.experiment_id], where)}
    rows = told(answer)
    assert set(runs) == set(rows)
    status = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
    for label, run in runs.items():
        assert run.info.status == status[rows[label]["state"]], label
        curve = [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, "objective")]
        assert sorted(curve) == rows[label]["history"], label
    run = runs["t000"]
    assert (run.data.params["mixture.gamma"], run.data.params["corrective.input_perturbation"]) == ("0.2", "0.0")
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 6
    assert "euler4-s1.png" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert Path(run.data.tags["mixflow.weights"]).exists()
    assert run.data.tags["mixflow.base_sha256"]
    assert "is not finite" in runs["t001"].data.tags["mixflow.reason"]


def test_kill_9_of_the_driver_a_worker_and_a_trials_driver_changes_nothing(quiet, tmp_path):
    workspace = tmp_path / "ws"
    environment = {"MIXFLOW_WORKSPACE": str(workspace)}

    def begun() -> int:
        """Trials that have a checkpoint."""
        return len({path.parts[-3] for path in workspace.glob("checkpoints/trials-*/step-*/manifest.json")})

    run = Run(command(*SPACE), tmp_path, environment)
    # In the first control, in the second, whose driver Tune starts again, and in the first trial.
    for victim, at_least in (("RayTrainWorker", 1), ("ImplicitFunc", 2), ("", 3)):
        run.until(lambda n=at_least: begun() >= n, f"a checkpoint of trial {at_least}", 500)
        run.until(lambda v=victim: run.find(v), f"a process {victim}")
        victims = run.find(victim) if victim else [run.process]
        family = run.process.children(recursive=True)
        victims[0].kill()
    for process in psutil.wait_procs(family, timeout=20)[1]:
        process.kill()
    run.wait()
    again = Run(command(*SPACE), tmp_path / "again", environment)
    assert again.wait(900) == 0, again.said()
    answer = again.answer()
    assert told(answer) == told(quiet[1])
    assert answer["best"] == quiet[1]["best"]
    expected = trained(quiet[0])
    assert {name: digest for name, digest in trained(workspace).items() if name in expected} == expected
    client = MlflowClient(answer["tracking"]["uri"])
    (experiment,) = (e for e in client.search_experiments() if e.name == "quickstart")
    names = [run.info.run_name for run in client.search_runs([experiment.experiment_id])]
    assert sorted(name for name in names if name in told(answer)) == sorted(told(answer))

    # Extended: the new points alone are run.
    before = {path: path.stat().st_mtime_ns for path in workspace.glob("trials/*/manifest.json")}
    more = Run(command(*WIDER), tmp_path / "more", environment)
    assert more.wait(600) == 0, more.said()
    wider = told(more.answer())
    assert list(wider) == [*told(answer), "t004"]
    assert wider["t004"]["params"] == {"mixture.gamma": 0.4, "corrective.input_perturbation": 0}
    assert {label: row for label, row in wider.items() if label != "t004"} == told(answer)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [row["label"] for row in more.answer()["trials"] if not row["in_space"]] == ["t001", "t003"]
    assert more.answer()["sweep"] == answer["sweep"]
