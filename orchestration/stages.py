"""What each stage does on a worker: reads its inputs, calls the workers' code, leaves files for rank 0 to publish."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mixflow_core.samplers import Sampler
from orchestration.results import cell_file
from orchestration.storage import Storage
from orchestration.workflow import Artifact, HeldError, Stage, Workspace
from workers.checkpoint import CheckpointStore
from workers.codecs import open_codec
from workers.config import RunConfig
from workers.data import ImageSet, Split, open_shards, realised_times, to_pixels
from workers.evaluate import DigitFeatures, reference_of, score, train_features
from workers.io import LocalIO
from workers.models.family import Network, build
from workers.models.sd3 import SD3
from workers.sample import SampleSet, grid_png, sample_batch
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

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value by rank, on rank 0; an empty list elsewhere."""
        if self.world_size == 1:
            return [value]
        box = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, box, 0)
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
    """The measuring instruments: the classifier (last rank) and the noise-level probe (rank 0), side by side."""
    data, accuracy = _data(site, inputs), 0.0
    if site.rank == site.world_size - 1:
        net, accuracy = train_features(data["train"], data["held_out"], stage.settings["num_classes"])
        trained = net.state_dict()
    if site.rank == 0:
        probe = train_probe(stage.settings["path"], data["train"])
        save_file(probe.state_dict(), directory / "probe.safetensors")
    parts = site.gather((trained, accuracy) if site.rank == site.world_size - 1 else None)
    if site.rank == 0:
        trained, accuracy = parts[-1]
        save_file(trained, directory / "classifier.safetensors")
    return {"held_out_accuracy": accuracy}


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
    """Every cell's images: logical batches shared out over the workers, put together in their order."""
    run, settings = site.workspace.experiment.sampling_run(), stage.settings
    model, nfe = _model(site, inputs, run), {}
    guide, decode = _guide(site, inputs), _decoder(site)
    cells = [Sampler(**sampler) for sampler in settings["samplers"]]
    for done, sampler in enumerate(cells):
        what = SampleSet(sampler, settings["num_samples"], settings["batch_size"], settings["seed"])
        mine = {
            n: sample_batch(model, run, what, n, site.device, guide=guide, decode=decode)
            for n in site.share(what.num_batches)
        }
        parts = site.gather({n: (s.pixels.numpy(), s.labels.numpy(), s.nfe) for n, s in mine.items()})
        if site.rank == 0:
            batches = [batch for _, batch in sorted(item for part in parts for item in part.items())]
            pixels, labels = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
            nfe[sampler.name] = batches[0][2]
            name = cell_file(sampler.name)
            flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), int(np.prod(pixels.shape[1:])))
            table = pa.table({"image": flat, "label": labels})
            about = {"shape": list(pixels.shape[1:]), "nfe": nfe[sampler.name]}
            pq.write_table(table.replace_schema_metadata({"mixflow": json.dumps(about)}), directory / f"{name}.parquet")
            side = pixels.shape[-1]  # a report holds a sheet for each arm and cell
            first = torch.from_numpy(pixels[: 100 if side < 64 else 20])
            columns = 20 if side < 64 else 10
            grid_png(first, str(directory / f"{name}.png"), columns=columns, enlarge=max(1, 32 // side))
            site.tell(stage.name, done + 1, len(cells), {})
    return {"nfe": nfe}


def _metrics(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """Every cell against the held-out images, cells shared out over the workers."""
    held_out = torch.from_numpy(_data(site, inputs)["held_out"].seen.copy())
    weights = load_file(inputs["features"].fetch(site.cache) / "classifier.safetensors")
    net = DigitFeatures(held_out.shape[1], held_out.shape[2], len(weights["head.bias"]))
    net.load_state_dict(weights)
    reference = reference_of(net.eval(), held_out)
    folder = inputs["samples"].fetch(site.cache)
    cells = sorted(inputs["samples"].manifest.meta["nfe"])
    mine = {cells[i]: dict(score(net, _pixels(folder, cells[i]), reference)) for i in site.share(len(cells))}
    found: dict[str, Any] = {}
    for part in site.gather(mine):
        found.update(part)
    if site.rank == 0:
        (directory / "metrics.json").write_text(json.dumps(found, indent=1, sort_keys=True))
    return {}


WORK: dict[str, Work] = {
    "base": _train,
    "arms": _train,
    "features": _features,
    "slow-flow": _slow_flow,
    "samples": _samples,
    "metrics": _metrics,
}


def _pixels(folder: Path, cell: str) -> torch.Tensor:
    table = pq.read_table(folder / f"{cell_file(cell)}.parquet")
    shape = json.loads(table.schema.metadata[b"mixflow"])["shape"]
    flat = table["image"].combine_chunks().flatten().to_numpy()
    return torch.from_numpy(flat.reshape(table.num_rows, *shape).copy())


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
    codec = open_codec(config, site.device)
    return lambda latents: codec.decode(latents.to(site.device)).cpu()
