"""A step of the published sizes on a GPU: images a second, memory, and the loop against a bare one."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from bench_checkpoint import published_run, random_latents
from bench_loop import LOOP_AIM_PERCENT, compared, local_io
from bench_note import Figure, Outcome, figure
from bench_side_by_side import BareLoop, Beside

from workers.config import RunConfig
from workers.train import post_train

# size: images a step, so that a step in fp32 fits into 80 GB
BATCHES = {"B": 64, "XL": 32}
PRECISIONS = ("fp32", "tf32", "bf16")
BLOCK, ROUNDS = 10, 6


def gpu(quick: bool) -> Outcome:
    """Steps of SiT-B/2 and SiT-XL/2 in each precision; B/2 also beside a bare loop."""
    if not torch.cuda.is_available():
        raise RuntimeError("benchmark gpu needs a CUDA device, got none; leave it out")
    # The loop asks for deterministic kernels, which cuBLAS has only with this.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda")
    figures: list[Figure] = []
    settings: dict[str, Any] = {"CUBLAS_WORKSPACE_CONFIG": os.environ["CUBLAS_WORKSPACE_CONFIG"]}
    for size, batch in BATCHES.items():
        for precision in PRECISIONS:
            run = timed_run(size, batch, precision, rounds=2 if quick else ROUNDS)
            settings[f"{size}/2 {precision}"] = run.model_dump(mode="json")
            figures += _step(f"SiT-{size}/2 {precision}, batch {batch}", run, device, with_bare=size == "B")
    about = (
        "Steps of post_train (no Ray) on random latents of 256-px images, start-up and checkpoints excluded; memory is "
        "the most that torch held at once. A size and precision without figures did not fit."
    )
    return Outcome("gpu", about, figures, settings)


def timed_run(size: str, batch: int, precision: str, rounds: int) -> RunConfig:
    """A run of so many blocks and two to warm up."""
    steps = BLOCK * (rounds + 2)
    return published_run(size, batch=batch, precision=precision, steps=steps, log_every=BLOCK, checkpoint_every=steps)


def _step(name: str, run: RunConfig, device: torch.device, with_bare: bool) -> list[Figure]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step_s = measure(run, device, {})["ours"]["wall"]
        found = [
            figure(f"{name}: a step", "ms", [1000 * s for s in step_s]),
            figure(f"{name}: speed", "images/s", [run.training.global_batch_size / s for s in step_s]),
            figure(f"{name}: peak memory", "GiB", [torch.cuda.max_memory_allocated() / 2**30]),
        ]
        if with_bare:
            bare = BareLoop(run, random_latents(512), device)
            times = measure(run, device, {"bare": bare})
            found += compared(f"{name}, side by side", times, "ours", "bare", LOOP_AIM_PERCENT)
        return found
    except torch.OutOfMemoryError:
        return []


def measure(run: RunConfig, device: torch.device, rivals: Mapping[str, BareLoop]) -> Any:
    """Seconds a step of post_train and of bare loops, block by block."""
    data, steps = random_latents(512), run.training.log_every
    blocks = {name: partial(bare.block, steps) for name, bare in rivals.items()}
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        turns = Beside(lambda step, metrics: None, blocks, steps, device)
        post_train(run, data, data, local_io(scratch, turns), device=device)
    return turns.times()
