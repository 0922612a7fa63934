"""Kills processes of a run on Ray with SIGKILL at random moments, and compares its result with that of a quiet run.

    python tests/benchmarks/ray_kill_campaign.py --kills 30

A round is one `mixflow train` of a small quickstart on two workers, and up to five kills: each time a random one of its
processes (the driver, a worker, Ray Train's controller, the process that speaks to MLflow, the raylet, the head's
server) dies up to six seconds after training was seen to go on. Where that ends the command, the same command is given
again. A round passes when the SHA-256 of all files that the run made are those of the quiet run, and MLflow holds each
run once, finished, with the quiet run's losses, each step once. `recovered_s` is the time from a kill to the next step
in training, with the command given again where the kill ended it; the last kill of a round may have none after it. Each
round is one JSON line in the result file, and a campaign that was stopped goes on after the rounds that are there.
`kill_campaign.py` kills the loop's process alone.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

sys.path.append(str(Path(__file__).parents[1] / "orchestration"))
from campaigns import append_result, read_results
from clusters import Run, results_of, small
from mlflow import MlflowClient

RESULTS = Path(__file__).parent / "results" / "ray_kill_campaign.jsonl"
KILLS_A_ROUND, WITHIN_S = 5, 6.0
SETTLED_S = 1.0  # after a kill: what was told before it has arrived
LONGEST_S = 300.0
STEPS, LOG_EVERY = 300, 10
COMMAND = [
    *("train", "quickstart", "--json"),
    *small(training__steps=STEPS, training__log_every=LOG_EVERY, cluster__max_failures=1),
]
# Titles of the processes; "" is the command's own.
VICTIMS = {
    "driver": "",
    "worker": "RayTrainWorker",
    "controller": "TrainController",
    "reporter": "Reporter",
    "raylet": "raylet",
    "head": "gcs_server",
}


def steps_told(run: Run) -> list[tuple[str, str]]:
    """The stages and steps in training that the command has told of."""
    return re.findall(r"stage \d+/\d+  (\S+) step (\d+)/", run.err.read_text())


def restarts(run: Run) -> int:
    """How often the command has told that its workers start again."""
    return len(re.findall(r"started again|starting again", run.err.read_text()))


def goes_on(run: Run, after: int) -> bool:
    """Waits until more than `after` steps are told; whether that came before the command's end."""
    end = time.monotonic() + LONGEST_S
    while len(steps_told(run)) <= after:
        if run.process.poll() is not None:
            return False
        if time.monotonic() > end:
            run.kill_all()
            raise TimeoutError(f"it does not go on:\n{run.said()}")
        time.sleep(0.05)
    return True


def ended(run: Run, family: list[psutil.Process]) -> None:
    """Waits for the command's end, and ends what outlives it: its workers do by themselves, within seconds."""
    run.wait(120)
    for process in psutil.wait_procs(family, timeout=20)[1]:
        process.kill()


def kill(run: Run, victim: str, numbers: random.Random) -> dict[str, Any] | None:
    """Kills one process while the run is at work; None if there is none any more."""
    time.sleep(numbers.uniform(0, WITHIN_S))
    family = run.process.children(recursive=True) if run.process.is_running() else []
    victims = [run.process] if victim == "driver" else run.find(VICTIMS[victim]) if family else []
    if not victims or run.process.poll() is not None:
        return None
    stage, step = steps_told(run)[-1]
    before = restarts(run)
    numbers.choice(victims).kill()
    killed_at = time.monotonic()
    if victim in ("driver", "raylet", "head"):
        ended(run, family)
    elif victim in ("worker", "controller"):  # until then steps are told that were done before
        while restarts(run) == before and run.process.poll() is None and time.monotonic() < killed_at + LONGEST_S:
            time.sleep(0.05)
    time.sleep(SETTLED_S)
    return {"victim": victim, "stage": stage, "step": int(step), "at": killed_at}


def play(seed: int, most_kills: int, victims: Sequence[str], wanted: Wanted, scratch: Path) -> dict[str, Any]:
    """One round."""
    numbers, directory = random.Random(seed), scratch / f"round-{seed}"
    workspace, kills, commands = directory / "workspace", list[dict[str, Any]](), 0
    run, told = None, 0
    while len(kills) < most_kills:
        if run is None or run.process.poll() not in (None, 0):
            commands += 1
            run, told = Run(COMMAND, directory / f"command-{commands}", {"MIXFLOW_WORKSPACE": str(workspace)}), 0
        if goes_on(run, told):
            recovered(kills)
        elif run.process.poll() == 0:
            break
        if done := kill(run, numbers.choice(victims), numbers):
            kills.append(done)
        told = len(steps_told(run))
    while run is None or run.wait() != 0:
        commands += 1
        if commands > 2 * KILLS_A_ROUND:
            raise RuntimeError(f"the command does not succeed:\n{run.said() if run else ''}")
        run = Run(COMMAND, directory / f"command-{commands}", {"MIXFLOW_WORKSPACE": str(workspace)})
    for one in kills:
        one.pop("at", None)
    problems = [] if results_of(workspace) == wanted.files else ["files differ"]
    problems += wanted.problems_in_mlflow(MlflowClient(f"sqlite:///{workspace}/mlflow.db"), "quickstart")
    return {"seed": seed, "kills": kills, "commands": commands, "problems": problems, "passed": not problems}


def recovered(kills: list[dict[str, Any]]) -> None:
    """Training goes on: the time since the last kill."""
    if kills and "at" in kills[-1]:
        kills[-1]["recovered_s"] = round(time.monotonic() - kills[-1].pop("at"), 1)


def losses_of(client: MlflowClient, experiment: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and losses of each trained run of an experiment in MLflow, in order."""
    found = {}
    for run in client.search_runs([client.get_experiment_by_name(experiment).experiment_id]):
        if run.info.run_name.split("/")[0] in ("standard", "mixflow", "matched"):
            rows = client.get_metric_history(run.info.run_id, "train/loss")
            found[run.info.run_name] = sorted((row.step, row.value) for row in rows)
    return found


@dataclass
class Wanted:
    """What the quiet run left: SHA-256 of its files, and losses_of it."""

    files: dict[str, str]
    losses: dict[str, list[tuple[int, float]]]

    def problems_in_mlflow(self, client: MlflowClient, experiment: str) -> list[str]:
        """Runs that are there twice or are not finished, and other losses than the quiet run's."""
        runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        problems = [f"{run.info.run_name} is {run.info.status}" for run in runs if run.info.status != "FINISHED"]
        counts = Counter(run.info.run_name for run in runs)
        problems += [f"{name} is there {count} times" for name, count in counts.items() if count > 1]
        found = losses_of(client, experiment)
        return problems + [f"losses of {n}" for n in self.losses | found if self.losses.get(n) != found.get(n)]


def main() -> int:
    """Command line; 1 if any round did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=list(VICTIMS), default=list(VICTIMS), help="kill these alone")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rounds = read_results(options.results)
    with tempfile.TemporaryDirectory(prefix="mixflow-kills-") as name:
        scratch = Path(name)
        Run(COMMAND, scratch / "quiet", {"MIXFLOW_WORKSPACE": str(scratch / "quiet/workspace")}).answer()
        quiet = scratch / "quiet/workspace"
        client = MlflowClient(f"sqlite:///{quiet}/mlflow.db")
        wanted = Wanted(results_of(quiet), losses_of(client, "quickstart"))
        while (made := sum(len(entry["kills"]) for entry in rounds)) < options.kills:
            entry = play(len(rounds), min(KILLS_A_ROUND, options.kills - made), options.only, wanted, scratch)
            rounds.append(entry)
            append_result(options.results, entry)
            print(entry, flush=True)
    passed = sum(entry["passed"] for entry in rounds)
    by_victim = Counter(kill["victim"] for entry in rounds for kill in entry["kills"])
    for victim in by_victim:
        took = [k["recovered_s"] for e in rounds for k in e["kills"] if k["victim"] == victim and "recovered_s" in k]
        if took:
            print(f"{victim}: training went on after {median(took):g} s, at most {max(took):g} ({len(took)} kills)")
    print(f"{by_victim.total()} kills ({dict(by_victim)}) in {len(rounds)} rounds, {passed} of them passed")
    return 0 if passed == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
