"""The Ray cluster: starting or joining it, and what it must offer before anything runs on it."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from orchestration.sections import Cluster
from orchestration.storage import Storage
from workers.disk import scratch_directory

NAMESPACE = "mixflow"
NODE_ANSWERS_S = 30.0  # a node that is gone is Ray's to find
STARTS, PROBE = 3, 2**20  # of Ray on this machine; bytes that its disk must take
JOINING_S = 60.0  # for the nodes of a cluster that was started a moment ago
# glibc would give the pages of every tensor back to the system and fetch new ones for the next: a tenth of the time.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "536870912"}
# Of the driver's environment, what every worker is told: which interfaces and transports collectives use, and how.
NETWORK = ("NCCL_", "TORCH_NCCL_", "GLOO_")
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray tells the entry point of a job about it


def inside_job() -> bool:
    """Whether this process is the entry point of a Ray job."""
    return JOB_CONFIG in os.environ


def check_address() -> None:
    """Refuses a RAY_ADDRESS at which nothing listens: Ray itself would try for minutes.

    Raises:
        ValueError: nothing answers, or the address has no port.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address in ("auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"RAY_ADDRESS must be host:port of a running cluster, got {address!r} ({error}); unset it to start one here"
        ) from error


def connect(environment: dict[str, str], *, dashboard: bool = False) -> None:
    """Joins the cluster of RAY_ADDRESS, or starts one on this machine for the time of this process.

    Args:
        environment: variables that every worker process needs; no secrets, they are shown by Ray.
        dashboard: the cluster must have a dashboard; one that is started here is on this machine alone. Sweeps need it:
            where a trial is stopped, Ray Train gives its CPUs back only after it has asked the dashboard whether the
            run still lives.

    Raises:
        ValueError: RAY_ADDRESS names no cluster, or one without a dashboard that was asked for.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    check_address()
    # Ray would print every worker's output twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # The driver looks at a finished group every two seconds by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray

    passed = {k: v for k, v in os.environ.items() if k in MEMORY or k.startswith(("RAY_TRAIN_", *NETWORK))}
    # What a job was told its workers are told too, and Ray refuses to be told it again, even the same.
    told = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env", {}).get("env_vars") or {}
    variables = {name: value for name, value in {**MEMORY, **environment, **passed}.items() if name not in told}
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "runtime_env": {"env_vars": variables},
        "logging_level": "ERROR",
        "log_to_driver": False,
    }
    # Ray Train's cleaner asks from a worker, and would look for the one cluster of its machine, which may have several.
    address = os.environ.get("RAY_ADDRESS") or _local_address()
    if address not in ("auto", "local"):
        variables["RAY_ADDRESS"] = address
    if os.environ.get("RAY_ADDRESS"):
        try:
            with _signals_kept():
                ray.init(**options)
        except ConnectionError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"RAY_ADDRESS must name a running cluster, got {os.environ['RAY_ADDRESS']!r}; {reason}"
            ) from error
        if dashboard:
            _check_dashboard()
    else:
        # Without one Ray still names port 8265 as its dashboard's, and the cleaner would ask whoever is there: another
        # cluster of the machine, which knows no such run and has it ended.
        options["dashboard_port"] = None if dashboard else _free_port()
        _start_here(variables, include_dashboard=dashboard, object_store_memory=256 * 2**20, **options)


def _start_here(variables: dict[str, str], **options: Any) -> None:
    """Starts Ray on this machine, again where it takes longer than the 30 s that Ray allows itself."""
    import ray

    with scratch_directory(PROBE) as scratch:
        (scratch / "probe").write_bytes(bytes(PROBE))  # Ray's own files lie beside it, and it does not say so
    for _ in range(STARTS):
        there = {process.pid for process in psutil.Process().children()}
        try:
            with _signals_kept():
                ray.init(address="local", **options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            cause = error
            for process in psutil.Process().children():
                if process.pid not in there:
                    process.kill()
            ray.shutdown()
            variables["RAY_ADDRESS"] = _local_address()
    raise OSError(
        f"Ray did not start on this machine within 30 s, {STARTS} times; it is busy: the same command goes on when it "
        "is less so"
    ) from cause


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray would let SIGTERM end this process on the spot; who has set another handler keeps it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM and callable(before):
            raise KeyboardInterrupt from ended  # by Ray's handler, while it starts
        raise
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _local_address() -> str:
    """Where the cluster that is started next on this machine will be: Ray takes the port from the environment."""
    import ray

    port = _free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    return f"{ray.util.get_node_ip_address()}:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _check_dashboard() -> None:
    from ray.exceptions import RaySystemError
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        list_nodes(limit=1, timeout=20)
    except (OSError, RaySystemError, RayStateApiException, ValueError, AssertionError) as error:
        got = f"{os.environ['RAY_ADDRESS']!r} without one ({' '.join(str(error).split())[:80]})"
        raise ValueError(
            f"RAY_ADDRESS must be a cluster with a dashboard for a sweep, got {got}; start its head with "
            "--include-dashboard=true"
        ) from error


def is_joined() -> bool:
    """Whether this process is a cluster's driver already."""
    import ray

    return bool(ray.is_initialized())


def check_local_machine(cluster: Cluster) -> None:
    """Refuses what a cluster started here could not hold; a running cluster (RAY_ADDRESS) is asked when it is joined.

    Raises:
        ValueError: too few CPUs or GPUs.
    """
    if os.environ.get("RAY_ADDRESS"):
        check_address()
        return
    import torch

    there = {"CPU": len(os.sched_getaffinity(0)), "GPU": torch.cuda.device_count()}
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    for kind, each in wanted.items():
        if each * cluster.least_workers > there[kind]:
            raise ValueError(
                f"cluster.num_workers must fit this machine: {cluster.least_workers} workers ask for "
                f"{each * cluster.least_workers:g} {kind}s, {there[kind]} are here; lower it, or set RAY_ADDRESS"
            )


def check_resources(cluster: Cluster, say: Callable[[str], None]) -> None:
    """Refuses an experiment whose workers do not fit: Ray would wait for them for ever.

    The nodes of a running cluster, which may have been started a moment ago, are waited for.

    Raises:
        ValueError: too few CPUs or GPUs in the cluster.
    """
    end = time.monotonic() + (JOINING_S if os.environ.get("RAY_ADDRESS") else 0)
    told = False
    while (room := room_for(cluster)) < cluster.least_workers:
        if time.monotonic() >= end:
            raise ValueError(
                f"cluster.num_workers must fit the cluster, whose nodes have room for {room} workers of "
                f"{cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker} GPUs, got "
                f"{cluster.least_workers}; lower it"
            )
        if not told:
            say(f"{room} of {cluster.least_workers} workers have room; waiting up to {JOINING_S:g} s for nodes to join")
        told = True
        time.sleep(1)


def groups_that_fit(cluster: Cluster) -> int:
    """How many groups of workers such as an experiment's the cluster holds at once."""
    room = room_for(cluster)
    return room // cluster.most_workers or int(room >= cluster.least_workers)


def room_for(cluster: Cluster) -> int:
    """Workers that the cluster's living nodes have room for."""
    import ray

    return sum(_workers_on(node["Resources"], cluster) for node in ray.nodes() if node["Alive"])


def more_room(cluster: Cluster, without: Container[str] = ()) -> dict[str, int]:
    """By node the further workers that it has room for now, beside all that runs; not of the nodes `without`."""
    from ray._private.state import state

    free = {name: _workers_on(node, cluster) for name, node in state.available_resources_per_node().items()}
    return {name: workers for name, workers in free.items() if workers and name not in without}


def _workers_on(resources: Mapping[str, float], cluster: Cluster) -> int:
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return min(int(resources.get(kind, 0) // each) for kind, each in wanted.items() if each)


def check_shared(storage: Storage) -> None:
    """Refuses a local workspace that some node of the cluster does not see.

    Raises:
        ValueError: naming the node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if not storage.is_local or len(nodes) == 1:
        return
    probe = f".probe-{uuid.uuid4().hex}"
    storage.put(probe, b"")
    try:
        sees = ray.remote(num_cpus=0)(lambda: storage.exists(probe))
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            address = node["NodeManagerAddress"]
            try:
                is_there = ray.get(sees.options(scheduling_strategy=here).remote(), timeout=NODE_ANSWERS_S)
            except ray.exceptions.GetTimeoutError as error:
                raise ValueError(
                    f"MIXFLOW_WORKSPACE must be shared by all nodes, but {address} did not say within "
                    f"{NODE_ANSWERS_S:g} s whether it sees {storage.uri}; look at that node"
                ) from error
            if not is_there:
                raise ValueError(
                    f"MIXFLOW_WORKSPACE must be shared by all nodes, but {address} does not see {storage.uri}; "
                    "use s3://bucket/prefix"
                )
    finally:
        storage.delete(probe)
