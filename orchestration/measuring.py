"""What measuring does on a worker: the experiment's own instruments, the reference, and every cell's metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mixflow_core.metrics import Gaussian, Moments, frechet_distance
from orchestration.given import local_copy, local_extractor
from orchestration.site import Inputs, Site, data_of, part_name
from orchestration.workflow import Artifact, Stage
from workers.adm import read_images, read_reference
from workers.classifier import DigitExtractor, train_features
from workers.evaluate import (
    BATCH,
    Measured,
    Reference,
    join_scores,
    merged,
    metric_names,
    patch_moments,
    score,
)
from workers.extractors import ClipScore, Extractor, open_extractor
from workers.sample import PART_IMAGES, read_part
from workers.slow_flow import train_probe


def features(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """The experiment's own instruments: the classifier (last rank) and the noise-level probe (rank 0), side by side."""
    data, trained, accuracy = data_of(site, inputs), None, None
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


def reference(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """What samples are compared with in each extractor's space, and in patches of pixels."""
    source = site.workspace.experiment.evaluation.reference
    clip, captions = _clip(site, inputs)
    for start in range(0, len(captions), PART_IMAGES):  # one that is too long is found before anything is trained
        assert clip, "captions come with it"
        clip.clip.tokens(captions[start : start + PART_IMAGES])
    extractors = open_extractors(site, inputs["features"])
    parts: Callable[[], Iterable[torch.Tensor]]
    if source.split:
        seen = data_of(site, inputs)[source.split].seen
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


def metrics(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """Every cell against the reference: features are extracted part by part on all workers, each cell scored on one."""
    extractors, folder = open_extractors(site, inputs["features"]), inputs["reference"].fetch(site.cache)
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
                mine[number] = (*_measured(extractors, pixels), fits, labels)
            parts = site.gather(mine, to=owner)
            if site.rank == owner:
                kept = _in_order(parts)
                _check_count(site, stage, cell, sum(len(part[3]) for part in kept))
        if site.rank < len(cells) - first:
            classes = torch.cat([part[3] for part in kept]) if stage.settings["label_law"] == "equal" else None
            found = [
                score(kind, Measured.join([part[0][kind] for part in kept]), references[kind], site.device, classes)
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


def _check_count(site: Site, stage: Stage, cell: str, found: int) -> None:
    """A manifest that names fewer parts than there were would give the metrics of fewer images."""
    wanted, samples = site.workspace.experiment.evaluation.num_samples, stage.inputs[0]
    if found != wanted:
        raise ValueError(f"{samples} must hold {wanted} images of {cell}, got {found}; --force {samples} redoes them")


def _fits(clip: ClipScore, pixels: torch.Tensor, captions: list[str]) -> torch.Tensor:
    starts = range(0, len(pixels), BATCH)
    return torch.cat([clip.score(pixels[n : n + BATCH], captions[n : n + BATCH]).cpu() for n in starts])


def _slices(pixels: np.ndarray) -> Iterator[torch.Tensor]:
    for start in range(0, len(pixels), PART_IMAGES):
        yield torch.from_numpy(np.require(pixels[start : start + PART_IMAGES], requirements="W"))


def _parts(site: Site, samples: Artifact, cell: str) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    """This rank's parts of a cell, by number."""
    for number in count(site.rank, site.world_size):
        name = part_name(cell, number)
        if name not in samples.manifest.files:
            return
        yield number, read_part(samples.fetch(site.cache) / name)


def _measured(extractors: Mapping[str, Extractor], pixels: torch.Tensor) -> tuple[dict[str, Measured], Moments]:
    return {kind: Measured.of(its, pixels) for kind, its in extractors.items()}, patch_moments(pixels)


def _in_order(parts: list[dict[int, Any]]) -> list[Any]:
    """Numbered results of all ranks in the order of their numbers; empty on the ranks that got none."""
    return [result for _, result in sorted((item for part in parts for item in part.items()), key=lambda item: item[0])]


def open_extractors(site: Site, features: Artifact, metric: str = "") -> dict[str, Extractor]:
    """The experiment's networks by kind, or those of one metric; CLIP aside, which scores images by itself."""
    found: dict[str, Extractor] = {}
    for config in site.workspace.experiment.evaluation.extractors:
        if metric and metric not in metric_names(config.kind).values():
            continue
        if config.kind == "digits":
            path = features.fetch(site.cache) / "classifier.safetensors"
            found["digits"] = DigitExtractor(path, features.manifest.files[path.name].sha256, site.device)
        elif config.kind != "clip":
            found[config.kind] = open_extractor(local_extractor(config), site.device)
    return found


def _clip(site: Site, inputs: Inputs) -> tuple[ClipScore | None, list[str]]:
    for config in site.workspace.experiment.evaluation.extractors:
        if config.kind == "clip":
            captions = data_of(site, inputs)["train"].captions
            assert captions, "clip was checked to have captions"
            here = local_extractor(config)
            return ClipScore(here.weights, here.sha256, site.device), captions.captions
    return None, []
