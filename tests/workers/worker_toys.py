"""Small runs, images and surroundings for the tests of the loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestration.storage import open_storage
from workers import train
from workers.checkpoint import CheckpointStore, TrainState
from workers.config import RunConfig
from workers.data import Batch, ImageSet
from workers.io import RunIO

MODEL = {
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
}
MIXTURE = {"time_law": "beta", "slowing_law": "interval", "gamma": 0.8, "target_time": "m"}
TRAINING = {
    "steps": 50,
    "global_batch_size": 16,
    "learning_rate": 0.01,
    "ema_decay": 0.9,
    "log_every": 1,
    "checkpoint_every": 10,
    "keep_checkpoints": 99,
}


def run_config(*, model: Mapping[str, Any] = {}, seed: int = 7, **training: Any) -> RunConfig:
    """A tiny run, through JSON as a recipe's values come; keywords change its training section."""
    values = {"model": {**MODEL, **model}, "mixture": MIXTURE, "training": {**TRAINING, **training}, "seed": seed}
    return RunConfig.model_validate_json(json.dumps(values))


def pixels(count: int = 40, seed: int = 0, size: int = 8) -> ImageSet:
    """Random uint8 images; 40 are no multiple of the batch of 16, so that batches cross epochs."""
    numbers = np.random.default_rng(seed)
    images = numbers.integers(0, 256, (count, 1, size, size), dtype=np.uint8)
    return ImageSet(images, numbers.integers(0, 10, count))


def latents(count: int = 200, seed: int = 0) -> ImageSet:
    """Random float32 images."""
    numbers = np.random.default_rng(seed)
    return ImageSet(numbers.standard_normal((count, 1, 8, 8)).astype(np.float32), numbers.integers(0, 10, count))


def local_io(
    directory: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    keep: int = 99,
    report: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    stopping: Callable[[], bool] = lambda: False,
) -> RunIO:
    """Surroundings over a local directory, as on a laptop."""
    store = CheckpointStore(open_storage(str(directory)), "checkpoints", keep=keep, about={"name": "toy"})
    return RunIO(store, report, rank=rank, world_size=world_size, stopping=stopping)


def parts(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of a state under one name each."""
    found = {"model": state.model, "ema": state.ema, "optimizer": state.optimizer}
    return {f"{part}/{name}": value for part, values in found.items() for name, value in values.items()}


def differences(a: TrainState, b: TrainState) -> list[str]:
    """What is not equal bit for bit in two states."""
    left, right = parts(a), parts(b)
    found = sorted(left.keys() ^ right.keys())
    found += [name for name in left.keys() & right.keys() if not torch.equal(left[name], right[name])]
    if a.history != b.history:
        found.append("history")
    return found + ([] if a.step == b.step else ["step"])


class Draws:
    """Records every logical shard that the loop asks for, by (step, shard), as a hash of all that it holds."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], str] = {}
        self._make = train.shard_batch

    def __enter__(self) -> Draws:
        train.shard_batch = self._record
        return self

    def __exit__(self, *exception: object) -> None:
        train.shard_batch = self._make

    def _record(self, run: RunConfig, data: ImageSet, step: int, shard: int) -> Batch:
        batch = self._make(run, data, step, shard)
        content = b"".join(value.numpy().tobytes() for value in (batch.x1, batch.y, batch.x0, batch.u))
        self.found[step, shard] = hashlib.sha256(content).hexdigest()
        return batch
