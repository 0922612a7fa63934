"""What a sweep says: its budget before, its table, figure and `sweep.json` after, and its runs in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestration.differences import higher_is_better
from orchestration.experiment import Experiment
from orchestration.figures import sweep_plot
from orchestration.ledger import Entry, Ledger
from orchestration.page import number
from orchestration.plan import PEAK_TFLOPS, costs, evaluations_of
from orchestration.recording import EXPERIMENT, Recorder, now_ms
from orchestration.results import cell_file
from orchestration.tracking import Metric
from orchestration.trials import CONTROLS, MATCHED, SCHEDULING, UNREAD, sweep_identity, sweep_of, trial_experiment
from orchestration.workflow import Workspace, code_version, trial_stage
from workers.cost import cost_of

MFU = 0.4
STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}  # of MLflow, by the state of a trial


class SweepWorkspace(Workspace):
    """The workspace of an experiment, with the sweep's own home."""

    @property
    def home(self) -> str:
        """Directory of what belongs to this sweep alone: its record, lease, ledger and results."""
        return f"sweeps/{self.experiment.name}-{sweep_identity(self.experiment)}"


def budget(
    experiment: Experiment, reached: Sequence[Experiment], mfu: float = MFU, peak_tflops: float | None = None
) -> dict[str, Any]:
    """What the sweep may take, trials, steps and hours, if none is stopped; `text` says it in a line.

    Args:
        experiment: with its sweep.
        reached: the experiments at the corners of the space.
        mfu: the share of the peak that a device reaches, as in `plan`.
        peak_tflops: that peak; None for an H100's.
    """
    trials, most = sweep_of(experiment).most_trials, max(reached, key=lambda e: e.training.steps)
    plan, longest = costs(experiment), costs(most)
    steps = trials * most.training.steps + len(CONTROLS) * experiment.training.steps
    training = trials * longest["arm_flops"] + len(CONTROLS) * plan["arm_flops"]
    control = trial_experiment(experiment, MATCHED, {})
    measuring = trials * _measuring_flops(most) + len(CONTROLS) * _measuring_flops(control)
    flops = training + measuring
    peak = peak_tflops or PEAK_TFLOPS[plan["precision"]]
    whose = f"{peak_tflops:g} TFLOP/s" if peak_tflops else f"an H100's peak in {plan['precision']}"
    hours = flops / (mfu * peak * 1e12) / 3600
    text = (
        f"at most {trials} trials and {len(CONTROLS)} controls, {steps:,} steps, {flops:.3g} FLOPs, "
        f"{measuring / flops:.0%} of them for the objective: {hours:.3g} device-hours at {mfu:.0%} of {whose}, "
        "beside what the trials share"
    )
    return {
        "trials": trials,
        "controls": len(CONTROLS),
        "steps": steps,
        "flops": flops,
        "measuring_flops": measuring,
        "device_hours": hours,
        "text": text,
    }


def _measuring_flops(experiment: Experiment) -> float:
    """Of a trial's objective, whose images are sampled anew at each of its measurements."""
    stage = trial_stage(experiment, list(experiment.arms)[-1])
    times = -(-experiment.training.steps // stage.settings["every"])
    return float(times * evaluations_of(stage.settings["samples"]) * cost_of(experiment.model).forward_flops)


def history_of(workspace: Workspace, label: str) -> list[list[float]]:
    """[step, objective] of a trial whose result is there."""
    key = f"eval/{workspace.experiment.objective}"
    rows = map(json.loads, workspace.result(f"trials/{label}").read("history.jsonl").splitlines())
    return [[row["step"], row[key]] for row in rows if key in row]


class SweepRecorder(Recorder):
    """Tells the Reporter of a sweep: a parent run, and a child for each trial. Telling it again is harmless."""

    def __init__(self, workspace: SweepWorkspace, reporter: Any, *, is_actor: bool) -> None:
        super().__init__(workspace, [], reporter, is_actor=is_actor)
        self.begun: list[str] = []
        self.ended: set[str] = set()

    def start(self) -> None:
        """Starts the parent run, or continues it."""
        experiment, identity = self.workspace.experiment, sweep_identity(self.workspace.experiment)
        sweep = sweep_of(experiment).model_dump(mode="json")
        params = {
            **experiment.model_dump(mode="json", exclude={"sweep", *UNREAD}),
            "sweep": {key: value for key, value in sweep.items() if key not in SCHEDULING},
        }
        # What may change when a sweep is extended cannot be a parameter.
        changing = {f"mixflow.sweep.{key}": json.dumps(sweep[key]) for key in sorted(SCHEDULING)}
        tags = {
            "mixflow.kind": "sweep",
            "mixflow.experiment": experiment.identity,
            "mixflow.workspace": self.workspace.storage.uri,
            "mixflow.code": code_version(),
            "mixflow.objective": experiment.objective,
            **changing,
        }
        self.tell("start_run", EXPERIMENT, f"{experiment.name}-sweep-{identity[:6]}", params, tags)

    def begin(self, entry: Entry) -> None:
        """Starts a trial's run, or continues it."""
        workspace = self.workspace_of(entry)
        stage = workspace.stages[f"trials/{entry.label}"]
        kind = "control" if entry.is_control else "trial"
        tags = {"mixflow.kind": kind, "mixflow.arm": entry.label}
        tags["mixflow.checkpoints"] = f"{workspace.storage.uri}/{workspace.checkpoints(stage.name)}"
        params = {"arm": entry.label, **stage.settings["run"]}
        self.tell("start_run", stage.name, entry.label, params, tags, EXPERIMENT)
        self.begun.append(entry.label)

    def end_trial(self, entry: Entry) -> None:
        """Its curves, objective, samples, weights and end."""
        run, now = f"trials/{entry.label}", now_ms()
        self.tell("log", run, [Metric("objective", int(step), value, now) for step, value in entry.history])
        tags = {"mixflow.state": entry.state, "mixflow.reason": entry.reason}
        workspace = self.workspace_of(entry)
        artifact = workspace.artifact(run) if entry.state == "finished" else None
        if artifact:
            rows = [json.loads(line) for line in artifact.read("history.jsonl").splitlines()]
            self.tell("log", run, [Metric(k, r["step"], v, now) for r in rows for k, v in r.items() if k != "step"])
            sheet = f"{cell_file(workspace.experiment.objective.partition('/')[2])}.png"
            self.tell("artifacts", run, [f"{artifact.path}/{sheet}"], "")
            tags |= {
                "mixflow.weights": f"{artifact.full_uri}/weights.safetensors",
                "mixflow.weights_sha256": artifact.manifest.files["weights.safetensors"].sha256,
                "mixflow.checkpoints": artifact.manifest.meta["checkpoints"],
                "mixflow.code": artifact.manifest.meta["code"],
            }
            self._log(run, {"cost/device_s/trials": artifact.device_s})
        self.tell("tags", run, {**tags, **self._lineage((workspace.experiment.base_stage(),))})
        self.tell("end_run", run, STATUS[entry.state])
        self.ended.add(entry.label)

    def found(self, values: Mapping[str, float], at: int) -> None:
        """What the parent run says: a sweep that goes on says it anew, `at` the steps of all its trials by then."""
        self.tell("log", EXPERIMENT, [Metric(key, at, value, now_ms()) for key, value in values.items()])

    def end(self, status: str) -> None:
        """Ends the parent run, and a trial's that has no end of its own."""
        for label in self.begun:
            if status != "FINISHED" and label not in self.ended:
                self.tell("end_run", f"trials/{label}", status)
        self.tell("end_run", EXPERIMENT, status)

    def workspace_of(self, entry: Entry) -> Workspace:
        """Where a trial stands."""
        experiment = trial_experiment(self.workspace.experiment, entry.label, entry.params)
        return Workspace(experiment, self.workspace.storage, entry.label)


def conclude(workspace: SweepWorkspace, ledger: Ledger, recorder: SweepRecorder) -> dict[str, Any]:
    """`sweep.json` and the figure in the sweep's home and on its MLflow run; returns the answer, with a `table`."""
    answer = summary_of(workspace.experiment, ledger)
    answer |= {"workspace": workspace.storage.uri, "sweep": workspace.home}
    keys = list(sweep_of(workspace.experiment).laws)
    files = {"sweep.json": json.dumps(answer, indent=1).encode(), "sweep.png": sweep_plot(answer, keys)}
    for name, content in files.items():
        workspace.storage.put(f"{workspace.home}/{name}", content)
    for entry in ledger.entries.values():
        # Of an earlier run, perhaps one that was killed before MLflow heard of it.
        if entry.label not in recorder.begun and not entry.refused:
            recorder.begin(entry)
            recorder.end_trial(entry)
    recorder.artifacts([f"{workspace.home}/{name}" for name in files])
    counts = {f"trials/{state}": float(sum(t["state"] == state for t in answer["trials"])) for state in STATUS}
    best = {"objective": answer["best"]["objective"]} if answer["best"] else {}
    recorder.found({**counts, **best}, sum(entry.step for entry in ledger.entries.values()))
    recorder.end("FINISHED")
    return {**answer, "figure": f"{workspace.storage.uri}/{workspace.home}/sweep.png", "table": table_of(answer, keys)}


def summary_of(experiment: Experiment, ledger: Ledger) -> dict[str, Any]:
    """Trials, controls and the best, as plain JSON.

    The differences to the controls are of one training seed: they have no interval, and the best of many trials is
    flattered. `--confirm` compares it again, with replicates.
    """
    controls = {e.label: e.objective for e in ledger.controls if e.state == "finished" and e.objective is not None}
    present = {entry.label for entry in ledger.within(sweep_of(experiment).laws)}  # of the space as it is now
    of_matched = trial_experiment(experiment, MATCHED, {})

    def own(entry: Entry) -> list[str]:
        """The controls that it may be held against."""
        if entry.is_control:
            return list(controls)
        its = trial_experiment(experiment, entry.label, entry.params)
        if its.training != of_matched.training:
            return []
        law, remedy = its.mixture_of(entry.label), its.arms[entry.label].corrective
        control = replace(of_matched.mixture_of(MATCHED), condition_on=law.condition_on)
        alike = law == control and remedy == of_matched.arms[MATCHED].corrective
        return [name for name in controls if name != MATCHED or alike]

    def row(entry: Entry) -> dict[str, Any]:
        value = entry.objective if entry.state == "finished" else None
        gaps = {} if value is None else {name: value - controls[name] for name in own(entry)}
        return {
            "label": entry.label,
            "params": entry.params,
            "state": entry.state,
            "step": entry.step,
            "objective": entry.objective,
            "history": entry.history,
            "reason": entry.reason,
            "differences": gaps,
            "in_space": entry.is_control or entry.label in present,
        }

    lower = not higher_is_better(experiment.objective.partition("/")[0])
    trials = [row(entry) for entry in ledger.trials]
    finished = [trial for trial in trials if trial["state"] == "finished" and trial["in_space"]]
    best = min(finished, key=lambda t: t["objective"] if lower else -t["objective"], default=None)
    return {
        "objective": experiment.objective,
        "lower_is_better": lower,
        "note": "differences are of one training seed and have no interval, and the best of many is flattered; the "
        "controls have the file's own settings, so a difference stands only where a trial is trained alike, and to "
        "matched where it has its mixture and remedies: --confirm runs the best beside its own",
        "controls": [row(entry) for entry in ledger.controls],
        "trials": trials,
        "best": best,
    }


def table_of(answer: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The trials for a terminal, the best first."""
    sign = 1 if answer["lower_is_better"] else -1
    last = float("inf")

    def place(trial: Mapping[str, Any]) -> tuple[bool, bool, float]:
        value = sign * trial["objective"] if trial["objective"] is not None else last
        return not trial["in_space"], trial["state"] != "finished", value

    head = ["", *keys, answer["objective"], *(f"- {name}" for name in CONTROLS), "step", "state"]
    rows = [head]
    for trial in [*answer["controls"], *sorted(answer["trials"], key=place)]:
        given = [_shown(trial["params"].get(key, "")) for key in keys]
        gaps = [_gap(trial, name) for name in CONTROLS]
        state = trial["state"] if trial["in_space"] else f"{trial['state']}, outside the space"
        state += f": {trial['reason']}" if trial["reason"] else ""
        rows.append([trial["label"], *given, number(trial["objective"]), *gaps, str(trial["step"]), state])
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    best = f"best: {answer['best']['label']}" if answer["best"] else "best: no trial has finished"
    lines += ["", f"{best}; {answer['note']}"]
    if "mixture.gamma" in keys:
        lines.append("a gamma is of its base and sampler: nothing measured beforehand predicted it (docs/results.md)")
    return "\n".join(lines)


def _gap(trial: Mapping[str, Any], control: str) -> str:
    if trial["label"] == control or control not in trial["differences"]:
        return ""
    return number(trial["differences"][control], signed=True)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
