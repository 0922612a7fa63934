"""Results -> tables, plots, one self-contained HTML."""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Callable, Mapping
from importlib import metadata, resources
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2

from orchestration.experiment import Experiment
from orchestration.results import cell_file, format_interval
from orchestration.workflow import Workspace, code_version
from workers.evaluate import METRICS

COLOURS = ("#444444", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2")
TITLES = {
    "fd_digits": "Frechet distance in classifier features (fd_digits, lower is better)",
    "kid_digits": "Kernel distance in classifier features (kid_digits, lower is better)",
    "precision": "Precision (higher is better)",
    "recall": "Recall (higher is better)",
    "fd_pixels": "Frechet distance in pixels (fd_pixels, lower is better)",
}
VERSIONS = ("mixflow", "torch", "diffusers", "transformers", "ray", "mlflow", "pyarrow", "numpy", "scikit-learn")


def write_report(workspace: Workspace, summary: Mapping[str, Any], directory: Path) -> None:
    """Writes report.html, its figures as PNG and results.json into a directory."""
    experiment, storage = workspace.experiment, workspace.storage
    figures = {
        "metrics.png": _metric_curves(experiment, summary),
        "slow_flow.png": slow_flow_plot(_slow_flow_results(workspace)),
        "times.png": _times_plot(_realised_times(workspace)),
    }
    for name, content in figures.items():
        (directory / name).write_bytes(content)
    (directory / "results.json").write_text(json.dumps(summary, indent=1))
    template = resources.files("orchestration").joinpath("report.html.jinja").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["interval"] = format_interval
    page = environment.from_string(template).render(
        experiment=experiment,
        summary=summary,
        colours=dict(zip(experiment.arms, cycle(COLOURS), strict=False)),
        metrics=METRICS,
        titles=TITLES,
        cells=[s.name for s in experiment.evaluation.samplers],
        controls={arm: experiment.controls_of(arm) for arm in experiment.arms},
        figures={name: _data_uri(content) for name, content in figures.items()},
        grids=_grids(workspace),
        cost=_cost(workspace),
        versions={name: metadata.version(name) for name in VERSIONS} | {"python": platform.python_version()},
        code=code_version(),
        settings=experiment.model_dump_json(indent=1),
        workspace=storage.uri,
    )
    (directory / "report.html").write_text(page)


def text_table(summary: Mapping[str, Any]) -> str:
    """The primary cell and the verdicts, for a terminal."""
    metric, _, cell = summary["primary"].partition("/")
    rows = [("arm", f"{metric} at {cell}, mean [95 %]", "verdict")]
    for name, arm in summary["arms"].items():
        rows.append((name, format_interval(arm["metrics"][cell][metric]), arm["verdict"]["verdict"]))
        rows += [("", f"  {reason}", "") for reason in arm["verdict"]["reasons"]]
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


def _metric_curves(experiment: Experiment, summary: Mapping[str, Any]) -> bytes:
    """Every metric against the number of network evaluations of the unguided samplers, one line an arm and method."""
    nfe = summary["protocol"]["nfe"]
    lines: dict[str, list[str]] = {}
    for sampler in experiment.evaluation.samplers:
        if sampler.guidance_scale == 1:
            lines.setdefault(sampler.method, []).append(sampler.name)

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(METRICS))
        for axis, metric in zip(axes, METRICS, strict=True):
            for colour, (name, arm) in zip(cycle(COLOURS), summary["arms"].items(), strict=False):
                for method, cells in lines.items():
                    cells = sorted(cells, key=lambda cell: nfe[cell])
                    x = [nfe[cell] for cell in cells]
                    found = [arm["metrics"][cell][metric] for cell in cells]
                    error = [i["high"] - i["mean"] for i in found]
                    style = {"euler": "o-", "heun": "s", "sde": "^"}.get(method, "D")
                    # Methods share an NFE: a little room between them keeps their bars apart.
                    shift = {"euler": 0, "heun": 0.3, "sde": -0.3}.get(method, 0.6)
                    label = f"{name} ({method})" if metric == METRICS[0] else None
                    y = [i["mean"] for i in found]
                    axis.errorbar(
                        [v + shift for v in x], y, error, fmt=style, color=colour, capsize=2, ms=4, lw=1.2, label=label
                    )
            axis.set_title(TITLES[metric].split(" (")[0], fontsize=9)
            axis.set_xlabel("network evaluations", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.25)
        if lines:
            figure.legend(loc="outside lower center", ncols=4, fontsize=7)

    return _png(draw, (17, 4.4))


def slow_flow_plot(measured: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG of the base (before) and arms (after): slowed time against sampling time, and the probe's lag."""
    rows = (
        ("slowed_time", "Slow Flow: nearest time on a real path"),
        ("probe_ode", "probe lag, Euler 20"),
        ("probe_sde", "probe lag, SDE 8"),
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(rows), len(measured), sharey="row", squeeze=False)
        for row, (key, title) in enumerate(rows):
            for axis, (name, result) in zip(axes[row], measured.items(), strict=True):
                q = result[key]
                t, values = q["times"], list(zip(*q["values"], strict=True))
                axis.fill_between(t, values[0], values[-1], alpha=0.2, color="#1f77b4", lw=0)
                axis.fill_between(t, values[1], values[-2], alpha=0.35, color="#1f77b4", lw=0)
                axis.plot(t, values[2], color="#1f77b4", lw=1.5)
                axis.plot([0, 1], [0, 1] if key == "slowed_time" else [0, 0], "k--", lw=0.8)
                axis.set_title(f"{'before: ' if name == 'base' else 'after: '}{name}" if row == 0 else "", fontsize=9)
                axis.tick_params(labelsize=7)
                axis.grid(alpha=0.25)
            axes[row][0].set_ylabel(title, fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel("sampling time t (0 noise, 1 data)", fontsize=8)

    return _png(draw, (3.4 * len(measured), 8))


def _times_plot(realised: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG of the laws of t, m and t - m as each arm drew them: densities over [0, 1]."""
    columns = (("t", "t, what the network is told"), ("m", "m, where the sample lies"), ("lag", "t - m, the slowing"))

    def draw(figure: Any) -> None:
        for axis, (key, title) in zip(figure.subplots(1, len(columns)), columns, strict=True):
            for colour, (name, found) in zip(cycle(COLOURS[1:]), realised.items(), strict=False):
                bins = len(found[key])
                density = [count * bins / found["num_draws"] for count in found[key]]
                axis.stairs(density, found["edges"], color=colour, label=name if key == "t" else None)
            axis.set_title(title, fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.25)
        if realised:
            figure.legend(loc="outside lower center", ncols=6, fontsize=7)

    return _png(draw, (12, 3.2))


def _png(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    # The object interface of matplotlib: no pyplot, no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=100)
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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
            images[arm] = _data_uri(artifact.read(f"{cell_file(sampler.name)}.png"))
        found.append({"cell": sampler.name, "images": images})
    return found


def _cost(workspace: Workspace) -> list[dict[str, Any]]:
    """Seconds of work by kind of stage, as recorded when each was done."""
    cost: dict[str, dict[str, Any]] = {}
    for name, stage in workspace.stages.items():
        artifact = workspace.artifact(name) if stage.kind != "report" else None
        if artifact and "seconds" in artifact.manifest.meta:
            row = cost.setdefault(stage.kind, {"kind": stage.kind, "stages": 0, "seconds": 0.0, "workers": 0})
            row["stages"] += 1
            row["seconds"] += artifact.manifest.meta["seconds"]
            row["workers"] = artifact.manifest.meta.get("num_workers", 1)
    return list(cost.values())


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
