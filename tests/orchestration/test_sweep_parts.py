"""What a sweep is made of, without a cluster: ledger, order of trials, pruning after a restart, table, registry."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from ray.tune.search import Searcher

from orchestration import cluster, sweep
from orchestration.confirm import best_experiment, write_best
from orchestration.experiment import Experiment
from orchestration.figures import sweep_plot
from orchestration.ledger import Entry, Ledger
from orchestration.recipe import load
from orchestration.recording import EXPERIMENT
from orchestration.sections import Cluster
from orchestration.storage import Storage, open_storage
from orchestration.sweep_report import SweepRecorder, budget, summary_of, table_of
from orchestration.tracking import Tracker
from orchestration.trials import check_space
from workers.cost import cost_of

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


@pytest.mark.parametrize(("label", "told"), [("matched", [{}]), ("t000", [{"objective": 6.0}, {"objective": 5.0}])])
def test_a_control_tells_no_scheduler_what_it_came_to(monkeypatch, label, told):
    """Or its end would stand in the rungs against which trials on their way are held."""
    reports: list[dict] = []
    trial = SimpleNamespace(stages={f"trials/{label}": SimpleNamespace(name=f"trials/{label}")}, artifact=lambda _: 1)
    ledger = SimpleNamespace(entries={label: Entry(label, -1 if label == "matched" else 0, {})})
    monkeypatch.setattr(sweep, "Ledger", lambda *_: ledger)
    monkeypatch.setattr(sweep, "trial_experiment", lambda *_: None)
    monkeypatch.setattr(sweep, "Workspace", lambda *_: trial)
    monkeypatch.setattr(sweep, "history_of", lambda *_: [[500, 6.0], [1000, 5.0]])
    monkeypatch.setattr(sweep, "TuneReportCallback", object)
    monkeypatch.setattr(sweep, "tune", SimpleNamespace(report=reports.append))
    context = {"experiment": load("quickstart").model_dump_json(), "workspace": "/nowhere", "home": HOME}
    sweep._run_trial(context, label)
    assert [{k: v for k, v in report.items() if k == "objective"} for report in reports] == told
    assert reports[-1]["step"] == 1000
    assert reports[-1]["last"]


def test_parameters_that_make_no_valid_run_are_an_entry_and_the_sweep_goes_on(storage, monkeypatch):
    whole = sweep.trial_experiment

    def choosy(experiment: Experiment, label: str, params: dict) -> Experiment:
        if label == "t001":
            raise ValueError("quickstart with mixture.gamma=0.5: refused")
        return whole(experiment, label, params)

    monkeypatch.setattr(sweep, "trial_experiment", choosy)
    ledger = Ledger(storage, HOME)
    experiment = swept("{space: {mixture.gamma: 'uniform(0,1)'}, num_trials: 3}")
    assert drain(experiment, ledger) == ["standard", "matched", "t000", "t002"]
    entry = Ledger(storage, HOME).entries["t001"]
    assert (entry.state, entry.reason, entry.is_open) == ("failed", "quickstart with mixture.gamma=0.5: refused", False)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("training.steps: 'uniform(500,1000)'", "training.steps"),
        ("training.checkpoint_every: 'randint(100,500)'", "checkpoint_every must be a multiple of log_every"),
    ],
)
def test_a_range_whose_ends_alone_are_valid_is_refused(space, says):
    with pytest.raises(ValueError, match=says):
        check_space(swept(f"{{space: {{{space}}}}}"))


def test_a_scheduler_that_could_stop_nothing_is_refused():
    with pytest.raises(ValueError, match=r"sweep.grace_steps must lie below training.steps 1000 for asha.* got 1000"):
        check_space(swept("{space: {mixture.gamma: 'uniform(0,1)'}, scheduler: asha, grace_steps: 1000}"))


def test_a_sweep_of_other_keys_begins_anew_and_a_wider_space_wants_more_trials(storage):
    section, ledger, record = "{space: {%s}, num_trials: %d}", Ledger(storage, HOME), f"{HOME}/experiment.json"
    narrow = swept(section % ("mixture.gamma: 'uniform(0.2,0.4)'", 3))
    storage.put(record, narrow.model_dump_json().encode())
    drain(narrow, ledger)
    for label in ledger.entries:
        ended(ledger, label, "finished", (1000, 1.0))
    wide = "mixture.gamma: 'uniform(0.2,1.0)'"
    with pytest.raises(ValueError, match=r"sweep.num_trials must be above the 3 trials that lie in the changed space"):
        sweep._work_left(swept(section % (wide, 3)), ledger, record)
    sweep._work_left(narrow, ledger, record)
    sweep._work_left(swept(section % (wide, 4)), ledger, record)
    other = swept(section % ("training.learning_rate: 'loguniform(1e-5,1e-3)'", 2))
    sweep._work_left(other, ledger, record)
    assert drain(other, ledger) == ["t003", "t004"]
    assert summary_of(other, ledger)["best"] is None


def test_a_trial_that_has_ended_keeps_its_end_when_the_sweep_is_stopped(monkeypatch):
    told = []
    recorder = SweepRecorder.__new__(SweepRecorder)
    recorder.begun, recorder.ended = ["t000", "t001"], {"t000"}
    monkeypatch.setattr(SweepRecorder, "tell", lambda self, *what: told.append(what))
    recorder.end("KILLED")
    assert told == [("end_run", "trials/t001", "KILLED"), ("end_run", EXPERIMENT, "KILLED")]


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
    short = load("quickstart", ["training.steps=1"]).model_copy(update={"sweep": experiment.sweep})
    of_one = budget(short, [short])
    one = (of_one["flops"] - of_one["measuring_flops"]) / 7
    assert found["flops"] - found["measuring_flops"] == pytest.approx(one * found["steps"])
    cost = cost_of(experiment.model).forward_flops
    # Every 500 steps, 2,000 images by Euler's 20 steps: 4 times in 2,000 steps and twice in a control's 1,000.
    assert found["measuring_flops"] == pytest.approx((5 * 4 + 2 * 2) * 2000 * 20 * cost)
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
    assert "one training seed" in lines[-2]
    assert "nothing measured beforehand predicted it" in lines[-1]
    assert "predicted" not in table_of(answer, ["training.learning_rate"])
    assert sweep_plot(answer, ["mixture.gamma"]).startswith(b"\x89PNG")
    of_recall = "{space: {mixture.gamma: 'uniform(0,1)'}, objective: recall_digits/euler20/s1}"
    higher = summary_of(swept(of_recall), ledger)
    assert higher["best"]["label"] == "t000"


def test_the_best_again_beside_its_own_controls():
    again = best_experiment(swept("{}"), {"mixture.gamma": 0.3, "corrective.input_perturbation": 0.1})
    assert (again.name, list(again.arms), again.sweep) == ("quickstart-best", ["standard", "best", "matched"], None)
    assert again.mixture_of("best").gamma == again.mixture_of("matched").gamma == 0.3
    assert again.controls_of("best") == ["standard", "matched"]
    assert again.arms["standard"].corrective.is_off
    assert again.arm_run("best", 0).corrective == again.arm_run("matched", 0).corrective
    assert again.replicates == load("quickstart").replicates
    elsewhere = best_experiment(swept("{objective: fd_digits/euler4/s1}"), {})
    assert elsewhere.evaluation.primary == "fd_digits/euler4/s1", "it is judged where it was searched"
    assert list(best_experiment(swept("{}"), {"mixture.gamma": 0}).arms) == ["standard", "best"], "no twin of itself"


def test_the_best_is_a_file_that_can_be_run(storage, tmp_path):
    answer = {"sweep": "sweeps/one", "best": {"params": {"mixture.gamma": 0.4895588723451577}}}
    uri = write_best(swept("{}"), answer, SimpleNamespace(storage=storage))
    assert uri == f"{storage.uri}/sweeps/one/best.yaml"
    (tmp_path / "best.yaml").write_bytes(storage.read("sweeps/one/best.yaml"))
    found = load(str(tmp_path / "best.yaml"))
    assert found == best_experiment(swept("{}"), answer["best"]["params"])
    assert found.mixture_of("best").gamma == 0.4895588723451577


def test_matched_is_the_control_of_trials_of_its_own_mixture(storage):
    experiment = swept(
        "{space: {mixture.gamma: 'choice(0.1,0.8)', mixture.condition_on: 'choice(m,t)'}, num_trials: 9}"
    )
    ledger = Ledger(storage, HOME)
    drain(experiment, ledger)
    assert len(ledger.trials) == 4, "every point once"
    for entry in list(ledger.entries.values()):
        ended(ledger, entry.label, "finished", (1000, 6.0))
    trials = summary_of(experiment, ledger)["trials"]
    assert {tuple(t["params"].values()): list(t["differences"]) for t in trials} == {
        (0.1, "m"): ["standard"],
        (0.1, "t"): ["standard"],
        (0.8, "m"): ["standard", "matched"],
        (0.8, "t"): ["standard", "matched"],
    }


def test_a_narrowed_space_whose_points_were_all_tried_is_done(storage):
    ledger = Ledger(storage, HOME)
    whole = swept("{space: {mixture.gamma: 'choice(0.2,0.4,0.8)'}}")
    drain(whole, ledger)
    for entry in list(ledger.entries.values()):
        ended(ledger, entry.label, "finished", (1000, 6.0))
    storage.put(f"{HOME}/experiment.json", whole.model_dump_json().encode())
    narrowed = swept("{space: {mixture.gamma: 'choice(0.2,0.4)'}}")
    assert not sweep._work_left(narrowed, ledger, f"{HOME}/experiment.json")


def test_matched_is_no_control_of_a_trial_with_another_remedy(storage):
    experiment = swept("{space: {corrective.input_perturbation: 'choice(0,0.1)'}}")
    ledger = Ledger(storage, HOME)
    drain(experiment, ledger)
    for entry in list(ledger.entries.values()):
        ended(ledger, entry.label, "finished", (1000, 6.0))
    trials = summary_of(experiment, ledger)["trials"]
    assert {t["params"]["corrective.input_perturbation"]: list(t["differences"]) for t in trials} == {
        0: ["standard", "matched"],
        0.1: ["standard"],
    }


def test_trials_outside_the_space_come_last_and_say_so(storage):
    ledger = Ledger(storage, HOME)
    drain(swept("{space: {mixture.gamma: 'choice(0.1)'}}"), ledger)
    wider = swept("{space: {mixture.gamma: 'choice(0.2)'}}")
    drain(wider, ledger)
    ended(ledger, "t000", "finished", (1000, 1.0))
    ended(ledger, "t001", "finished", (1000, 2.0))
    answer = summary_of(wider, ledger)
    assert answer["best"]["label"] == "t001"
    lines = [line for line in table_of(answer, ["mixture.gamma"]).splitlines() if line.startswith("t0")]
    assert [line.split()[0] for line in lines] == ["t001", "t000"]
    assert "finished, outside the space" in lines[1]


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
