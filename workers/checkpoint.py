"""TrainState <-> directory, and the store that keeps them: content first, manifest last, never pickle."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.disk import NoRoomError, room_for
from workers.manifest import CorruptError, Manifest, canonical_hash

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """All that a run needs to go on exactly: no generator state, since randomness is a function of position.

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

    def write(self, directory: Path, about: Mapping[str, Any]) -> None:
        """Writes the files of a checkpoint (no manifest); `about` (plain JSON) makes it self-describing."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("model", "ema", "optimizer"):
            save_file(getattr(self, name), directory / f"{name}.safetensors")
        rows = "".join(json.dumps(row) + "\n" for row in self.history)
        (directory / "history.jsonl").write_text(rows)
        (directory / "run.json").write_text(
            json.dumps({**about, "step": self.step, "loss_sum": self.loss_sum}, indent=1, sort_keys=True)
        )

    @classmethod
    def read(cls, directory: Path) -> TrainState:
        """Reads what `write` wrote; the caller has verified the manifest."""
        history = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
        model, ema, optimizer = (load_file(directory / f"{name}.safetensors") for name in ("model", "ema", "optimizer"))
        about = json.loads((directory / "run.json").read_text())
        return cls(about["step"], model, ema, optimizer, history, about.get("loss_sum", 0.0))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, which is what a checkpoint takes but for its history."""
        return sum(value.nbytes for part in (self.model, self.ema, self.optimizer) for value in part.values())

    def snapshot(self) -> TrainState:
        """A copy in CPU memory that later updates do not touch."""

        def copy(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in part.items()}

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

    def publish(self, directory: Path, path: str, meta: Mapping[str, Any]) -> Manifest:
        """Copies a local directory to `path`, its manifest last."""

    def fetch(self, path: str, into: Path) -> Path:
        """A verified local copy of a published directory; raises where a file differs from the manifest."""

    def delete(self, prefix: str) -> None:
        """Removes a directory."""

    def set_aside(self, path: str, reason: str) -> None:
        """Marks a directory as not to be used."""

    def discard_unfinished(self, prefix: str) -> None:
        """Removes what a writer that died left of unfinished objects below a directory."""


class CheckpointStore:
    """The checkpoints of one run, in `<path>/step-<step>-<attempt>/`: one writer, the newest valid one is restored.

    Args:
        files: where they are kept.
        path: the run's directory of checkpoints in there.
        keep: newest checkpoints kept, besides the one with the lowest score.
        about: what run.json says of the run.
    """

    def __init__(self, files: Files, path: str, *, keep: int, about: Mapping[str, Any]) -> None:
        self.files, self.path, self.keep, self.about = files, path, keep, about
        self._scratch = f"mixflow-checkpoint-{canonical_hash([files.uri, path])[:16]}-"
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def names(self) -> list[str]:
        """All checkpoint directories, torn ones included, oldest first."""
        skip = len(self.path) + 1
        return sorted({path[skip:].split("/")[0] for path in self.files.list(self.path)})

    def newest(self) -> str | None:
        """Path of the newest complete checkpoint."""
        complete = [name for name in self.names() if self.files.manifest(f"{self.path}/{name}")]
        return f"{self.path}/{complete[-1]}" if complete else None

    def restore(self) -> TrainState | None:
        """The newest checkpoint that is complete and unaltered; None where there is none.

        Every one that is torn or altered is set aside and named in the log.
        """
        for left in Path(tempfile.gettempdir()).glob(f"{self._scratch}*"):  # by a writer that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.files.discard_unfinished(self.path)
        for name in reversed(self.names()):
            path = f"{self.path}/{name}"
            if "set-aside.json" in {p.rsplit("/", 1)[1] for p in self.files.list(path)}:
                continue
            if self.files.manifest(path) is None:
                self._set_aside(path, "it has no manifest: writing it was interrupted")
                continue
            with tempfile.TemporaryDirectory(prefix="mixflow-restore-") as scratch:
                try:
                    return TrainState.read(self.files.fetch(path, Path(scratch)))
                except CorruptError as error:
                    self._set_aside(path, str(error))
        return None

    def save(self, state: TrainState, score: float | None) -> None:
        """Writes a snapshot in the background; blocks only while an earlier one is still being written.

        Args:
            state: copied before this returns.
            score: held-out loss; the checkpoint with the lowest is kept. None where it was not measured.
        """
        self.wait()
        copy = state.snapshot()
        self._writer = threading.Thread(target=self._write, args=(copy, score), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Waits for the checkpoint being written and raises what went wrong with it."""
        if self._writer:
            self._writer.join()
            self._writer = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write(self, state: TrainState, score: float | None) -> None:
        scratch = Path(tempfile.mkdtemp(prefix=self._scratch))
        # A directory of its own for each attempt: a torn one is never completed by another's files.
        path = f"{self.path}/step-{state.step:09d}-{uuid.uuid4().hex[:8]}"
        try:
            with room_for(scratch, state.num_bytes):
                state.write(scratch, self.about)
            self._publish(scratch, path, {"step": state.step, "score": score})
            self._retain()
        except BaseException as error:
            self._error = error  # raised in the training thread by the next wait()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _publish(self, scratch: Path, path: str, meta: Mapping[str, Any]) -> None:
        try:
            self.files.publish(scratch, path, meta)
        except NoRoomError:
            self.files.delete(path)  # or what there is of it would fill the room that the next attempt needs
            raise

    def _retain(self) -> None:
        found = [(name, self.files.manifest(f"{self.path}/{name}")) for name in self.names()]
        complete = {name: manifest.meta["score"] for name, manifest in found if manifest}
        scored = {name: score for name, score in complete.items() if score is not None}
        best = min(scored, key=lambda name: scored[name], default=None)
        for name in list(complete)[: -self.keep]:
            if name != best:
                self.files.delete(f"{self.path}/{name}")

    def _set_aside(self, path: str, reason: str) -> None:
        log.warning("checkpoint %s is set aside: %s", path, reason)
        self.files.set_aside(path, reason)
