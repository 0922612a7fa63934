"""What tracking costs training: one run whose MLflow is there, away and silent by turns."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from bench_loop import CPU, local_io
from bench_note import Outcome, figure, overhead

from orchestration.recipe import load
from orchestration.storage import open_storage
from orchestration.tracking import Metric, Tracker
from workers.config import RunConfig
from workers.data import digits
from workers.train import post_train

sys.path.append(str(Path(__file__).parents[1] / "servers"))
sys.path.append(str(Path(__file__).parents[1] / "orchestration"))
from mlflow_servers import MlflowServer
from s3_servers import Control, fault_proxy

AIM_PERCENT = 2.0
RECIPE, ROUNDS, ROUNDS_QUICK = "quickstart", 24, 1
BLOCK, BLOCK_QUICK, LOG_EVERY = 400, 100, 10  # steps; metrics five times as often as in the recipe
# What the proxy before MLflow does in a block; None where nothing is handed to the tracker.
MODES: dict[str, str | None] = {"untracked": None, "there": "ok", "away": "reset", "silent": "blackhole"}
SETTLE_S = 120.0


def mlflow(quick: bool) -> Outcome:
    """Blocks of one arm's steps with MLflow there, with connections to it reset, and with no answer from it."""
    block, rounds = (BLOCK_QUICK, ROUNDS_QUICK) if quick else (BLOCK, ROUNDS)
    steps = block * len(MODES) * (rounds + 1)  # the first round warms up
    run = load(RECIPE).arm_run("mixflow", 0)
    short = {"steps": steps, "log_every": LOG_EVERY, "checkpoint_every": steps}
    run = RunConfig.model_validate(run.model_copy(update={"training": run.training.model_copy(update=short)}))
    times = _blocks(run, block)
    figures = [figure(f"{name}: a step", "ms", [1000 * s / block for s in of[1:]]) for name, of in times.items()]
    for name, other, aim in (
        ("there", "untracked", None),
        ("away", "there", AIM_PERCENT),
        ("silent", "there", AIM_PERCENT),
    ):
        figures.append(figure(f"{name} over {other}", "%", overhead(times[name][1:], times[other][1:]), aim))
    about = (
        f"Blocks of {block} steps of one run of {RECIPE}'s MixFlow arm, by turns: without tracking, and with metrics "
        f"every {LOG_EVERY} steps through a Tracker in a process of its own to a real MLflow server behind a proxy, "
        "which lets everything pass, resets every connection, or never answers. What a block left is delivered before "
        "the next one begins. Everything shares the machine's cores."
    )
    return Outcome("mlflow", about, figures, {"block": block, "run": run.model_dump(mode="json")})


class Turns:
    """A run's report callback: hands metrics to the tracker's process, and changes the mode after every block."""

    def __init__(self, block: int, control: Control, calls: Any, answers: Any) -> None:
        self.block, self.control, self.calls, self.answers = block, control, calls, answers
        self.times: dict[str, list[float]] = defaultdict(list)
        self.names = cycle(MODES)
        self._begin()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        if MODES[self.name]:
            now = int(time.time() * 1000)
            self.calls.put([(key, step, value, now) for key, value in metrics.items()])
        if step % self.block == 0 and "time/images_per_s" in metrics:  # and not a measurement at the same step
            self.times[self.name].append(time.perf_counter() - self.began)
            self.control(mode="ok")
            self.calls.put(None)
            if pending := self.answers.get():
                raise RuntimeError(f"{pending} events of a block of {self.name} were not delivered")
            self._begin()

    def _begin(self) -> None:
        self.name = next(self.names)
        self.control(mode=MODES[self.name] or "ok")
        self.began = time.perf_counter()


def _blocks(run: RunConfig, block: int) -> dict[str, list[float]]:
    """Seconds of the blocks by mode, in their order."""
    settings = load(RECIPE).data.digits
    assert settings
    splits = digits(settings.image_size, settings.held_out)
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixflow-benchmark-")))
        server = MlflowServer(f"sqlite:///{scratch}/mlflow.db", scratch)
        stack.callback(server.kill)
        server.start()
        endpoint, control = stack.enter_context(fault_proxy(server.uri))
        spawn = multiprocessing.get_context("spawn")
        calls, answers = spawn.Queue(), spawn.Queue()
        tracking = spawn.Process(target=_track, args=(calls, answers, endpoint, str(scratch / "spool")), daemon=True)
        tracking.start()
        stack.callback(tracking.kill)
        calls.put(None)
        answers.get()  # it has begun
        torch.set_num_threads(1)  # as in the recipe
        stack.callback(torch.set_num_threads, threads)
        turns = Turns(block, control, calls, answers)
        post_train(run, splits["train"], splits["held_out"], local_io(str(scratch / "run"), turns), device=CPU)
    return turns.times


def _track(calls: Any, answers: Any, uri: str, spool: str) -> None:
    """What the Reporter does with the metrics it is told; None asks how many are left after a wait for MLflow."""
    tracker = Tracker(open_storage(spool), uri, "benchmark", "tracking/benchmark")
    tracker.start_run("run", "run", params={})
    take: Callable[[], list[Any] | None] = calls.get
    while True:
        rows = take()
        if rows is not None:
            tracker.log("run", [Metric(*row) for row in rows])
            continue
        end = time.monotonic() + SETTLE_S
        while tracker.status()["pending"] and time.monotonic() < end:
            tracker.drain(SETTLE_S)
        answers.put(tracker.status()["pending"])
