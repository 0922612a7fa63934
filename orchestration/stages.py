"""What each stage does on a worker: reads its inputs, calls the workers' code, leaves files for rank 0 to publish."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mixflow_core.correctives import SamplingCorrective
from mixflow_core.metrics import Gaussian, Moments, frechet_distance
from mixflow_core.samplers import Sampler
from orchestration.inputs import local_codec, local_copy, local_extractor
from orchestration.results import cell_file
from orchestration.storage import Storage
from orchestration.workflow import Artifact, HeldError, Stage, Workspace
from workers.adm import read_images, read_reference
from workers.checkpoint import CheckpointStore
from workers.classifier import DigitExtractor, train_features
from workers.codecs import open_codec
from workers.config import RunConfig
from workers.data import ImageSet, Split, open_shards, realised_times, to_pixels
from workers.evaluate import BATCH, Measured, Reference, join_scores, merged, patch_moments, score
from workers.extractors import ClipScore, Extractor, open_extractor
from workers.io import LocalIO
from workers.models.family import Network, build
from workers.models.sd3 import SD3
from workers.sample import PART_IMAGES, SampleSet, grid_png, read_part, sample_batch, write_part
from workers.slow_flow import measure_slow_flow, new_probe, train_probe
from workers.train import allow_tf32, post_train

log = logging.getLogger(__name__)
WAIT_S = 2.0
Tell = Callable[[str, int, int, Mapping[str, float]], None]


@dataclass
class Site:
    """A worker's surroundings.

    Attributes:
        workspace: the experiment in its storage; only rank 0's answers count.
        rank, world_size: of this worker in its group.
        device: where it computes.
        cache: local directory for fetched artifacts and memory maps, shared by the workers of a machine.
        tell: tell(stage, done, total, metrics) hands progress and metrics over without waiting (rank 0).
    """

    workspace: Workspace
    rank: int
    world_size: int
    device: torch.device
    cache: Path
    tell: Tell

    @property
    def storage(self) -> Storage:
        """The workspace's storage."""
        return self.workspace.storage

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: Any, to: int = 0) -> list[Any]:
        """Every rank's value by rank, on rank `to`; an empty list elsewhere."""
        if self.world_size == 1:
            return [value]
        box = [None] * self.world_size if self.rank == to else None
        dist.gather_object(value, box, to)
        return box or []

    def share(self, count: int) -> range:
        """This rank's part of `count` equal pieces of work."""
        return range(self.rank, count, self.world_size)


Inputs = Mapping[str, Artifact]
Work = Callable[[Site, Stage, Inputs, Path], dict[str, Any]]


def run_stages(site: Site, stages: list[Stage]) -> None:
    """Runs those of the stages that are still to do, in order, on all workers together."""
    for stage in stages:
        with ExitStack() as lease:
            inputs = _begin(site, stage, lease)
            if inputs is None:
                continue
            start = time.monotonic()
            if site.rank == 0:
                site.tell(stage.name, 0, 1, {})
            # A training that came before in this process may have left a lower precision: measuring is always in fp32.
            allow_tf32(False)
            with tempfile.TemporaryDirectory(prefix="mixflow-stage-") as scratch:
                directory = Path(scratch)
                about = WORK[stage.kind](site, stage, inputs, directory)
                if site.rank == 0:
                    about |= {"num_workers": site.world_size, "device": site.device.type}
                    site.workspace.publish(stage.name, directory, seconds=time.monotonic() - start, **about)
                    site.tell(stage.name, 1, 1, {})


def _begin(site: Site, stage: Stage, lease: ExitStack) -> Inputs | None:
    """The inputs of a stage that is now this group's; None if its result is there.

    An experiment beside this one may be at a stage that both share, such as the base: its result is waited for.
    """
    told = False
    while True:
        answer = site.agree(_try_to_begin(site.workspace, stage, lease) if site.rank == 0 else None)
        if not isinstance(answer, HeldError):
            return answer
        if site.rank == 0 and not told:
            log.warning("%s; its result is waited for", answer)
            told = True
        time.sleep(WAIT_S)  # here and not in one long collective, which would run into the group's time limit


def _try_to_begin(workspace: Workspace, stage: Stage, lease: ExitStack) -> Inputs | HeldError | None:
    if _inputs(workspace, stage) is None:
        return None
    try:
        lease.enter_context(workspace.lease(stage.name))
    except HeldError as error:
        return error
    return _inputs(workspace, stage)  # it may have been published between the first look and the lease


def _inputs(workspace: Workspace, stage: Stage) -> Inputs | None:
    """The artifacts a stage reads by kind, or None if its own is there already."""
    if workspace.artifact(stage.name):
        return None
    found = {name: workspace.artifact(name) for name in stage.inputs}
    missing = [name for name, artifact in found.items() if artifact is None]
    if missing:
        raise RuntimeError(f"{stage.name} needs {missing[0]}, which is not in the workspace")
    return {name.split("/")[0]: artifact for name, artifact in found.items() if artifact}


def _train(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """Base and arms: the same loop, from fresh weights or from the base's."""
    run = RunConfig.model_validate_json(json.dumps(stage.settings["run"]))
    data = _data(site, inputs)
    initial = _weights(site, inputs["base"]) if "base" in inputs and site.rank == 0 else None
    checkpoints = site.agree(site.workspace.checkpoints(stage.name) if site.rank == 0 else None)
    about = {"stage": stage.name, "run": stage.settings["run"]}
    store = CheckpointStore(site.storage, checkpoints, keep=run.training.keep_checkpoints, about=about)

    def report(step: int, metrics: Mapping[str, float]) -> None:
        site.tell(stage.name, step, run.training.steps, metrics)

    io = LocalIO(store, report, rank=site.rank, world_size=site.world_size)
    state = post_train(run, data["train"], data["held_out"], io, initial=initial, device=site.device)
    if site.rank == 0:
        save_file(
            {name: value.cpu().contiguous() for name, value in state.ema.items()}, directory / "weights.safetensors"
        )
        (directory / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in state.history))
        (directory / "times.json").write_text(json.dumps(realised_times(run), indent=1))
        (directory / "run.json").write_text(json.dumps(stage.settings["run"], indent=1))
    return {"steps": run.training.steps, "checkpoints": f"{site.storage.uri}/{checkpoints}"}


def _features(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """The experiment's own instruments: the classifier (last rank) and the noise-level probe (rank 0), side by side."""
    data, trained, accuracy = _data(site, inputs), None, None
    if stage.settings["classifier"] and site.rank == site.world_size - 1:
        net, accuracy = train_features(data["train"], data["held_out"], stage.settings["num_classes"])
        trained = net.state_dict()
    if site.rank == 0:
        probe = train_probe(stage.settings["path"], data["train"])
        save_file(probe.state_dict(), directory / "probe.safetensors")
    parts = site.gather((trained, accuracy))
    if site.rank != 0 or not stage.settings["classifier"]:
        return {}
    trained, accuracy = parts[-1]
    save_file(trained, directory / "classifier.safetensors")
    return {"held_out_accuracy": accuracy}


def _reference(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """What samples are compared with in each extractor's space, and in patches of pixels."""
    source = site.workspace.experiment.evaluation.reference
    clip, captions = _clip(site, inputs)
    for start in range(0, len(captions), PART_IMAGES):  # one that is too long is found before anything is trained
        assert clip, "captions come with it"
        clip.clip.tokens(captions[start : start + PART_IMAGES])
    extractors = _extractors(site, inputs["features"])
    parts: Callable[[], Iterable[torch.Tensor]]
    if source.split:
        seen = _data(site, inputs)[source.split].seen
        parts = partial(_slices, seen)
    else:
        npz = Path(local_copy("npz", source.npz or "", source.sha256 or ""))
        known = read_reference(npz)
        parts = partial(read_images, npz, PART_IMAGES) if known.num_images else partial(iter, ())
    mine: dict[int, tuple[dict[str, Measured], Moments]] = {}
    for number, pixels in enumerate(parts()):
        if number % site.world_size == site.rank:
            mine[number] = _measured(extractors, pixels)
    found = _in_order(site.gather(mine))
    if site.rank == 0:
        references = {
            kind: Reference.of(Measured.join([part[0][kind] for part in found])) for kind in extractors if found
        }
        if not source.split:
            spatial = None
            if known.spatial_mean is not None and known.spatial_covariance is not None:
                spatial = Gaussian(known.spatial_mean, known.spatial_covariance)
            features = references["inception"].features if found else None
            references["inception"] = Reference(Gaussian(known.mean, known.covariance), spatial, features)
        for kind, reference in references.items():
            reference.save(directory / f"{kind}.safetensors")
        patches = merged(part[1] for part in found)
        if patches:
            Reference(patches.gaussian).save(directory / "patches.safetensors")
    return {"num_images": sum(len(next(iter(part[0].values())).pooled) for part in found) if found else None}


def _slow_flow(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """One model's Slow Flow, on rank 0: a second of work."""
    if site.rank == 0:
        data, run = _data(site, inputs)["train"], site.workspace.experiment.sampling_run()
        probe = new_probe(run.model.in_channels, run.model.input_size)
        probe.load_state_dict(load_file(inputs["features"].fetch(site.cache) / "probe.safetensors"))
        measured = measure_slow_flow(
            _model(site, inputs, run),
            run,
            data,
            probe.eval(),
            num_samples=stage.settings["num_samples"],
            seed=stage.settings["seed"],
            device=site.device,
        )
        (directory / "slow_flow.json").write_text(json.dumps(measured, indent=1))
    return {}


def _samples(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """Every cell's images in parts, which the workers write as they are done: no process ever holds them all."""
    experiment, settings = site.workspace.experiment, stage.settings
    run, decode = experiment.sampling_run(), _decoder(site)
    model, guide = _model(site, inputs, run), _guide(site, inputs)
    path = site.agree(site.workspace.parts(stage.name) if site.rank == 0 else None)
    digest = path.path.rpartition("/")[2]  # the stage's identity
    shape = experiment.image_shape
    work = [
        (cell_file(what.sampler.name), what, number, batches)
        for what in _sample_sets(settings)
        for number, batches in enumerate(what.parts(math.prod(shape)))
    ]
    mine: dict[str, Any] = {}
    for place in site.share(len(work)):
        cell, what, number, batches = work[place]
        name = _part_name(cell, number)
        record, why_again = path.finished(name, digest)
        if why_again:
            log.warning("%s of %s is sampled again: %s", name, stage.name, why_again)
        if record is None:
            done = [sample_batch(model, run, what, n, site.device, guide=guide, decode=decode) for n in batches]
            pixels, labels = torch.cat([s.pixels for s in done]), torch.cat([s.labels for s in done])
            if number == 0:  # before the part's record, so that it is there when the part is
                path.keep(f"{cell}.png", digest, _grid(pixels, directory / f"{cell}.png"), {"evaluations": 0})
            write_part(directory / name, pixels, labels)
            evaluations = sum(s.nfe * len(s.labels) for s in done)
            record = path.keep(name, digest, directory / name, {"evaluations": evaluations})
            (directory / name).unlink()
        mine[name] = record
        if number == 0:
            mine[f"{cell}.png"] = path.finished(f"{cell}.png", digest)[0]
        if site.rank == 0:
            site.tell(stage.name, place, len(work), {})
    records = {name: record for part in site.gather(mine) for name, record in part.items()}
    for file in directory.iterdir():
        file.unlink()  # the parts are in their place
    if site.rank != 0:
        return {}
    totals = dict.fromkeys((what.sampler.name for what in _sample_sets(settings)), 0)
    for cell, what, number, _ in work:
        totals[what.sampler.name] += records[_part_name(cell, number)]["evaluations"]
    n = settings["num_samples"]
    nfe = {cell: total // n if total % n == 0 else total / n for cell, total in totals.items()}
    return {"nfe": nfe, "parts": records}


def _metrics(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """Every cell against the reference: features are extracted part by part on all workers, each cell scored on one."""
    extractors, folder = _extractors(site, inputs["features"]), inputs["reference"].fetch(site.cache)
    references = {kind: Reference.load(folder / f"{kind}.safetensors").to(site.device) for kind in extractors}
    patches = Reference.load(folder / "patches.safetensors") if (folder / "patches.safetensors").exists() else None
    clip, captions = _clip(site, inputs)
    cells = sorted(inputs["samples"].manifest.meta["nfe"])
    scores: dict[str, Any] = {}
    for first in range(0, len(cells), site.world_size):
        for owner, cell in enumerate(cells[first : first + site.world_size]):
            mine: dict[int, Any] = {}
            for number, (pixels, labels) in _parts(site, inputs["samples"], cell):
                fits = _fits(clip, pixels, [captions[i] for i in labels.tolist()]) if clip else None
                mine[number] = (*_measured(extractors, pixels), fits)
            parts = site.gather(mine, to=owner)
            if site.rank == owner:
                kept = _in_order(parts)
        if site.rank < len(cells) - first:
            found = [
                score(kind, Measured.join([part[0][kind] for part in kept]), references[kind], site.device)
                for kind in extractors
            ]
            if patches:
                moments = merged(part[1] for part in kept)
                assert moments, "a cell has images"
                found.append({"fd_patches": frechet_distance(moments, patches.gaussian)})
            if clip:
                found.append({"clip_score": float(torch.cat([part[2] for part in kept]).double().mean())})
            scores[cells[first + site.rank]] = join_scores(found)
        if site.rank == 0:
            site.tell(stage.name, first, len(cells), {})
    everything: dict[str, Any] = {}
    for part in site.gather(scores):
        everything.update(part)
    if site.rank == 0:
        (directory / "metrics.json").write_text(json.dumps(everything, indent=1, sort_keys=True))
    return {}


WORK: dict[str, Work] = {
    "base": _train,
    "arms": _train,
    "features": _features,
    "reference": _reference,
    "slow-flow": _slow_flow,
    "samples": _samples,
    "metrics": _metrics,
}


def _sample_sets(settings: Mapping[str, Any]) -> list[SampleSet]:
    corrective = SamplingCorrective(**settings["corrective"])
    return [
        SampleSet(
            _sampler(sampler),
            settings["num_samples"],
            settings["batch_size"],
            settings["seed"],
            settings["label_law"],
            corrective,
        )
        for sampler in settings["samplers"]
    ]


def _sampler(settings: Mapping[str, Any]) -> Sampler:
    return Sampler(**{**settings, "guidance_interval": tuple(settings["guidance_interval"])})


def _grid(pixels: torch.Tensor, path: Path) -> Path:
    """The sheet of a cell's first images: a report holds one for each arm and cell."""
    side = pixels.shape[-1]
    count, columns = (100, 20) if side < 64 else (20, 10)
    grid_png(pixels[:count], str(path), columns=columns, enlarge=max(1, 32 // side))
    return path


def _part_name(cell: str, number: int) -> str:
    return f"{cell}-{number:05d}.parquet"


def _fits(clip: ClipScore, pixels: torch.Tensor, captions: list[str]) -> torch.Tensor:
    starts = range(0, len(pixels), BATCH)
    return torch.cat([clip.score(pixels[n : n + BATCH], captions[n : n + BATCH]).cpu() for n in starts])


def _slices(pixels: np.ndarray) -> Iterator[torch.Tensor]:
    for start in range(0, len(pixels), PART_IMAGES):
        yield torch.from_numpy(np.require(pixels[start : start + PART_IMAGES], requirements="W"))


def _parts(site: Site, samples: Artifact, cell: str) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    """This rank's parts of a cell, by number."""
    for number in count(site.rank, site.world_size):
        name = _part_name(cell_file(cell), number)
        if name not in samples.manifest.files:
            return
        yield number, read_part(samples.fetch(site.cache) / name)


def _measured(extractors: Mapping[str, Extractor], pixels: torch.Tensor) -> tuple[dict[str, Measured], Moments]:
    return {kind: Measured.of(its, pixels) for kind, its in extractors.items()}, patch_moments(pixels)


def _in_order(parts: list[dict[int, Any]]) -> list[Any]:
    """Numbered results of all ranks in the order of their numbers; empty on the ranks that got none."""
    return [result for _, result in sorted((item for part in parts for item in part.items()), key=lambda item: item[0])]


def _extractors(site: Site, features: Artifact) -> dict[str, Extractor]:
    """The experiment's networks by kind, CLIP aside, which scores images by itself."""
    found: dict[str, Extractor] = {}
    for config in site.workspace.experiment.evaluation.extractors:
        if config.kind == "digits":
            path = features.fetch(site.cache) / "classifier.safetensors"
            found["digits"] = DigitExtractor(path, features.manifest.files[path.name].sha256, site.device)
        elif config.kind != "clip":
            found[config.kind] = open_extractor(local_extractor(config), site.device)
    return found


def _clip(site: Site, inputs: Inputs) -> tuple[ClipScore | None, list[str]]:
    for config in site.workspace.experiment.evaluation.extractors:
        if config.kind == "clip":
            captions = _data(site, inputs)["train"].captions
            assert captions, "clip was checked to have captions"
            here = local_extractor(config)
            return ClipScore(here.weights, here.sha256, site.device), captions.captions
    return None, []


def _data(site: Site, inputs: Inputs) -> dict[Split, ImageSet]:
    artifact = inputs["data"]
    return open_shards(artifact.fetch(site.cache), artifact.manifest, site.cache / "images")


def _weights(site: Site, artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.fetch(site.cache) / "weights.safetensors")


def _model(site: Site, inputs: Inputs, run: RunConfig) -> Network:
    """The network of a stage: an arm's or the base's weights, or an arm's adapters on the base's."""
    model = build(run.model).initialise(0)
    given = [_weights(site, inputs[kind]) for kind in ("base", "arms") if kind in inputs]
    answers = [model.load_state_dict(weights, strict=False) for weights in given]
    wrong = set.intersection(*(set(answer.missing_keys) for answer in answers))
    wrong.update(name for answer in answers for name in answer.unexpected_keys)
    if wrong:
        raise RuntimeError(f"weights must be those of the model, but {min(wrong)} is missing or not part of it")
    if isinstance(model, SD3):
        captions = _data(site, inputs)["train"].captions
        assert captions, "data was checked to have captions"
        model.set_captions(captions.text, captions.pooled)
    return model.to(site.device).eval()


def _guide(site: Site, inputs: Inputs) -> Network | None:
    guide = site.workspace.experiment.guide
    if guide is None or "guide" not in inputs:
        return None
    model = build(guide.model)
    model.load_state_dict(_weights(site, inputs["guide"]))
    return model.to(site.device).eval()


def _decoder(site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
    """Latents, or pixels as numbers, to uint8 pixels on the CPU."""
    config = site.workspace.experiment.codec
    if config is None or config.kind == "identity":
        return to_pixels
    codec = open_codec(local_codec(config), site.device)
    return lambda latents: codec.decode(latents.to(site.device)).cpu()
