"""Measures what the project claims of its speed, prints tables and writes a dated note.

    python tests/benchmarks/run.py [--quick] [--only NAME ...] [--out DIRECTORY]

Nothing here asserts a time: an aim that is missed is written down as missed. See README.md in this directory.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from bench_checkpoint import checkpoint
from bench_encode import encode
from bench_gpu import gpu
from bench_loader import has_server, loader
from bench_loop import loop, mixture
from bench_metrics import available, metrics
from bench_models import models
from bench_note import Outcome, host_kind, machine, note, now, record, table
from bench_paired import paired
from bench_runs import quickstart
from bench_sample import sample
from bench_scaling import scaling
from bench_sweep import search, sweep
from bench_tracking import mlflow

RESULTS = Path(__file__).parent / "results"
BENCHMARKS: dict[str, Callable[[bool], Outcome]] = {
    "loop": loop,
    "mixture": mixture,
    "checkpoint": checkpoint,
    "scaling": scaling,
    "loader": loader,
    "mlflow": mlflow,
    "quickstart": quickstart,
    "encode": encode,
    "sample": sample,
    "models": models,
    "search": search,
    "sweep": sweep,
    "paired": paired,
    "metrics": metrics,
    "gpu": gpu,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; 1 if one of them could not be run at all, whatever its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="extend", nargs="+", choices=list(BENCHMARKS), help="these benchmarks instead of all"
    )
    parser.add_argument("--quick", action="store_true", help="does everything run? Figures of a few steps mean little")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the note and benchmarks.jsonl")
    options = parser.parse_args(argv)
    names = options.only or [name for name in BENCHMARKS if name not in NEEDS or NEEDS[name][0]()]
    command = " ".join(["python tests/benchmarks/run.py", *(argv if argv is not None else sys.argv[1:])])
    about, outcomes, start = {"time": now(), **machine()}, [], time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = [about["time"][:10], host_kind(about), *(options.only or []), *(["quick"] if options.quick else [])]
    path = options.out / f"{'-'.join(parts)}.md"
    for name in names:
        print(f"\n{name} ...", file=sys.stderr, flush=True)
        outcomes.append(_run(name, options.quick))
        print(f"\n## {name}\n{outcomes[-1].about}\n\n{table(outcomes[-1])}", flush=True)
        path.write_text(note(about, outcomes, command))  # after each, so that what is interrupted keeps its figures
    about["seconds"] = time.monotonic() - start
    path.write_text(note(about, outcomes, command))
    with (options.out / "benchmarks.jsonl").open("a") as file:
        file.write(record(about, outcomes, command) + "\n")
    print(f"\n{path}")
    return int(any(outcome.failed for outcome in outcomes))


def _run(name: str, quick: bool) -> Outcome:
    is_there, what = NEEDS.get(name, (lambda: True, ""))
    if not is_there():
        return Outcome(name, "", [], {}, failed=f"needs {what}, got none: not measured")
    try:
        return BENCHMARKS[name](quick)
    except Exception as error:  # the others can still be measured, and the note says that this one was not
        traceback.print_exc()
        reason = " ".join(str(error).split())[:500]
        return Outcome(name, "", [], {}, failed=f"{type(error).__name__}: {reason}")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# What a benchmark cannot do without; all of them together leave out those that lack it.
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "gpu": (_has_gpu, "a CUDA device"),
    "metrics": (available, "torch-fidelity in .venv/fidelity"),
    "loader": (has_server, "Ceph RADOS Gateway"),
}


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    sys.exit(main())
