"""What a run would do and need, and whether this machine is fit for it: `mixflow plan` and `mixflow doctor`."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from orchestration import cluster, tracking
from orchestration.experiment import Experiment
from orchestration.run import Place, check_inputs, open_place
from orchestration.workflow import Workspace

GIB = 2**30


def make_plan(experiment: Experiment, place: Place) -> dict[str, Any]:
    """The resolved experiment, its stages (done, stale, to do), and what is still to be spent.

    Raises:
        ValueError, CorruptError: whatever would stop the run.
    """
    workspace = Workspace(experiment, place.storage)
    check_inputs(workspace)
    cluster.check_local_machine(experiment.cluster)
    states = {name: workspace.state(name) for name in workspace.stages}
    size = model_size(experiment)
    to_do = {name for name, state in states.items() if state == "to do"}
    to_train = [workspace.stages[n].settings["run"]["training"] for n in to_do if _is_training(workspace, n)]
    images = sum(training["steps"] * training["global_batch_size"] for training in to_train)
    evaluations = sum(_evaluations(experiment) for name in to_do if name.startswith("samples/"))
    training = experiment.training
    kept = (training.keep_checkpoints + 1) * 4 + 1  # model, EMA and two moments a checkpoint; the final EMA once
    sampled = sum(name.startswith("samples/") for name in to_do)
    return {
        "experiment": experiment.model_dump(mode="json"),
        "identity": experiment.identity,
        "workspace": place.storage.uri,
        "tracking": place.tracking_uri,
        "warnings": place.warnings,
        "stages": [{"name": name, "state": state} for name, state in states.items()],
        "parameters": size["parameters"],
        "training_steps": sum(training["steps"] for training in to_train),
        "training_flops": 6.0 * size["multiplications"] * images,
        "sampling_flops": 2.0 * size["multiplications"] * evaluations,
        "memory_gib_per_worker": _memory(experiment, size) / GIB,
        "storage_gib": (4 * size["parameters"] * kept * len(to_train) + _sample_bytes(experiment) * sampled) / GIB,
    }


def plan_text(plan: Mapping[str, Any]) -> str:
    """The plan for a terminal."""
    import yaml

    by_state: dict[str, list[str]] = {}
    for stage in plan["stages"]:
        by_state.setdefault(stage["state"], []).append(stage["name"])
    lines = [yaml.safe_dump(plan["experiment"], sort_keys=False).rstrip(), ""]
    lines += [f"warning: {warning}" for warning in plan["warnings"]]
    for state in ("done", "stale", "to do"):
        names = by_state.get(state, [])
        lines.append(f"{state:<6} {len(names):>3} stages  {', '.join(names)}".rstrip())
    lines += [
        "",
        f"identity    {plan['identity']}",
        f"workspace   {plan['workspace']}",
        f"tracking    {plan['tracking']}",
        f"model       {plan['parameters']:,} parameters",
        f"training    {plan['training_steps']:,} steps, {plan['training_flops']:.3g} FLOPs",
        f"sampling    {plan['sampling_flops']:.3g} FLOPs",
        f"memory      {plan['memory_gib_per_worker']:.2f} GiB a worker (weights, gradients, moments, EMA, activations)",
        f"storage     {plan['storage_gib']:.3f} GiB to be written",
    ]
    return "\n".join(lines)


def model_size(experiment: Experiment) -> dict[str, int]:
    """Parameters, and multiplications of one forward pass of one image (matrix products and attention)."""
    import torch

    from workers.models.sit import SiT

    with torch.device("meta"):
        model = SiT(experiment.model)
    config = experiment.model
    tokens = (config.input_size // config.patch_size) ** 2
    parameters = sum(p.numel() for p in model.parameters())
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.ndim > 1}
    del matrices["pos_embed"], matrices["y_embedder.embedding_table.weight"]  # looked up, not multiplied
    # What makes the condition runs once an image, the rest once a token.
    once = sum(count for name, count in matrices.items() if "adaLN" in name or name.startswith("t_embedder"))
    attention = 2 * tokens * tokens * config.hidden_size * config.depth
    multiplications = once + (sum(matrices.values()) - once) * tokens + attention
    return {"parameters": parameters, "multiplications": multiplications, "tokens": tokens}


def _memory(experiment: Experiment, size: Mapping[str, int]) -> float:
    config, training = experiment.model, experiment.training
    shards = -(-training.num_shards // experiment.cluster.num_workers)
    images = training.global_batch_size // training.num_shards * min(training.shards_per_pass or shards, shards)
    # About 34 numbers a token and unit of width are kept for the backward pass of a block, 4 bytes each.
    activations = 34 * 4 * size["tokens"] * config.hidden_size * config.depth * images
    return 4 * size["parameters"] * 5 + activations


def _evaluations(experiment: Experiment) -> int:
    """Network evaluations of one image in every cell."""
    per_step = {"euler": 1, "heun": 2, "sde": 1, "dopri5": 100}
    steps = sum(
        s.num_steps * per_step[s.method] * (1 if s.guidance_scale == 1 else 2) for s in experiment.evaluation.samplers
    )
    return steps * experiment.evaluation.num_samples


def _sample_bytes(experiment: Experiment) -> int:
    config, evaluation = experiment.model, experiment.evaluation
    return config.in_channels * config.input_size**2 * evaluation.num_samples * len(evaluation.samplers)


def _is_training(workspace: Workspace, name: str) -> bool:
    return "training" in workspace.stages[name].settings.get("run", {})


def examine(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What works and what does not, each finding {what, ok, says}."""
    return [
        _finding("python", lambda: f"{platform.python_version()} at {sys.executable}"),
        _finding("packages", _packages),
        _finding("clock", _clock),
        _finding("disk", lambda: f"{shutil.disk_usage('.').free / GIB:.1f} GiB free here"),
        _finding("gpu", _gpus),
        _finding("ray", lambda: _ray(environment)),
        _finding("place", _place),
    ]


def _finding(what: str, look: Any) -> dict[str, Any]:
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
    nodes = sum(node["Alive"] for node in ray.nodes())
    ray.shutdown()
    return f"{address}: {nodes} nodes, {there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs"


def _place() -> str:
    place = open_place()
    if place.warnings:
        raise ValueError(place.warnings[0])
    return f"workspace {place.storage.uri}; tracking {place.tracking_uri}; {tracking.ui_command(place.tracking_uri)}"
