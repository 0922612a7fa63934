"""Kills a training run with SIGKILL at random moments, starts it again until it is done, and compares the result.

    python tests/benchmarks/kill_campaign.py --kills 200

One round is one run with one to four kills, then restarts with the same command until it finishes. A round is equal
when the files of its last checkpoint (weights, averaged weights, optimiser, metric history) are, by SHA-256, those of
the run that was never killed, and the newest checkpoint could be loaded after each kill. Each round is one JSON line in
the result file, and a campaign that was itself stopped goes on after the rounds that are there.

Kills come at random times (`random`), or when the process is about to put some file of some checkpoint in place
(`writing`), which leaves a torn checkpoint behind. Runs are forked from this process, which has imported torch and
started no thread, so that a start takes milliseconds instead of seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # AdamW imports it on its first use: a second that each child would spend anew
from campaigns import append_result, read_results

from orchestration.storage import Storage, open_storage
from workers.checkpoint import CheckpointStore, TrainState
from workers.config import RunConfig
from workers.data import ImageSet
from workers.disk import scratch_directory
from workers.io import RunIO
from workers.manifest import Manifest
from workers.train import post_train

RESULTS = Path(__file__).parent / "results" / "kill_campaign.jsonl"
CHECKPOINTS = "checkpoints"
STEPS, CHECKPOINT_EVERY, FILES_A_CHECKPOINT = 120, 6, 6  # the sixth file is the manifest
RUN = RunConfig.model_validate_json(
    json.dumps(
        {
            "model": {
                "input_size": 8,
                "patch_size": 4,
                "in_channels": 1,
                "hidden_size": 16,
                "depth": 1,
                "num_heads": 2,
                "num_classes": 10,
            },
            "mixture": {"time_law": "beta", "slowing_law": "interval", "gamma": 0.8, "target_time": "m"},
            "training": {
                "steps": STEPS,
                "global_batch_size": 16,
                "learning_rate": 0.01,
                "ema_decay": 0.9,
                "log_every": 2,
                "checkpoint_every": CHECKPOINT_EVERY,
            },
            "seed": 3,
        }
    )
)


def images(count: int, seed: int) -> ImageSet:
    """Random pixels; what the images show does not matter here."""
    numbers = np.random.default_rng(seed)
    return ImageSet(numbers.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8), numbers.integers(0, 10, count))


def train(directory: Path, kill_at_write: int | None) -> None:
    """The run, from its newest checkpoint; with `kill_at_write` it dies before that file is put in place."""
    storage = open_storage(str(directory))
    if kill_at_write is not None:
        _die_at_write(storage, kill_at_write)
    store = CheckpointStore(storage, CHECKPOINTS, keep=RUN.training.keep_checkpoints, about={})
    post_train(RUN, images(100, 0), images(32, 1), RunIO(store, lambda step, metrics: None))


def _die_at_write(storage: Storage, number: int) -> None:
    """Makes the storage send SIGKILL to its process instead of making its write number `number` (0, 1, ...)."""
    writes = itertools.count()

    def deadly(write: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            if next(writes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args)

        return counted

    for name in ("_copy_in", "put_new"):  # the content files, then the manifest
        setattr(storage, name, deadly(getattr(storage, name)))


def fork(directory: Path, work: Callable[[], int | None]) -> int:
    """Starts work in a child, with log and scratch in the directory, whose exit code it answers; the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with (directory / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        tempfile.tempdir = str(directory / "scratch")
        code = work() or 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


def finish(directory: Path) -> str:
    """Runs to the end and returns the digest of the last checkpoint's files."""
    _, status = os.waitpid(fork(directory, lambda: train(directory, None)), 0)
    if status:
        raise RuntimeError(f"the restarted run failed with status {status}: {(directory / 'log.txt').read_text()}")
    manifest = newest(directory)
    assert manifest is not None
    assert manifest.meta["step"] == STEPS
    return manifest.digest


def newest(directory: Path) -> Manifest | None:
    """The manifest of the newest complete checkpoint."""
    storage = open_storage(str(directory))
    path = CheckpointStore(storage, CHECKPOINTS, keep=1, about={}).newest()
    return storage.manifest(path) if path else None


def loads(directory: Path) -> bool:
    """Whether the newest checkpoint is read, with the step of its manifest; of none there is nothing to read."""
    manifest, storage = newest(directory), open_storage(str(directory))
    if manifest is None:
        return True
    path = CheckpointStore(storage, CHECKPOINTS, keep=1, about={}).newest()
    with scratch_directory() as scratch:
        return TrainState.read(storage.fetch(path, scratch / "it")).step == manifest.meta["step"]


def num_torn(directory: Path) -> int:
    """Checkpoint directories without a manifest."""
    return sum(not (path / "manifest.json").exists() for path in (directory / CHECKPOINTS).glob("step-*"))


def kill_once(directory: Path, aim: str, numbers: random.Random, duration: float) -> dict[str, Any]:
    """Starts or restarts the run and kills it; what was aimed at and how far the run had come."""
    manifest = newest(directory)
    steps_left = STEPS - (manifest.meta["step"] if manifest else 0)
    torn_before, start = num_torn(directory), time.monotonic()
    if aim == "writing":
        at_write = numbers.randrange(max(1, steps_left // CHECKPOINT_EVERY * FILES_A_CHECKPOINT))
        pid = fork(directory, lambda: train(directory, at_write))
    else:
        pid = fork(directory, lambda: train(directory, None))
        time.sleep(numbers.random() * duration * steps_left / STEPS)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the run failed by itself: {(directory / 'log.txt').read_text()}")
    manifest = newest(directory)
    return {
        "aim": aim,
        "killed": os.WIFSIGNALED(status),  # False: the run was done before the kill came
        "loads": loads(directory),
        "after_s": round(time.monotonic() - start, 4),
        "step_reached": manifest.meta["step"] if manifest else 0,
        "torn": num_torn(directory) > torn_before,
    }


def play_round(number: int, kills: int, reference: str, duration: float, scratch: Path) -> dict[str, Any]:
    """One run, killed `kills` times and brought to its end."""
    numbers, directory = random.Random(number), _fresh(scratch / f"round-{number}")
    made: list[dict[str, Any]] = []
    while len(made) < kills and (not made or made[-1]["killed"]):
        made.append(kill_once(directory, numbers.choice(["random", "writing"]), numbers, duration))
    digest = finish(directory)
    shutil.rmtree(directory)
    kept = [kill for kill in made if kill["killed"]]
    return {
        "seed": number,
        "kills": kept,
        "digest": digest,
        "equal": digest == reference and all(kill["loads"] for kill in made),
    }


def _fresh(directory: Path) -> Path:
    (directory / "scratch").mkdir(parents=True)
    return directory


def campaign(results: Path, kills: int) -> list[dict[str, Any]]:
    """Plays rounds until there are at least `kills` kills, the rounds in the result file included."""
    results.parent.mkdir(parents=True, exist_ok=True)
    rounds = read_results(results)
    with tempfile.TemporaryDirectory(prefix="mixflow-kills-") as name:
        scratch = Path(name)
        finish(_fresh(scratch / "warm-up"))
        start = time.monotonic()
        reference = finish(_fresh(scratch / "reference"))
        duration = time.monotonic() - start
        print(f"a run of {STEPS} steps takes {duration:.2f} s; {len(rounds)} rounds are there", flush=True)
        while (made := sum(len(entry["kills"]) for entry in rounds)) < kills:
            number = len(rounds)
            wanted = min(random.Random(f"kills of {number}").randint(1, 4), kills - made)
            rounds.append(play_round(number, wanted, reference, duration, scratch))
            append_result(results, rounds[-1])
            print(f"round {number}: {_brief(rounds[-1])}", flush=True)
    return rounds


def _brief(entry: dict[str, Any]) -> str:
    kills = ", ".join(
        f"{kill['aim']} at step {kill['step_reached']}{' torn' * kill['torn']}" for kill in entry["kills"]
    )
    return f"{kills or 'no kill'}: {'equal' if entry['equal'] else 'NOT EQUAL'}"


def main() -> int:
    """Command line; 1 if any round was not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork loses the threads of a pool, and the child would wait for them
    rounds = campaign(options.results, options.kills)
    kills = [kill for entry in rounds for kill in entry["kills"]]
    unequal = [entry["seed"] for entry in rounds if not entry["equal"]]
    print(
        f"{len(kills)} kills in {len(rounds)} rounds, {sum(kill['torn'] for kill in kills)} left a torn checkpoint; "
        f"{len(rounds) - len(unequal)} rounds equal, {len(unequal)} not{f': {unequal}' if unequal else ''}"
    )
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
