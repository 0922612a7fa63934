"""Training of one global batch on one, two and four workers, in the default and in the reproducible mode."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_loop import CPU, local_io
from bench_note import Figure, Outcome, figure, overhead

from orchestration.recipe import load
from workers.config import RunConfig
from workers.data import digits
from workers.train import post_train

RECIPE = "digits32"
WORKERS = (1, 2, 4)
MODES = {False: "default", True: "reproducible"}
ROUNDS, WINDOWS, WINDOW = 5, 4, 12  # windows of so many steps are timed; the first one warms up


def scaling(quick: bool) -> Outcome:
    """Images a second by number of workers; all of a round run one after another, and are compared with each other."""
    rounds, window = (1, 3) if quick else (ROUNDS, WINDOW)
    speeds: dict[tuple[bool, int], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for workers in WORKERS:
            for reproducible in MODES:
                speeds[reproducible, workers].append(_speed(_run(reproducible, window), workers))
    cores = len(os.sched_getaffinity(0))
    figures: list[Figure] = []
    for reproducible, mode in MODES.items():
        for workers in WORKERS:
            own = speeds[reproducible, workers]
            figures.append(figure(f"{mode}, workers: {workers}", "images/s", own))
            if workers > 1:
                times = [a / b for a, b in zip(own, speeds[reproducible, 1], strict=True)]
                ideal = f"ideal {min(workers, cores)}"
                figures.append(Figure(f"{mode}, workers: {workers}, over one", "", tuple(times), ideal))
    for workers in WORKERS:
        longer = overhead(speeds[False, workers], speeds[True, workers])  # speeds: the slower one's time is longer
        figures.append(figure(f"reproducible over default, a step, workers: {workers}", "%", longer))
    about = (
        f"Steps of {RECIPE}'s MixFlow arm (one global batch of 64 in 8 logical shards) in gloo groups of processes "
        f"with one torch thread each, on {cores} cores, without Ray; checkpoints and start-up excluded. The ideal is "
        "one worker's speed times the number of workers, or of cores where there are fewer. Reproducible: each "
        "logical shard's gradient by itself, gathered and added in their order."
    )
    return Outcome("scaling", about, figures, _run(False, window).model_dump(mode="json"))


def _run(reproducible: bool, window: int) -> RunConfig:
    steps = window * (WINDOWS + 1)
    changes = {"steps": steps, "log_every": window, "checkpoint_every": steps, "reproducible": reproducible}
    run = load(RECIPE).arm_run("mixflow", 0)
    return run.model_copy(update={"training": run.training.model_copy(update=changes)})


def _speed(run: RunConfig, workers: int) -> float:
    """Images a second on so many workers."""
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        mp.spawn(_rank, (workers, scratch, run.model_dump_json()), nprocs=workers)
        seconds = json.loads(Path(scratch, "seconds.json").read_text())
    return run.training.global_batch_size * run.training.log_every * len(seconds) / sum(seconds)


def _rank(rank: int, workers: int, scratch: str, run_json: str) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/group", rank=rank, world_size=workers)
    run, seconds = RunConfig.model_validate_json(run_json), list[float]()

    def report(step: int, metrics: Mapping[str, float]) -> None:
        if "time/images_per_s" in metrics:
            seconds.append(run.training.global_batch_size * run.training.log_every / metrics["time/images_per_s"])

    settings = load(RECIPE).data.digits
    assert settings
    splits = digits(settings.image_size, settings.held_out)
    io = local_io(scratch, report)
    io.rank, io.world_size = rank, workers
    post_train(run, splits["train"], splits["held_out"], io, device=CPU)
    if rank == 0:
        Path(scratch, "seconds.json").write_text(json.dumps(seconds[1:]))
    if workers > 1:
        dist.destroy_process_group()
