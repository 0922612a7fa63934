"""The published sizes on a GPU: training and sampling speed, memory, what compiling and sharding change."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from bench_checkpoint import published_run, random_latents
from bench_loop import LOOP_AIM_PERCENT, compared
from bench_note import Figure, Outcome, figure
from bench_side_by_side import BareLoop, Beside

from mixflow_core.samplers import Sampler
from orchestration.recipe import load
from workers.checkpoint import TrainState, Writers
from workers.config import RunConfig, Training
from workers.cost import cost_of
from workers.data import ImageSet
from workers.io import Report, RunIO
from workers.models.ddt import DiTDHConfig
from workers.models.family import build
from workers.models.sit import SiTConfig
from workers.sample import SampleSet, sample_batch
from workers.train import post_train

PUBLISHED: dict[str, SiTConfig | DiTDHConfig] = {
    "SiT-XL/2": SiTConfig.published("XL"),
    "DiT-DH XL": DiTDHConfig.published("XL"),
}
IMAGES = 32  # a step, and a batch of samples: what fits into 80 GB beside the states
BLOCK, ROUNDS, ROUNDS_QUICK = 10, 4, 2
SAMPLER = Sampler(method="euler", num_steps=10)
SAMPLE_BATCHES = 3
MEMORY_AIM_PERCENT = 25.0


def gpu(quick: bool) -> Outcome:
    """Training and sampling of SiT-XL/2 and DiT-DH XL, and a step of SiT-B/2 beside a bare loop."""
    if not torch.cuda.is_available():
        raise RuntimeError("benchmark gpu needs a CUDA device, got none; leave it out")
    # The loop asks for deterministic kernels, which cuBLAS has only with this.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device, rounds = torch.device("cuda"), ROUNDS_QUICK if quick else ROUNDS
    peak = peak_flops(torch.cuda.get_device_name())
    figures, settings = _beside_bare(device, rounds)
    for name, config in PUBLISHED.items():
        bench = Bench(name, config, device, rounds, IMAGES)
        figures += [*bench.training(peak), *bench.sampling()]
        settings[name] = bench.run().model_dump(mode="json")
    settings |= {
        "CUBLAS_WORKSPACE_CONFIG": os.environ["CUBLAS_WORKSPACE_CONFIG"],
        "peak bf16 FLOP/s": peak or "unknown",
        "sampler": f"{SAMPLER.method}, {SAMPLER.num_steps} steps, unguided, without decoding",
    }
    about = (
        "Steps of post_train (no Ray) on random latents of 256-px images in bf16, start-up and checkpoints excluded: "
        "eager, with each block compiled, and with FSDP2 on this one GPU. MFU is the FLOPs of forward and backward "
        "passes over the device's dense bf16 peak (in the settings; no MFU where it is unknown). Memory is the most "
        "that torch held at once, over what the project's plan estimates. SiT-B/2 takes turns with a bare loop."
    )
    return Outcome("gpu", about, figures, settings)


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, None where they are not stated here."""
    if "PCIe" not in name and "NVL" not in name and ("H100" in name or "H200" in name):
        return 989e12
    return 312e12 if "A100" in name else None


class Unsaved(RunIO):
    """A run's surroundings without checkpoints: writing 10 GB is measured elsewhere."""

    def __init__(self, report: Report) -> None:
        self.report, self.rank, self.world_size = report, 0, 1

    def restore(self) -> None:
        """There is nothing."""

    def stopping(self) -> bool:
        """Nobody asks."""
        return False

    def save(self, state: TrainState, score: float | None, writers: Writers | None = None) -> None:
        """Keeps nothing."""

    def wait(self) -> None:
        """There is nothing to wait for."""


@dataclass(frozen=True)
class Bench:
    """One network on one device, `rounds` blocks of steps of `images` images."""

    name: str
    config: SiTConfig | DiTDHConfig
    device: torch.device
    rounds: int
    images: int

    def run(self, **changes: Any) -> RunConfig:
        """A run of so many blocks and two to warm up."""
        steps = BLOCK * (self.rounds + 2)
        values = {
            "steps": steps,
            "global_batch_size": self.images,
            "precision": "bf16",
            "log_every": BLOCK,
            "checkpoint_every": steps,
        }
        return RunConfig(
            model=self.config,
            mixture=load("quickstart").mixture,
            training=Training.model_validate({**values, **changes}),
            seed=0,
        )

    def training(self, peak: float | None) -> list[Figure]:
        """Speed, MFU and memory; and the same compiled and sharded, against the eager run."""
        figures, base = self._measured("bf16", peak)
        for name, changes in (("compiled", {"compile": True}), ("FSDP2", {"sharded": True})):
            found, step_s = self._measured(f"bf16 {name}", peak, **changes)
            over = [100 * (s / statistics.median(base) - 1) for s in step_s]
            figures += [*found, figure(f"{self.name} bf16 {name}: a step over the eager one", "%", over)]
        return figures

    def _measured(self, mode: str, peak: float | None, **changes: Any) -> tuple[list[Figure], list[float]]:
        """Figures of one run, and seconds a step."""
        run, name, cost = self.run(**changes), f"{self.name} {mode}", cost_of(self.config)
        _forget(self.device)
        step_s = measure(run, self._data(), self.device, {})["ours"]["wall"]
        found = [
            figure(f"{name}: a step of {self.images} images", "ms", [1000 * s for s in step_s]),
            figure(f"{name}: speed", "images/s", [self.images / s for s in step_s]),
        ]
        if peak:
            mfu = [100 * cost.training_flops * self.images / s / peak for s in step_s]
            found.append(figure(f"{name}: MFU", "%", mfu))
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated()
            over = 100 * (used / cost.memory_bytes(run.training, self.images, 1) - 1)
            aim, met = f"within {MEMORY_AIM_PERCENT:g} %", abs(over) <= MEMORY_AIM_PERCENT
            found.append(figure(f"{name}: peak memory", "GiB", [used / 2**30]))
            found.append(Figure(f"{name}: peak memory over its estimate", "%", (over,), aim, met))
        return found, step_s

    def sampling(self) -> list[Figure]:
        """Images a second of a batch, in fp32 and under bf16 autocast."""
        _forget(self.device)
        torch.set_float32_matmul_precision("highest")  # a run in bf16 leaves it at "high"
        model, run = build(self.config).initialise(0).to(self.device).eval(), self.run()
        what = SampleSet(SAMPLER, self.images * (SAMPLE_BATCHES + 1), self.images, 0)
        figures = []
        for precision in ("fp32", "bf16"):
            speeds = []
            for number in range(what.num_batches):
                start = time.perf_counter()
                with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    sample_batch(model, run, what, number, self.device, decode=lambda latents: latents)  # on the CPU
                speeds.append(self.images / (time.perf_counter() - start))
            name = f"{self.name} {precision}: sampling, {SAMPLER.num_steps} Euler steps"
            figures.append(figure(name, "images/s", speeds[1:]))  # the first one warms up
        return figures

    def _data(self) -> ImageSet:
        """Random latents: a step's images for each logical shard of the held-out loss."""
        numbers, config = torch.Generator().manual_seed(0), self.config
        shape = (8 * self.images, config.in_channels, config.input_size, config.input_size)
        labels = torch.randint(0, config.num_classes, shape[:1], generator=numbers)
        return ImageSet(torch.randn(shape, generator=numbers).numpy(), labels.numpy())


def _beside_bare(device: torch.device, rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """A bf16 step of SiT-B/2 in the loop and in a bare one, taking turns."""
    _forget(device)
    steps = BLOCK * (rounds + 2)
    run = published_run("B", batch=64, precision="bf16", steps=steps, log_every=BLOCK, checkpoint_every=steps)
    data = random_latents(512)
    times = measure(run, data, device, {"bare": BareLoop(run, data, device)})
    name = "SiT-B/2 bf16, batch 64"
    return compared(name, times, "ours", "bare", LOOP_AIM_PERCENT), {name: run.model_dump(mode="json")}


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(run: RunConfig, data: ImageSet, device: torch.device, rivals: Mapping[str, BareLoop]) -> Any:
    """Seconds a step of post_train and of bare loops, block by block."""
    steps = run.training.log_every
    blocks = {name: partial(bare.block, steps) for name, bare in rivals.items()}
    turns = Beside(lambda step, metrics: None, blocks, steps, device)
    try:
        post_train(run, data, data, Unsaved(turns), device=device)
    finally:
        if dist.is_initialized():  # by a sharded run
            dist.destroy_process_group()
    return turns.times()
