"""Ray nodes in network namespaces of this machine: each with an address of its own, to be killed or cut off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from clusters import answers
from mlflow_servers import free_port, wait_until

NETWORK = "10.199.77"


class Nodes:
    """A head without CPUs on the host, and nodes of one CPU each, joined by a bridge. Needs root and iproute2."""

    def __init__(self, log: Path) -> None:
        self.log, self.mark = log, f"mf{os.getpid() % 100000}"
        self.directory, self.port = f"/tmp/mixflow-nodes-{os.getpid()}", free_port()
        self.address = f"{NETWORK}.1:{self.port}"
        self.nodes: dict[int, psutil.Popen] = {}
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MIXFLOW_", "MLFLOW_"))}
        self.env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120", "RAY_AUTH_MODE": "disabled"}
        ip("link", "add", self.mark, "type", "bridge")
        ip("addr", "add", f"{NETWORK}.1/24", "dev", self.mark)
        ip("link", "set", self.mark, "up")
        dashboard = free_port()
        self.head = self._start(
            [],
            [
                "--head",
                f"--port={self.port}",
                "--num-cpus=0",
                f"--node-ip-address={NETWORK}.1",
                f"--dashboard-port={dashboard}",
                "--dashboard-host=127.0.0.1",
                f"--temp-dir={self.directory}",
                f"--dashboard-agent-listen-port={free_port()}",
                f"--metrics-export-port={free_port()}",
            ],
            self.env,
        )
        wait_until(lambda: answers(f"http://127.0.0.1:{dashboard}/api/gcs_healthz"), "Ray's head starts")

    def add(self, number: int) -> None:
        """Starts node `number`, 2 to 250."""
        space = f"{self.mark}-{number}"
        ip("netns", "add", space)
        ip("link", "add", f"{self.mark}v{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", f"{self.mark}v{number}", "master", self.mark, "up")
        ip("-n", space, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        # The host's name means an address that is not in there.
        env = {**self.env, "GLOO_SOCKET_IFNAME": "eth0"}
        self.nodes[number] = self._start(
            ["ip", "netns", "exec", space],
            [f"--address={self.address}", "--num-cpus=1", f"--node-ip-address={NETWORK}.{number}"],
            env,
        )

    def cut(self, number: int) -> None:
        """Takes the cable out: the node lives, and nobody reaches it."""
        ip("link", "set", f"{self.mark}v{number}", "down")

    def kill(self, number: int) -> None:
        """kill -9 of all of the node's processes."""
        process = self.nodes.pop(number)
        for each in [*process.children(recursive=True), process]:
            each.kill()

    def close(self) -> None:
        """Removes everything."""
        numbers = [*self.nodes]
        for number in numbers:
            self.kill(number)
        for each in [*self.head.children(recursive=True), self.head]:
            each.kill()
        for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
            if line.startswith(f"{self.mark}-"):
                ip("netns", "delete", line.split()[0])
        ip("link", "delete", self.mark)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self, before: list[str], arguments: list[str], env: dict[str, str]) -> psutil.Popen:
        command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        command += ["--object-store-memory=100000000", "--memory=3000000000"]
        with self.log.open("ab") as out:
            return psutil.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)


def ip(*arguments: str) -> None:
    """Runs iproute2's `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def cluster_of(log: Path, *numbers: int) -> Iterator[Nodes]:
    """A head with these nodes."""
    nodes = Nodes(log)
    try:
        for number in numbers:
            nodes.add(number)
        yield nodes
    finally:
        nodes.close()
