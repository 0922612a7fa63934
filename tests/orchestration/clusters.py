"""Runs of the real command line in processes of their own, and the processes of Ray behind them."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow_servers import free_port, wait_until

# The quickstart, all of its stages, in seconds instead of minutes.
SMALL = {
    "base.train.steps": 40,
    "base.train.log_every": 20,
    "base.train.checkpoint_every": 20,
    "training.steps": 60,
    "training.log_every": 10,
    "training.checkpoint_every": 20,
    "training.global_batch_size": 32,
    "base.train.global_batch_size": 32,
    "evaluation.num_samples": 100,
    "evaluation.sample_batch_size": 50,
    "evaluation.slow_flow_samples": 50,
    "replicates": 2,
}


RESULT_KINDS = ("data", "base", "features", "arms", "samples", "metrics", "slow-flow")  # directories of a workspace


def small(**more: object) -> list[str]:
    """--set arguments of the small quickstart; keywords write dots as double underscores."""
    settings = SMALL | {key.replace("__", "."): value for key, value in more.items()}
    return [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]


def inherited() -> dict[str, str]:
    """This process's environment without what would lead elsewhere, fit for a machine that is not idle.

    Ray's own start-up limit is for idle ones, and its workers, which have niceness 15, starve beside other tests.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MIXFLOW_", "MLFLOW_"))}
    return env | {"RAY_raylet_start_wait_time_s": "120", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class Run:
    """`python -m orchestration ...` in a process group of its own."""

    def __init__(self, arguments: list[str], directory: Path, environment: Mapping[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.out, self.err = directory / "stdout", directory / "stderr"
        env = inherited() | dict(environment)
        with self.out.open("wb") as out, self.err.open("ab") as err:
            self.process = psutil.Popen(
                [sys.executable, "-m", "orchestration", *arguments],
                stdout=out,
                stderr=err,
                env=env,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = 400) -> int:
        """The exit code; what the run said if it hangs."""
        try:
            return int(self.process.wait(timeout_s))
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            self.kill_all()
            pytest.fail(f"the run did not end in {timeout_s:g} s:\n{self.said()}")

    def answer(self) -> dict[str, Any]:
        """The JSON document of a run that ended well."""
        code = self.wait()
        assert code == 0, self.said()
        return dict(json.loads(self.out.read_text()))

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return self.err.read_text()[-4000:]

    def find(self, name: str) -> list[psutil.Process]:
        """Its living descendants whose title or program name contains `name`."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                title = f"{process.name()} {' '.join(process.cmdline()[:1])}"
                if name in title and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 200) -> None:
        """Waits until a condition holds, and fails if the run ends or the time is over before."""
        end = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill_all()
                pytest.fail(f"{what} did not happen:\n{self.said()}")
            time.sleep(0.05)

    def kill_all(self) -> None:
        """Ends what is left of it, by pid."""
        kill_family(self.process)


def kill_family(process: psutil.Process) -> None:
    """kill -9 of a process and of all below it, as far as they are there."""
    try:
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for each in family:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


@contextmanager
def ray_head(name: str, log: Path, *, cpus: int = 2, **variables: str) -> Iterator[dict[str, str]]:
    """A head node with a job server, and in its environment `variables`; yields a user's environment."""
    # Sockets have short names only, so Ray's directory must not lie below pytest's.
    directory = f"/tmp/mixflow-{name}-{os.getpid()}"
    gcs, dashboard = free_port(), free_port()
    env = inherited() | variables
    # Jobs call `python`, which is this one.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--num-cpus={cpus}", "--block"]
    command += [
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--temp-dir={directory}",
        "--node-ip-address=127.0.0.1",
    ]
    command += ["--object-store-memory=200000000", "--include-dashboard=true"]
    # The defaults of these are fixed ports, which another cluster on this machine may hold.
    agent = free_port()
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={free_port()}"]
    with log.open("wb") as out:
        process = psutil.Popen(command, env=env, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until(lambda: answers(f"{address}/api/gcs_healthz"), "Ray's job server starts")
        wait_until(lambda: answers(f"http://127.0.0.1:{agent}/api/local_raylet_healthz"), "Ray's agent starts")
        yield {**env, "RAY_API_SERVER_ADDRESS": address, "SESSION": directory, "GCS": f"127.0.0.1:{gcs}"}
    finally:
        kill_family(process)
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def ray_node(head: Mapping[str, str], log: Path) -> Iterator[psutil.Popen]:
    """Another node of one CPU, which joins the head on this machine as a container's does (docker/compose.yaml)."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={head['GCS']}"]
    command += ["--num-cpus=1", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
    agent = free_port()
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={free_port()}"]
    with log.open("ab") as out:
        process = psutil.Popen(command, env=dict(head), stdout=out, stderr=out)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{agent}/api/local_raylet_healthz"), "the node joins")
        yield process
    finally:
        kill_family(process)
        process.wait()


def answers(url: str) -> bool:
    """Whether a GET of the URL is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def results_of(workspace: Path) -> dict[str, str]:
    """SHA-256 of every file that training, sampling and evaluation left, by its path in the workspace."""
    found = {}
    for kind in RESULT_KINDS:
        for manifest in (workspace / kind).glob("*/manifest.json"):
            for name, entry in json.loads(manifest.read_text())["files"].items():
                found[f"{kind}/{manifest.parent.name}/{name}"] = entry["sha256"]
    return found
