"""How long training stands still for a checkpoint, by the size of the model."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_loop import CPU, local_io
from bench_note import Figure, Outcome, figure
from bench_side_by_side import BareLoop
from safetensors.torch import save_file

from orchestration.recipe import load
from orchestration.storage import open_storage
from workers.checkpoint import CheckpointStore, TrainState
from workers.config import RunConfig, Training
from workers.data import ImageSet, digits
from workers.models.sit import SiT, SiTConfig
from workers.train import held_out_loss

AIM_MS, AIM_SHARE_PERCENT = 50.0, 0.5
SAVES, SAVES_QUICK = 5, 2
SIZES_MIB, SIZES_MIB_QUICK = (1, 16, 256, 2048), (1, 16)
TENSORS = 24
STEPS_TIMED = 5


def checkpoint(quick: bool) -> Outcome:
    """CheckpointStore.save's blocking time for the recipes' models and two published sizes."""
    saves = SAVES_QUICK if quick else SAVES
    figures: list[Figure] = []
    settings: dict[str, Any] = {"saves": saves, "storage": "a local directory"}
    threads = torch.get_num_threads()
    for recipe in ("quickstart", "digits32"):
        experiment = load(recipe)
        assert experiment.data.digits
        splits = digits(experiment.data.digits.image_size, experiment.data.digits.held_out)
        run = experiment.arm_run("mixflow", 0)
        torch.set_num_threads(1)  # as in the recipe
        figures += _measure(recipe, run, splits["train"], CPU, saves)
        figures += [_held_out(recipe, run, splits["held_out"], saves)]
        settings[recipe] = run.model_dump(mode="json")
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in () if quick else ("S", "B"):
        name, run = f"SiT-{size}/2", _published_run(size, device)
        figures += _measure(name, run, random_latents(64), device, saves)
        settings[name] = {**run.model_dump(mode="json"), "device": str(device), "threads": threads}
    for mib in SIZES_MIB_QUICK if quick else SIZES_MIB:
        figures += _by_size(mib, saves)
    about = (
        "Time for which CheckpointStore.save keeps the loop waiting (it copies the state; a thread writes it), with "
        "nothing earlier still being written, and that time as a share of the time between two checkpoints: the "
        "run's checkpoint_every times a step's time here, of a bare loop. The published sizes have no recipe here: "
        f"every {Training.model_fields['checkpoint_every'].default} steps, the default, at a batch far smaller than "
        "anybody's, so that their share is an upper bound. The aim is met where either holds. `writing` happens "
        "behind; save waits for it only if the next checkpoint comes sooner; steps are slower meanwhile, on the same "
        "cores. The held-out loss stops training too. "
        f"By size: {TENSORS} tensors of random numbers; the time to copy them bare, and the speed at which a "
        "checkpoint becomes complete (copy, files, SHA-256, files in the store, manifest) over that of a bare "
        "save_file with fsync."
    )
    return Outcome("checkpoint", about, figures, settings)


def _measure(name: str, run: RunConfig, data: ImageSet, device: torch.device, saves: int) -> list[Figure]:
    bare = BareLoop(run, data, device)
    bare.block(1)
    start = time.perf_counter()
    bare.block(STEPS_TIMED)
    if device.type == "cuda":
        torch.cuda.synchronize()
    step_s = (time.perf_counter() - start) / STEPS_TIMED
    between_s = run.training.checkpoint_every * step_s
    state = _state_of(bare)
    size_mib = sum(v.nbytes for part in (state.model, state.ema, state.optimizer) for v in part.values()) / 2**20
    blocked_ms, writing_s = [], []
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        store = CheckpointStore(open_storage(scratch), "checkpoints", keep=1, about={})
        for number in range(saves + 1):
            state.step = number
            start = time.perf_counter()
            store.save(state, 0.0)
            saved = time.perf_counter()
            store.wait()
            if number:  # the first one warms up
                blocked_ms.append(1000 * (saved - start))
                writing_s.append(time.perf_counter() - saved)
        slower = _slower(bare, state, store, saves) if min(writing_s) > 3 * step_s else []
    share = [ms / 10 / between_s for ms in blocked_ms]
    blocked = figure(f"{name} ({size_mib:.0f} MiB): save blocks", "ms", blocked_ms)
    of_time = figure(f"{name}: share of the {between_s:.0f} s between checkpoints", "%", share)
    aim, met = (
        f"{AIM_MS:g} ms or {AIM_SHARE_PERCENT:g} %",
        blocked.median <= AIM_MS or of_time.median <= AIM_SHARE_PERCENT,
    )
    return [
        Figure(**{**vars(blocked), "aim": aim, "met": met}),
        of_time,
        figure(f"{name}: writing behind", "s", writing_s),
        *([figure(f"{name}: a step amid writing over one after it", "%", slower)] if slower else []),
    ]


def _slower(bare: BareLoop, state: TrainState, store: CheckpointStore, saves: int) -> list[float]:
    """By how many per cent a step takes longer while a checkpoint is being written: median of steps of each save."""

    def step_s() -> float:
        start = time.perf_counter()
        bare.block(1)
        return time.perf_counter() - start

    slower = []
    for number in range(1000, 1000 + saves):
        state.step, amid = number, list[float]()
        store.save(state, 0.0)
        writing = threading.Thread(target=store.wait)
        writing.start()
        while writing.is_alive():
            amid.append(step_s())
        after = [step_s() for _ in amid]
        slower.append(100 * (median(amid) / median(after) - 1))
    return slower


def _by_size(mib: int, saves: int) -> list[Figure]:
    """A state of so many MiB: how long saving blocks beside a bare copy, and how fast it is kept beside a bare file."""
    numbers = torch.Generator().manual_seed(0)
    tensors = {f"{n}": torch.randn(mib * 2**18 // TENSORS, generator=numbers) for n in range(TENSORS)}
    groups = {part: dict(list(tensors.items())[n::3]) for n, part in enumerate(("model", "ema", "optimizer"))}
    times: dict[str, list[float]] = {"save blocks": [], "copied bare": [], "kept": [], "bare": []}
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        store = CheckpointStore(open_storage(scratch), "checkpoints", keep=1, about={})
        for number in range(saves + 1):
            start = time.perf_counter()
            store.save(TrainState(number, groups["model"], groups["ema"], groups["optimizer"], []), 0.0)
            blocked = time.perf_counter()
            store.wait()
            kept = time.perf_counter()
            copies = [tensor.clone() for tensor in tensors.values()]
            copied = time.perf_counter()
            save_file(tensors, Path(scratch, "bare"))
            with Path(scratch, "bare").open("rb") as file:
                os.fsync(file.fileno())
            done = time.perf_counter()
            del copies
            if number:  # the first one warms up
                steps = (blocked - start, copied - kept, kept - start, done - copied)
                for name, seconds in zip(times, steps, strict=True):
                    times[name].append(seconds)
    over = [bare / ours for bare, ours in zip(times["bare"], times["kept"], strict=True)]
    return [
        figure(f"{mib} MiB: save blocks", "ms", [1000 * s for s in times["save blocks"]]),
        figure(f"{mib} MiB: a bare copy", "ms", [1000 * s for s in times["copied bare"]]),
        figure(f"{mib} MiB: kept at", "MiB/s", [mib / s for s in times["kept"]]),
        figure(f"{mib} MiB: speed over a bare file's", "", over),
    ]


def _held_out(name: str, run: RunConfig, held_out: ImageSet, times: int) -> Figure:
    model = SiT(run.model).initialise(run.seed)
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        io = local_io(scratch, lambda step, metrics: None)
        measured = []
        for _ in range(times + 1):
            start = time.perf_counter()
            held_out_loss(run, model, held_out, io, CPU)
            measured.append(1000 * (time.perf_counter() - start))
    return figure(f"{name}: held-out loss at each checkpoint", "ms", measured[1:])


def _state_of(bare: BareLoop) -> TrainState:
    weights = {name: value.detach() for name, value in bare.model.state_dict().items()}
    names = [name for name, p in bare.model.named_parameters() if p.requires_grad]
    averages = dict(zip(names, bare.averages, strict=True))
    moments = {
        f"{key}/{name}": bare.optimizer.state[parameter][key]
        for name, parameter in zip(names, bare.parameters, strict=True)
        for key in ("exp_avg", "exp_avg_sq")
    }
    return TrainState(0, weights, {**weights, **averages}, moments, [])


def _published_run(size: str, device: torch.device) -> RunConfig:
    """A published size at one image a step on CPU (a step of B/2 takes seconds there), at 32 on a GPU."""
    return published_run(size, batch=32 if device.type == "cuda" else 1, precision="fp32")


def published_run(size: str, *, batch: int, precision: str, **training: Any) -> RunConfig:
    """A run of a published SiT with the paper's mixture."""
    return RunConfig.model_validate(
        {
            "model": SiTConfig.published(size),
            "mixture": load("quickstart").mixture,
            "training": Training(
                steps=training.pop("steps", 1000),
                global_batch_size=batch,
                num_shards=min(8, batch),
                precision=precision,
                **training,
            ),
            "seed": 0,
        }
    )


def random_latents(count: int) -> ImageSet:
    """Latents of 256-px images, as far as time is concerned."""
    numbers = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 32, 32, generator=numbers).numpy()
    return ImageSet(latents, torch.randint(0, 1000, (count,), generator=numbers).numpy())
