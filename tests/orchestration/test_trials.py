"""Trials of a sweep: experiments of their own, and a training that measures its objective on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from stage_group import SMALL, run_group, run_trial

from orchestration import objective, workflow
from orchestration.confirm import best_experiment
from orchestration.progress import Progress
from orchestration.recipe import load
from orchestration.run import _driver_stages
from orchestration.storage import open_storage
from orchestration.trials import check_space, sweep_identity, trial_experiment
from orchestration.workflow import Workspace, trial_stage

KEY = "eval/fd_digits/euler3/s1"
TRIAL = (*SMALL, "training.steps=40", "training.checkpoint_every=10", "sweep.evaluate_every=20")


def swept(*overrides: str):
    return load("quickstart", ("sweep={}", *overrides))


def test_a_trial_is_the_experiment_with_its_parameters():
    experiment = swept()
    params = {"mixture.gamma": 0.3, "training.learning_rate": 2e-3, "corrective.input_perturbation": 0.1}
    trial = trial_experiment(experiment, "t007", params)
    run, plain = trial.arm_run("t007", 0), experiment.arm_run("mixflow", 0)
    assert (run.mixture.gamma, run.training.learning_rate) == (0.3, 2e-3)
    assert run.corrective.input_perturbation == 0.1
    assert run.seed == plain.seed, "the same data order and noise"
    assert trial.base_run() == experiment.base_run()
    assert trial.sampling_seed(0) == experiment.sampling_seed(0)
    same = trial_experiment(experiment, "t000", {})
    assert same.arm_run("t000", 0) == plain
    matched, standard = (trial_experiment(experiment, name, {}) for name in ("matched", "standard"))
    assert matched.arm_run("matched", 0) == experiment.arm_run("matched", 0)
    assert standard.arm_run("standard", 0) == experiment.arm_run("standard", 0)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"mixture.gamma": 1.5}, "gamma must lie in [0, 1], got 1.5"),
        ({"mixture.gama": 0.5}, "unknown key 'mixture.gama'; did you mean 'gamma'?"),
        ({"training.checkpoint_every": 30}, "checkpoint_every must be a multiple of log_every 50, got 30"),
        ({"training.learning_rate": "fast"}, "training.learning_rate must be a number, got 'fast'"),
    ],
)
def test_a_wrong_parameter_is_said_as_set_says_it(params, says):
    with pytest.raises(ValueError, match="quickstart with ") as refused:
        trial_experiment(swept(), "t000", params)
    assert says in str(refused.value)
    (override,) = (f"{key}={value}" for key, value in params.items())
    with pytest.raises(ValueError, match="quickstart: ") as by_set:
        load("quickstart", [override])
    assert str(by_set.value).split(": ", 1)[1] == str(refused.value).split(": ", 1)[1]


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ("{scheduler: pbt}", "population based training does nothing for trials that are Ray Train runs"),
        ("{scheduler: hyperband}", "scheduler must be 'fifo' or 'asha', got 'hyperband'"),
        ("{objective: fid/euler20/s1}", "sweep.objective must be one of the metrics"),
        ("{objective: fd_digits/euler5/s1}", "sweep.objective must be one of the metrics"),
        ("{evaluate_every: 300}", "sweep.evaluate_every must be a multiple of training.checkpoint_every 500, got 300"),
        ("{space: {mixture.gamma: 'uniform(0'}}", "sweep.space.mixture.gamma must be one of uniform(a,b)"),
        ("{space: {mixture.gamma: 'uniform(0,1)'}, search: grid}", "for grid search; list its values"),
        ("{trials: 3}", "unknown key 'sweep.trials'; did you mean 'num_trials'?"),
    ],
)
def test_a_wrong_section_is_one_line(sweep, says):
    with pytest.raises(ValueError, match="quickstart") as refused:
        load("quickstart", [f"sweep={sweep}"])
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_corners_are_built():
    good = check_space(swept("sweep={space: {mixture.gamma: 'uniform(0,1)', training.steps: 'randint(10,20)'}}"))
    assert [(e.mixture.gamma, e.training.steps) for e in good[:4]] == [(0, 10), (0, 20), (1, 10), (1, 20)]
    assert all(0 <= e.mixture.gamma < 1 and 10 <= e.training.steps < 20 for e in good[4:]), "and points within"
    assert len({(e.mixture.gamma, e.training.steps) for e in good}) > 8
    with pytest.raises(ValueError, match=r"quickstart with mixture.gamma=0, mixture.shift=0.5: .*at least 1, got 0.5"):
        check_space(swept("sweep={space: {mixture.gamma: 'uniform(0,1)', mixture.shift: 'choice(1,0.5)'}}"))
    with pytest.raises(ValueError, match=r"sweep\.space must have a key, got none; add --space"):
        check_space(swept())


def test_the_law_without_a_range_is_searched_beside_the_other():
    interval, independent = check_space(swept("sweep={space: {mixture.slowing_law: 'choice(interval,independent)'}}"))
    assert interval.mixture == load("quickstart").mixture
    assert (independent.mixture.slowing_law, independent.mixture.gamma) == ("independent", 0)
    again = best_experiment(swept(), {"mixture.slowing_law": "independent"})
    assert (again.mixture.slowing_law, again.mixture.gamma) == ("independent", 0)
    both = "sweep={space: {mixture.slowing_law: 'choice(interval,independent)', mixture.gamma: 'uniform(0.2,1)'}}"
    with pytest.raises(ValueError, match=r"gamma must be 0 with slowing_law 'independent', got 0\.2; set gamma to 0"):
        check_space(swept(both))


def test_a_sweep_is_known_by_what_its_trials_share():
    one = sweep_identity(swept("sweep={space: {mixture.gamma: 'uniform(0,1)'}}"))
    for same in ("sweep={num_trials: 99, search: optuna, scheduler: asha}", "cluster.num_workers=1", "replicates=9"):
        assert sweep_identity(swept(same)) == one, same
    for other in ("sweep={num_samples: 100}", "mixture.gamma=0.7", "seed=1", "training.steps=500"):
        assert sweep_identity(swept(other)) != one, other
    assert swept("sweep={num_trials: 9}").identity == load("quickstart").identity, "run ignores it"


# ---------------------------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def seeds_of_an_arm() -> Iterator[None]:
    """Trials with the seeds of an arm's first pair, against which they are held."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "SEARCH_PAIR", 0)
        yield


def test_the_seeds_of_a_search_are_of_no_pair():
    experiment = swept("replicates=5")
    stage = trial_stage(trial_experiment(experiment, "t000", {}), "t000")
    again = best_experiment(experiment, {})
    for pair in range(5):
        assert stage.settings["run"]["seed"] != again.arm_run("best", pair).seed
        assert stage.settings["samples"]["seed"] != again.sampling_seed(pair)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, seeds_of_an_arm: None) -> Path:
    """All that trials share, and the arm that a trial without parameters is, with its metrics."""
    directory = tmp_path_factory.mktemp("ready")
    workspace = Workspace(load("quickstart", TRIAL), open_storage(str(directory / "ws")))
    progress = Progress(list(workspace.stages), 0)
    _driver_stages(workspace, list(workspace.stages.values()), progress, ExitStack())
    progress.close()
    run_group(1, directory, ("base", "features", "reference", "arms", "samples", "metrics"), TRIAL)
    return directory


def result_of(directory: Path):
    experiment = trial_experiment(load("quickstart", TRIAL), "t000", {})
    artifact = Workspace(experiment, open_storage(str(directory / "ws")), "t000").result("trials/t000")
    rows = [json.loads(line) for line in artifact.read("history.jsonl").splitlines()]
    return artifact, {row["step"]: row[KEY] for row in rows if KEY in row}


def rungs(directory: Path, rank: int = 0) -> list[tuple[int, float]]:
    lines = (line.split() for line in (directory / f"rungs-{rank}").read_text().splitlines())
    return [(int(step), float(value)) for step, value in lines]


@pytest.fixture(scope="module")
def alone(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "trial"
    shutil.copytree(ready, directory)
    run_trial(1, directory, {}, TRIAL)
    return directory


def test_the_objective_is_the_metric_of_the_arm_that_it_is(alone):
    workspace = Workspace(load("quickstart", TRIAL), open_storage(str(alone / "ws")))
    cell = json.loads(workspace.result("metrics/mixflow/0").read("metrics.json"))["euler3/s1"]
    artifact, values = result_of(alone)
    assert list(values) == [20, 40]
    assert values[40] == pytest.approx(cell["fd_digits"], rel=1e-6)
    assert values[20] != pytest.approx(values[40], rel=1e-3)
    arm = workspace.result("arms/mixflow/0")
    weights = "weights.safetensors"
    assert artifact.manifest.files[weights].sha256 == arm.manifest.files[weights].sha256, "measuring changes nothing"
    assert "euler3-s1.png" in artifact.manifest.files
    assert rungs(alone) == [(20, values[20])], "the end is told by whoever finds the result"


def test_workers_share_the_measuring(ready, alone, tmp_path):
    directory = tmp_path / "trial"
    shutil.copytree(ready, directory)
    run_trial(2, directory, {}, TRIAL)
    found, expected = result_of(directory)[1], result_of(alone)[1]
    assert found == pytest.approx(expected, rel=2e-3)
    assert rungs(directory, 0) == rungs(directory, 1) == [(20, found[20])]


class Killed(Exception):
    pass


def test_a_restart_measures_no_step_twice_and_tells_every_one_again(ready, alone, tmp_path, monkeypatch):
    directory = tmp_path / "trial"
    shutil.copytree(ready, directory)
    measured, measure = [], objective.Objective.measure

    def counted(self, step, model):
        if step == 30 and 20 in measured and 30 not in measured:
            measured.append(30)
            raise Killed
        found = measure(self, step, model)
        measured.extend([step] if found else [])
        return found

    monkeypatch.setattr(objective.Objective, "measure", counted)
    with pytest.raises(Killed):
        run_trial(1, directory, {}, TRIAL)
    run_trial(1, directory, {}, TRIAL)
    assert measured == [20, 30, 40]
    artifact, values = result_of(directory)
    assert rungs(directory) == [(20, values[20])] * 2
    files, others = artifact.manifest.files, result_of(alone)[0].manifest.files
    assert {n: f.sha256 for n, f in files.items()} == {n: f.sha256 for n, f in others.items()}


def test_samples_that_are_not_finite_end_the_trial(ready, tmp_path, monkeypatch):
    directory = tmp_path / "trial"
    shutil.copytree(ready, directory)

    def broken(*args, **kwargs):
        raise FloatingPointError("image 3")

    monkeypatch.setattr(objective, "sample_batch", broken)
    with pytest.raises(Exception, match=r"eval/fd_digits/euler3/s1 is not finite at step 20 \(last checkpoint: .*10"):
        run_trial(1, directory, {}, TRIAL)


def test_decays_that_the_warm_up_never_reaches_are_no_space():
    """After 1,000 steps the average's decay is at most 1001 / 1010."""
    assert check_space(swept("sweep.space={training.ema_decay: 'uniform(0.9,0.99)'}", "training.steps=1000"))
    with pytest.raises(ValueError, match=r"keep training.ema_decay at most 0.9911, .* after 1000 steps: .*, got 0.999"):
        check_space(swept("sweep.space={training.ema_decay: 'choice(0.9,0.999)'}", "training.steps=1000"))
