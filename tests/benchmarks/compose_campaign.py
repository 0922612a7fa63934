"""Kills containers of the cluster of docker/compose.yaml while a job runs on it, and compares with a quiet job.

    tests/cluster/up.sh DIR && .venv/bin/python tests/benchmarks/compose_campaign.py --rounds 4     # as root

In the project's directory, where the cluster is up, with podman or Docker (CONTAINER_ENGINE=docker). First a quiet job:
`mixflow submit -- train` of a small quickstart. A round is the same job in another workspace, in which the first
process of a container gets SIGKILL from outside, a few seconds after training was seen to go on: in even rounds
MLflow's and then a worker's, in odd ones the head's, where the same command has to be given again. A round passes when
the SHA-256 of all files are those of the quiet job, MLflow holds each run once, finished, with the quiet job's losses,
each step once, and every container is healthy again. `recovered_s` is the time from the last kill to the next step in
training. Each round is one JSON line in the result file, and a campaign that was stopped goes on after the rounds that
are there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).parents[1] / "orchestration"))
from campaigns import append_result, read_results
from clusters import Run, small
from mlflow import MlflowClient
from nodes_campaign import files_of
from ray_kill_campaign import LOG_EVERY, STEPS, Wanted, goes_on, losses_of, restarts, steps_told

from orchestration.doctor import COMPOSE_ENV, read_env

RESULTS = Path(__file__).parent / "results" / "compose_campaign.jsonl"
ENGINE = os.environ.get("CONTAINER_ENGINE", "podman")
PODMAN_CONF = Path(__file__).parents[1] / "cluster" / "containers.conf"
WITHIN_S, HEALTHY_S = 6.0, 300.0


def engine(*words: str) -> str:
    """What the container engine answers."""
    env = {"CONTAINERS_CONF": str(PODMAN_CONF), **os.environ}
    return subprocess.run([ENGINE, *words], env=env, capture_output=True, text=True, check=True, timeout=60).stdout


def containers(service: str = "") -> dict[str, dict[str, Any]]:
    """State of each running container of a service, or of all, by its name."""
    named = ["--filter", f"label=com.docker.compose.service={service}"] if service else []
    found = json.loads(engine("inspect", *ids)) if (ids := engine("ps", "--quiet", *named).split()) else []
    return {one["Name"].lstrip("/"): one["State"] for one in found}


def kill(service: str, numbers: random.Random) -> str:
    """SIGKILL to the first process of one of a service's containers; an engine's own kill would not be restarted.

    Of workers it is one that has a process of the group: a container of two CPUs may hold both.
    """
    found = sorted(containers(service).items())
    if service == "worker":
        found = [(name, state) for name, state in found if _has_group(state["Pid"])]
    name, state = numbers.choice(found)
    os.kill(state["Pid"], signal.SIGKILL)
    return name


def _has_group(pid: int) -> bool:
    return any("RayTrainWorker" in " ".join(each.cmdline()[:1]) for each in psutil.Process(pid).children(True))


def all_healthy(names: set[str]) -> bool:
    """Whether all of these run, and are healthy."""
    states = containers()
    health = {name: state.get("Health") or state.get("Healthcheck") or {} for name, state in states.items()}
    return names <= states.keys() and all(health[name].get("Status") == "healthy" for name in names)


def submitted(name: str, directory: Path) -> Run:
    """The job of a round, with artifacts and an experiment in MLflow of its own."""
    words = small(name=name, training__steps=STEPS, training__log_every=LOG_EVERY, cluster__max_failures=1)
    return Run(["submit", "--json", "--", "train", "quickstart", *words], directory, {"MIXFLOW_WORKSPACE": place(name)})


def place(name: str) -> str:
    """Workspace of a round."""
    return f"s3://mixflow/{name}"


def play(seed: int, name: str, wanted: Wanted, scratch: Path) -> dict[str, Any]:
    """One round."""
    numbers = random.Random(seed)
    services = ["head"] if seed % 2 else ["mlflow", "worker"]
    names = set(containers())
    run, killed, commands = submitted(name, scratch / f"{name}-1"), list[str](), 1
    for service in services:
        assert goes_on(run, len(steps_told(run))), run.said()
        time.sleep(numbers.uniform(0, WITHIN_S))
        began = restarts(run)
        killed.append(kill(service, numbers))
    start = time.monotonic()
    if "head" in services:
        code, commands = run.wait(), 2
        assert code, "the job outlived its head"
        run, told = submitted(name, scratch / f"{name}-2"), 0
    else:
        run.until(lambda: restarts(run) > began, "its workers start again", HEALTHY_S)
        told = len(steps_told(run))
    assert goes_on(run, told), run.said()
    recovered_s = round(time.monotonic() - start, 1)
    run.answer()
    while not all_healthy(names) and time.monotonic() < start + HEALTHY_S:
        time.sleep(1)
    problems = [] if files_of(place(name)) == wanted.files else ["files differ"]
    problems += [] if all_healthy(names) else [f"not healthy: {containers()}"]
    problems += wanted.problems_in_mlflow(MlflowClient(), name)
    entry = {"seed": seed, "killed": killed, "commands": commands, "recovered_s": recovered_s}
    return {**entry, "problems": problems, "passed": not problems}


def connect() -> None:
    """The environment of somebody on this machine who has docker/.env."""
    env = read_env(COMPOSE_ENV)
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{env.get('S3_PORT', 8333)}",
        AWS_REGION="us-east-1",
        AWS_ACCESS_KEY_ID=env["S3_ACCESS_KEY"],
        AWS_SECRET_ACCESS_KEY=env["S3_SECRET_KEY"],
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{env.get('MLFLOW_PORT', 5000)}",
        MLFLOW_TRACKING_USERNAME="admin",
        MLFLOW_TRACKING_PASSWORD=env["MLFLOW_ADMIN_PASSWORD"],
    )


def main() -> int:
    """Command line; 1 if any round did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    connect()
    rounds, sitting = read_results(options.results), uuid.uuid4().hex[:6]
    with tempfile.TemporaryDirectory(prefix="mixflow-compose-") as directory:
        scratch = Path(directory)
        quiet = f"quiet-{sitting}"
        print(json.dumps(submitted(quiet, scratch / "quiet").answer()["tracking"]), flush=True)
        wanted = Wanted(files_of(place(quiet)), losses_of(MlflowClient(), quiet))
        for seed in range(len(rounds), options.rounds):
            rounds.append(play(seed, f"round-{seed}-{sitting}", wanted, scratch))
            append_result(options.results, rounds[-1])
            print(json.dumps(rounds[-1]), flush=True)
    passed = sum(entry["passed"] for entry in rounds)
    print(f"{passed} of {len(rounds)} rounds passed")
    return 0 if passed == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
