"""What the processes of a gloo group run for test_train_groups.py: every scenario in one start."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from worker_toys import Draws, latents, local_io, pixels, run_config

from mixflow_core.correctives import TrainingCorrective
from orchestration.storage import Storage
from workers import checkpoint
from workers.checkpoint import TrainState
from workers.data import ImageSet, batch_rows
from workers.io import StoppedError
from workers.manifest import FileEntry
from workers.models.sit import SiT
from workers.train import NonFiniteLossError, post_train

RESUME_STEP, SMALL_FILE = 20, 20_000
CORRECTIVE = TrainingCorrective(input_perturbation=0.1, rollout_share=0.5, rollout_step=0.1, rollout_ramp=0.5)
BAD_STEP, BAD_SHARD, STOP_STEP = 13, 4, 17


def run_group(world_size: int, directory: Path) -> None:
    """Runs all scenarios on `world_size` processes (this one, if 1), each leaving its files in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    if world_size == 1:
        run_rank(0, 1, directory)
    else:
        mp.spawn(run_rank, (world_size, directory), nprocs=world_size)


def run_rank(rank: int, world_size: int, directory: Path) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=world_size)
    with Draws() as draws:
        train("plain", rank, world_size, directory)
    (directory / f"draws-{rank}.pickle").write_bytes(pickle.dumps(draws.found))
    resume("plain", rank, world_size, directory)
    train("reproducible", rank, world_size, directory, reproducible=True)
    resume("reproducible", rank, world_size, directory, reproducible=True)
    for per_pass in (1, 2):
        train(f"per-pass-{per_pass}", rank, world_size, directory, shards_per_pass=per_pass, steps=10)
    stop_on_bad_image(rank, world_size, directory)
    for reproducible in (False, True):
        stop(f"stopped-{reproducible}", rank, world_size, directory, reproducible=reproducible)
    train("corrected", rank, world_size, directory, corrected=True)
    resume("corrected", rank, world_size, directory, corrected=True)
    train("recomputed", rank, world_size, directory, steps=10, activation_checkpointing=True)
    for name, sharded in (("clipped", False), ("sharded", True)):
        if world_size == 2:  # three workers cannot share eight shards evenly
            train(name, rank, world_size, directory, sharded=sharded, grad_clip=0.5, initial=rank == 0)
            both = {"corrected": True, "grad_clip": 0.5, "initial": rank == 0}
            train(f"{name}-corrected", rank, world_size, directory, sharded=sharded, **both)
    if world_size == 2:
        resume("sharded", rank, world_size, directory, sharded=True, grad_clip=0.5)
        both = {"sharded": True, "activation_checkpointing": True, "shards_per_pass": 2}
        train("sharded-passes", rank, world_size, directory, steps=10, grad_clip=0.5, initial=rank == 0, **both)
        for name in ("split", "unkept"):
            split_checkpoint(name, rank, world_size, directory, broken=name == "unkept" and rank == 1)
    if world_size > 1:
        dist.destroy_process_group()


def train(name: str, rank: int, world_size: int, directory: Path, *, initial: bool = False, **training: object) -> None:
    """A run to its end; each rank keeps the state it returned. With `initial` it starts from given weights."""
    corrected = training.pop("corrected", False)
    io, run = local_io(directory / name, rank=rank, world_size=world_size), run_config(**training)
    if corrected:
        run = run.model_copy(update={"corrective": CORRECTIVE})
    weights = SiT(run.model).initialise(5).state_dict() if initial else None
    state = post_train(run, pixels(), pixels(24, seed=1), io, initial=weights)
    torch.save(state.__dict__, directory / f"{name}-{rank}.pt")


def resume(name: str, rank: int, world_size: int, directory: Path, **training: object) -> None:
    """The same command where only the checkpoints up to RESUME_STEP are there."""
    source, target = directory / name, directory / f"{name}-resumed"
    if rank == 0:
        shutil.copytree(source, target)
        for path in (target / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > RESUME_STEP:
                shutil.rmtree(path)
    train(f"{name}-resumed", rank, world_size, directory, **training)


def stop(name: str, rank: int, world_size: int, directory: Path, **training: object) -> None:
    """A run whose last rank alone is asked to stop, during step STOP_STEP; then the same run to its end."""
    steps, last = itertools.count(1), rank == world_size - 1
    io = local_io(
        directory / name, rank=rank, world_size=world_size, stopping=lambda: last and next(steps) == STOP_STEP
    )
    try:
        post_train(run_config(**training), pixels(), pixels(24, seed=1), io)
    except StoppedError as error:
        (directory / f"{name}-{rank}.txt").write_text(str(error))
    train(name, rank, world_size, directory, **training)


def image_gone_bad() -> ImageSet:
    """Latents whose one infinite image is first drawn at BAD_STEP by BAD_SHARD."""
    data, run = latents(800), run_config()
    per_step, per_shard = run.training.global_batch_size, 2
    row = batch_rows(run.seed, BAD_STEP * per_step + BAD_SHARD * per_shard, 1, len(data.labels))[0]
    data.images[row, 0, 3, 3] = float("inf")
    return data


def stop_on_bad_image(rank: int, world_size: int, directory: Path) -> None:
    """Keeps the error, as it arrives through a pickle, of each rank."""
    io = local_io(directory / "bad", rank=rank, world_size=world_size)
    try:
        post_train(run_config(), image_gone_bad(), latents(24, seed=1), io)
    except NonFiniteLossError as error:
        (directory / f"error-{rank}.pickle").write_bytes(pickle.dumps(error))


class Recording:
    """Storage that knows which files were put into it; or that is full."""

    def __init__(self, inner: Storage, broken: bool) -> None:
        self.inner, self.broken, self.files = inner, broken, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def put_file(self, source: Path, path: str) -> FileEntry:
        if self.broken:
            raise OSError("this rank's disk is full")
        self.files.append(path.rpartition("/")[2])
        return self.inner.put_file(source, path)


def split_checkpoint(name: str, rank: int, world_size: int, directory: Path, *, broken: bool) -> None:
    """A sharded run whose checkpoint is of many files: which each rank wrote, and what it said if it failed."""
    io = local_io(directory / name, rank=rank, world_size=world_size)
    io.store.files = storage = Recording(io.store.files, broken)
    with mock.patch.object(checkpoint, "FILE_BYTES", SMALL_FILE):
        try:
            post_train(run_config(steps=10, sharded=True), pixels(), pixels(24, seed=1), io)
        except OSError as error:
            (directory / f"{name}-{rank}.txt").write_text(str(error))
    (directory / f"{name}-{rank}.json").write_text(json.dumps(storage.files))


def state(directory: Path, name: str, rank: int = 0) -> TrainState:
    """A state that `train` kept."""
    return TrainState(**torch.load(directory / f"{name}-{rank}.pt", weights_only=True))
