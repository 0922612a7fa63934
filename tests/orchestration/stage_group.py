"""What the processes of a gloo group run for test_measuring.py: sampling and measuring stages of a small experiment."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orchestration import workflow
from orchestration.recipe import load
from orchestration.site import Site
from orchestration.stages import run_stages
from orchestration.storage import open_storage
from orchestration.trials import trial_experiment
from orchestration.workflow import Workspace
from workers import sample
from workers.io import StoppedError

SMALL = (
    "base.train.steps=20",
    "base.train.log_every=10",
    "base.train.checkpoint_every=20",
    "base.train.global_batch_size=32",
    "training.steps=10",
    "training.log_every=10",
    "training.checkpoint_every=10",
    "training.global_batch_size=32",
    "evaluation.samplers=[{method: euler, num_steps: 3}, {method: sde, num_steps: 3}, "
    "{method: euler, num_steps: 3, guidance_scale: 1.5}]",
    "evaluation.num_samples=180",
    "evaluation.sample_batch_size=20",
    "evaluation.slow_flow_samples=20",
    "evaluation.label_law=random",
    "evaluation.primary=fd_digits/euler3/s1",
    "replicates=2",
)


def run_group(world_size: int, workspace: Path, kinds: Sequence[str], overrides: Sequence[str] = SMALL) -> None:
    """Runs the stages of these kinds on `world_size` processes (this one, if 1)."""
    arguments = (world_size, workspace, tuple(kinds), tuple(overrides))
    if world_size == 1:
        before = sample.PART_IMAGES
        try:
            run_rank(0, *arguments)
        finally:
            sample.PART_IMAGES = before
    else:
        (workspace / "group").unlink(missing_ok=True)
        mp.spawn(run_rank, arguments, nprocs=world_size)


def run_rank(rank: int, world_size: int, directory: Path, kinds: Sequence[str], overrides: Sequence[str]) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    sample.PART_IMAGES = 60  # three parts a cell, as 3,000 images of the real size have
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=world_size)
    workspace = Workspace(load("quickstart", overrides), open_storage(str(directory / "ws")))
    site = Site(workspace, rank, world_size, torch.device("cpu"), directory / "cache", lambda *told: None)
    run_stages(site, [stage for stage in workspace.stages.values() if stage.kind in kinds])
    if world_size > 1:
        dist.destroy_process_group()


def run_stopped(directory: Path) -> None:
    """Samples on two processes, of which the first is asked to stop before its last part; `stopped-<rank>` says why."""
    (directory / "group").unlink(missing_ok=True)
    mp.spawn(stopped_rank, (directory,), nprocs=2)


def stopped_rank(rank: int, directory: Path) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    sample.PART_IMAGES = 60
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/group",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    workspace = Workspace(load("quickstart", SMALL), open_storage(str(directory / "ws")))
    asked = itertools.count()
    site = Site(workspace, rank, 2, torch.device("cpu"), directory / "cache", lambda *told: None)
    site.stopping = lambda: rank == 0 and next(asked) == 4  # once before the stage, then before each of its four parts
    try:
        run_stages(site, [workspace.stages["samples/none/0"]])
    except StoppedError as error:
        (directory / f"stopped-{rank}").write_text(str(error))
    dist.destroy_process_group()


def run_trial(world_size: int, workspace: Path, params: dict[str, object], overrides: Sequence[str]) -> None:
    """Runs trial t000 on `world_size` processes; each leaves the rungs that it told in `rungs-<rank>`, a line each."""
    (workspace / "group").unlink(missing_ok=True)
    arguments = (world_size, workspace, params, tuple(overrides))
    if world_size == 1:
        trial_rank(0, *arguments)
    else:
        mp.spawn(trial_rank, arguments, nprocs=world_size)


def trial_rank(
    rank: int, world_size: int, directory: Path, params: dict[str, object], overrides: Sequence[str]
) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=world_size)

    def rung(step: int, value: float) -> None:
        with (directory / f"rungs-{rank}").open("a") as file:
            file.write(f"{step} {value!r}\n")

    workflow.SEARCH_PAIR = 0  # the seeds of an arm's first pair, against which the trial is held
    experiment = trial_experiment(load("quickstart", overrides), "t000", params)
    workspace = Workspace(experiment, open_storage(str(directory / "ws")), "t000")
    site = Site(workspace, rank, world_size, torch.device("cpu"), directory / "cache", lambda *told: None, rung)
    run_stages(site, [workspace.stages["trials/t000"]])
    if world_size > 1:
        dist.destroy_process_group()
