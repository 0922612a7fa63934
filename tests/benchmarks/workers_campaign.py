"""Changes a run's number of workers at random steps, 1-2-4-3-1, and compares its result with that of one worker alone.

    python tests/benchmarks/workers_campaign.py --seeds 20

A round is one run in reproducible mode by five groups of gloo processes, one after another. Each of the first four is
ended at a random step: one of its workers, chosen by chance, dies of SIGKILL in that step (`killed`: the others lose
their connection, and the next group starts from the last checkpoint), or is asked to stop (`stopped`: all keep that
step). A round is equal when the files of its last checkpoint are, by SHA-256, those of the run that one worker made in
one piece. Each round is one JSON line in the result file, and a campaign that was itself stopped goes on after them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from campaigns import append_result, read_results
from kill_campaign import CHECKPOINTS, RUN, STEPS, fork, images, newest

from orchestration.storage import open_storage
from workers.checkpoint import CheckpointStore
from workers.io import RunIO, StoppedError
from workers.train import post_train

RESULTS = Path(__file__).parent / "results" / "workers_campaign.jsonl"
REPRODUCIBLE = RUN.model_copy(update={"training": RUN.training.model_copy(update={"reproducible": True})})
COUNTS = (1, 2, 4, 3, 1)
STOPPED, LOST = 3, 4  # exit codes of a worker: it kept its step; another worker was gone


def work(rank: int, group: Path, count: int, end: tuple[str, int] | None) -> int:
    """One worker's part of the run, from its newest checkpoint; with `end` it is the one to end in that step."""
    steps = itertools.count(1)

    def stopping() -> bool:
        if end is None or next(steps) != end[1]:
            return False
        if end[0] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=count)
    store = CheckpointStore(open_storage(str(group.parent)), CHECKPOINTS, keep=RUN.training.keep_checkpoints, about={})
    io = RunIO(store, lambda step, metrics: None, rank=rank, world_size=count, stopping=stopping)
    try:
        post_train(REPRODUCIBLE, images(100, 0), images(32, 1), io)
    except StoppedError:
        return STOPPED
    except RuntimeError as error:
        if count == 1 or ("losed by peer" not in str(error) and "reset by peer" not in str(error)):
            raise
        return LOST
    return 0


def run_group(directory: Path, number: int, count: int, ends: dict[int, tuple[str, int]]) -> list[int]:
    """Runs `count` workers to their ends; the exit code of each, negative for a signal."""
    group = directory / f"group-{number}"
    members = [fork(directory, partial(work, rank, group, count, ends.get(rank))) for rank in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in members]


def step_of(directory: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    manifest = newest(directory)
    return int(manifest.meta["step"]) if manifest else 0


def play(seed: int, counts: tuple[int, ...], scratch: Path) -> dict[str, Any]:
    """The run by groups of these sizes one after another."""
    numbers, directory = random.Random(seed), scratch / f"run-{seed}"
    (directory / "scratch").mkdir(parents=True)
    points = [*sorted(numbers.sample(range(2, STEPS), len(counts) - 1)), STEPS]
    changes = []
    for number, (count, point) in enumerate(zip(counts, points, strict=True)):
        first, how = step_of(directory), "finished"
        ends = {}
        if point < STEPS:
            how = numbers.choice(["killed", "stopped"])
            ends = {numbers.randrange(count): (how, point - first)}
        codes = run_group(directory, number, count, ends)
        as_expected = {
            "finished": {0},
            "stopped": {STOPPED},
            "killed": {-signal.SIGKILL} | ({LOST} if count > 1 else set()),
        }
        if set(codes) != as_expected[how]:
            raise RuntimeError(f"{how} at {point}: workers ended with {codes}: {(directory / 'log.txt').read_text()}")
        changes.append({"workers": count, "from_step": first, "to_step": point, "how": how})
    manifest = newest(directory)
    assert manifest is not None
    assert manifest.meta["step"] == STEPS
    shutil.rmtree(directory)
    return {"seed": seed, "changes": changes, "digest": manifest.digest}


def campaign(results: Path, seeds: int) -> list[dict[str, Any]]:
    """Plays the rounds that are not in the result file yet."""
    results.parent.mkdir(parents=True, exist_ok=True)
    rounds = read_results(results)
    with tempfile.TemporaryDirectory(prefix="mixflow-workers-") as name:
        reference = play(0, (1,), Path(name) / "reference")["digest"]
        for seed in range(len(rounds), seeds):
            entry = play(seed, COUNTS, Path(name))
            rounds.append(entry | {"equal": entry["digest"] == reference})
            append_result(results, rounds[-1])
            told = ", ".join(f"{c['workers']} {c['how']} at {c['to_step']}" for c in entry["changes"])
            print(f"round {seed}: {told}: {'equal' if rounds[-1]['equal'] else 'NOT EQUAL'}", flush=True)
    return rounds


def main() -> int:
    """Command line; 1 if any round was not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork loses the threads of a pool, and the child would wait for them
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rounds = campaign(options.results, options.seeds)
    unequal = [entry["seed"] for entry in rounds if not entry["equal"]]
    print(f"{len(rounds) - len(unequal)} of {len(rounds)} runs through {'-'.join(map(str, COUNTS))} workers are equal")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
