"""Results -> tables, plots, one self-contained HTML."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, resources
from itertools import cycle
from pathlib import Path
from typing import Any

from orchestration.differences import unit_of
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
    cell = summary["primary"].partition("/")[2]
    counted = _counts(arms, cell)
    counts = count_curves(arms, cell, colours) if counted else None
    slow_flow = _slow_flow_figures(workspace)
    figures = {
        "metrics.png": metric_curves(arms, metrics, nfe, colours),
        **slow_flow,
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
        counted_metrics=counted,
        cells=[s.name for s in experiment.evaluation.samplers],
        figures={name: data_uri(content) for name, content in figures.items()},
        slow_flow=dict(zip((s.name for s in experiment.slow_flow_samplers), slow_flow, strict=True)),
        which_gamma=json.loads(resources.files("orchestration").joinpath("which_gamma.json").read_text()),
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


def _counts(arms: Mapping[str, Any], cell: str) -> dict[str, list[int]]:
    """Metric -> the numbers of samples that it was measured with in a cell, where there are several."""
    first = next(iter(arms.values())).get("by_count", {}).get(cell, {})
    return {metric: [row[0] for row in rows] for metric, rows in first.items() if len(rows) > 1}


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
        needed, bases = found.get("pairs_needed"), summary["protocol"].get("bases", 1)
        agreement = found["agreement"]
        agreement += f", {needed} {unit_of(found, bases)} needed" if needed and agreement == "inconclusive" else ""
        rows.append((claim["arm"], f"{text}, as published: {format_interval(found, signed=True)}", agreement))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def slow_flow_table(measured: Mapping[str, Any]) -> str:
    """Every quantity at a few times, the error-free field's below the model's, for a terminal."""
    lines = [
        f"{measured['of']}: {measured['num_samples']} pairs; in brackets 95 % intervals over pairs; "
        f"error-free: the exact field of the {measured['num_images']:,} training images"
    ]
    for sampler, found in measured["samplers"].items():
        rows = [("model", found["model"])]
        if isinstance(found["error_free"], str):
            lines += [f"{sampler} (no error-free field: {found['error_free']})"]
        else:
            lines += [sampler]
            rows.append(("error-free", found["error_free"]))
        lines += _table(rows)
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Of one sampler, the model's and the error-free field's reading, by what is read."""
    times, called = rows[0][1]["same_class"]["times"], rows[0][1]["deficit_times"]
    picked, starts = _few(times), range(len(rows[0][1]["continuation"]))
    blocks: list[tuple[str, list[float], Callable[[Mapping[str, Any], int], str]]] = [
        ("rollout against a real image of its class: 5 %, median, 95 % of m; share with m <= t", times, _rollout),
        ("mean lag of the noise-level probe; 0 is none, below 0 too noisy", times, _lag),
        ("velocity deficit 1 - E|u|^2 / E|v|^2: on generated states; on true ones", called, _deficits),
    ]
    lines = []
    for title, at, say in blocks:
        lines.append(f"  {title}")
        for i in picked:
            lines += [f"    {_head(at[i], k)}{name:<11} {say(row, i)}" for k, (name, row) in enumerate(rows)]
    for i in starts:
        part = rows[0][1]["continuation"][i]
        lines.append(f"  real pairs continued from s = {part['from']:.2f}: 5 %, median, 95 % of m")
        for k, (name, row) in enumerate(rows):
            text = _quantiles(row["continuation"][i], len(part["times"]) - 1)
            lines.append(f"    {_head(part['times'][-1], k)}{name:<11} {text}")
    return lines


def _few(times: Sequence[float]) -> list[int]:
    """Places of at most five times, the last included."""
    count = min(5, len(times))
    return [len(times) * (k + 1) // count - 1 for k in range(count)]


def _head(t: float, row: int) -> str:
    return f"t = {t:.2f}  " if row == 0 else " " * 10


def _rollout(found: Mapping[str, Any], i: int) -> str:
    share, low, high = found["slowed"][i]
    return f"{_quantiles(found['same_class'], i)}  {share:.1%} [{low:.1%}, {high:.1%}]"


def _lag(found: Mapping[str, Any], i: int) -> str:
    return _with_ends(*found["probe_lag"][i])


def _deficits(found: Mapping[str, Any], i: int) -> str:
    return f"{_with_ends(*found['deficit_generated'][i])}  {_with_ends(*found['deficit_true'][i])}"


def _quantiles(part: Mapping[str, Any], i: int) -> str:
    rows = (part["values"][i], part["low"][i], part["high"][i])
    return "  ".join(_with_ends(*(row[j] for row in rows)) for j in (0, len(part["levels"]) // 2, -1))


def _with_ends(value: float, low: float | None, high: float | None) -> str:
    ends = ", ".join("-" if end is None else f"{end:.3f}" for end in (low, high))
    return f"{value:.3f} [{ends}]"


def _slow_flow_figures(workspace: Workspace) -> dict[str, bytes]:
    """A figure for each sampler, the base and every trained arm side by side."""
    found = _slow_flow_results(workspace)
    figures = {}
    for sampler in workspace.experiment.slow_flow_samplers:
        columns = {
            f"{'before' if name == 'base' else 'after'}: {name}": measured["samplers"][sampler.name]
            for name, measured in found.items()
        }
        figures[f"slow_flow_{cell_file(sampler.name)}.png"] = slow_flow_plot(columns)
    return figures


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
