"""Sampling stages against a bare sampler loop, on one worker and on two, and their memory by number of images."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_note import Figure, Outcome, figure, overhead

from orchestration.experiment import Experiment
from orchestration.parts import Parts
from orchestration.progress import Progress
from orchestration.recipe import load
from orchestration.run import _driver_stages
from orchestration.site import Site
from orchestration.stages import run_stages
from orchestration.storage import open_storage
from orchestration.workflow import Workspace
from workers.manifest import measure
from workers.models.checkpoints import save_weights
from workers.models.family import build

AIM_PERCENT, AIM_TIMES, AIM_MIB = 2.0, 1.9, 32.0
IMAGES, IMAGES_QUICK = 8000, 3000
STEPS, BATCH = 20, 250
LARGE = 8  # times as many images, to see whether memory grows


def sample(quick: bool) -> Outcome:
    """The samples stage of the base of digits32 beside a bare loop in the same process, and in processes of its own."""
    count = IMAGES_QUICK if quick else IMAGES
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        home = Path(scratch)
        beside = _measure(home / "beside", count, workers=1, beside=True)[0]
        alone = _measure(home / "one", count, workers=1)
        both = _measure(home / "two", count, workers=2)
        few = _measure(home / "few", count, workers=1, steps=1)[0]["mib"]
        many = _measure(home / "many", LARGE * count, workers=1, steps=1)[0]["mib"]
    ours, bare = ([part[name] for part in beside["parts"][1:]] for name in ("ours", "bare"))  # the first one loads
    times = max(part["seconds"] for part in alone) / max(part["seconds"] for part in both)
    figures = [
        figure("ours, images a second", "1/s", [1 / s for s in ours]),
        figure("bare, images a second", "1/s", [1 / s for s in bare]),
        figure("ours over bare, an image", "%", overhead(ours, bare), AIM_PERCENT),
        Figure("two workers over one, images a second", "", (times,), f"at least {AIM_TIMES:g}", times >= AIM_TIMES),
        figure(f"memory of {LARGE} times as many images, more", "MiB", [many - few], AIM_MIB),
    ]
    about = (
        f"{count} images of 32 px from digits32's network with random weights, Euler {STEPS}, batches of {BATCH}, one "
        "torch thread a worker: the samples stage, from noise keyed by image to published Parquet parts with their "
        "hashes, and after each part a bare loop (torch.randn, Euler, uint8) over as many images in that process. Then "
        "the stage alone on one and on two gloo workers, and its peak resident memory at one step. Start-up excluded."
    )
    return Outcome("sample", about, figures, {"images": count, "steps": STEPS, "batch_size": BATCH})


def _measure(home: Path, count: int, *, workers: int, steps: int = STEPS, beside: bool = False) -> list[dict[str, Any]]:
    """What each worker measured of sampling `count` images."""
    home.mkdir()
    settings = _settings(home, count, steps)
    workspace = Workspace(_experiment(settings), open_storage(str(home / "ws")))
    progress = Progress(list(workspace.stages), 0)
    _driver_stages(workspace, list(workspace.stages.values()), progress, ExitStack())
    progress.close()
    mp.spawn(_rank, (workers, home, settings, beside), nprocs=workers)
    return [json.loads((home / f"{rank}.json").read_text()) for rank in range(workers)]


def _settings(home: Path, count: int, steps: int) -> list[str]:
    path = home / "base.safetensors"
    save_weights(_network().state_dict(), path)
    return [
        f"base={{checkpoint: {path}, sha256: {measure(path).sha256}}}",
        f"evaluation.samplers=[{{method: euler, num_steps: {steps}}}]",
        f"evaluation.primary=fd_digits/euler{steps}/s1",
        f"evaluation.num_samples={count}",
        f"evaluation.sample_batch_size={BATCH}",
    ]


def _network() -> torch.nn.Module:
    """A fresh network's zero weights would cost less than a trained one's."""
    network = build(load("digits32").model).initialise(0).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return network


def _experiment(settings: list[str]) -> Experiment:
    return load("digits32", settings)


def _rank(rank: int, workers: int, home: Path, settings: list[str], beside: bool) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{home}/group", rank=rank, world_size=workers)
    workspace = Workspace(_experiment(settings), open_storage(str(home / "ws")))
    site = Site(workspace, rank, workers, torch.device("cpu"), home / "cache", lambda *told: None)
    found: dict[str, Any] = {"parts": []}
    if beside:
        _let_the_bare_loop_follow(workspace.experiment, found["parts"])
    if workers > 1:
        dist.barrier()
    start = time.perf_counter()
    run_stages(site, [workspace.stages["samples/none/0"]])
    found["seconds"] = time.perf_counter() - start
    found["mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (home / f"{rank}.json").write_text(json.dumps(found))
    if workers > 1:
        dist.destroy_process_group()


def _let_the_bare_loop_follow(experiment: Experiment, times: list[dict[str, float]]) -> None:
    """After each part of ours the bare loop samples as many images."""
    network = _network()
    keep, last = Parts.keep, [time.perf_counter()]

    def keep_and_follow(self: Parts, name: str, digest: str, file: Path, about: Mapping[str, Any]) -> dict[str, Any]:
        record = keep(self, name, digest, file, about)
        if name.endswith(".parquet"):
            images = about["evaluations"] // STEPS
            middle = time.perf_counter()
            for _ in range(images // BATCH):
                _bare(network, experiment)
            end = time.perf_counter()
            times.append({"ours": (middle - last[0]) / images, "bare": (end - middle) / images})
            last[0] = end
        return record

    Parts.keep = keep_and_follow  # type: ignore[method-assign]


@torch.no_grad()
def _bare(network: torch.nn.Module, experiment: Experiment) -> torch.Tensor:
    """One batch as one writes it by hand."""
    side = experiment.model.input_size
    x, y = torch.randn(BATCH, 1, side, side), torch.arange(BATCH) % 10
    for t, t_next in pairwise(torch.linspace(0, 1, STEPS + 1)):
        x = x + (t_next - t) * network(x, t.expand(BATCH), y)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
