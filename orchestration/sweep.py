"""Sweeps: the ledger in the workspace is the truth, Ray Tune is the scheduler of the moment.

Each trial is one Ray Train run inside a Tune trial. Nothing of Tune's own state is ever restored: the same command
builds a new Tune run, which gets the trials that are still open, then new ones; a scheduler is told again what became
of the others.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestration import cluster
from orchestration.differences import higher_is_better
from orchestration.experiment import Experiment, derived_seed
from orchestration.launch import ControllerDiedError, DivergedError, RunFailedError, cause_of, launch
from orchestration.ledger import Entry, Ledger
from orchestration.progress import Progress
from orchestration.run import Place, delivered, join_cluster, open_reporter, run_experiment
from orchestration.space import is_exhausted, suggest
from orchestration.storage import open_storage
from orchestration.sweep_report import SweepRecorder, SweepWorkspace, budget, conclude, history_of
from orchestration.trials import CONTROLS, MATCHED, check_space, grace_of, label_of, sweep_of, trial_experiment
from orchestration.watch import watching
from orchestration.workflow import Stage, Workspace, trial_stage
from workers.io import StoppedError

RECORD = "experiment.json"
# A trial's driver must take no CPU: on a small machine its own workers would wait for it for ever. Tune refuses an
# empty request, and this one byte is everywhere.
DRIVER: dict[str, float] = {"memory": 1}
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints on stdout whatever `verbose` says
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow and the ledger have it all
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of Tune's own state, which nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours lets the workers finish their step
    # A trial that is stopped waits for its training, which waits for somebody to hear its report: end it, and with it
    # its workers, whose CPUs the next trial needs. By default that takes ten minutes.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_sweep(experiment: Experiment, place: Place, *, resume: bool = False) -> dict[str, Any]:
    """Runs what is still to do of a sweep and returns what `--json` prints.

    Raises:
        ValueError, CorruptError: wrong input, before any worker is started.
        RunFailedError: the base, or whatever else the trials share, failed. A trial that fails is an entry.
        StoppedError: this process was asked to end, and the trials have stopped.
    """
    experiment = experiment.model_copy(update={"sweep": sweep_of(experiment)})
    reached = check_space(experiment)
    workspace = SweepWorkspace(experiment, place.storage)
    if resume and not place.storage.exists(f"{workspace.home}/{RECORD}"):
        raise ValueError(
            f"--resume needs an earlier sweep of {experiment.name} with these settings in {place.storage.uri}"
        )
    cluster.check_local_machine(experiment.cluster)
    with workspace.lease() as lease, ExitStack() as cleanup:
        ledger = Ledger(place.storage, workspace.home)
        is_open = _work_left(experiment, ledger, f"{workspace.home}/{RECORD}")
        place.storage.put(f"{workspace.home}/{RECORD}", experiment.model_dump_json(indent=1).encode())
        with closing(Progress([], 0)) as progress:
            spent = budget(experiment, reached)
            progress.say(spent["text"])
            if is_open:
                join_cluster(workspace, cleanup, progress, dashboard=True)
        run_experiment(experiment, place, targets=_shared(experiment))
        labels = map(label_of, range(len(ledger.trials) + sweep_of(experiment).most_trials))
        names = [f"trials/{label}" for label in (*CONTROLS, *labels)]
        progress = Progress(names, sum(not entry.is_open for entry in ledger.entries.values()))
        cleanup.callback(progress.close)
        reporter, name = open_reporter(workspace, place, is_open, cleanup, progress)
        recorder = SweepRecorder(workspace, reporter, is_actor=is_open)
        recorder.start()
        try:
            if is_open:
                watch = watching(reporter, experiment.cluster, progress.say, lease)
                with progress.following(recorder.progress), watch:
                    _tune(workspace, ledger, recorder, name, max(e.training.steps for e in reached))
                if recorder.tell("is_ending"):
                    raise StoppedError("stopped, with the state of every trial kept")
        except (KeyboardInterrupt, StoppedError):
            recorder.end_badly("KILLED")
            raise
        except BaseException:
            recorder.end_badly("FAILED")
            raise
        answer = conclude(workspace, ledger, recorder)
        return {**answer, "budget": spent, "tracking": delivered(recorder, place, progress)}


def _is_open(experiment: Experiment, ledger: Ledger) -> bool:
    """Whether a trial is still to be run; a grid may have fewer points than trials are asked for."""
    if len(ledger.controls) < len(CONTROLS) or any(entry.is_open for entry in ledger.entries.values()):
        return True
    return _next_params(experiment, ledger) is not None


def _next_params(experiment: Experiment, ledger: Ledger) -> dict[str, Any] | None:
    """Of the next new trial; None where there are as many as were asked for, or the grid has no more points."""
    sweep, seed = sweep_of(experiment), derived_seed(experiment.seed, "sweep", 0)
    lower, there = _mode(experiment) == "min", len(ledger.within(sweep.laws))
    if there >= (sweep.num_trials or math.inf) or (sweep.resolved_search != "grid" and there >= sweep.most_trials):
        return None
    return suggest(sweep.laws, sweep.resolved_search, seed, len(ledger.trials), ledger.tried, lower_is_better=lower)


def _work_left(experiment: Experiment, ledger: Ledger, record: str) -> bool:
    """Whether a trial is still to be run.

    Raises:
        ValueError: none is, in a space that was changed since `record`: the answer would be taken for a search of it.
    """
    if _is_open(experiment, ledger):
        return True
    before = (json.loads(ledger.storage.read(record)).get("sweep") or {}).get("space")
    sweep = sweep_of(experiment)
    if before != dict(sweep.space) and not is_exhausted(sweep.laws, (entry.params for entry in ledger.trials)):
        raise ValueError(
            f"sweep.num_trials must be above the {len(ledger.within(sweep.laws))} trials that lie in the changed space "
            f"already, got {sweep.most_trials}; raise it"
        )
    return False


def _shared(experiment: Experiment) -> Callable[[Stage], bool]:
    """The stages that all trials read."""
    inputs = trial_stage(trial_experiment(experiment, MATCHED, {}), MATCHED).inputs
    return lambda stage: stage.name in inputs


def _tune(workspace: SweepWorkspace, ledger: Ledger, recorder: SweepRecorder, reporter_name: str, steps: int) -> None:
    """Runs the open trials and the new ones by Ray Tune, as many at once as the cluster holds."""
    experiment, storage = workspace.experiment, workspace.storage
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    context = {
        "experiment": experiment.model_dump_json(),
        "workspace": storage.uri,
        "home": workspace.home,
        "reporter": reporter_name,
    }

    def trial(config: dict[str, Any]) -> None:
        _run_trial(context, config["label"])

    tune.run(
        tune.with_resources(trial, DRIVER),
        name=f"{experiment.name}-{uuid.uuid4().hex[:8]}",  # never the same twice: the ledger is the truth
        storage_path=f"{storage.uri}/ray",
        num_samples=len(CONTROLS) + len(ledger.trials) + sweep_of(experiment).most_trials,  # or fewer
        search_alg=_Trials(experiment, ledger, recorder),
        scheduler=scheduler_of(experiment, ledger.trials, steps),
        callbacks=[_Accounts(experiment, ledger, recorder)],
        max_concurrent_trials=cluster.groups_that_fit(experiment.cluster),
        max_failures=experiment.cluster.max_failures,
        trial_dirname_creator=lambda trial: trial.trial_id,
        # A new process for each trial's driver costs seconds of imports; one whose trial was pruned still waits there.
        reuse_actors=sweep_of(experiment).scheduler == "fifo",
        raise_on_failed_trial=False,
        verbose=0,
    )


def _run_trial(context: Mapping[str, str], label: str) -> None:
    """A trial's own driver, in a process of Tune's: a worker group of Ray Train, then the last word on its result."""
    experiment = Experiment.model_validate_json(context["experiment"])
    storage = open_storage(context["workspace"])
    entry = Ledger(storage, context["home"]).entries[label]
    workspace = Workspace(trial_experiment(experiment, label, entry.params), storage, label)
    stage = workspace.stages[f"trials/{label}"]
    # Controls tell Tune no objective: no scheduler can stop them, or hold their ends against trials on their way.
    callbacks = [] if entry.is_control else [TuneReportCallback()]
    there = workspace.artifact(stage.name) is not None
    try:
        if not there:
            launch(workspace, [stage], context["reporter"], experiment.cluster.max_failures, callbacks)
    except ControllerDiedError:
        raise  # Tune starts the trial again
    except StoppedError:
        tune.report({"step": 0, "objective": math.nan, "stopped": True, "last": True})
        return
    except RunFailedError as error:
        diverged = isinstance(error, DivergedError)
        tune.report({"step": 0, "objective": math.nan, "reason": str(error), "diverged": diverged, "last": True})
        return
    history = history_of(workspace, label)
    if entry.is_control:
        tune.report({"step": history[-1][0], "last": True})
        return
    if there:  # finished by workers that outlived their driver: a scheduler has its say as well
        for step, value in history[:-1]:
            tune.report({"step": step, "objective": value})
    tune.report({"step": history[-1][0], "objective": history[-1][1], "last": True})


class _Trials(Searcher):
    """What Tune is to run: controls, trials of the ledger that are still open, then new ones."""

    def __init__(self, experiment: Experiment, ledger: Ledger, recorder: SweepRecorder) -> None:
        super().__init__(metric="objective", mode=_mode(experiment))
        self.experiment, self.ledger, self.recorder = experiment, ledger, recorder
        self.open = [label for label in CONTROLS if label not in ledger.entries or ledger.entries[label].is_open]
        self.open += [entry.label for entry in ledger.trials if entry.is_open]

    def suggest(self, trial_id: str) -> Any:
        """A trial's label, or that there are no more."""
        entry = None if self.recorder.tell("is_ending") else self._next()
        if entry is None:
            return Searcher.FINISHED
        self.ledger.close(entry, "running")
        self.recorder.begin(entry)
        return {"label": entry.label}

    def _next(self) -> Entry | None:
        if self.open:
            label = self.open.pop(0)
            return self.ledger.entries.get(label) or self.ledger.born(-1, {}, label)
        while (params := _next_params(self.experiment, self.ledger)) is not None:
            entry = self.ledger.born(len(self.ledger.trials), params)
            try:
                trial_experiment(self.experiment, entry.label, entry.params)
            except ValueError as error:  # between points that were found valid
                entry.refused = True
                self.ledger.close(entry, "failed", str(error))
            else:
                return entry
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The ledger hears of it from `_Accounts`."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""


class _Accounts(tune.Callback):
    """Writes down what became of every trial."""

    def __init__(self, experiment: Experiment, ledger: Ledger, recorder: SweepRecorder) -> None:
        self.experiment, self.ledger, self.recorder = experiment, ledger, recorder

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """A rung, or the end."""
        if "objective" in result and "reason" not in result and "stopped" not in result:
            self._entry(trial).saw(int(result["step"]), float(result["objective"]))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Finished, stopped by the scheduler, or failed as its own driver says."""
        entry, last = self._entry(trial), trial.last_result or {}
        if "stopped" in last:
            return  # it stays open
        if "reason" in last:
            self.ledger.close(entry, "failed", last["reason"], diverged=last["diverged"])
        else:
            finished = bool(last.get("last"))
            if finished:  # a control has told its end alone
                entry.history = history_of(self.recorder.workspace_of(entry), entry.label)
            self.ledger.close(entry, "finished" if finished else "pruned")
        self.recorder.end_trial(entry)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Its own driver failed, as often as it may."""
        error = trial.get_pickled_error() or trial.get_error() or RuntimeError("the trial's driver failed")
        self.ledger.close(self._entry(trial), "failed", cause_of(error))
        self.recorder.end_trial(self._entry(trial))

    def _entry(self, trial: Any) -> Entry:
        return self.ledger.entries[trial.config["label"]]


def _mode(experiment: Experiment) -> str:
    return "max" if higher_is_better(experiment.objective.partition("/")[0]) else "min"


def scheduler_of(experiment: Experiment, trials: Sequence[Entry], steps: int) -> TrialScheduler:
    """FIFO, or ASHA for trials of at most so many steps, which has heard of those that have ended."""
    sweep, mode = sweep_of(experiment), _mode(experiment)
    if sweep.scheduler == "fifo":
        return FIFOScheduler()
    grace = grace_of(experiment)
    # Past the end, because a trial that has come to it is not to be stopped.
    asha = AsyncHyperBandScheduler(
        time_attr="step",
        metric="objective",
        mode=mode,
        max_t=max(steps, grace) + 1,
        grace_period=grace,
        reduction_factor=sweep.reduction_factor,
    )
    told: Any = asha
    for entry in trials:
        if not entry.is_open:
            known = SimpleNamespace(trial_id=entry.label)
            told.on_trial_add(None, known)
            for step, value in entry.history:
                told.on_trial_result(None, known, {"step": step, "objective": value})
    return asha
