"""Which gamma? Every base gets a sweep of the slowing range, and what was measured of it before is held against that.

    python tests/benchmarks/gamma_campaign.py                              # goes on where it was stopped
    python tests/benchmarks/gamma_campaign.py --only digits8/trained       # one setting
    python tests/benchmarks/gamma_campaign.py --table                      # what the results say, without running
    python tests/benchmarks/gamma_campaign.py --findings                   # in short: orchestration/which_gamma.json

Three kinds of images (scikit-learn's digits of 8 x 8, the same enlarged to 32 x 32, its two photographs cut into
patches of 16 x 16) times three bases (small, undertrained, trained) are nine settings. Each is an experiment as usual:
the base, standard post-training, the paper's law of t with gamma 0, and for each other gamma the slowed arm and its
matched-marginal control, all with three paired seeds, sampled by Euler of 8 and 20 steps and an SDE of 8. The workspace
resumes what was begun; a setting that is done is one JSON line of the result file.

The best of five arms is partly the luckiest. Its gain is therefore read on each seed for the gamma that the other seeds
chose. Of many predictors one correlates by luck: a rank correlation counts where it is beyond what the largest of all
predictors stays below in 95 % of random orders of the settings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from campaigns import append_result, read_results
from scipy import stats

from mixflow_core.statistics import student_interval

RESULTS = Path(__file__).parent / "results" / "gamma_campaign.jsonl"
GAMMAS = (0.2, 0.4, 0.6, 0.8, 1.0)
CELLS = ("euler8/s1", "euler20/s1", "sde8/s1")
BASES = ("small", "undertrained", "trained")
PATCH, HELD_OUT = 16, 500
STANDARD = {
    "time_law": "uniform", "slowing_law": "interval", "gamma": 0, "target_time": "m", "condition_on": "t", "shift": 1,
}  # fmt: skip


def experiment_of(images: str, base: str, photographs: Path) -> dict[str, Any]:
    """The settings of one of the nine experiments."""
    sizes = {  # side, patch, channels, classes, width, depth, batch, base steps
        "digits8": (8, 4, 1, 10, 32, 2, 128, 3000),
        "digits32": (32, 8, 1, 10, 96, 4, 64, 3000),
        "photographs": (PATCH, 4, 3, 2, 64, 3, 64, 3000),
    }
    side, patch, channels, classes, width, depth, batch, steps = sizes[images]
    if base == "small":
        width, depth = width // 2, max(1, depth // 2)
    if base == "undertrained":
        steps //= 10
    data: dict[str, Any] = {"digits": {"image_size": side, "held_out": 597}}
    if images == "photographs":
        data = {"images": {"source": str(photographs), "held_out": HELD_OUT}}
    training = {"global_batch_size": batch, "learning_rate": 1e-3, "ema_decay": 0.999, "log_every": 50}
    arms: dict[str, Any] = {"none": {"train": False}, "standard": {"mixture": STANDARD}}
    arms["gamma-0"] = {"mixture": {"gamma": 0}, "judged": False}
    for gamma in GAMMAS:
        arms[f"gamma-{gamma}"] = {"mixture": {"gamma": gamma}}
        arms[f"matched-{gamma}"] = {"mixture": {"gamma": gamma, "condition_on": "m"}}
    return {
        "name": f"gamma-{images}-{base}",
        "data": data,
        **({"codec": {"kind": "identity", "image_size": side}} if images == "photographs" else {}),
        "model": {
            "input_size": side, "patch_size": patch, "in_channels": channels, "hidden_size": width, "depth": depth,
            "num_heads": 4, "num_classes": classes,
        },
        "base": {"train": {**training, "steps": steps, "checkpoint_every": 300}},
        "training": {**training, "steps": 600, "checkpoint_every": 300},
        "mixture": {"time_law": "beta", "slowing_law": "interval", "gamma": 0.8, "target_time": "m"},
        "arms": arms,
        "replicates": 3,
        "evaluation": {
            "samplers": [
                {"method": "euler", "num_steps": 8}, {"method": "euler", "num_steps": 20},
                {"method": "sde", "num_steps": 8},
            ],
            "num_samples": 2000,
            "primary": "fd_digits/euler20/s1",
        },
        "cluster": {"num_workers": 2, "cpus_per_worker": 1},
    }  # fmt: skip


def cut_photographs(folder: Path) -> Path:
    """scikit-learn's two photographs as PNG patches, a class folder each: 1,040 of each of 427 x 640 pixels."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    for name in ("china", "flower"):
        picture, target = load_sample_image(f"{name}.jpg"), folder / name
        target.mkdir(parents=True, exist_ok=True)
        places = [(y, x) for y in range(picture.shape[0] // PATCH) for x in range(picture.shape[1] // PATCH)]
        for number, (y, x) in enumerate(places):
            path = target / f"{number:04d}.png"
            if not path.exists():
                patch = picture[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
                Image.fromarray(patch).save(path)
    return folder


def play(images: str, base: str, workspace: Path) -> dict[str, Any]:
    """Runs one setting to its end; what the table needs of it."""
    from orchestration.recipe import validated
    from orchestration.run import open_place, run_experiment

    os.environ["MIXFLOW_WORKSPACE"] = str(workspace)
    photographs = cut_photographs(workspace / "photographs") if images == "photographs" else Path()
    settings = experiment_of(images, base, photographs)
    outcome = run_experiment(validated(settings["name"], settings), open_place())
    if images == "photographs":
        settings["data"]["images"]["source"] = photographs.name  # where it lies here says nothing elsewhere
    arms = {
        arm["name"]: {cell: found["fd_digits"]["values"] for cell, found in arm["metrics"].items()}
        for arm in outcome["arms"]
    }
    recalls = {
        arm["name"]: {cell: found["recall_digits"]["values"] for cell, found in arm["metrics"].items()}
        for arm in outcome["arms"]
    }
    return {
        "images": images, "base": base, "fd": arms, "recall": recalls,
        "predictors": predictors(outcome["slow_flow"]), "settings": settings,
    }  # fmt: skip


def predictors(slow_flow: Mapping[str, Any]) -> dict[str, float]:
    """Candidates, each measured on the base before any post-training, of the Slow Flow measurement's two samplers."""
    found = {}
    for sampler, both in slow_flow["samplers"].items():
        model, exact = both["model"], both["error_free"]
        for field, its in (("", model), (" of the error-free field", exact)):
            if isinstance(its, str):
                continue
            q = its["same_class"]
            found[f"1 - m/t at the end{field}, {sampler}"] = 1 - q["values"][-1][2] / q["times"][-1]
        if not isinstance(exact, str):
            found[f"1 - m/t beyond the error-free field, {sampler}"] = (
                found[f"1 - m/t at the end, {sampler}"]
                - found[f"1 - m/t at the end of the error-free field, {sampler}"]
            )
        for start in model["continuation"]:
            way = start["times"][-1] - start["from"]
            found[f"share of the way lost from t = {start['from']:.2g}, {sampler}"] = (
                start["times"][-1] - start["values"][-1][2]
            ) / way
        found[f"probe's lag at the end, {sampler}"] = -model["probe_lag"][-1][0]
        found[f"largest probe's lag, {sampler}"] = -min(lag[0] for lag in model["probe_lag"])
        found[f"velocity deficit, {sampler}"] = float(np.mean([d[0] for d in model["deficit_generated"]]))
    return found


# ---------------------------------------------------------------------------------------------------------- the table


def best_gamma(entry: Mapping[str, Any], cell: str) -> dict[str, Any]:
    """The best value of the grid, and what is known of it.

    `best`: by the mean over the seeds; `by_seed`: each seed's own; `gain` and `matched`: the relative difference of the
    slowed arm to gamma 0 (the same law of t) and to its matched-marginal control, [mean, low, high], each seed's with
    the gamma that is best on the others; below 0 where it helped.
    """
    fd = {0.0: entry["fd"]["gamma-0"][cell], **{g: entry["fd"][f"gamma-{g}"][cell] for g in GAMMAS}}
    by_seed = [min(fd, key=lambda g: fd[g][k]) for k in range(len(fd[0.0]))]
    seeds, gain, matched = range(len(fd[0.0])), [], []
    for k in seeds:
        slowed = min(GAMMAS, key=lambda g: sum(fd[g][other] for other in seeds if other != k))
        gain.append(fd[slowed][k] / fd[0.0][k] - 1)
        matched.append(fd[slowed][k] / entry["fd"][f"matched-{slowed}"][cell][k] - 1)
    return {
        "best": min(fd, key=lambda g: float(np.mean(fd[g]))),
        "by_seed": by_seed,
        "gain": _ends(gain),
        "matched": _ends(matched),
    }


def _ends(values: Sequence[float]) -> list[float]:
    found = student_interval(values)
    return [found.mean, found.low, found.high]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float] | None:
    """Spearman's rank correlation with its 95 % bootstrap interval over the settings; None where one is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    numbers = np.random.default_rng(0)
    rows = np.stack([numbers.integers(len(x), size=len(x)) for _ in range(2000)])
    ranks = [stats.rankdata(np.asarray(values)[rows], axis=1) for values in (x, y)]
    a, b = (values - values.mean(1, keepdims=True) for values in ranks)
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    draws = (a * b).sum(1)[size > 0] / size[size > 0]  # where one is constant there is no correlation
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(stats.spearmanr(x, y).statistic), float(low), float(high)


def luck(predictors: Sequence[Sequence[float]], y: Sequence[float]) -> float:
    """The rank correlation that the largest of all predictors stays below in 95 % of random orders of `y`."""
    ranks, numbers = np.array([stats.rankdata(x) for x in predictors]), np.random.default_rng(0)
    ranks = (ranks - ranks.mean(1, keepdims=True)) / ranks.std(1, keepdims=True)
    other = stats.rankdata(y)
    other = (other - other.mean()) / other.std()
    largest = [np.abs(ranks @ numbers.permutation(other) / len(other)).max() for _ in range(5000)]
    return float(np.quantile(largest, 0.95))


def power(number: int, threshold: float, correlation: float) -> float:
    """Share of draws of `number` normal pairs of this correlation whose rank correlation reaches the threshold."""
    numbers = np.random.default_rng(0)
    x, other = numbers.standard_normal((2, 20_000, number))
    y = correlation * x + (1 - correlation**2) ** 0.5 * other
    ranks = [values.argsort(1).argsort(1) - (number - 1) / 2 for values in (x, y)]
    found = (ranks[0] * ranks[1]).sum(1) / (ranks[0] ** 2).sum(1)
    return float((np.abs(found) >= threshold).mean())


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The settings with their best gamma, then the predictors with what they say of it, as Markdown."""
    lines = ["| images | base | cell | best gamma (by seed) | slowed against gamma 0 | against its matched control |"]
    lines.append("|---|---|---|---|---|---|")
    for entry in entries:
        for cell in CELLS:
            found = best_gamma(entry, cell)
            seeds = ", ".join(f"{g:g}" for g in found["by_seed"])
            lines.append(
                f"| {entry['images']} | {entry['base']} | {cell} | {found['best']:g} ({seeds}) | "
                f"{_percent(found['gain'])} | {_percent(found['matched'])} |"
            )
    if len(entries) < 3:  # nothing to correlate
        return "\n".join(lines)
    known, wanted = known_before(entries), to_predict(entries)
    lines += ["", f"Rank correlation over {len(entries)} settings, [95 %]; in the last row what luck reaches:", ""]
    lines.append(f"| predictor | range | {' | '.join(wanted)} |")
    lines.append("|---|---|" + "---|" * len(wanted))
    for name, x in known.items():
        cells = " | ".join(_correlation(rank_correlation(x, y)) for y in wanted.values())
        lines.append(f"| {name} | {min(x):.3f} to {max(x):.3f} | {cells} |")
    lucky = [luck(list(known.values()), y) if len(set(y)) > 1 else None for y in wanted.values()]
    shown = ["" if value is None else f"{value:.2f}" for value in lucky]
    lines.append(f"| the largest of {len(known)} by luck, 95 % | | {' | '.join(shown)} |")
    share = power(len(entries), max(value for value in lucky if value is not None), 0.9)
    lines += ["", f"A predictor of correlation .9 would be found in {share:.0%} of draws of {len(entries)} settings."]
    return "\n".join(lines)


def known_before(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The predictors that every setting has and that differ between them, by name."""
    found = {
        name: [entry["predictors"][name] for entry in entries]
        for name in entries[0]["predictors"]
        if all(name in entry["predictors"] for entry in entries)
    }
    return {name: x for name, x in found.items() if len(set(x)) > 1}


def to_predict(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """What a predictor should tell: the best gamma of each cell, and what slowing gains."""
    wanted = {f"best gamma, {cell}": [best_gamma(e, cell)["best"] for e in entries] for cell in CELLS}
    for key, what in (("gain", "gain over gamma 0"), ("matched", "gain over the matched control")):
        wanted[f"{what}, all cells"] = [
            -float(np.mean([best_gamma(e, cell)[key][0] for cell in CELLS])) for e in entries
        ]
    return wanted


def findings(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tables in short, as reports show them: each setting, and the largest correlation beside what luck reaches.

    Numbers have 6 decimals, so that another processor finds the same.
    """
    known = known_before(entries)
    return {
        "cells": list(CELLS),
        "settings": [
            {"images": e["images"], "base": e["base"]}
            | {"cells": [_short(best_gamma(e, cell)) for cell in CELLS]}
            for e in entries
        ],
        "predictors": len(known),
        "correlations": [
            {
                "of": name,
                "largest": round(max(abs(float(stats.spearmanr(x, y).statistic)) for x in known.values()), 6),
                "luck": round(luck(list(known.values()), y), 6),
            }
            for name, y in to_predict(entries).items()
        ],
    }  # fmt: skip


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"best": found["best"], "matched": [round(value, 6) for value in found["matched"]]}


def short_table(found: Mapping[str, Any]) -> str:
    """The settings of `findings` as Markdown."""
    head = ["images", "base", *(f"{cell}: best gamma, against matched" for cell in found["cells"])]
    lines = [f"| {' | '.join(head)} |"]
    lines.append("|---|---|" + "---|" * len(found["cells"]))
    for row in found["settings"]:
        cells = " | ".join(f"{cell['best']:g}, {_percent(cell['matched'])}" for cell in row["cells"])
        lines.append(f"| {row['images']} | {row['base']} | {cells} |")
    return "\n".join(lines)


def _percent(interval: Sequence[float]) -> str:
    mean, low, high = (f"{100 * value:+.1f}" for value in interval)
    return f"{mean} % [{low}, {high}]"


def _correlation(found: tuple[float, float, float] | None) -> str:
    return (
        "the best gamma is the same everywhere"
        if found is None
        else f"{found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"
    )


def campaign(results: Path, workspace: Path, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Plays the settings that are wanted and not done."""
    done = {f"{entry['images']}/{entry['base']}" for entry in read_results(results)}
    for images in ("digits8", "photographs", "digits32"):
        for base in BASES:
            name = f"{images}/{base}"
            if name in done or not wanted(name):
                continue
            print(f"== {name}", flush=True)
            entry = play(images, base, workspace)
            append_result(results, entry)
    return read_results(results)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workspace", type=Path, default=Path("gamma-campaign-workspace"))
    parser.add_argument("--only", action="append", default=[], metavar="IMAGES/BASE")
    parser.add_argument("--table", action="store_true", help="do not run anything")
    parser.add_argument("--findings", action="store_true", help="do not run anything; print them as JSON")
    arguments = parser.parse_args()
    names = [f"{images}/{base}" for images in ("digits8", "photographs", "digits32") for base in BASES]
    unknown = set(arguments.only) - set(names)
    if unknown:
        parser.error(f"--only must be one of {', '.join(names)}, got {min(unknown)}")
    entries = read_results(arguments.results)
    if not arguments.table and not arguments.findings:
        workspace = arguments.workspace.absolute()
        entries = campaign(arguments.results, workspace, lambda name: not arguments.only or name in arguments.only)
    if entries:
        print(json.dumps(findings(entries), indent=1) if arguments.findings else table(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
