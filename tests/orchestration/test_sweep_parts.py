"""What a sweep is made of, without a cluster: ledger, order of trials, pruning after a restart, table, registry."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from ray.tune.search import Searcher

from orchestration import cluster, sweep
from orchestration.confirm import best_experiment
from orchestration.experiment import Experiment
from orchestration.figures import sweep_plot
from orchestration.ledger import Entry, Ledger
from orchestration.recipe import load
from orchestration.sections import Cluster
from orchestration.storage import Storage, open_storage
from orchestration.sweep_report import budget, summary_of, table_of
from orchestration.tracking import Tracker
from orchestration.trials import check_space

HOME = "sweeps/one"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "workspace"))


def swept(section: str) -> Experiment:
    return load("quickstart", [f"sweep={section}"])


class Silent:
    """A recorder that nobody listens to."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def tell(self, method: str) -> bool:
        assert method == "is_ending"
        return False

    def begin(self, entry: Entry) -> None:
        self.begun.append(entry.label)


def drain(experiment: Experiment, ledger: Ledger) -> list[str]:
    """All labels that Tune would be given."""
    trials, found = sweep._Trials(experiment, ledger, Silent()), []
    while (given := trials.suggest("id")) != Searcher.FINISHED:
        found.append(given["label"])
    return found


def ended(ledger: Ledger, label: str, state: str, *history: tuple[int, float], **more: object) -> None:
    entry = ledger.entries[label]
    for step, value in history:
        entry.saw(step, value)
    ledger.close(entry, state, **more)


def test_controls_then_what_is_open_then_what_is_new(storage):
    section = "{space: {mixture.gamma: 'uniform(0,1)'}, num_trials: %d}"
    first = Ledger(storage, HOME)
    assert drain(swept(section % 4), first) == ["standard", "matched", "t000", "t001", "t002", "t003"]
    params = {label: entry.params for label, entry in first.entries.items()}
    ended(first, "standard", "finished", (500, 2.0), (1000, 1.0))
    ended(first, "t000", "finished", (1000, 1.5))
    ended(first, "t001", "failed", reason="the node died")
    ended(first, "t002", "failed", reason="loss is not finite", diverged=True)
    again = Ledger(storage, HOME)
    assert {label: entry.params for label, entry in again.entries.items()} == params
    assert (again.entries["standard"].step, again.entries["standard"].objective) == (1000, 1.0)
    assert again.entries["t002"].reason == "loss is not finite"
    assert drain(swept(section % 6), again) == ["matched", "t001", "t003", "t004", "t005"]
    assert sweep._is_open(swept(section % 6), again)
    for label in ("matched", "t001", "t003", "t004", "t005"):
        ended(again, label, "pruned")
    assert not sweep._is_open(swept(section % 6), again)
    assert drain(swept(section % 6), again) == []
    assert sweep._is_open(swept(section % 7), again)


def test_the_whole_grid_whatever_was_tried_before(storage):
    ledger = Ledger(storage, HOME)
    assert len(drain(swept("{space: {mixture.gamma: 'grid(0,0.5,1)'}}"), ledger)) == 5
    for label in ledger.entries:
        ended(ledger, label, "finished", (1000, 1.0))
    wider = swept("{space: {mixture.gamma: 'grid(0.2,0.5)'}}")
    assert drain(wider, ledger) == ["t003"]
    assert ledger.entries["t003"].params == {"mixture.gamma": 0.2}


@pytest.mark.parametrize(("objective", "sign"), [("fd_digits/euler20/s1", 1), ("recall_digits/euler20/s1", -1)])
def test_asha_has_heard_of_what_was_before_a_restart(storage, objective, sign):
    """A rung of eight values lets the better half go on: the ninth is stopped if it is worse than their median."""
    experiment = swept(
        "{space: {mixture.gamma: 'uniform(0,1)'}, scheduler: asha, reduction_factor: 2, num_trials: 9, "
        f"objective: {objective}}}"
    )
    ledger = Ledger(storage, HOME)
    drain(experiment, ledger)
    for number in range(8):
        ended(ledger, f"t{number:03d}", "pruned", (500, sign * float(number)))

    def decision(value: float, step: int = 500) -> str:
        scheduler = sweep.scheduler_of(experiment, ledger.trials, 1000)
        trial = SimpleNamespace(trial_id="new", status="RUNNING")
        scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"step": step, "objective": value})

    assert decision(sign * 3.0) == "CONTINUE"
    assert decision(sign * 5.0) == "STOP"
    assert decision(sign * 5.0, 250) == "CONTINUE", "before the first rung"


def test_as_many_trials_at_once_as_the_nodes_hold(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 5.0}}, {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}]
    monkeypatch.setattr("ray.nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])
    fit = cluster.groups_that_fit
    assert fit(Cluster(num_workers=2)) == 3
    assert fit(Cluster(num_workers=1, cpus_per_worker=2)) == 3
    assert fit(Cluster(num_workers=1, gpus_per_worker=1)) == 1
    assert fit(Cluster(num_workers=8)) == 0


def test_the_budget_is_the_most_that_it_may_take():
    experiment = swept("{space: {training.steps: 'randint(100,2000)'}, num_trials: 5}")
    found = budget(experiment, check_space(experiment))
    assert (found["trials"], found["steps"]) == (5, 5 * 2000 + 2 * 1000)
    flops = load("quickstart", ["training.steps=1"])
    one = budget(flops.model_copy(update={"sweep": experiment.sweep}), [flops])["flops"] / 7
    assert found["flops"] == pytest.approx(one * found["steps"])
    assert "5 trials and 2 controls, 12,000 steps" in found["text"]


def test_the_best_is_of_the_finished_and_differences_are_to_finished_controls(storage):
    experiment = swept("{space: {mixture.gamma: 'choice(0.1,0.2,0.3)'}, num_trials: 3}")
    ledger = Ledger(storage, HOME)
    drain(experiment, ledger)
    ended(ledger, "standard", "finished", (1000, 6.0))
    ended(ledger, "matched", "failed", reason="out of memory")
    ended(ledger, "t000", "finished", (500, 9.0), (1000, 7.0))
    ended(ledger, "t001", "pruned", (500, 1.0))
    ended(ledger, "t002", "finished", (1000, 5.0))
    answer = summary_of(experiment, ledger)
    assert answer["best"]["label"] == "t002"
    assert answer["best"]["differences"] == {"standard": -1.0}
    assert [trial["differences"] for trial in answer["trials"]] == [{"standard": 1.0}, {}, {"standard": -1.0}]
    lines = table_of(answer, ["mixture.gamma"]).splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["standard", "matched", "t002", "t000", "t001"]
    assert "failed: out of memory" in lines[2]
    assert "-1.000" in lines[3]
    assert "one training seed" in lines[-1]
    assert sweep_plot(answer, ["mixture.gamma"]).startswith(b"\x89PNG")
    higher = summary_of(swept("{objective: recall_digits/euler20/s1}"), ledger)
    assert higher["best"]["label"] == "t000"


def test_the_best_again_beside_its_own_controls():
    again = best_experiment(swept("{}"), {"mixture.gamma": 0.3, "corrective.input_perturbation": 0.1})
    assert (again.name, list(again.arms), again.sweep) == ("quickstart-best", ["standard", "best", "matched"], None)
    assert again.mixture_of("best").gamma == again.mixture_of("matched").gamma == 0.3
    assert again.controls_of("best") == ["standard", "matched"]
    assert again.arms["standard"].corrective.is_off
    assert again.arm_run("best", 0).corrective == again.arm_run("matched", 0).corrective
    assert again.replicates == load("quickstart").replicates


def test_weights_are_registered_once(storage, tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri, client = f"sqlite:///{tmp_path}/mlflow.db", MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for weights in ("one", "one", "two"):
        storage.put(f"arms/{weights}/weights.safetensors", b"w")
        tracker = Tracker(storage, uri, "experiment", "tracking/experiment")
        tracker.start_run("a", "a run")
        source = f"{storage.uri}/arms/{weights}"
        tracker.register("a", "digits-best", source=source, alias="best", tags={"mixflow.data": "d", "mixflow.n": "3"})
        assert tracker.drain(120) == 0, tracker.status()
        assert tracker.status()["rejected"] == 0
        tracker.close()
        best = client.get_model_version_by_alias("digits-best", "best")
        assert best.source == source
        assert best.tags == {"mixflow.data": "d", "mixflow.n": "3"}
        assert client.get_run(best.run_id).info.run_name == "a run"
    assert len(client.search_model_versions("name = 'digits-best'")) == 2
