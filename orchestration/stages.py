"""What each stage does on a worker: reads its inputs, calls the workers' code, leaves files for rank 0 to publish."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from orchestration import measuring
from orchestration.given import local_codec
from orchestration.lease import WAIT_S, HeldError
from orchestration.objective import Objective
from orchestration.results import cell_file
from orchestration.site import Inputs, Site, Work, data_of, part_name, weights_of
from orchestration.workflow import Stage, Workspace
from workers.checkpoint import CheckpointStore
from workers.codecs import open_codec
from workers.config import RunConfig
from workers.data import realised_times, to_pixels
from workers.disk import room_for, scratch_directory
from workers.io import RunIO, StoppedError
from workers.models.family import Network, build
from workers.models.sd3 import SD3
from workers.sample import SampleSet, grid_png, sample_batch, sample_sets, samplers_of, write_part
from workers.slow_flow import measure_slow_flow, new_probe
from workers.train import post_train, set_precision

log = logging.getLogger(__name__)
_Part = tuple[str, SampleSet, int, range]  # file of its cell, the cell's set, its number in it, and its batches


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
            # Whatever came before in this process: measuring and sampling are always in fp32, with the same kernels.
            set_precision("fp32")
            with scratch_directory() as directory:
                about = WORK[stage.kind](site, stage, inputs, directory)
                if site.agree(site.lease is not None and not site.lease.is_ours()):
                    raise StoppedError(f"stopped in {stage.name}, which is another process's by now")
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
        answer = site.agree(_try_to_begin(site, stage, lease) if site.rank == 0 else None)
        if isinstance(answer, StoppedError):
            raise answer
        if not isinstance(answer, HeldError):
            return answer
        if site.rank == 0 and not told:
            log.warning("%s; its result is waited for", answer)
            told = True
        time.sleep(WAIT_S)  # here and not in one long collective, which would run into the group's time limit


def _try_to_begin(site: Site, stage: Stage, lease: ExitStack) -> Inputs | HeldError | StoppedError | None:
    workspace = site.workspace
    if _inputs(workspace, stage) is None:
        return None
    if site.stopping():
        return StoppedError(f"stopped before {stage.name}")
    try:
        site.lease = lease.enter_context(workspace.lease(stage.name))
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


def _train(site: Site, stage: Stage, inputs: Inputs, directory: Path, judge: Objective | None = None) -> dict[str, Any]:
    """Base, arms and trials: the same loop, from fresh weights or from the base's."""
    run = RunConfig.model_validate_json(json.dumps(stage.settings["run"]))
    data = data_of(site, inputs)
    initial = weights_of(site, inputs["base"]) if "base" in inputs and site.rank == 0 else None
    checkpoints = site.agree(site.workspace.checkpoints(stage.name) if site.rank == 0 else None)
    about = {"stage": stage.name, "run": stage.settings["run"]}
    store = CheckpointStore(site.storage, checkpoints, keep=run.training.keep_checkpoints, about=about)

    def report(step: int, metrics: Mapping[str, float]) -> None:
        site.tell(stage.name, step, run.training.steps, metrics)

    io = RunIO(store, report, rank=site.rank, world_size=site.world_size, stopping=site.is_to_stop)
    state = post_train(run, data["train"], data["held_out"], io, initial=initial, device=site.device, judge=judge)
    if site.rank == 0:
        weights = {name: value.cpu().contiguous() for name, value in state.ema.items()}
        with room_for(directory / "weights.safetensors", sum(value.nbytes for value in weights.values())):
            save_file(weights, directory / "weights.safetensors")
        (directory / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in state.history))
        (directory / "times.json").write_text(json.dumps(realised_times(run), indent=1))
        (directory / "run.json").write_text(json.dumps(stage.settings["run"], indent=1))
    return {"steps": run.training.steps, "checkpoints": f"{site.storage.uri}/{checkpoints}"}


def _trial(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """A trial of a sweep: its training with the objective measured on the way, and a sheet of its samples."""
    (what,), guide, decode = sample_sets(stage.settings["samples"]), _guide(site, inputs), _decoder(site)
    about = _train(site, stage, inputs, directory, Objective(site, stage, inputs, what, guide, decode))
    if site.rank == 0:
        set_precision("fp32")
        run = site.workspace.experiment.sampling_run()
        given = [weights_of(site, inputs["base"]), load_file(directory / "weights.safetensors")]
        model = _network(site, inputs, run, given[-1:] if not getattr(run.model, "lora_rank", 0) else given)
        pixels = sample_batch(model, run, what, 0, site.device, guide=guide, decode=decode).pixels
        _grid(pixels, directory / f"{cell_file(what.sampler.name)}.png")
    return about


def _slow_flow(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """One model's Slow Flow, on rank 0: seconds of work."""
    if site.rank == 0:
        data, run = data_of(site, inputs)["train"], site.workspace.experiment.sampling_run()
        probe = new_probe(run.model.in_channels, run.model.input_size)
        probe.load_state_dict(load_file(inputs["features"].fetch(site.cache) / "probe.safetensors"))
        measured = measure_slow_flow(
            _model(site, inputs, run),
            run,
            data,
            probe.eval(),
            samplers_of(stage.settings),
            num_samples=stage.settings["num_samples"],
            batch_size=stage.settings["batch_size"],
            seed=stage.settings["seed"],
            device=site.device,
            guide=_guide(site, inputs),
        )
        (directory / "slow_flow.json").write_text(json.dumps(measured, indent=1))
    return {}


def _samples(site: Site, stage: Stage, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """Every cell's images in parts, which the workers write as they are done: no process ever holds them all."""
    experiment, settings = site.workspace.experiment, stage.settings
    run, decode = experiment.sampling_run(), _decoder(site)
    model, guide = _model(site, inputs, run), _guide(site, inputs)
    parts = site.agree(site.workspace.parts(stage.name) if site.rank == 0 else None)
    digest = parts.path.rpartition("/")[2]  # the stage's identity
    shape = experiment.image_shape
    work: list[_Part] = [
        (cell_file(what.sampler.name), what, number, batches)
        for what in sample_sets(settings)
        for number, batches in enumerate(what.parts(math.prod(shape)))
    ]
    mine: dict[str, Any] = {}
    stopped = False
    costs = [what.sampler.expected_nfe * what.num_images(batches) for _, what, _, batches in work]
    for place in site.share(costs):
        if stopped := site.is_to_stop():
            break
        cell, what, number, batches = work[place]
        name = part_name(cell, number)
        record, why_again = parts.finished(name, digest)
        if why_again:
            log.warning("%s of %s is sampled again: %s", name, stage.name, why_again)
        sheet = parts.finished(f"{cell}.png", digest)[0] if number == 0 else None
        if record is None or (number == 0 and sheet is None):
            done = [sample_batch(model, run, what, n, site.device, guide=guide, decode=decode) for n in batches]
            pixels, labels = torch.cat([s.pixels for s in done]), torch.cat([s.labels for s in done])
            if number == 0:  # before the part's record, so that it is there when the part is
                sheet = parts.keep(f"{cell}.png", digest, _grid(pixels, directory / f"{cell}.png"), {"evaluations": 0})
            with room_for(directory / name, pixels.nbytes):
                write_part(directory / name, pixels, labels)
            evaluations = sum(s.nfe * len(s.labels) for s in done)
            record = parts.keep(name, digest, directory / name, {"evaluations": evaluations})
            (directory / name).unlink()
        mine[name] = record
        if sheet is not None:
            mine[f"{cell}.png"] = sheet
        if site.rank == 0:
            site.tell(stage.name, place, len(work), {})
    found = site.gather((mine, stopped))
    # Together: a worker that is through with its parts would wait here for one that left alone.
    if site.agree(any(left for _, left in found)):
        raise StoppedError(f"stopped in {stage.name}, whose finished parts are kept")
    records = {name: record for part, _ in found for name, record in part.items()}
    for file in directory.iterdir():
        file.unlink()  # the parts are in their place
    if site.rank != 0:
        return {}
    try:
        return {"nfe": _evaluations(work, records), "parts": records}
    except ValueError as error:
        where = f"{parts.storage.uri}/{parts.records}"
        raise ValueError(f"{stage.name}: {error}; remove {where} and run again") from error


def _evaluations(work: list[_Part], records: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Network evaluations an image, by cell.

    Raises:
        ValueError: the parts of a cell took unlike many, which only an adaptive solver may.
    """
    totals, images, each = dict[str, int](), dict[str, int](), dict[str, float]()
    for cell, what, number, batches in work:
        name, evaluations = what.sampler.name, records[part_name(cell, number)]["evaluations"]
        totals[name] = totals.get(name, 0) + evaluations
        images[name] = images.get(name, 0) + what.num_images(batches)
        an_image = evaluations / what.num_images(batches)
        if what.sampler.method != "dopri5" and each.setdefault(cell, an_image) != an_image:
            raise ValueError(
                f"the parts of {cell} must take equally many evaluations an image, got {each[cell]:g} and {an_image:g}"
            )
    return {
        name: total / images[name] if total % images[name] else total // images[name] for name, total in totals.items()
    }


WORK: dict[str, Work] = {
    "base": _train,
    "arms": _train,
    "trials": _trial,
    "features": measuring.features,
    "reference": measuring.reference,
    "slow-flow": _slow_flow,
    "samples": _samples,
    "metrics": measuring.metrics,
}


def _grid(pixels: torch.Tensor, path: Path) -> Path:
    """The sheet of a cell's first images: a report holds one for each arm and cell."""
    side = pixels.shape[-1]
    count, columns = (100, 20) if side < 64 else (20, 10)
    grid_png(pixels[:count], str(path), columns=columns, enlarge=max(1, 32 // side))
    return path


def _model(site: Site, inputs: Inputs, run: RunConfig) -> Network:
    """The network of a stage: an arm's or the base's weights, or an arm's adapters on the base's."""
    return _network(site, inputs, run, [weights_of(site, inputs[kind]) for kind in ("base", "arms") if kind in inputs])


def _network(site: Site, inputs: Inputs, run: RunConfig, given: list[dict[str, torch.Tensor]]) -> Network:
    """The network with these weights, the later ones over the earlier ones."""
    model = build(run.model).initialise(0)
    answers = [model.load_state_dict(weights, strict=False) for weights in given]
    wrong = set.intersection(*(set(answer.missing_keys) for answer in answers))
    wrong.update(name for answer in answers for name in answer.unexpected_keys)
    if wrong:
        raise RuntimeError(f"weights must be those of the model, but {min(wrong)} is missing or not part of it")
    if isinstance(model, SD3):
        captions = data_of(site, inputs)["train"].captions
        assert captions, "data was checked to have captions"
        model.set_captions(captions.text, captions.pooled)
    return model.to(site.device).eval()


def _guide(site: Site, inputs: Inputs) -> Network | None:
    guide = site.workspace.experiment.guide
    if guide is None or "guide" not in inputs:
        return None
    model = build(guide.model)
    model.load_state_dict(weights_of(site, inputs["guide"]))
    return model.to(site.device).eval()


def _decoder(site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
    """Latents, or pixels as numbers, to uint8 pixels on the CPU."""
    config = site.workspace.experiment.codec
    if config is None or config.kind == "identity":
        return to_pixels
    codec = open_codec(local_codec(config), site.device)
    return lambda latents: codec.decode(latents.to(site.device)).cpu()
