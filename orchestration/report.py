"""Results -> tables, plots, one self-contained HTML."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any

from orchestration.figures import count_curves, metric_curves, slow_flow_plot, times_plot
from orchestration.page import COLOURS, data_uri, render
from orchestration.results import cell_file, format_interval
from orchestration.workflow import Workspace

VERSIONS = ("mixflow", "torch", "diffusers", "transformers", "ray", "mlflow", "pyarrow", "numpy", "scikit-learn")


def write_report(workspace: Workspace, summary: Mapping[str, Any], directory: Path) -> None:
    """Writes report.html, its figures as PNG and results.json into a directory."""
    experiment, storage = workspace.experiment, workspace.storage
    arms, nfe, metrics = summary["arms"], summary["protocol"]["nfe"], metrics_of(summary)
    colours = dict(zip(experiment.arms, cycle(COLOURS), strict=False))
    counts = count_curves(arms, summary["primary"].partition("/")[2], colours)
    figures = {
        "metrics.png": metric_curves(arms, metrics, nfe, colours),
        "slow_flow.png": slow_flow_plot(_slow_flow_results(workspace)),
        "times.png": times_plot(_realised_times(workspace), colours),
        **({"counts.png": counts} if counts else {}),
    }
    for name, content in figures.items():
        (directory / name).write_bytes(content)
    (directory / "results.json").write_text(json.dumps(summary, indent=1))
    page = render(
        "report.html.jinja",
        experiment=experiment,
        summary=summary,
        rows=[{"name": name, "colour": colours[name], "arm": arm} for name, arm in arms.items()],
        metrics=metrics,
        cells=[s.name for s in experiment.evaluation.samplers],
        figures={name: data_uri(content) for name, content in figures.items()},
        grids=_grids(workspace),
        cost=_cost(workspace),
        versions={name: metadata.version(name) for name in VERSIONS} | {"python": platform.python_version()},
        code=_code(workspace),
        settings=experiment.model_dump_json(indent=1),
        workspace=storage.uri,
    )
    (directory / "report.html").write_text(page)


def metrics_of(summary: Mapping[str, Any]) -> list[str]:
    """Every metric that a summary holds, in its order."""
    cells = [found for arm in summary["arms"].values() for found in arm["metrics"].values()]
    return list(dict.fromkeys(metric for found in cells for metric in found))


def text_table(summary: Mapping[str, Any]) -> str:
    """The primary cell and the verdicts, for a terminal."""
    metric, _, cell = summary["primary"].partition("/")
    rows = [("arm", f"{metric} at {cell}, mean [95 %]", "verdict")]
    for name, arm in summary["arms"].items():
        rows.append((name, format_interval(arm["metrics"][cell][metric]), arm["verdict"]["verdict"]))
        rows += [("", f"  {reason}", "") for reason in arm["verdict"]["reasons"]]
    for claim in summary.get("claims", ()):
        found = claim["cells"][cell]
        text = (
            f"  {claim['expected']} than {claim['control']}"
            if claim["expected"] != "equal"
            else f"  equal to {claim['control']}"
        )
        rows.append((claim["arm"], f"{text}, as published: {format_interval(found, signed=True)}", found["agreement"]))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def slow_flow_table(measured: Mapping[str, Any]) -> str:
    """Median and 5-95 % of each quantity at a few times, for a terminal."""
    lines = [f"m_t <= t in {measured['share_slowed']:.1%} of states ({measured['num_samples']} rollouts)"]
    for key in ("slowed_time", "probe_ode", "probe_sde"):
        q = measured[key]
        lines.append(f"{key}: median [5 %, 95 %]")
        step = max(1, len(q["times"]) // 5)
        for t, values in list(zip(q["times"], q["values"], strict=True))[step - 1 :: step]:
            lines.append(f"  t = {t:.2f}  {values[2]:+.3f} [{values[0]:+.3f}, {values[-1]:+.3f}]")
    return "\n".join(lines)


def _slow_flow_results(workspace: Workspace) -> dict[str, Any]:
    found = {}
    for name, stage in workspace.stages.items():
        artifact = workspace.artifact(name) if stage.kind == "slow-flow" else None
        if artifact:
            found[name.split("/")[1]] = json.loads(artifact.read("slow_flow.json"))
    return found


def _realised_times(workspace: Workspace) -> dict[str, Any]:
    """Histograms of the times that each arm trained on (replicate 0)."""
    trained = [name for name, arm in workspace.experiment.arms.items() if arm.train]
    return {name: json.loads(workspace.result(f"arms/{name}/0").read("times.json")) for name in trained}


def _grids(workspace: Workspace) -> list[dict[str, Any]]:
    """For each cell, the first hundred images of every arm at the same noise (replicate 0)."""
    found = []
    for sampler in workspace.experiment.evaluation.samplers:
        images = {}
        for arm in workspace.experiment.arms:
            artifact = workspace.result(f"samples/{arm}/0")
            images[arm] = data_uri(artifact.read(f"{cell_file(sampler.name)}.png"))
        found.append({"cell": sampler.name, "images": images})
    return found


def _code(workspace: Workspace) -> str:
    """The versions of the code that made the results, which may be older than the one that writes the report."""
    artifacts = [workspace.artifact(name) for name, stage in workspace.stages.items() if stage.kind != "report"]
    counts = Counter(str(a.manifest.meta["code"]) for a in artifacts if a and "code" in a.manifest.meta)
    if len(counts) < 2:
        return "".join(counts)
    each = ", ".join(f"{version} ({count} stages)" for version, count in counts.most_common())
    return f"warning: results of several versions: {each}; --force redoes the older"


def _cost(workspace: Workspace) -> list[dict[str, Any]]:
    """Work by kind of stage, as recorded when each was done."""
    cost: dict[str, dict[str, Any]] = {}
    for name, stage in workspace.stages.items():
        artifact = workspace.artifact(name) if stage.kind != "report" else None
        if artifact and "seconds" in artifact.manifest.meta:
            row = cost.setdefault(
                stage.kind, {"kind": stage.kind, "stages": 0, "seconds": 0.0, "workers": 0, "device_s": 0.0}
            )
            row["stages"] += 1
            row["seconds"] += artifact.manifest.meta["seconds"]
            row["device_s"] += artifact.device_s
            row["workers"] = artifact.manifest.meta.get("num_workers", 1)
    return list(cost.values())
