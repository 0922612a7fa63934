"""Encoding through Ray Data against a bare loop over the same images."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_note import Outcome, figure, overhead
from PIL import Image

from orchestration import cluster
from orchestration import encode as encoding
from orchestration.encode import Task, Worker
from orchestration.storage import open_storage
from workers.codecs import CodecConfig, centre_crop, directory_hash
from workers.encode import Images
from workers.sources import Place

AIM_PERCENT = 5.0
SHARDS, SHARDS_QUICK = 12, 3
ROWS, ROWS_QUICK = 64, 8
BATCH = 32
TIMES = "times.jsonl"


class BareLoop:
    """What one writes by hand: open, crop, encode, save; one process, one image after the other."""

    def __init__(self, codec: CodecConfig, batch_size: int, device: torch.device) -> None:
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL.from_pretrained(codec.weights).to(device).eval()
        self.size, self.batch_size, self.device = codec.image_size, batch_size, device

    @torch.no_grad()
    def encode(self, files: list[Path], out: Path) -> None:
        """Some images to one file."""
        torch.backends.cudnn.allow_tf32 = False  # as ours: latents in full fp32
        found = []
        for start in range(0, len(files), self.batch_size):
            images = [centre_crop(Image.open(file), self.size) for file in files[start : start + self.batch_size]]
            pixels = torch.from_numpy(np.stack(images)).to(self.device).float() / 127.5 - 1
            posterior = self.vae.encode(pixels).latent_dist
            found.append(torch.cat([posterior.mean, posterior.std], 1).cpu().numpy())
        np.save(out, np.concatenate(found))


class Beside(Worker):
    """The project's worker, which after each of its shards lets the bare loop encode the same images."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        torch.set_num_threads(1)
        self.bare = BareLoop(task.recipe.codec, task.recipe.settings.batch_size, self.encoder.device)
        self.home = Path(task.parts.storage.uri).parent

    def do(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        """See Worker."""
        files = [self.task.recipe.root / Place(*place).file for place in piece["shard"][2]]
        start = self._now()
        answer = super().do(piece)
        middle = self._now()
        self.bare.encode(files, self.home / "bare.npy")
        end = self._now()
        times = {
            name: {
                kind: (after - before) / len(files) for kind, before, after in zip(("wall", "cpu"), *of, strict=True)
            }
            for name, of in {"ours": (start, middle), "bare": (middle, end)}.items()
        }
        with (self.home / TIMES).open("a") as file:
            file.write(json.dumps(times) + "\n")
        return answer

    def _now(self) -> tuple[float, float]:
        if self.encoder.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def encode(quick: bool) -> Outcome:
    """orchestration.encode with one worker beside BareLoop in that worker."""
    on_gpu, rows = torch.cuda.is_available(), ROWS_QUICK if quick else ROWS
    shards = SHARDS_QUICK if quick else SHARDS
    with tempfile.TemporaryDirectory(prefix="mixflow-benchmark-") as scratch:
        home = Path(scratch)
        codec = _codec(home / "vae", on_gpu)
        settings = Images(
            source=_photographs(home / "images", rows * (shards + 1)),
            held_out=rows,
            batch_size=min(BATCH, rows),
            rows_per_shard=rows,
        )
        seconds = _run(home, settings, codec, on_gpu)
        measured = [json.loads(line) for line in (home / TIMES).read_text().splitlines()][1:]  # the first one loads
    times = {n: {kind: [of[n][kind] for of in measured] for kind in ("wall", "cpu")} for n in ("ours", "bare")}
    longer = overhead(times["ours"]["wall"], times["bare"]["wall"])
    figures = [
        *(figure(f"{name}, images a second", "1/s", [1 / s for s in of["wall"]]) for name, of in times.items()),
        figure("ours over bare, an image", "%", longer, AIM_PERCENT),
        figure("ours over bare, CPU time", "%", overhead(times["ours"]["cpu"], times["bare"]["cpu"])),
        figure("the whole stage, with the bare loop and start-up", "s", [seconds]),
    ]
    about = (
        "Photographs (JPEG, 500 x 400) to an AutoencoderKL's moments: orchestration.encode on one worker of Ray Data, "
        "from reading a shard's images to its record in the workspace, and after each shard a bare loop over the same "
        "images in that worker. One torch thread each; ours decodes in a thread beside it. Loading and start-up "
        "excluded."
    )
    shape = {"settings": settings.model_dump(mode="json"), "codec": codec.description, "gpu": on_gpu}
    return Outcome("encode", about, figures, shape)


def _run(home: Path, settings: Images, codec: CodecConfig, on_gpu: bool) -> float:
    import ray

    def tell(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        pass

    os.environ.pop("RAY_ADDRESS", None)
    start, original = time.monotonic(), encoding.Worker
    encoding.Worker = Beside  # type: ignore[misc]
    cluster.connect({})
    try:
        encoding.encode(
            open_storage(str(home / "workspace")),
            "data/benchmark",
            settings,
            codec,
            num_workers=1,
            cpus_per_worker=1.0,
            gpus_per_worker=int(on_gpu),
            tell=tell,
        )
    finally:
        encoding.Worker = original  # type: ignore[misc]
        ray.shutdown()
    return time.monotonic() - start


def _codec(directory: Path, on_gpu: bool) -> CodecConfig:
    """Stable Diffusion's autoencoder with random weights; a quarter as wide, and smaller images, on a CPU."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512) if on_gpu else (32, 64, 128, 128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
        )
    vae.save_pretrained(directory)
    side = 256 if on_gpu else 128
    return CodecConfig(
        kind="vae", image_size=side, weights=str(directory), sha256=directory_hash(directory), scale=0.18215
    )


def _photographs(root: Path, count: int) -> str:
    """Pieces of scikit-learn's two photographs, in two classes."""
    from sklearn.datasets import load_sample_image

    numbers = np.random.default_rng(0)
    for label, name in enumerate(("china.jpg", "flower.jpg")):
        photo = Image.fromarray(load_sample_image(name))
        (root / str(label)).mkdir(parents=True)
        for number in range(label, count, 2):
            left, top = (int(numbers.integers(0, most + 1)) for most in (photo.width - 500, photo.height - 400))
            piece = photo.crop((left, top, left + 500, top + 400))
            piece.save(root / str(label) / f"{number:05d}.jpg", quality=90)
    return str(root)
