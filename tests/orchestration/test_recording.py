"""What MLflow holds of a finished experiment, read back by MLflow's own client."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from recorded import Drawn, record
from test_results import ARM_LEVELS, CELLS, metric_value
from test_summary import SEVERAL, SeveralBases

from orchestration.recording import NOTE_ROWS, Recorder, note
from orchestration.workflow import code_version

SEEDS = 2


class Held:
    """One experiment and its runs by name."""

    def __init__(self, made: Drawn, uri: str, parent: str) -> None:
        self.made, self.client = made, MlflowClient(uri)
        self.parent = self.client.get_run(parent)
        where = f"tags.`mlflow.parentRunId` = '{parent}'"
        found = self.client.search_runs([self.parent.info.experiment_id], where)
        self.children = {run.info.run_name: run for run in found}

    def artifact(self, run: Any, path: str, directory: Path) -> bytes:
        return Path(self.client.download_artifacts(run.info.run_id, path, str(directory))).read_bytes()


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Held:
    directory = tmp_path_factory.mktemp("recorded")
    shutil.copy(empty_database, directory / "mlflow.db")
    uri = f"sqlite:///{directory}/mlflow.db"
    made = Drawn(directory, f"replicates={SEEDS}")
    record(made, uri)
    return Held(made, uri, record(made, uri))  # telling it again changes nothing


def test_a_parent_and_a_child_for_the_base_and_each_arm_and_seed(held):
    identity = held.made.experiment.identity
    assert held.parent.info.run_name == f"quickstart-{identity[:6]}"
    assert set(held.children) == {"base", *(f"{arm}/{k}" for arm in ARM_LEVELS for k in range(SEEDS))}
    assert {run.info.status for run in [held.parent, *held.children.values()]} == {"FINISHED"}
    kinds = {name: run.data.tags["mixflow.kind"] for name, run in held.children.items()}
    assert kinds == {name: "base" if name == "base" else "arm" for name in held.children}
    assert held.parent.data.tags["mixflow.kind"] == "experiment"
    assert held.parent.data.tags["mixflow.experiment"] == identity
    for arm in ARM_LEVELS:
        for k in range(SEEDS):
            tags = held.children[f"{arm}/{k}"].data.tags
            assert (tags["mixflow.arm"], tags["mixflow.replicate"]) == (arm, str(k))


def test_settings_are_params_that_can_be_compared(held):
    params = {name: run.data.params for name, run in held.children.items()}
    assert {
        name: [found.get(f"mixture.{key}") for key in ("time_law", "gamma", "condition_on")]
        for name, found in params.items()
        if name.endswith("/1")
    } == {
        "none/1": [None, None, None],
        "standard/1": ["uniform", "0.0", "t"],
        "mixflow/1": ["beta", "0.8", "t"],
        "matched/1": ["beta", "0.8", "m"],
    }
    one = params["mixflow/1"]
    assert (one["arm"], one["replicate"], one["training.steps"], one["model.depth"]) == ("mixflow", "1", "1000", "2")
    assert one["seed"] != params["mixflow/0"]["seed"] == params["matched/0"]["seed"], "pairs share their seed"
    parent = held.parent.data.params
    assert (parent["replicates"], parent["mixture.gamma"]) == (str(SEEDS), "0.8")
    assert parent["evaluation.num_samples"] == "2000"


def test_every_metric_of_every_cell_once(held):
    for arm in ARM_LEVELS:
        run = held.children[f"{arm}/1"]
        evaluated = {key for key in run.data.metrics if key.startswith("eval/") and key != "eval/loss"}
        assert len(evaluated) == 5 * len(CELLS)
        for cell in CELLS:
            (point,) = held.client.get_metric_history(run.info.run_id, f"eval/fd_digits/{cell}")
            assert (point.value, point.step) == (metric_value(arm, 1, cell, "fd_digits"), 0)
    assert set(held.parent.data.metrics) >= {f"primary/{arm}" for arm in ARM_LEVELS}


def test_training_curves(held):
    run = held.children["mixflow/1"]
    losses = held.client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in sorted(losses, key=lambda point: point.step)] == list(range(50, 1001, 50))
    assert len(held.client.get_metric_history(run.info.run_id, "eval/loss")) == 2


def test_cost(held):
    """Each stage took 1.5 s on two workers: 3 device-seconds."""
    cost = {k: v for k, v in held.children["mixflow/1"].data.metrics.items() if k.startswith("cost/")}
    assert cost == {
        "cost/device_s/arms": 3.0,
        "cost/device_s/samples": 3.0,
        "cost/device_s/metrics": 3.0,
        "cost/images_trained": 1000 * 128,
        "cost/nfe/euler20/s1": 20,
        "cost/nfe/heun4/s1.5": 16,
    }
    assert "cost/device_s/arms" not in held.children["none/1"].data.metrics
    assert held.children["base"].data.metrics["cost/images_trained"] == 3000 * 128
    total = held.parent.data.metrics
    assert total["cost/images_trained"] == (3000 + 3 * SEEDS * 1000) * 128
    assert (total["cost/device_s/arms"], total["cost/device_s/samples"]) == (3.0 * 3 * SEEDS, 3.0 * 4 * SEEDS)
    assert total["cost/device_s/slow-flow"] == 3.0 * 4


def test_an_experiment_of_several_bases_goes_back_to_none_of_them_alone(tmp_path):
    made = SeveralBases(tmp_path, *SEVERAL)
    recorder = Recorder(made.workspace, [], None, is_actor=False)
    assert set(recorder._lineage()) == {"mixflow.data"}
    weights = made.workspace.result("base/1").manifest.files["weights.safetensors"]
    assert recorder._lineage(["data", "base/1"])["mixflow.base_sha256"] == weights.sha256


def test_lineage_and_protocol(held, tmp_path):
    workspace = held.made.workspace
    base, data = workspace.result("base"), workspace.result("data")
    for run in [held.parent, *held.children.values()]:
        assert run.data.tags["mixflow.base_sha256"] == base.manifest.files["weights.safetensors"].sha256
        assert run.data.tags["mixflow.data"] == data.manifest.digest
    assert held.parent.data.tags["mixflow.code"] == code_version()
    assert held.children["mixflow/0"].data.tags["mixflow.device"] == "cpu"
    evaluated = [held.parent, *(run for name, run in held.children.items() if name != "base")]
    assert len({run.data.tags["mixflow.protocol"] for run in evaluated}) == 1
    protocol = json.loads(held.artifact(held.parent, "protocol.json", tmp_path))
    summary = json.loads(held.artifact(held.parent, "results.json", tmp_path))
    assert protocol == summary["protocol"]
    assert protocol["num_samples"] == 2000


def test_the_compare_page_of_mlflow_finds_the_grids(held, tmp_path):
    """It shows files of one name that lie in no folder."""
    for name, run in held.children.items():
        files = [file.path for file in held.client.list_artifacts(run.info.run_id) if not file.is_dir]
        assert sorted(files) == ([] if name == "base" else ["euler20-s1.png", "heun4-s1.5.png"])
    grid = held.artifact(held.children["matched/1"], "heun4-s1.5.png", tmp_path)
    assert grid == held.made.workspace.result("samples/matched/1").read("heun4-s1.5.png")


def test_verdicts_are_where_one_looks(held):
    tags = held.parent.data.tags
    assert tags["mixflow.verdict.mixflow"] == held.children["mixflow/1"].data.tags["mixflow.verdict"] == "promote"
    assert "| mixflow | 3." in tags["mlflow.note.content"]


def test_a_note_of_many_arms_fits_a_tag():
    interval = {"mean": 123456.789, "low": 100000.1, "high": 150000.2}
    arm = {"metrics": {"euler20/s1": {"fd_digits": interval}}, "verdict": {"verdict": "inconclusive"}}
    many = {f"an-arm-with-quite-a-long-name-{i}": arm for i in range(500)}
    text = note({"primary": "fd_digits/euler20/s1", "arms": many})
    assert len(text) < 8000  # MLflow's limit
    assert f"It has {500 - NOTE_ROWS} more arms." in text
