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
from clusters import answers, inherited, kill_family
from mlflow_servers import free_port, wait_until

NETWORK = "10.199.77"  # the host is .1, and .254 as the object store
HOST, STORE = f"{NETWORK}.1", f"{NETWORK}.254"
NODES = f"{NETWORK}.0/25"  # the head and all nodes, and not the store
# Of Ray's agent at its default port, as every namespace has all ports.
PROBE = "import urllib.request as u; u.urlopen('http://127.0.0.1:52365/api/local_raylet_healthz', timeout=5)"
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}


class Nodes:
    """A head without CPUs on the host, and nodes of one CPU each, joined by a bridge."""

    def __init__(self, log: Path, bridge: str) -> None:
        self.bridge, self._log = bridge, log
        self._directory, port = f"/tmp/mixflow-nodes-{os.getpid()}", free_port()
        self.address = f"{HOST}:{port}"
        self._nodes: dict[int, psutil.Popen] = {}
        self._lost: set[int] = set()
        self._env = {**inherited(), **AUTHENTICATION, "NO_PROXY": f"127.0.0.1,{HOST},{STORE}"}
        dashboard, agent = free_port(), free_port()
        arguments = ["--head", f"--port={port}", "--num-cpus=0", f"--node-ip-address={HOST}"]
        arguments += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={self._directory}"]
        arguments += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={free_port()}"]
        self._head = self._start([], arguments)
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{dashboard}/api/gcs_healthz"), "Ray's head starts")
        except BaseException:
            self.close()
            raise

    def add(self, number: int) -> None:
        """Starts node `number`, 2 to 126, and waits until it has joined."""
        space, cable = f"{self.bridge}-{number}", f"{self.bridge}v{number}"
        ip("netns", "add", space)
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", cable, "master", self.bridge, "up")
        ip("-n", space, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        arguments = [f"--address={self.address}", "--num-cpus=1", f"--node-ip-address={NETWORK}.{number}"]
        # The name of this host means an address that is not in there.
        self._nodes[number] = self._start(["ip", "netns", "exec", space], arguments, GLOO_SOCKET_IFNAME="eth0")
        probe = ["ip", "netns", "exec", space, sys.executable, "-c", PROBE]
        wait_until(lambda: subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0, f"node {number} joins")

    def with_workers(self) -> list[int]:
        """The nodes on which a worker of Ray Train is at work, by its title; none that was cut off or killed."""
        return [number for number, node in self._nodes.items() if number not in self._lost and _has_worker(node)]

    def cut(self, number: int) -> None:
        """Takes the cable out, for good: the node lives, and nobody reaches it."""
        ip("link", "set", f"{self.bridge}v{number}", "down")
        self._lost.add(number)

    def part(self, number: int) -> None:
        """For good, nothing of the node reaches the head and other nodes any more; the object store it reaches."""
        ip("-n", f"{self.bridge}-{number}", "route", "add", "blackhole", NODES)
        self._lost.add(number)

    def kill(self, number: int) -> None:
        """kill -9 of all of the node's processes."""
        node = self._nodes.pop(number)
        kill_family(node)
        node.wait()

    def close(self) -> None:
        """Removes everything but the bridge."""
        for number in [*self._nodes]:
            self.kill(number)
        kill_family(self._head)
        self._head.wait()
        for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
            if line.startswith(f"{self.bridge}-"):
                ip("netns", "delete", line.split()[0])
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, before: list[str], arguments: list[str], **variables: str) -> psutil.Popen:
        command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        command += ["--object-store-memory=100000000", "--memory=3000000000"]
        with self._log.open("ab") as out:
            env = {**self._env, **variables}
            return psutil.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)


def _has_worker(node: psutil.Popen) -> bool:
    for process in node.children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()[:1]):
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def ip(*arguments: str) -> None:
    """Runs iproute2's `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def network() -> Iterator[str]:
    """A bridge with the addresses HOST and STORE; its name. Needs root and iproute2."""
    bridge = f"mf{os.getpid() % 100000}"
    ip("link", "add", bridge, "type", "bridge")
    try:
        for address in (HOST, STORE):
            ip("addr", "add", f"{address}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        yield bridge
    finally:
        ip("link", "delete", bridge)


@contextmanager
def nodes_of(bridge: str, log: Path, *numbers: int) -> Iterator[Nodes]:
    """A head with these nodes."""
    nodes = Nodes(log, bridge)
    try:
        for number in numbers:
            nodes.add(number)
        yield nodes
    finally:
        nodes.close()
