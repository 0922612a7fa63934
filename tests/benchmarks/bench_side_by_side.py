"""Two loops in one process, taking turns block by block, so that whatever disturbs the machine disturbs both.

A run of post_train calls its `report` every `log_every` steps. `Beside` is such a callback: it notes how long the block
that has just ended took and then lets every rival run a block of as many steps, before the loop goes on. All share one
process, one setting of threads and one set of pages in memory; separate processes would differ in all of these, and
one after the other they would also differ in the machine's clock and load.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from workers.config import RunConfig
from workers.data import ImageSet
from workers.io import Report
from workers.models.sit import SiT

Times = dict[str, dict[str, list[float]]]


class BareLoop:
    """What a good engineer writes for this one model by hand: no seeds by position, logs, checkpoints or checks.

    All images lie in memory as the model sees them; noise and times come from torch's global generator; AdamW is
    fused and the average of the weights is one foreach operation. Mixture: Algorithm 1 with the linear path.
    """

    def __init__(self, run: RunConfig, data: ImageSet, device: torch.device) -> None:
        self.run, self.device = run, device
        self.x1, self.y = data.x1(slice(None)).to(device), data.y(slice(None)).to(device)
        self.model = SiT(run.model).initialise(run.seed).to(device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]
        training = run.training
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        self.order, self.place = torch.empty(0, dtype=torch.long), 0

    def block(self, steps: int) -> None:
        """So many steps."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # post_train's own choice, and its own cost
        for _ in range(steps):
            self._step()
        torch.use_deterministic_algorithms(deterministic)

    def _step(self) -> None:
        size, model, gamma = self.run.training.global_batch_size, self.run.model, self.run.mixture.gamma
        if self.place + size > len(self.order):
            self.order, self.place = torch.randperm(len(self.y), device=self.device), 0
        rows = self.order[self.place : self.place + size]
        self.place += size
        x1, y = self.x1[rows], self.y[rows]
        y = torch.where(torch.rand(size, device=self.device) < model.class_dropout_prob, model.num_classes, y)
        t = torch.rand(size, device=self.device).sqrt()
        m = (t - gamma * t * torch.rand(size, device=self.device))[:, None, None, None]
        x0 = torch.randn_like(x1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.training.precision == "bf16"):
            loss = functional.mse_loss(self.model(m * x1 + (1 - m) * x0, t, y), x1 - x0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - self.run.training.ema_decay)


class Follower:
    """Another run of post_train, in a thread of its own, which goes on by one block whenever it is told to."""

    def __init__(self, train: Callable[[Report], Any]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True)
        self._thread.start()

    def block(self) -> None:
        """The next block; at the end of the run there is none."""
        self._go.release()
        self._done.acquire()
        if self._error:
            raise RuntimeError("the run beside failed") from self._error

    def finish(self) -> None:
        """Lets the run end."""
        self.block()
        self._thread.join()

    def _run(self, train: Callable[[Report], Any]) -> None:
        self._go.acquire()
        try:
            train(self._report)
        except BaseException as error:  # raised in block(), which would wait for ever
            self._error = error
        self._done.release()

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        if "train/loss" in metrics:
            self._done.release()
            self._go.acquire()


class Beside:
    """A report callback that times the loop's own blocks ("ours") and, after each, a block of every rival.

    Args:
        report: the callback that it stands for; its time is the loop's own.
        rivals: name -> one block of as many steps as the loop has between two reports.
        steps: that number.
        device: where they compute.
    """

    def __init__(
        self, report: Report, rivals: Mapping[str, Callable[[], None]], steps: int, device: torch.device
    ) -> None:
        self.report, self.rivals, self.steps, self.device = report, rivals, steps, device
        self._times: Times = {name: {"wall": [], "cpu": []} for name in ("ours", *rivals)}
        self._start: tuple[float, float] | None = None

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """See RunIO.report."""
        self.report(step, metrics)
        if "train/loss" not in metrics:  # the checkpoint at the end of the run
            return
        if self._start:
            self._note("ours", self._start)
        for name, block in self.rivals.items():
            start = self._now()
            block()
            self._note(name, start)
        self._start = self._now()

    def times(self) -> Times:
        """Seconds a step by name, `wall` and `cpu`, without the first blocks, which include starting."""
        # Our own first block was never noted, so a rival's number k + 1 ran right after our number k in these lists.
        first = {name: 1 if name == "ours" else 2 for name in self._times}
        return {name: {k: v[first[name] :] for k, v in kinds.items()} for name, kinds in self._times.items()}

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def _note(self, name: str, start: tuple[float, float]) -> None:
        for kind, then, now in zip(("wall", "cpu"), start, self._now(), strict=True):
            self._times[name][kind].append((now - then) / self.steps)
