"""Progress of long work: a bar on a terminal, plain lines in a log, always on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 5.0
SILENCE_S = 10.0


class Progress:
    """Shows how far a list of stages is.

    Args:
        stages: names of all stages in order.
        done: how many of them were there already.
    """

    def __init__(self, stages: list[str], done: int) -> None:
        self.stages, self.start, self.last_line = stages, time.monotonic(), time.monotonic()
        self.shown, self.starts, self.warnings = "", 0, 0
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=len(stages),
            initial=done,
            unit="stage",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not self.is_terminal,
        )

        self.done = threading.Event()
        if not self.is_terminal:
            threading.Thread(target=self._keep_talking, daemon=True, name="heartbeat").start()

    def _keep_talking(self) -> None:
        """A log that stands still for long looks dead."""
        while not self.done.wait(1.0):
            if time.monotonic() - self.last_line > SILENCE_S:
                self.say(f"still at work: {self.shown or 'starting'}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.last_line = time.monotonic()
        if self.is_terminal:
            self.bar.write(text, file=sys.stderr)
        else:
            print(f"[{time.monotonic() - self.start:6.1f} s] {text}", file=sys.stderr, flush=True)

    def show(self, latest: Mapping[str, Any]) -> None:
        """The newest progress: {stage, done, total, metrics}, and how often a worker group has started."""
        if latest.get("starts", 0) > max(1, self.starts):
            self.say(f"warning: the workers were started again ({latest['starts'] - 1}); going on from there")
        self.starts = max(self.starts, latest.get("starts", 0))
        for text in latest.get("warnings", [])[self.warnings :]:
            self.say(f"warning: {text}")
        self.warnings = len(latest.get("warnings", []))
        stage = latest.get("stage")
        if stage not in self.stages:
            return
        place = self.stages.index(stage)
        share = latest["done"] / latest["total"]
        loss = latest["metrics"].get("train/loss")
        steps = f" step {latest['done']}/{latest['total']}" if latest["total"] > 1 else ""
        text = f"{stage}{steps}" + (f" loss {loss:.4f}" if loss is not None else "")
        if self.is_terminal:
            self.bar.n = round(place + share, 2)
            self.bar.set_postfix_str(text)
            return
        now = time.monotonic()
        if text != self.shown and (now - self.last_line > LINE_EVERY_S or latest["done"] == latest["total"]):
            self.last_line, self.shown = now, text
            self.say(f"stage {place + 1}/{len(self.stages)}  {text}")

    @contextmanager
    def following(self, latest: Callable[[], Mapping[str, Any] | None]) -> Iterator[None]:
        """Shows latest() every half second while the block runs."""
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(0.5):
                found = latest()
                if found:
                    self.show(found)

        thread = threading.Thread(target=follow, daemon=True, name="progress")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)
            self.show(latest() or {})

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self.done.set()
        self.bar.close()
