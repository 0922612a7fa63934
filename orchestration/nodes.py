"""The nodes of a running cluster, each seen by a probe on it: equal versions, clocks, storage, MLflow, collectives."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from orchestration import cluster, mlflow_server
from orchestration.s3_client import s3_environment
from orchestration.storage import Storage
from orchestration.workflow import code_version

ANSWER_S = 120.0  # for a probe to start and answer: imports on a busy node take tens of seconds
SKEW_S = 1.0  # by which clocks may differ: leases in the workspace and MLflow's curves are read across nodes


class Probe:
    """What runs on a node."""

    def versions(self) -> dict[str, str]:
        """Versions that have to be equal on all nodes."""
        names = ("ray", "torch", "mixflow")
        found = {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
        return found | {"sources": code_version()}

    def time_s(self) -> float:
        """This node's clock."""
        return time.time()

    def storage(self, storage: Storage) -> str:
        """What is wrong with the storage as seen from here; empty if nothing is."""
        os.environ.update(s3_environment(os.environ))
        try:
            storage.check()
        except ValueError as error:
            return str(error)
        return ""

    def mlflow(self, uri: str) -> str:
        """What is wrong with MLflow as seen from here; empty if nothing is."""
        try:
            return mlflow_server.check_tracking(uri) or ""
        except ValueError as error:
            return str(error)

    def free_port(self) -> int:
        """A port that nobody listens at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def gpus(self) -> str:
        """The GPUs that torch sees in this process, and its NCCL."""
        import torch

        if not torch.cuda.is_available():
            return ""
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"

    def all_reduce(self, rank: int, world_size: int, host: str, port: int) -> float:
        """The sum of one from each rank, over NCCL where this process has a GPU, else over gloo."""
        import torch
        from torch import distributed

        gpu = torch.cuda.is_available()
        distributed.init_process_group(
            "nccl" if gpu else "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=ANSWER_S / 2),
        )
        try:
            one = torch.ones(1, device="cuda" if gpu else "cpu")
            distributed.all_reduce(one)
            return float(one)
        finally:
            distributed.destroy_process_group()


class Probes:
    """A probe on each node of the cluster that this process has joined."""

    def __init__(self) -> None:
        import ray

        self.nodes = {
            f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})": node for node in ray.nodes() if node["Alive"]
        }
        self.probes = {name: self._start(name) for name in self.nodes}

    def checks(self, workspace: Callable[[], Storage], tracking_uri: Callable[[], str]) -> dict[str, Callable[[], str]]:
        """What to look at, by the name of its finding; each raises ValueError with what is wrong and where."""
        return {
            "versions": self.versions,
            "clocks": self.clocks,
            "storage nodes": lambda: self._storage(workspace()),
            "mlflow nodes": lambda: self._nothing_wrong("mlflow", tracking_uri()),
            "gpu nodes": self.gpus,
            "collectives": self.collectives,
        }

    def versions(self) -> str:
        """The versions, equal on all nodes."""
        answers = self._ask("versions")
        first_node, first = next(iter(answers.items()))
        for node, its in answers.items():
            for name, version in its.items():
                if version != first[name]:
                    raise ValueError(
                        f"{name} must be the same on all nodes, got {first[name]} on {first_node} and {version} on "
                        f"{node}; give all of them one image"
                    )
        return ", ".join(f"{name} {version}" for name, version in first.items()) + f" on {len(answers)} nodes"

    def clocks(self) -> str:
        """By how much clocks differ at least: a reading must lie between our own before and after it."""
        self._ask("time_s")  # so that the second answer is quick
        worst = 0.0
        for node in self.probes:
            before = time.time()
            there = self._ask("time_s", only=node)[node]
            apart = max(before - there, there - time.time(), 0.0)
            if apart > SKEW_S:
                raise ValueError(
                    f"clocks must agree within {SKEW_S:g} s, got {apart:.1f} s on {node}; run NTP (chrony) on all nodes"
                )
            worst = max(worst, apart)
        return f"within {max(worst, 0.001):.3f} s on {len(self.probes)} nodes"

    def gpus(self) -> str:
        """The GPUs of each node, in words."""
        counts = {name: int(node["Resources"].get("GPU", 0)) for name, node in self.nodes.items()}
        if not any(counts.values()):
            return f"none on {len(counts)} nodes"
        probes = {name: self._start(name, num_gpus=1) for name, count in counts.items() if count}
        found = self._ask("gpus", of=probes)
        blind = [name for name, says in found.items() if not says]
        if blind:
            raise ValueError(
                f"torch must see the GPUs of {blind[0]}, got none (a CPU build of torch, or no driver in the "
                "container); build the image with CUDA=1"
            )
        return "; ".join(f"{name}: {counts[name]} GPUs, {says}" for name, says in found.items())

    def collectives(self) -> str:
        """An all-reduce over all nodes: NCCL with a process on each GPU where there are GPUs, else gloo."""
        per_gpu = [name for name, node in self.nodes.items() for _ in range(int(node["Resources"].get("GPU", 0)))]
        per_cpu = [name for name, node in self.nodes.items() if node["Resources"].get("CPU", 0)]
        ranks = per_gpu or per_cpu or list(self.nodes)
        group = {f"rank {i} on {name}": self._start(name, num_gpus=1 if per_gpu else 0) for i, name in enumerate(ranks)}
        lead = next(iter(group))
        host = self.nodes[ranks[0]]["NodeManagerAddress"]
        port = self._ask("free_port", of=group, only=lead)[lead]
        sums = self._ask("all_reduce", of=group, each=lambda rank: (rank, len(ranks), host, port))
        wrong = [name for name, total in sums.items() if total != len(ranks)]
        if wrong:
            raise ValueError(
                f"an all-reduce of ones over {len(ranks)} processes must be {len(ranks)}, got another on {wrong[0]}"
            )
        return f"{'NCCL' if per_gpu else 'gloo'} all-reduce over {len(ranks)} processes on {len(set(ranks))} nodes"

    def _storage(self, storage: Storage) -> str:
        cluster.check_shared(storage)  # each node can write a directory that only itself sees
        return self._nothing_wrong("storage", storage)

    def _nothing_wrong(self, method: str, argument: Any) -> str:
        for node, problem in self._ask(method, each=lambda rank: (argument,)).items():
            if problem:
                raise ValueError(f"{node}: {problem}")
        return f"reached from {len(self.probes)} nodes"

    def _start(self, node: str, num_gpus: int = 0) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(self.nodes[node]["NodeID"], soft=False)
        return ray.remote(Probe).options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=there).remote()

    def _ask(
        self,
        method: str,
        *,
        of: dict[str, Any] | None = None,
        only: str = "",
        each: Callable[[int], tuple[Any, ...]] = lambda rank: (),
    ) -> dict[str, Any]:
        """The answers of the probes by name; ValueError if one does not answer in time."""
        import ray

        probes = {name: probe for name, probe in (of or self.probes).items() if only in ("", name)}
        calls = {name: getattr(probe, method).remote(*each(rank)) for rank, (name, probe) in enumerate(probes.items())}
        ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_S)
        for name, call in calls.items():
            if call not in ready:
                raise ValueError(
                    f"{name} must answer within {ANSWER_S:g} s, got nothing; it is overloaded or cut off, or its GPUs "
                    "are busy"
                )
        return {name: ray.get(call) for name, call in calls.items()}
