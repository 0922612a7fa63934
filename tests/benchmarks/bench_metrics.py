"""Features and metrics against torch-fidelity's, taking turns in one process, with the same inputs.

torch-fidelity comes with a stand-in for torchvision (tests/fidelity/peer.py), which must not reach the other
benchmarks: `metrics` starts this file as a process of its own, which prints its figures as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_note import ROOT, Figure, Outcome, figure

from mixflow_core.metrics import Moments, frechet_distance, precision_recall

AIM = 1.0
# images, turns, features of a set, dimension
FULL, QUICK = (16, 6, 5000, 2048), (1, 1, 300, 64)
Turn = dict[str, Callable[[], Any]]


def available() -> bool:
    """Whether torch-fidelity is where .ci/install --tests puts it."""
    return (ROOT / ".venv" / "fidelity" / "torch_fidelity").is_dir()


def metrics(quick: bool) -> Outcome:
    """FID-Inception, FID from features, precision and recall, ours and torch-fidelity's.

    Raises:
        RuntimeError: the process failed, for instance because torch-fidelity is not installed.
    """
    places = [ROOT, *(ROOT / "tests" / name for name in ("", "fidelity", "benchmarks"))]
    # Matrices in NumPy and in torch are each given one thread.
    alone = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    done = subprocess.run(
        [sys.executable, __file__, *(["--quick"] if quick else [])],
        env={**os.environ, **alone, "PYTHONPATH": os.pathsep.join(map(str, places))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the comparison must end by itself, got {done.returncode}: {done.stderr.strip()[-400:]}")
    figures = [Figure(**{**found, "values": tuple(found["values"])}) for found in json.loads(done.stdout)]
    images, turns, count, dimension = QUICK if quick else FULL
    about = (
        f"Seconds of one CPU thread, fp32 for the networks and float64 for the rest: {images} random images of 256 px "
        f"through the FID-Inception with the same random weights (ours has the normalisations merged into the "
        f"convolutions and gives sFID's features too), and metrics of {count} features of {dimension} dimensions whose "
        "variances fall by eight orders (`reference kept`: another sample against a reference used before). They take "
        "turns in one process, the first of a turn changing; a ratio is of the two of one turn. torch-fidelity 0.4.0."
    )
    settings = {"images": images, "turns": turns, "features": count, "dimension": dimension}
    return Outcome("metrics", about, figures, settings)


def main() -> None:
    """Prints the figures as JSON."""
    images, turns, count, dimension = QUICK if "--quick" in sys.argv else FULL
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures = extraction(images, turns) + formulae(count, dimension, turns)
    print(json.dumps([asdict(found) for found in figures]))


def extraction(images: int, turns: int) -> list[Figure]:
    """Features of images."""
    from peer import PeerInception
    from toys import inception_weights

    from workers.inception import load_inception

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "inception.pth"
        torch.save(inception_weights(0), path)
        ours, theirs = load_inception(path), PeerInception(path)
    pixels = torch.randint(0, 256, (images, 3, 256, 256), dtype=torch.uint8)
    with torch.no_grad():
        differences = [
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(pixels), theirs(pixels), strict=True)
        ]
        passes = {"ours": lambda: ours(pixels), "torch-fidelity": lambda: theirs.net(pixels)}
        seconds = take_turns(passes, turns)
    return [
        *compared("FID-Inception, an image", seconds, 1000 / images, "ms"),
        figure("FID-Inception: largest difference", "1e-6 of the largest", [1e6 * max(differences)]),
    ]


def formulae(count: int, dimension: int, turns: int) -> list[Figure]:
    """Metrics of features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    axes = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64)).Q
    axes = torch.logspace(0.5, -3.5, dimension, dtype=torch.float64)[:, None] * axes
    x, y = (torch.randn(count, dimension, dtype=torch.float64) @ axes for _ in range(2))
    reference, their_reference = Moments.of(y), fid_features_to_statistics(y)
    frechet_distance(reference, reference)  # makes what is kept of it

    def theirs(reference: Any) -> Any:
        return fid_statistics_to_metric(fid_features_to_statistics(x), reference, verbose=False)

    plans: dict[str, tuple[Turn, int]] = {
        "FID of two sets": (
            {
                "ours": lambda: frechet_distance(Moments.of(x), Moments.of(y)),
                "torch-fidelity": lambda: theirs(fid_features_to_statistics(y)),
            },
            max(1, turns // 2),
        ),
        "FID, reference kept": (
            {
                "ours": lambda: frechet_distance(Moments.of(x), reference),
                "torch-fidelity": lambda: theirs(their_reference),
            },
            max(1, turns // 2),
        ),
        "precision and recall": (
            {
                "ours": lambda: precision_recall(y, x),
                "torch-fidelity": lambda: prc_features_to_metric(x, y, verbose=False),
            },
            max(1, turns // 3),
        ),
    }
    return [f for name, (turn, n) in plans.items() for f in compared(name, take_turns(turn, n), 1, "s")]


def take_turns(turn: Turn, turns: int) -> dict[str, list[float]]:
    """Seconds that the process computed in each, turn by turn, after one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in turn}
    for number in range(turns + 1):
        for name in list(turn) if number % 2 else list(turn)[::-1]:
            start = time.process_time()
            turn[name]()
            if number:
                found[name].append(time.process_time() - start)
    return found


def compared(name: str, seconds: dict[str, list[float]], scale: float, unit: str) -> list[Figure]:
    """Each one's time, and the ratios."""
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["torch-fidelity"], strict=True)]
    return [
        *(figure(f"{name}: {key}", unit, [scale * s for s in values]) for key, values in seconds.items()),
        figure(f"{name}: ours over torch-fidelity", "", ratios, AIM),
    ]


if __name__ == "__main__":
    main()
