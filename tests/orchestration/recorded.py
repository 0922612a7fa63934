"""Finished experiments without any training, with pictures that a browser can show, and recorded in MLflow."""

import io
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image
from test_results import ARM_LEVELS, NOISE, Fabricated

from orchestration.launch import Reporter
from orchestration.recording import Recorder
from orchestration.report import write_report
from orchestration.results import summarise


class Drawn(Fabricated):
    """A fabricated workspace with training curves and real PNGs."""

    def base(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        return {"weights.safetensors": b"base", "history.jsonl": history(1.5)}, {"steps": 3000}

    def arms(self, arm: str, replicate: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        files, about = super().arms(arm, replicate)
        level = ARM_LEVELS.get(arm, 9.0) / 10 + float(NOISE[int(replicate)]) / 5
        return files | {"history.jsonl": history(level)}, {**about, "steps": 1000, "device": "cpu"}

    def samples(self, arm: str, replicate: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        files, about = super().samples(arm, replicate)
        shade = 40 * [*ARM_LEVELS, arm].index(arm) + 7 * int(replicate)
        return {name: png(shade) for name in files}, about


def history(level: float) -> bytes:
    """A loss that falls from 1 above `level`, every 50 of 1,000 steps, and a held-out loss every 500."""
    rows: list[dict[str, float]] = []
    for step in range(50, 1001, 50):
        rows.append({"step": step, "train/loss": level + math.exp(-step / 200), "train/grad_norm": 1 / step})
        if step % 500 == 0:
            rows.append({"step": step, "eval/loss": level + 0.1})
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def png(shade: int) -> bytes:
    """A sheet of gradients that tells one arm's shade from another's."""
    image = Image.new("L", (160, 80))
    image.putdata([(x * 2 + y + shade) % 256 for y in range(80) for x in range(160)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def record(made: Fabricated, tracking_uri: str, *, report: str = "results") -> str:
    """Tells MLflow of a finished experiment, as the driver does; returns the id of its parent run.

    `report` is what there is of it: "" nothing, "results" its numbers, "drawn" all.
    """
    workspace = made.workspace
    reporter = Reporter(workspace.storage.uri, tracking_uri, workspace.experiment.name, workspace.home)
    try:
        recorder = Recorder(workspace, list(workspace.stages.values()), reporter, is_actor=False)
        recorder.start()
        recorder.training()
        summary = summarise(workspace)
        recorder.evaluation(summary)
        if report:
            directory = made.directory / "report"
            directory.mkdir(exist_ok=True)
            (directory / "results.json").write_text(json.dumps(summary))
            if report == "drawn":
                write_report(workspace, summary, directory)
            workspace.publish("report", directory, seconds=1.0)
            found = workspace.result("report")
            recorder.artifacts([f"{found.path}/{name}" for name in found.manifest.files])
        recorder.end("FINISHED")
        status = reporter.drain(120)
        assert status["pending"] == 0, status
        assert status["rejected"] == 0, status
        return str(status["run_id"])
    finally:
        reporter.tracker.close()


def page_of(made: Fabricated, directory: Path, summary: dict[str, Any] | None = None) -> Path:
    """The report of a fabricated experiment, or of another summary of it."""
    directory.mkdir(parents=True)
    write_report(made.workspace, summary or summarise(made.workspace), directory)
    return directory / "report.html"
