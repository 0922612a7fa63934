"""Images from S3: bringing them to a machine against bare range reads, and how long the loop waits for a batch."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_loop import CPU, local_io
from bench_note import Figure, Outcome, figure

from orchestration.recipe import load
from orchestration.s3_storage import AT_ONCE, PART
from orchestration.storage import Storage, open_storage
from workers import train
from workers.config import RunConfig
from workers.data import ImageSet, Split, digits
from workers.manifest import Manifest
from workers.models.sit import SiTConfig
from workers.shards import open_shards, write_shards

sys.path.append(str(Path(__file__).parents[1] / "servers"))
from s3_servers import BUCKET, ceph, ceph_is_installed, s3_variables

ROUNDS, ROUNDS_QUICK = 7, 2
IMAGES, IMAGES_QUICK = 32768, 2048  # of 16 KiB: posterior moments of a 256 px image's latents
ROWS = 4096
AIM_SHARE, AIM_WAIT_PERCENT = 0.9, 3.0
BLOCKS = {"digits32": 300, "quickstart": 1500}  # steps
LATENTS = 300  # steps


def loader(quick: bool) -> Outcome:
    """A data set's way from a real S3 server into memory maps, and from there into the loop."""
    count = IMAGES_QUICK if quick else IMAGES
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        home = Path(scratch)
        with ceph(home / "ceph") as server, mock.patch.dict(os.environ, s3_variables(server.endpoint)):
            splits = {"train": _moments(count), "held_out": _moments(64)}
            write_shards(splits, home / "shards", num_classes=1000, rows=ROWS)
            storage = open_storage(f"s3://{BUCKET}/data")
            manifest = storage.publish(home / "shards", "set")
            figures += _bringing(storage, manifest, home, ROUNDS_QUICK if quick else ROUNDS)
            latents = open_shards(storage.fetch("set", home / "fetched"), manifest, home / "maps")
            figures += _waiting("latents from S3", _latents_run(), latents, LATENTS // 10 if quick else LATENTS)
    for recipe, steps in BLOCKS.items():
        experiment = load(recipe)
        assert experiment.data.digits
        splits = digits(experiment.data.digits.image_size, experiment.data.digits.held_out)
        figures += _waiting(recipe, experiment.arm_run("mixflow", 0), splits, steps // 10 if quick else steps)
    about = (
        f"{count} posterior moments of 16 KiB in Parquet shards of {ROWS}, in Ceph RADOS Gateway on the same cores. "
        "Bare: every byte by boto3's range reads of 8 MiB, four at once, thrown away. Kept bare: four files at once, "
        "each part written and hashed as it comes. Ours: Storage.fetch, which writes files and compares their SHA-256. "
        "They take turns; hashing and writing take time from the server where it has no core of its own. Unpacking "
        "checks every value and writes the memory maps that all workers of a machine share, once. Waiting: the share "
        "of the loop's time in which the next batch was not there yet, one worker, one torch thread, with batches made "
        "by a thread beside it: of posterior moments of that set by the memory maps in a small model, and of the "
        "recipes' digits."
    )
    return Outcome("loader", about, figures, {"images": count, "rows": ROWS, "steps": {**BLOCKS, "latents": LATENTS}})


def has_server() -> bool:
    """Whether the S3 server can be started."""
    return ceph_is_installed()


def _moments(count: int) -> ImageSet:
    numbers = np.random.default_rng(0)
    images = np.abs(numbers.standard_normal((count, 8, 32, 32), dtype=np.float32)).astype(np.float16)
    codec = {"kind": "vae", "posterior": "sample", "scale": 0.18215, "shift": 0.0}
    return ImageSet(images, np.arange(count) % 1000, codec)


def _bringing(storage: Storage, manifest: Manifest, home: Path, rounds: int) -> list[Figure]:
    mib = sum(entry.size for entry in manifest.files.values()) / 2**20
    times: dict[str, list[float]] = {"bare": [], "kept bare": [], "ours": [], "unpacking": []}
    for number in range(rounds + 1):
        steps: dict[str, Callable[[], Any]] = {
            "bare": lambda: _read_all(storage, manifest),
            "kept bare": lambda: _keep_all(storage, manifest, home / "kept"),
            "ours": lambda: storage.fetch("set", home / "fetched"),
            "unpacking": lambda: open_shards(home / "fetched", manifest, home / "maps"),
        }
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
        shutil.rmtree(home / "fetched")
        shutil.rmtree(home / "maps")
        shutil.rmtree(home / "kept")
    share, kept = (
        tuple(bare / ours for bare, ours in zip(times[which], times["ours"], strict=True))
        for which in ("bare", "kept bare")
    )
    met = float(np.median(share)) >= AIM_SHARE
    return [
        *(figure(f"{name}, of {mib:.0f} MiB", "MiB/s", [mib / s for s in of]) for name, of in times.items()),
        Figure("speed of ours over bare", "", share, f"at least {AIM_SHARE:g}", met),
        Figure("speed of ours over kept bare", "", kept),
    ]


def _read_all(storage: Any, manifest: Manifest) -> None:
    client = storage.client.boto
    parts = [
        (f"data/set/{name}", start, min(start + PART, entry.size) - 1)
        for name, entry in manifest.files.items()
        for start in range(0, entry.size, PART)
    ]

    def read(part: tuple[str, int, int]) -> int:
        key, first, last = part
        return len(client.get_object(Bucket=BUCKET, Key=key, Range=f"bytes={first}-{last}")["Body"].read())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert sum(pool.map(read, parts)) == sum(entry.size for entry in manifest.files.values())


def _keep_all(storage: Any, manifest: Manifest, into: Path) -> None:
    client = storage.client.boto
    into.mkdir()

    def keep(name: str) -> None:
        size, digest = manifest.files[name].size, hashlib.sha256()
        with (into / name).open("wb") as file:
            for start in range(0, size, PART):
                byte_range = f"bytes={start}-{min(start + PART, size) - 1}"
                data = client.get_object(Bucket=BUCKET, Key=f"data/set/{name}", Range=byte_range)["Body"].read()
                digest.update(data)
                file.write(data)
        assert digest.hexdigest() == manifest.files[name].sha256

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(keep, manifest.files))


def _latents_run() -> RunConfig:
    """A small model on 256 px images' latents: on a published size nothing would ever be waited for."""
    model = SiTConfig(
        input_size=32, patch_size=4, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=1000
    )
    run = load("quickstart").arm_run("mixflow", 0)
    return RunConfig.model_validate(run.model_copy(update={"model": model}))


def _waiting(name: str, run: RunConfig, splits: Mapping[Split, ImageSet], steps: int) -> list[Figure]:
    short = {"steps": steps, "log_every": steps // 10, "checkpoint_every": steps}
    run = RunConfig.model_validate(run.model_copy(update={"training": run.training.model_copy(update=short)}))
    waited, prefetch = list[float](), train._prefetch

    def timed(*arguments: Any) -> Iterator[Any]:
        batches = prefetch(*arguments)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waited.append(time.perf_counter() - start)
            if batch is None:
                return
            yield batch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch,
        mock.patch.object(train, "_prefetch", timed),
    ):
        marks: list[tuple[float, int]] = []
        io = local_io(scratch, lambda step, metrics: marks.append((time.perf_counter(), len(waited))))
        train.post_train(run, splits["train"], splits["held_out"], io, device=CPU)
    torch.set_num_threads(threads)
    shares = [
        100 * sum(waited[first:last]) / (end - start)
        for (start, first), (end, last) in pairwise(marks[:-1])  # the last is the checkpoint's
    ]
    return [figure(f"{name}: waiting for data", "% of the time", shares, AIM_WAIT_PERCENT)]
