"""What a run would do and need, and whether this machine is fit for it: `mixflow plan` and `mixflow doctor`."""

from __future__ import annotations

import importlib.util
import math
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from orchestration import cluster, tracking
from orchestration.experiment import Experiment
from orchestration.inputs import check_inputs
from orchestration.run import Place, open_workspace
from orchestration.workflow import Workspace
from workers.config import Training
from workers.cost import Cost, cost_of

GIB = 2**30


def make_plan(experiment: Experiment, place: Place) -> dict[str, Any]:
    """The resolved experiment, its stages (done, stale, to do), and what is still to be spent.

    Raises:
        ValueError, CorruptError: whatever would stop the run.
    """
    workspace = Workspace(experiment, place.storage)
    warnings = check_inputs(workspace)
    cluster.check_local_machine(experiment.cluster)
    states = {name: workspace.state(name) for name in workspace.stages}
    cost = _cost(experiment)
    # Without REPA's projectors, which sampling has no use for.
    sampling_cost = cost_of(experiment.model) if experiment.alignment_weight else cost
    to_do = {name for name, state in states.items() if state == "to do"}
    to_train = [workspace.stages[n].settings["run"]["training"] for n in to_do if _is_training(workspace, n)]
    images = sum(training["steps"] * training["global_batch_size"] for training in to_train)
    to_sample = [workspace.stages[name].settings for name in to_do if name.startswith("samples/")]
    evaluations = sum(_evaluations(settings) for settings in to_sample)
    kept = sum(cost.run_bytes(Training.model_validate(training)) for training in to_train)
    images_sampled = sum(len(settings["samplers"]) * settings["num_samples"] for settings in to_sample)
    sampled_bytes = math.prod(experiment.image_shape) * images_sampled
    return {
        "experiment": experiment.model_dump(mode="json"),
        "identity": experiment.identity,
        "workspace": place.storage.uri,
        "tracking": place.tracking_uri,
        "warnings": [*place.warnings, *warnings],
        "stages": [{"name": name, "state": state} for name, state in states.items()],
        **costs(experiment),
        "training_steps": sum(training["steps"] for training in to_train),
        "training_flops": float(cost.training_flops * images),
        "sampling_flops": float(sampling_cost.forward_flops * evaluations),
        "storage_gib": (kept + sampled_bytes) / GIB,
    }


def costs(experiment: Experiment) -> dict[str, Any]:
    """What the model costs, whatever is done already and whether its files are there or not."""
    cost, training = _cost(experiment), experiment.training
    shards = -(-training.num_shards // experiment.cluster.num_workers)
    images = training.global_batch_size // training.num_shards * min(training.shards_per_pass or shards, shards)
    memory = {
        f"{'fsdp2' if sharded else 'ddp'}{', activations computed again' if again else ''}": cost.memory_bytes(
            training.model_copy(update={"sharded": sharded, "activation_checkpointing": again}),
            images,
            experiment.cluster.num_workers,
        )
        / GIB
        for sharded in (False, True)
        for again in (False, True)
    }
    return {
        "parameters": cost.parameters,
        "trainable_parameters": cost.trainable,
        "forward_gflops_per_image": cost.forward_flops / 1e9,
        "training_gflops_per_image": cost.training_flops / 1e9,
        "images_per_pass": images,
        "memory_gib_per_worker": cost.memory_bytes(training, images, experiment.cluster.num_workers) / GIB,
        "memory_gib_by_mode": memory,
        "arm_flops": float(cost.training_flops * training.steps * training.global_batch_size),
    }


def _cost(experiment: Experiment) -> Cost:
    """As it is trained."""
    return cost_of(experiment.model, align=experiment.alignment_weight > 0)


def cost_lines(plan: Mapping[str, Any], mfu: float, peak_tflops: float) -> list[str]:
    """What the model costs, for a terminal; hours on one device that reaches the share `mfu` of `peak_tflops`."""
    hours = plan["arm_flops"] / (mfu * peak_tflops * 1e12) / 3600
    lines = [
        f"model       {plan['parameters']:,} parameters, {plan['trainable_parameters']:,} of them train",
        f"compute     {plan['forward_gflops_per_image']:.4g} GFLOP an image forward, "
        f"{plan['training_gflops_per_image']:.4g} trained (2 for each multiply-add)",
        f"one arm     {plan['arm_flops']:.3g} FLOPs, {hours:,.2f} device-hours at {mfu:.0%} of {peak_tflops:g} TFLOP/s",
        f"memory      about {plan['memory_gib_per_worker']:.2f} GiB a worker, {plan['images_per_pass']} images a pass",
    ]
    return lines + [f"            {gib:9.2f} GiB with {mode}" for mode, gib in plan["memory_gib_by_mode"].items()]


def plan_text(plan: Mapping[str, Any], mfu: float, peak_tflops: float) -> str:
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
        *cost_lines(plan, mfu, peak_tflops),
        f"training    {plan['training_steps']:,} steps to do, {plan['training_flops']:.3g} FLOPs",
        f"sampling    {plan['sampling_flops']:.3g} FLOPs",
        f"storage     {plan['storage_gib']:.3f} GiB to be written",
    ]
    return "\n".join(lines)


def _evaluations(settings: Mapping[str, Any]) -> int:
    """Network evaluations of all images in every cell of a sampling stage, guidance everywhere."""
    per_step = {"euler": 1, "heun": 2, "sde": 1, "sde_heun": 2, "dopri5": 100}
    steps = sum(
        s["num_steps"] * per_step[s["method"]] * (1 if s["guidance_scale"] == 1 else 2) for s in settings["samplers"]
    )
    return int(steps * settings["num_samples"])


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
        _finding("storage", _storage),
        _finding("mlflow", _mlflow),
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


def _storage() -> str:
    storage = open_workspace()
    storage.check()
    return f"workspace {storage.uri}: read, written and deleted"


def _mlflow() -> str:
    uri = tracking.default_tracking_uri(open_workspace())
    warning = tracking.check_tracking(uri)
    if warning:
        raise ValueError(warning)
    return f"{tracking.ui_command(uri)} shows the runs"
