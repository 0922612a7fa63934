"""The loop under Ray Train against a bare PyTorch loop, and the MixFlow step against the standard one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_note import Figure, Outcome, figure, overhead
from bench_side_by_side import BareLoop, Beside, Follower, Times

from orchestration import worker as launching
from orchestration.experiment import Experiment
from orchestration.recipe import load
from orchestration.run import Place, run_experiment
from orchestration.storage import open_storage
from workers.checkpoint import CheckpointStore
from workers.config import RunConfig
from workers.data import digits
from workers.io import Report, RunIO
from workers.train import post_train

CPU = torch.device("cpu")
ARM = "arms/mixflow/0"
# recipe: steps a block, so that a block lasts a second or so
BLOCKS = {"digits32": 20, "quickstart": 150}
ROUNDS, ROUNDS_QUICK = 25, 4
LOOP_AIM_PERCENT, MIXTURE_AIM_PERCENT = 2.5, 1.0


def loop(quick: bool) -> Outcome:
    """post_train in a worker of Ray Train, started as `mixflow train` starts it, beside BareLoop in the same worker."""
    cores = len(os.sched_getaffinity(0))
    cases = [("digits32", 1), *([("digits32", cores)] if cores > 1 else []), ("quickstart", 1)]
    figures: list[Figure] = []
    settings: dict[str, Any] = {}
    for recipe, threads in cases:
        name = f"{recipe}, {threads} thread{'s' * (threads > 1)}"
        experiment = _experiment(recipe, quick, threads)
        with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
            times = _under_ray(experiment, Path(scratch))
        aim = LOOP_AIM_PERCENT if recipe == "digits32" else None
        figures += compared(name, times, "ours", "bare", aim)
        figures += [figure(f"{name}: bare against itself (noise)", "%", _percent(times, "bare again", "bare", "wall"))]
        settings[name] = experiment.arm_run("mixflow", 0).model_dump(mode="json")
    about = (
        "Seconds a step of post_train under Ray Train (one worker, its real worker entry, reporter, tracking and "
        "checkpoint store) and of a bare PyTorch loop of the same model, batch, mixture, optimiser and average, taking "
        "turns block by block in that worker. Start-up and checkpoints excluded. Overheads compare neighbouring "
        "blocks. digits32 is dominated by computing; quickstart is so small that fixed costs show."
    )
    return Outcome("loop", about, figures, settings)


def mixture(quick: bool) -> Outcome:
    """The MixFlow step (Beta(2, 1), gamma 0.8) against the standard one (uniform, gamma 0) in the same loop."""
    figures: list[Figure] = []
    settings: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for recipe in BLOCKS:
            experiment = _experiment(recipe, quick, 1)
            slowed, standard = experiment.arm_run("mixflow", 0), experiment.arm_run("standard", 0)
            times = _taking_turns(slowed, {"standard": standard, "standard again": standard}, experiment)
            figures += compared(recipe, times, "ours", "standard", MIXTURE_AIM_PERCENT, ours="MixFlow")
            noise = _percent(times, "standard again", "standard", "wall")
            figures += [figure(f"{recipe}: standard against itself (noise)", "%", noise)]
            settings[recipe] = slowed.model_dump(mode="json")
    finally:
        torch.set_num_threads(threads)
    about = (
        "Seconds a step of post_train with the MixFlow mixture and with standard interpolation, taking turns block by "
        "block in one process (no Ray), one thread."
    )
    return Outcome("mixture", about, figures, settings)


def local_io(directory: str, report: Report) -> RunIO:
    """A run's surroundings without a cluster."""
    return RunIO(CheckpointStore(open_storage(directory), "checkpoints", keep=1, about={}), report)


def worker_entry(config: dict[str, Any], out: str) -> dict[str, Any]:
    """The project's worker entry, in which post_train of the slowed arm runs beside two bare loops."""
    from orchestration import stages, worker

    def beside(run: RunConfig, data: Any, held_out: Any, io: RunIO, **more: Any) -> Any:
        if run.mixture.is_standard:  # the base, which only has to be there
            return post_train(run, data, held_out, io, **more)
        steps, loops = run.training.log_every, [BareLoop(run, data, more["device"]) for _ in range(2)]
        rivals = {name: partial(bare.block, steps) for name, bare in zip(("bare", "bare again"), loops, strict=True)}
        turns = io.report = Beside(io.report, rivals, steps, more["device"])
        state = post_train(run, data, held_out, io, **more)
        Path(out).write_text(json.dumps(turns.times()))
        return state

    stages.post_train = beside
    return worker.worker_entry(config)


def _experiment(recipe: str, quick: bool, threads: int) -> Experiment:
    """A recipe with an arm of ROUNDS blocks, a checkpoint only at its end, on one worker."""
    block = max(2, BLOCKS[recipe] // 10) if quick else BLOCKS[recipe]
    steps = block * ((ROUNDS_QUICK if quick else ROUNDS) + 2)  # the first two blocks of each loop warm up
    batch = load(recipe).training.global_batch_size
    short = f"{{steps: 10, global_batch_size: {batch}, log_every: 10, checkpoint_every: 10}}"
    return load(
        recipe,
        [
            f"base.train={short}",
            f"training.steps={steps}",
            f"training.log_every={block}",
            f"training.checkpoint_every={steps}",
            "cluster.num_workers=1",
            f"cluster.cpus_per_worker={threads}",
        ],
    )


def _under_ray(experiment: Experiment, scratch: Path) -> Times:
    place = Place(open_storage(str(scratch / "workspace")), f"sqlite:///{scratch}/mlflow.db", [])
    original, out = launching.worker_entry, scratch / "times.json"
    launching.worker_entry = partial(worker_entry, out=str(out))
    try:
        run_experiment(experiment, place, targets=lambda stage: stage.name == ARM)
    finally:
        launching.worker_entry = original
    times: Times = json.loads(out.read_text())
    return times


def _taking_turns(own: RunConfig, others: dict[str, RunConfig], experiment: Experiment) -> Times:
    assert experiment.data.digits
    splits = digits(experiment.data.digits.image_size, experiment.data.digits.held_out)

    def train(run: RunConfig, report: Report) -> None:
        with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
            post_train(run, splits["train"], splits["held_out"], local_io(scratch, report))

    followers = {name: Follower(partial(train, run)) for name, run in others.items()}
    rivals: dict[str, Callable[[], None]] = {name: follower.block for name, follower in followers.items()}
    turns = Beside(lambda step, metrics: None, rivals, own.training.log_every, CPU)
    train(own, turns)
    for follower in followers.values():
        follower.finish()
    return turns.times()


def compared(name: str, times: Times, own: str, other: str, aim: float | None, *, ours: str = "ours") -> list[Figure]:
    """A step of either, and by how much our own is longer; the aim is for that."""
    step_ms = {key: [1000 * s for s in times[key]["wall"]] for key in (own, other)}
    return [
        figure(f"{name}: {ours}, a step", "ms", step_ms[own]),
        figure(f"{name}: {other}, a step", "ms", step_ms[other]),
        figure(f"{name}: {ours} over {other}", "%", _percent(times, own, other, "wall"), aim),
        figure(
            f"{name}: {ours} over {other}, fastest blocks", "%", overhead([min(step_ms[own])], [min(step_ms[other])])
        ),
        figure(f"{name}: {ours} over {other}, CPU time", "%", _percent(times, own, other, "cpu")),
    ]


def _percent(times: Times, own: str, other: str, kind: str) -> list[float]:
    return overhead(times[own][kind], times[other][kind])
