"""What a run would do and need: `mixflow plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestration import cluster, mlflow_server, sizes
from orchestration.experiment import Experiment, is_captioned
from orchestration.inputs import check_inputs
from orchestration.run import Place
from orchestration.workflow import Workspace
from workers.cost import Cost, cost_of
from workers.sample import sample_sets

GIB = 2**30
# Of an H100 SXM's data sheet, dense, TFLOP/s by training.precision.
PEAK_TFLOPS = {"bf16": 989.0, "tf32": 494.7, "fp32": 66.9}


def make_plan(experiment: Experiment, place: Place) -> dict[str, Any]:
    """The resolved experiment, its stages (done, stale, to do), and what is still to be spent.

    Raises:
        ValueError, CorruptError: whatever would stop the run.
    """
    workspace = Workspace(experiment, place.storage)
    warnings, to_encode = check_inputs(workspace)
    cluster.check_local_machine(experiment.cluster)
    states = {name: workspace.state(name) for name in workspace.stages}
    cost = _cost(experiment)
    # Without REPA's projectors, which sampling has no use for.
    sampling_cost = cost_of(experiment.model) if experiment.alignment_weight else cost
    to_do = {name for name, state in states.items() if state == "to do"}
    to_train = sizes.trainings_of(workspace.stages[name] for name in to_do)
    images = sum(training.steps * training.global_batch_size for training in to_train)
    to_sample = [workspace.stages[name].settings for name in to_do if name.startswith("samples/")]
    evaluations = sum(evaluations_of(settings) for settings in to_sample)
    images_sampled = sum(len(settings["samplers"]) * settings["num_samples"] for settings in to_sample)
    captions = experiment.model.num_classes if is_captioned(experiment.model) else 0
    written = {
        "data": sizes.encoded_bytes(experiment, to_encode, captions) if to_encode else 0,
        "runs": sum(map(cost.run_bytes, to_train)),
        "samples": sizes.sample_bytes(experiment, images_sampled),
    }
    return {
        "experiment": experiment.model_dump(mode="json"),
        "identity": experiment.identity,
        "workspace": place.storage.uri,
        "tracking": mlflow_server.without_password(place.tracking_uri),
        "warnings": [*place.warnings, *warnings],
        "stages": [{"name": name, "state": state} for name, state in states.items()],
        **costs(experiment),
        "training_steps": sum(training.steps for training in to_train),
        "training_flops": float(cost.training_flops * images),
        "sampling_flops": float(sampling_cost.forward_flops * evaluations),
        "images_to_encode": to_encode,
        "storage_gib": sum(written.values()) / GIB,
        "storage_gib_by_part": {part: size / GIB for part, size in written.items()},
    }


def costs(experiment: Experiment) -> dict[str, Any]:
    """What the model costs, whatever is done already and whether its files are there or not."""
    cost, training = _cost(experiment), experiment.training
    shards = -(-training.num_shards // experiment.cluster.least_workers)
    images = training.global_batch_size // training.num_shards * min(training.shards_per_pass or shards, shards)
    memory = {
        f"{'fsdp2' if sharded else 'ddp'}{', activations computed again' if again else ''}": cost.memory_bytes(
            training.model_copy(update={"sharded": sharded, "activation_checkpointing": again}),
            images,
            experiment.cluster.least_workers,
        )
        / GIB
        for sharded in (False, True)
        for again in (False, True)
    }
    million = sizes.bytes_for_a_million(experiment)
    return {
        "parameters": cost.parameters,
        "trainable_parameters": cost.trainable,
        "forward_gflops_per_image": cost.forward_flops / 1e9,
        "training_gflops_per_image": cost.training_flops / 1e9,
        "images_per_pass": images,
        "memory_gib_per_worker": cost.memory_bytes(training, images, experiment.cluster.least_workers) / GIB,
        "memory_gib_by_mode": memory,
        "precision": training.precision,
        "arm_flops": float(cost.training_flops * training.steps * training.global_batch_size),
        "data_gib_per_million_images": None if million is None else million / GIB,
        **sizes.whole(experiment, cost),
    }


def _cost(experiment: Experiment) -> Cost:
    """As it is trained."""
    return cost_of(experiment.model, align=experiment.alignment_weight > 0)


def cost_lines(plan: Mapping[str, Any], mfu: float, peak_tflops: float | None) -> list[str]:
    """What the experiment costs, for a terminal.

    Args:
        plan: from `costs` or `make_plan`.
        mfu: the share of the peak that training reaches, for hours on one device.
        peak_tflops: that peak; None for an H100's in the precision of training.
    """
    peak = peak_tflops or PEAK_TFLOPS[plan["precision"]]
    whose = "as given" if peak_tflops else f"an H100's in {plan['precision']}"
    hours, of_peak = plan["arm_flops"] / (mfu * peak * 1e12) / 3600, f"{mfu:.0%} of {peak:g} TFLOP/s, {whose}"
    arms, pairs, total = plan["num_trained_arms"], plan["num_pairs"], plan["all_steps"]
    runs, samples = plan["all_run_bytes"] / GIB, plan["all_sample_bytes"] / GIB
    lines = [
        f"model       {plan['parameters']:,} parameters, {plan['trainable_parameters']:,} of them train",
        f"compute     {plan['forward_gflops_per_image']:.4g} GFLOP an image forward, "
        f"{plan['training_gflops_per_image']:.4g} trained (2 for each multiply-add)",
        f"one arm     {plan['arm_flops']:.3g} FLOPs, {_hours(hours)} at {of_peak}",
        f"steps       {plan['arm_steps']:,} an arm, {arms} arms that train, {pairs} pairs; {total:,} in all, "
        f"{_hours(hours * total / plan['arm_steps'])}",
        f"memory      about {plan['memory_gib_per_worker']:.2f} GiB a worker, {plan['images_per_pass']} images a pass",
    ]
    lines += [f"            {gib:9.2f} GiB with {mode}" for mode, gib in plan["memory_gib_by_mode"].items()]
    parts = f"{runs:,.2f} of checkpoints and weights, {samples:,.2f} of samples"
    lines.append(f"storage     {runs + samples:,.2f} GiB in all: {parts}")
    if (million := plan["data_gib_per_million_images"]) is not None:
        lines.append(f"data        {million:,.2f} GiB encoded from each million images of the source")
    return lines


def _hours(hours: float) -> str:
    return f"{hours:,.2f} device-hours" if hours >= 0.01 else f"{hours * 3600:.2g} device-seconds"


def plan_text(plan: Mapping[str, Any], mfu: float, peak_tflops: float | None) -> str:
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
    parts, to_encode = plan["storage_gib_by_part"], plan["images_to_encode"]
    sampling_peak = peak_tflops or PEAK_TFLOPS["fp32"]
    to_sample = plan["sampling_flops"] / (mfu * sampling_peak * 1e12) / 3600
    lines += [
        "",
        f"identity    {plan['identity']}",
        f"workspace   {plan['workspace']}",
        f"tracking    {plan['tracking']}",
        *cost_lines(plan, mfu, peak_tflops),
        "",
        "still to do:",
        *([f"encode      {sum(to_encode.values()):,} images to {parts['data']:,.3f} GiB of data"] if to_encode else []),
        f"train       {plan['training_steps']:,} steps, {plan['training_flops']:.3g} FLOPs, {parts['runs']:,.3f} GiB",
        f"sample      {plan['sampling_flops']:.3g} FLOPs, {_hours(to_sample)} in fp32 at {mfu:.0%} of "
        f"{sampling_peak:g} TFLOP/s, {parts['samples']:,.3f} GiB",
        f"write       {plan['storage_gib']:,.3f} GiB in all",
    ]
    return "\n".join(lines)


def evaluations_of(settings: Mapping[str, Any]) -> int:
    """Network evaluations of all images in every cell of a sampling stage, guidance everywhere."""
    return sum(what.sampler.expected_nfe * what.num_samples for what in sample_sets(settings))
