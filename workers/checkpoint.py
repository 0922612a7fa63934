"""TrainState <-> directory, and the store that keeps them: content first, manifest last, never pickle."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.disk import NoRoomError, PermanentError, scratch_directory
from workers.manifest import MANIFEST, CorruptError, FileEntry, Manifest

log = logging.getLogger(__name__)

FILE_BYTES = 2**32  # at most, of one file of tensors: the most that a rank holds in memory more than its share
PARTS = ("model", "ema", "optimizer")


@dataclass
class TrainState:
    """All that a run needs to go on exactly: no generator state, since randomness is a function of position.

    Of a state that several ranks write together, each holds the tensors of its own files; the others are on the meta
    device.

    Attributes:
        step: optimiser steps done.
        model: parameters by state-dict name.
        ema: averaged parameters by state-dict name, complete: the weights that are evaluated.
        optimizer: AdamW's `exp_avg/<name>` and `exp_avg_sq/<name>`.
        history: metric rows, {"step": ..., key: value}, in order.
        loss_sum: of the losses since the last row of the history, for the mean that the next row holds.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    history: list[dict[str, float]]
    loss_sum: float = 0.0

    def files(self) -> dict[str, tuple[str, list[str]]]:
        """The files of tensors: by name the part that each is of and the tensors in it, at most FILE_BYTES if several.

        That depends on the tensors' names and shapes alone, not on who holds them.
        """
        found = {}
        for part in PARTS:
            groups: list[list[str]] = [[]]
            size = 0
            for name, value in getattr(self, part).items():
                num_bytes = value.numel() * value.element_size()
                if groups[-1] and size + num_bytes > FILE_BYTES:
                    groups.append([])
                    size = 0
                groups[-1].append(name)
                size += num_bytes
            for number, names in enumerate(groups, 1):
                of = f"-{number:05d}-of-{len(groups):05d}" * (len(groups) > 1)
                found[f"{part}{of}.safetensors"] = part, names
        return found

    def write_tensors(self, directory: Path) -> None:
        """Writes the files of tensors that are this rank's."""
        for file, (part, names) in self.files().items():
            tensors = {name: getattr(self, part)[name] for name in names}
            if not any(tensor.is_meta for tensor in tensors.values()):
                save_file(tensors, directory / file)

    def write_rest(self, directory: Path, about: Mapping[str, Any]) -> None:
        """Writes all else but the manifest; `about` (plain JSON) makes a checkpoint self-describing."""
        rows = "".join(json.dumps(row) + "\n" for row in self.history)
        (directory / "history.jsonl").write_text(rows)
        (directory / "run.json").write_text(
            json.dumps({**about, "step": self.step, "loss_sum": self.loss_sum}, indent=1, sort_keys=True)
        )

    @classmethod
    def read(cls, directory: Path) -> TrainState:
        """Reads what was written; the caller has verified the manifest."""
        history = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
        model, ema, optimizer = (
            {k: v for file in sorted(directory.glob(f"{part}*.safetensors")) for k, v in load_file(file).items()}
            for part in PARTS
        )
        about = json.loads((directory / "run.json").read_text())
        return cls(about["step"], model, ema, optimizer, history, about.get("loss_sum", 0.0))

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's tensors, which is what its files take."""
        return sum(value.nbytes for part in PARTS for value in getattr(self, part).values() if not value.is_meta)

    def snapshot(self) -> TrainState:
        """A copy in CPU memory that later updates do not touch."""

        def copy(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: value if value.is_meta else value.detach().to("cpu", copy=True).contiguous()
                for name, value in part.items()
            }

        return TrainState(
            self.step, copy(self.model), copy(self.ema), copy(self.optimizer), list(self.history), self.loss_sum
        )


class Files(Protocol):
    """The part of object storage that checkpoints need; `orchestration.storage.Storage` is one."""

    uri: str

    def list(self, prefix: str) -> list[str]:
        """Paths of all objects under a directory, sorted."""

    def manifest(self, path: str) -> Manifest | None:
        """The manifest of a complete directory that is not set aside, else None."""

    def put_file(self, source: Path, path: str) -> FileEntry:
        """Copies a local file to an object."""

    def commit(self, path: str, manifest: Manifest) -> Manifest:
        """Makes a directory complete, whose files lie there already: puts its manifest."""

    def fetch(self, path: str, into: Path) -> Path:
        """A verified local copy of a published directory; raises where a file differs from the manifest."""

    def delete(self, prefix: str) -> None:
        """Removes a directory."""

    def set_aside(self, path: str, reason: str) -> None:
        """Marks a directory as not to be used."""

    def discard_unfinished(self, prefix: str) -> None:
        """Removes what a writer that died left of unfinished objects below a directory."""


class Writers:
    """The ranks that write a checkpoint together, by a process group that only their writing threads use.

    Args:
        group: of the ranks; None for this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self._group = dist.get_rank(group) if group else 0, group

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in their order; RuntimeError where a rank is gone."""
        if self._group is None:
            return [value]
        found = [value] * dist.get_world_size(self._group)
        dist.all_gather_object(found, value, self._group)
        return found


class CheckpointStore:
    """The checkpoints of one run, in `<path>/step-<step>-<attempt>/`: one run writes, the newest valid one is restored.

    Args:
        files: where they are kept.
        path: the run's directory of checkpoints in there.
        keep: newest checkpoints kept, besides the one with the lowest score.
        about: what run.json says of the run.
    """

    def __init__(self, files: Files, path: str, *, keep: int, about: Mapping[str, Any]) -> None:
        self.files, self.path, self.keep, self.about = files, path, keep, about
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._has_lost_one = False  # the one before could not be kept, and this one is in its place

    def names(self) -> list[str]:
        """All checkpoint directories, torn ones included, oldest first."""
        skip = len(self.path) + 1
        return sorted({path[skip:].split("/")[0] for path in self.files.list(self.path)})

    def newest(self) -> str | None:
        """Path of the newest complete checkpoint."""
        complete = [name for name in self.names() if self.files.manifest(f"{self.path}/{name}")]
        return f"{self.path}/{complete[-1]}" if complete else None

    def restore(self) -> TrainState | None:
        """The newest checkpoint that is complete and unaltered; None where there is no complete one.

        Every one that is torn, or is altered while an older one is not, is set aside and named in the log.

        Raises:
            OSError: there are complete ones, and each reads as altered: this machine may be at fault, and training
                must not begin anew for that.
        """
        try:
            self.files.discard_unfinished(self.path)
        except OSError as error:  # perhaps the credentials do not cover it
            log.warning("what was not finished below %s may go on taking room: %s", self.path, error)
        altered: list[tuple[str, CorruptError]] = []
        for name in reversed(self.names()):
            path = f"{self.path}/{name}"
            there = {p.rsplit("/", 1)[1] for p in self.files.list(path)}
            if "set-aside.json" in there:
                continue
            if MANIFEST not in there:
                self._set_aside(path, "it has no manifest: writing it was interrupted")
                continue
            if self.files.manifest(path) is None:
                altered.append((path, CorruptError(f"{self.files.uri}/{path}", MANIFEST, "is unreadable")))
                continue
            with scratch_directory() as scratch:
                try:
                    state = TrainState.read(self.files.fetch(path, scratch / "checkpoint"))
                except CorruptError as error:
                    altered.append((path, error))
                    continue
            for bad, reason in altered:
                self._set_aside(bad, str(reason))
            return state
        if altered:
            raise OSError(
                f"every checkpoint in {self.files.uri}/{self.path} reads as altered on this machine, the newest: "
                f"{altered[0][1].file} {altered[0][1].problem}; try another machine, or remove them to begin anew"
            )
        return None

    def save(self, state: TrainState, score: float | None, writers: Writers | None = None) -> None:
        """Writes a snapshot in the background; blocks only while an earlier one is still being written.

        Where that one could not be kept, as after a storage was away for longer than it is waited for, this one takes
        its place with a warning.

        Args:
            state: copied before this returns.
            score: held-out loss; the checkpoint with the lowest is kept. None where it was not measured.
            writers: all of whose ranks save their part of the state, by as many calls; None for this process alone.

        Raises:
            NoRoomError, PermanentError: the one before met a fault that does not pass.
            OSError: neither of the two before could be kept.
        """
        try:
            self.wait()
            self._has_lost_one = False
        except (NoRoomError, PermanentError):
            raise
        except OSError as error:
            if self._has_lost_one:
                raise
            self._has_lost_one = True
            log.warning("the checkpoint before step %d was not kept, and this one is tried: %s", state.step, error)
        arguments = state.snapshot(), score, writers or Writers()
        self._writer = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Waits for the checkpoint being written and raises what went wrong with it."""
        if self._writer:
            self._writer.join()
            self._writer = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write(self, state: TrainState, score: float | None, writers: Writers) -> None:
        try:
            # A directory of its own for each attempt: a torn one is never completed by another's files.
            path = writers.exchange(f"{self.path}/step-{state.step:09d}-{uuid.uuid4().hex[:8]}")[0]
            entries, problem = self._keep(state, path, writers.rank)
            answers = writers.exchange((entries, str(problem or "")))
            lacking = [f"worker {rank}: {why}" for rank, (_, why) in enumerate(answers) if why]
            if isinstance(problem, NoRoomError):
                self.files.delete(path)  # or what there is of it would fill the room that the next attempt needs
            if problem:
                raise problem
            if lacking:
                raise OSError(f"checkpoint {path} is not complete, {lacking[0]}")
            if writers.rank == 0:
                files = {name: entry for entries, _ in answers for name, entry in entries.items()}
                try:
                    self.files.commit(path, Manifest(files, {"step": state.step, "score": score}))
                except NoRoomError:
                    with contextlib.suppress(OSError):  # what there was no room for matters more
                        self.files.delete(path)
                    raise
                self._retain()
        except BaseException as error:
            self._error = error  # raised in the training thread by the next wait()

    def _keep(self, state: TrainState, path: str, rank: int) -> tuple[dict[str, FileEntry], BaseException | None]:
        """Puts this rank's files where they belong; what went wrong with it, which the others are to hear."""
        entries: dict[str, FileEntry] = {}
        try:
            with scratch_directory(state.num_bytes) as scratch:
                state.write_tensors(scratch)
                if rank == 0:
                    state.write_rest(scratch, self.about)
                for file in sorted(scratch.iterdir()):
                    entries[file.name] = self.files.put_file(file, f"{path}/{file.name}")
        except BaseException as error:
            return {}, error
        return entries, None

    def _retain(self) -> None:
        found = [(name, self.files.manifest(f"{self.path}/{name}")) for name in self.names()]
        complete = {name: manifest.meta["score"] for name, manifest in found if manifest}
        scored = {name: score for name, score in complete.items() if score is not None}
        best = min(scored, key=lambda name: scored[name], default=None)
        for name in list(complete)[: -self.keep]:
            if name != best:
                self.files.delete(f"{self.path}/{name}")
        newest = max(map(_step_of, complete))
        for name, manifest in found:  # what was torn by a kill: no manifest at all, and nobody writes older steps now
            path = f"{self.path}/{name}"
            if not manifest and _step_of(name) < newest and f"{path}/{MANIFEST}" not in self.files.list(path):
                self.files.delete(path)

    def _set_aside(self, path: str, reason: str) -> None:
        log.warning("checkpoint %s is set aside: %s", path, reason)
        try:
            self.files.set_aside(path, reason)
        except OSError as error:  # a full disk is no reason not to go on from another one
            log.warning("it could not be marked, and is looked at again by the next start: %s", error)


def _step_of(name: str) -> int:
    return int(name.split("-")[1])
