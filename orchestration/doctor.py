"""`mixflow doctor`: whether this machine, and the cluster it belongs to, are fit for a run, and how to mend them."""

from __future__ import annotations

import importlib.util
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestration import cluster, mlflow_server, nodes
from orchestration.run import open_workspace
from workers.disk import room_for

GIB = 2**30
COMPOSE_ENV = Path("docker/.env")  # beside docker/compose.yaml, where Compose looks for it


def examine(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What works and what does not, each finding {what, ok, says}; on a running cluster, of all its nodes."""
    here = [
        _finding("python", lambda: f"{platform.python_version()} at {sys.executable}"),
        _finding("packages", _packages),
        _finding("clock", _clock),
        _finding(
            "disk", lambda: f"{_free('.')} GiB free here, {_free(tempfile.gettempdir())} in {tempfile.gettempdir()}"
        ),
        _finding("gpu", _gpus),
        _finding("ray", lambda: _ray(environment)),
        _finding("storage", _storage),
        _finding("mlflow", _mlflow),
    ]
    if not cluster.is_joined():
        return here
    import ray

    try:
        checks = nodes.Probes().checks(open_workspace, _tracking_uri)
        return here + [_finding(what, look) for what, look in checks.items()]
    finally:
        ray.shutdown()


def _finding(what: str, look: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"what": what, "ok": True, "says": look()}
    except Exception as error:  # the finding is the error
        return {"what": what, "ok": False, "says": " ".join(str(error).split())}


def _packages() -> str:
    import re

    found = []
    for requirement in metadata.requires("mixflow") or []:
        match = re.match(r"([A-Za-z0-9_-]+)(?:\[[^]]*\])?==([^ ;]+)$", requirement)
        if match:
            name, pinned = match.groups()
            version = metadata.version(name).split("+")[0]
            if version != pinned:
                raise ValueError(f"{name} must be {pinned}, got {version}; pip install -e . mends it")
            found.append(f"{name} {version}")
    return ", ".join(found)


def _clock() -> str:
    if time.time() < 1735689600:  # 2025-01-01: signatures of S3 requests and Ray's leases need a clock that is right
        raise ValueError(f"the clock must be right, got {time.ctime()}; set it (NTP)")
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none; runs use CPUs (cluster.gpus_per_worker: 0)"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _ray(environment: Mapping[str, str]) -> str:
    if importlib.util.find_spec("ray") is None:
        raise ValueError("ray must be installed; pip install -e . mends it")
    address = environment.get("RAY_ADDRESS")
    if not address:
        return f"{metadata.version('ray')}; RAY_ADDRESS is not set, a run starts its own cluster on this machine"
    cluster.connect({})
    import ray

    there = ray.cluster_resources()
    alive = sum(node["Alive"] for node in ray.nodes())
    return f"{address}: {alive} nodes, {there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs"


def _storage() -> str:
    storage = open_workspace()
    storage.check()
    return f"workspace {storage.uri}: read, written and deleted"


def _tracking_uri() -> str:
    return mlflow_server.default_tracking_uri(open_workspace())


def _mlflow() -> str:
    uri = _tracking_uri()
    warning = mlflow_server.check_tracking(uri)
    if warning:
        raise ValueError(warning)
    return f"{mlflow_server.ui_command(uri)} shows the runs"


def _free(place: str) -> str:
    return f"{shutil.disk_usage(place).free / GIB:.1f}"


def init_env(path: Path = COMPOSE_ENV) -> dict[str, Any]:
    """Writes the file of passwords that docker/compose.yaml reads, for its owner's eyes only.

    Raises:
        ValueError: it is there already, or docker/compose.yaml is not.
    """
    if not (path.parent / "compose.yaml").is_file():
        raise ValueError(f"--init-env must be used where {path.parent}/compose.yaml is, got {Path.cwd()}; go there")
    names = ("S3_SECRET_KEY", "POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY", "RAY_AUTH_TOKEN")
    values = {"MIXFLOW_CLUSTER": "mixflow", "S3_ACCESS_KEY": f"mixflow{secrets.token_hex(8)}"}
    values |= {name: secrets.token_hex(32) for name in names}
    text = "# Passwords of docker/compose.yaml, made by `mixflow doctor --init-env`. MLflow's user is admin.\n"
    text += "".join(f"{name}={value}\n" for name, value in values.items())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ValueError(
            f"{path} must not be there yet, got one, with passwords that the cluster's volumes may know; keep it, or "
            "delete it with them (docker compose -f docker/compose.yaml down -v)"
        ) from error
    try:
        with room_for(path, len(text)), open(descriptor, "w") as file:
            file.write(text)
    except BaseException:
        path.unlink()
        raise
    return {"written": str(path)}


def read_env(path: Path) -> dict[str, str]:
    """The variables of a file that `init_env` wrote."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    pairs = [line.partition("=") for line in lines if "=" in line and not line.startswith("#")]
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}
