"""Where a stage does its work: a worker among others, the workspace, and the inputs that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from orchestration.lease import Lease
from orchestration.results import cell_file
from orchestration.storage import Storage
from orchestration.workflow import Artifact, Stage, Workspace
from workers.data import ImageSet, Split
from workers.shards import open_shards

Tell = Callable[[str, int, int, Mapping[str, float]], None]


def _nobody(step: int, value: float) -> None:
    """Where no scheduler listens."""


@dataclass
class Site:
    """A worker's surroundings.

    Attributes:
        workspace: the experiment in its storage; only rank 0's answers count.
        rank, world_size: of this worker in its group.
        device: where it computes.
        cache: local directory for fetched artifacts and memory maps, shared by the workers of a machine.
        tell: tell(stage, done, total, metrics) hands progress and metrics over without waiting (rank 0).
        rung: rung(step, value) reports a trial's objective to whoever schedules the trials, on all ranks together.
        stopping: whether this worker was asked to stop.
        lease: of the stage at work (rank 0).
        group: for `agree` and `gather`, in which workers wait for one another for as long as a piece of work may take;
            None for the default group.
    """

    workspace: Workspace
    rank: int
    world_size: int
    device: torch.device
    cache: Path
    tell: Tell
    rung: Callable[[int, float], None] = _nobody
    stopping: Callable[[], bool] = lambda: False
    lease: Lease | None = None
    group: dist.ProcessGroup | None = None

    @property
    def storage(self) -> Storage:
        """The workspace's storage."""
        return self.workspace.storage

    def is_to_stop(self) -> bool:
        """Whether this worker was asked to stop, or the stage is another process's by now."""
        return self.stopping() or bool(self.lease and self.lease.lost)

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def gather(self, value: Any, to: int = 0) -> list[Any]:
        """Every rank's value by rank, on rank `to`; an empty list elsewhere."""
        if self.world_size == 1:
            return [value]
        box = [None] * self.world_size if self.rank == to else None
        dist.gather_object(value, box, to, self.group)
        return box or []

    def share(self, costs: Sequence[float]) -> list[int]:
        """Places of this rank's pieces of work, in order: the dearest are dealt first, each to who has least so far."""
        loads, mine = [0.0] * self.world_size, []
        for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
            rank = loads.index(min(loads))
            loads[rank] += costs[place]
            if rank == self.rank:
                mine.append(place)
        return sorted(mine)


Inputs = Mapping[str, Artifact]
Work = Callable[[Site, Stage, Inputs, Path], dict[str, Any]]


def data_of(site: Site, inputs: Inputs) -> dict[Split, ImageSet]:
    """The images, memory-mapped."""
    artifact = inputs["data"]
    return open_shards(artifact.fetch(site.cache), artifact.manifest, site.cache / "images")


def weights_of(site: Site, artifact: Artifact) -> dict[str, torch.Tensor]:
    """The weights that a training left."""
    return load_file(artifact.fetch(site.cache) / "weights.safetensors")


def part_name(cell: str, number: int) -> str:
    """File of a part of a cell's samples."""
    return f"{cell_file(cell)}-{number:05d}.parquet"
