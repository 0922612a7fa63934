"""What the loop knows of the world around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import nn

from workers.checkpoint import CheckpointStore, TrainState, Writers

Report = Callable[[int, Mapping[str, float]], None]


class StoppedError(Exception):
    """A worker was asked to stop, and what was done is kept: the same run goes on from there. It says where."""


class Judge(Protocol):
    """Looks at a run while it trains. Both methods are called on all ranks together."""

    def restored(self, history: Sequence[Mapping[str, float]]) -> None:
        """The history of the checkpoint that the run goes on from, empty at its start."""

    def measure(self, step: int, model: nn.Module) -> Mapping[str, float]:
        """Metrics of the averaged weights after `step` steps, the same on all ranks; empty where it does not look."""


class RunIO:
    """Where a run comes from and goes to, over a checkpoint store. Only rank 0's restore and report are called.

    Args:
        store: of its checkpoints.
        report: hands the metrics of a step over without waiting.
        rank, world_size: of this worker.
        stopping: whether this worker was asked to stop; asked once a step.
    """

    def __init__(
        self,
        store: CheckpointStore,
        report: Report,
        *,
        rank: int = 0,
        world_size: int = 1,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.store, self.report, self.stopping = store, report, stopping
        self.rank, self.world_size = rank, world_size

    def restore(self) -> TrainState | None:
        """The newest valid checkpoint, None to start."""
        return self.store.restore()

    def save(self, state: TrainState, score: float | None, writers: Writers | None) -> None:
        """Keeps a copy of the state; returns before it is written. The score is None where nothing was measured.

        Called on rank 0, or on all `writers`, each with its part of the state.
        """
        self.store.save(state, score, writers)

    def wait(self) -> None:
        """Waits until what was saved is kept."""
        self.store.wait()

    @property
    def last_checkpoint(self) -> str:
        """Names the newest complete checkpoint, for error messages."""
        return self.store.newest() or "none"
