"""What pairing arms by seed, data order and noise saves: the variance of an effect, paired over unpaired."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench_note import Outcome, figure
from bench_runs import run_command

SEEDS = 10
SETTINGS = ("training.steps=400", "training.checkpoint_every=400", "evaluation.num_samples=1000")
CONTRASTS = (("mixflow", "standard"), ("matched", "standard"), ("mixflow", "matched"))
METRICS = ("fd_digits", "kid_digits", "recall_digits")


def paired(quick: bool) -> Outcome:
    """A quickstart with many training seeds: how its effects vary over pairs, and over arms of unlike seeds."""
    seeds = 3 if quick else SEEDS
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as name:
        run_command(["run", "quickstart"], Path(name), (*SETTINGS, f"replicates={seeds}"))
        (results,) = Path(name).glob("experiments/*/results.json")
        arms = json.loads(results.read_text())["arms"]
    figures = []
    for a, b in CONTRASTS:
        for metric in METRICS:
            cells = arms[a]["metrics"]
            ratios = [
                _ratio(cells[cell][metric]["values"], arms[b]["metrics"][cell][metric]["values"]) for cell in cells
            ]
            figures.append(figure(f"{a} minus {b}, {metric}", "of the unpaired variance", ratios))
    about = (
        f"{seeds} training seeds of each arm; arms share seed, order of the data, noise of training and noise of "
        "sampling. Variance of the difference over the pairs, divided by the sum of the two arms' variances over the "
        "seeds, which it would be with unlike seeds; a value for each sampler. Below 1, pairing needs that part of the "
        "seeds for the same interval."
    )
    return Outcome("paired", about, figures, {"settings": SETTINGS, "seeds": seeds})


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    apart = statistics.variance([a - b for a, b in zip(one, other, strict=True)])
    return apart / (statistics.variance(one) + statistics.variance(other))
