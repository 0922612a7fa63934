"""What a benchmark leaves behind: its figures with their aims, and the machine, versions and settings they hold for."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "ray", "mlflow", "numpy", "pyarrow", "pydantic", "safetensors", "boto3", "torchdiffeq")
BUSY_LOAD = 0.3  # runnable processes before the start; above it, what is measured is also somebody else's work


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    Attributes:
        name, unit: what it is.
        values: the measurements.
        aim: the aim in words, "" for a figure without one.
        met: whether the median meets the aim, None for a figure without one.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    aim: str = ""
    met: bool | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def figure(name: str, unit: str, values: Sequence[float], at_most: float | None = None) -> Figure:
    """A figure whose aim, if any, is a median of at most so much."""
    if at_most is None:
        return Figure(name, unit, tuple(values))
    return Figure(name, unit, tuple(values), f"at most {at_most:g} {unit}", statistics.median(values) <= at_most)


@dataclass
class Outcome:
    """What one benchmark found.

    Attributes:
        name: of the benchmark.
        about: what was compared and how, in a sentence or two.
        figures: in the order of the table.
        settings: complete configuration, plain JSON.
        failed: why it has no figures, "" if it has.
    """

    name: str
    about: str
    figures: list[Figure]
    settings: Mapping[str, Any]
    failed: str = ""


def overhead(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Per cent by which each of ours is longer than the one measured beside it."""
    return [100 * (a / b - 1) for a, b in zip(ours, theirs, strict=True)]


# ---------------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """Hardware, system, versions and code; the load before anything was started."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "os": _os(),
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit(),
        "load_before": os.getloadavg()[0],
    }


def host_kind(about: Mapping[str, Any]) -> str:
    """A short name for this kind of machine, for a file's name."""
    gpus = [gpu.split(",")[0] for gpu in about["gpus"]]
    words = f"{about['cores']}cpu {about['cpu']} {f'{len(gpus)}x {gpus[0]}' if gpus else ''}"
    return "-".join(re.findall(r"[a-z0-9]+", words.lower()))


def _cpu() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.+)", info)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _os() -> str:
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "") if Path("/etc/os-release").exists() else ""
    return f"{release or platform.system()}, kernel {platform.release()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Of this working tree; what is not committed in it is said."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # The sources that are measured; a new result file beside them changes nothing.
        changed = git(
            "status", "--porcelain", "--", "mixflow_core", "workers", "orchestration", "tests/benchmarks/*.py"
        )
        return git("rev-parse", "--short=12", "HEAD") + (
            f" with {len(changed.splitlines())} changed files" * bool(changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git)"


# -------------------------------------------------------------------------------------------------------- writing


def table(outcome: Outcome) -> str:
    """A benchmark's figures as a Markdown table."""
    if outcome.failed:
        return f"failed: {outcome.failed}"
    head = ("figure", "unit", "n", "min", "median", "max", "aim", "met")
    rows = [
        (
            f.name,
            f.unit,
            str(len(f.values)),
            *(_number(v) for v in (min(f.values), f.median, max(f.values))),
            f.aim,
            {True: "yes", False: "NO", None: ""}[f.met],
        )
        for f in outcome.figures
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, *rows)
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}"


def note(about: Mapping[str, Any], outcomes: Sequence[Outcome], command: str) -> str:
    """The dated note: machine, then each benchmark with its table and settings."""
    busy = about["load_before"] > BUSY_LOAD
    lines = [
        f"# Benchmarks, {about['time']}",
        "",
        f"`{command}`, {about['seconds']:.0f} s" if "seconds" in about else f"`{command}`, not finished",
        "",
        f"- CPU: {about['cpu']}, {about['cores']} cores; memory {about['memory_gib']} GiB",
        f"- GPU: {', '.join(about['gpus']) or 'none'}",
        f"- {about['os']}",
        "- " + ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        f"- commit {about['commit']}",
        f"- load average before the start {about['load_before']:.2f}"
        + ("; **the machine was busy with other work**: compare ratios only" if busy else ""),
    ]
    for outcome in outcomes:
        settings = json.dumps(outcome.settings, sort_keys=True)
        lines += ["", f"## {outcome.name}", "", outcome.about, "", table(outcome), "", f"Settings: `{settings}`"]
    return "\n".join(lines) + "\n"


def record(about: Mapping[str, Any], outcomes: Sequence[Outcome], command: str) -> str:
    """The same as one line of JSON."""
    found = []
    for outcome in outcomes:
        figures = [
            {**asdict(f), "min": min(f.values), "median": f.median, "max": max(f.values)} for f in outcome.figures
        ]
        found.append({**asdict(outcome), "figures": figures})
    return json.dumps({"machine": dict(about), "command": command, "benchmarks": found}, sort_keys=True)


def now() -> str:
    """The time of a note."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
