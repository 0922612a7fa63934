"""`mixflow import` and `mixflow export`: weights between runs and the layouts of their own ecosystems."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestration.bridge import NO_COUNTERPART, simpletuner_settings, transport_change
from orchestration.experiment import Experiment
from orchestration.recipe import TO_BE_GIVEN
from orchestration.results import cell_file
from orchestration.run import Place
from orchestration.wording import one_line
from orchestration.workflow import Workspace
from workers.adm import write_samples
from workers.disk import scratch_directory
from workers.manifest import measure
from workers.models.checkpoints import family_of, infer_config, load_weights, save_weights
from workers.models.mismatch import check_architecture
from workers.models.sd3 import SD3Config, beside_adapters, load_sd3, save_lora, save_sd3
from workers.sample import read_part

FILES = (".safetensors", ".pt")
LABELS = ("num_classes", "class_dropout_prob")
INFERABLE = {"sit": ("num_heads", *LABELS, "projector_depth"), "ddt": (*LABELS, "depth")}


def import_weights(source: Path, target: Path, *, family: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a published checkpoint, finds out what it is, and writes it as one file with the same tensors.

    Args:
        source: a `.pt`, `.pth` or `.safetensors` file, or a diffusers directory of SD3.
        target: the file to write, `.safetensors` or `.pt`; it must not exist.
        family: `sit`, `repa` or `rae`, where the file does not say it.
        given: settings that the file does not say, see infer_config.

    Returns:
        `model` and `base`, the sections of an experiment file that use it.

    Raises:
        ValueError: the source cannot be read or is of no known family, or the target cannot be written.
    """
    _check_target(target)
    if not source.exists():
        raise ValueError(f"the checkpoint to import must exist, got {str(source)!r}; correct the path")
    if source.is_dir() and family:
        raise ValueError(f"--family must be left out for a diffusers directory, which is SD3's, got {family!r}")
    if source.is_dir():
        model, weights = _read_sd3(source, given)
    else:
        weights = load_weights(source)
        known = _check_given(weights, given)
        try:
            config = infer_config(weights, family=family, **given)
        except ValueError as error:
            name = str(error).split(" ")[0]
            raise ValueError(f"{error}; give --set {name}=..." if name in known else str(error)) from error
        check_architecture(weights, config, source.name, section="")
        model = asdict(config)
    save_weights(weights, target)
    base = {"checkpoint": str(target.absolute()), "sha256": measure(target).sha256}
    return {"model": json.loads(json.dumps(model)), "base": base}


def _read_sd3(source: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model section and the weights of a diffusers directory, after checking one against the other."""
    unknown = sorted(given.keys() - {"input_size", "num_classes"})
    if unknown:
        raise ValueError(f"--set must be one of input_size, num_classes for SD3, got {unknown[0]!r}; correct it")
    _check_whole(given)
    fields, weights = load_sd3(source)
    patch = fields["patch_size"]
    # The latent's side and the number of captions are the data set's, which a file does not know: any will do.
    ours = {"input_size": patch if type(patch) is int and patch > 0 else 1, "num_classes": 1, **given}
    try:
        config = TypeAdapter(SD3Config).validate_json(json.dumps({**fields, **ours}))
    except ValidationError as error:
        text = one_line(error, SD3Config)
        raise ValueError(f"{'--set' if text.split()[0] in given else f'{source}/config.json:'} {text}") from error
    check_architecture(weights, config, source.name, section="config.json's ")
    return {"family": "sd3", "input_size": TO_BE_GIVEN, "num_classes": TO_BE_GIVEN, **fields, **given}, weights


def _check_given(weights: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The settings that a file of this family leaves open, after checking that only such are given."""
    known = list(INFERABLE.get(family_of(weights) or "", sorted({*INFERABLE["sit"], *INFERABLE["ddt"]})))
    if family_of(weights) == "sit" and "projectors.0.0.weight" not in weights:
        known.remove("projector_depth")
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ValueError(f"--set must be one of {', '.join(known)} for this file, got {unknown[0]!r}; leave it out")
    share, depth = given.get("class_dropout_prob", 0.0), given.get("depth", [1, 1])
    if type(share) not in (int, float):
        raise ValueError(f"--set class_dropout_prob must be a number, got {share!r}; correct it")
    if not isinstance(depth, list) or len(depth) != 2 or any(type(value) is not int for value in depth):
        raise ValueError(f"--set depth must be two whole numbers, encoder and decoder, got {depth!r}; correct it")
    _check_whole({name: value for name, value in given.items() if name not in ("class_dropout_prob", "depth")})
    return known


def _check_whole(given: Mapping[str, Any]) -> None:
    """Refuses values that are no whole numbers."""
    for name, value in given.items():
        if type(value) is not int:
            raise ValueError(f"--set {name} must be a whole number, got {value!r}; correct it")


def export_weights(
    experiment: Experiment, place: Place, arm: str, replicate: int, target: Path, *, adapters: bool
) -> dict[str, Any]:
    """Writes a run's averaged weights in the layout of its family.

    Args:
        experiment: whose run.
        place: where it is kept.
        arm: an arm that trains, or `base`.
        replicate: which of its runs, or which base.
        target: `.pt` (the state dict under `ema`, which the published samplers of SiT, REPA and RAE read),
            `.safetensors` (the bare state dict), or for SD3 a directory in diffusers' layout.
        adapters: of a LoRA run, write the adapters alone instead of the merged transformer.

    Raises:
        ValueError: there is no such run, it is not done, or the target does not fit its family or exists.
    """
    names = ["base", *(name for name, its in experiment.arms.items() if its.train)]
    if arm not in names:
        raise ValueError(f"the arm to export must be one of {', '.join(names)}, got {arm!r}")
    runs = experiment.bases if arm == "base" else experiment.num_pairs
    if not 0 <= replicate < runs:
        raise ValueError(f"replicate must lie in [0, {runs - 1}], got {replicate}")
    _check_target(target, directory=isinstance(experiment.model, SD3Config))
    workspace = Workspace(experiment, place.storage)
    stage = experiment.base_stage(replicate) if arm == "base" else f"arms/{arm}/{replicate}"
    weights = _weights(workspace, stage)
    config = experiment.model
    if isinstance(config, SD3Config):
        base = None if arm == "base" else experiment.base_stage(experiment.base_of(replicate))
        _export_sd3(workspace, config, weights, target, adapters=adapters, base=base)
    elif adapters:
        raise ValueError("adapters must not be asked of a model without LoRA; leave --adapters out")
    else:
        save_weights(weights, target)
    return {"stage": stage, "written": str(target.absolute()), "model": json.loads(json.dumps(asdict(config)))}


def export_samples(
    experiment: Experiment, place: Place, arm: str, pair: int, cell: str | None, target: Path
) -> dict[str, Any]:
    """Writes a cell's samples as ADM's evaluator reads them, one part in memory at a time.

    Args:
        experiment: whose samples.
        place: where they are kept.
        arm: of the experiment.
        pair: which of its runs.
        cell: `<sampler><steps>/s<scale>`, None for the primary one.
        target: an `.npz` that does not exist.

    Raises:
        ValueError: there are no such samples, they have no three colours, or the target cannot be written.
    """
    cells = {sampler.name: sampler for sampler in experiment.evaluation.samplers}
    cell = cell or experiment.evaluation.primary.partition("/")[2]
    for what, value, known in (("arm", arm, list(experiment.arms)), ("cell", cell, list(cells))):
        if value not in known:
            raise ValueError(f"the {what} to export must be one of {', '.join(known)}, got {value!r}")
    if not 0 <= pair < experiment.num_pairs:
        raise ValueError(f"replicate must lie in [0, {experiment.num_pairs - 1}], got {pair}")
    channels, height, width = experiment.image_shape
    if channels != 3:
        raise ValueError(f"samples must have 3 colours for ADM's evaluator, got {channels}")
    _check_target(target, endings=(".npz",))
    stage = f"samples/{arm}/{pair}"
    artifact = Workspace(experiment, place.storage).artifact(stage)
    if artifact is None:
        raise ValueError(f"{stage} must be done before it is exported; run `mixflow sample` with the same --set")
    names = sorted(
        n for n in artifact.manifest.files if re.fullmatch(rf"{re.escape(cell_file(cell))}-\d{{5}}\.parquet", n)
    )
    if not names:
        raise ValueError(
            f"{stage} must have the cell {cell}, which is sampled from the first base alone; give --replicate 0 to "
            f"{experiment.replicates - 1}"
        )
    batches = (read_part(io.BytesIO(artifact.read(name)))[0] for name in names)
    write_samples(target, batches, (experiment.evaluation.num_samples, height, width, channels))
    return {"stage": stage, "cell": cell, "written": str(target.absolute())}


def export_mixture(experiment: Experiment, arm: str, target: Path) -> dict[str, Any]:
    """Writes an arm's mixture for other trainers; it needs no finished run.

    Args:
        experiment: whose arm.
        arm: one that trains.
        target: `.json`: keys of SimpleTuner's config.json; `.py`: the change to a SiT-style transport, explained.

    Raises:
        ValueError: it cannot be expressed there, or the target cannot be written.
    """
    _check_target(target, endings=(".json", ".py"))
    answer: dict[str, Any] = {"stage": f"mixture of {arm}", "written": str(target.absolute())}
    if target.suffix == ".py":
        target.write_text(transport_change(experiment, arm))
        return answer
    settings = simpletuner_settings(experiment, arm)
    target.write_text(json.dumps(settings, indent=2) + "\n")
    return {**answer, "settings": settings, "no_counterpart": list(NO_COUNTERPART)}


def _export_sd3(
    workspace: Workspace,
    config: SD3Config,
    weights: dict[str, Any],
    target: Path,
    *,
    adapters: bool,
    base: str | None,
) -> None:
    """`base` is the stage whose weights an arm's adapters go with; None for the base itself."""
    if not config.lora_rank or base is None:
        if adapters:
            raise ValueError("adapters must not be asked of weights without LoRA; leave --adapters out")
        save_sd3(target, config, weights)
    elif adapters:
        save_lora(target, config, weights)
    else:
        save_sd3(target, config, {**beside_adapters(_weights(workspace, base), weights), **weights})


def _weights(workspace: Workspace, stage: str) -> dict[str, Any]:
    artifact = workspace.artifact(stage)
    if artifact is None:
        raise ValueError(f"{stage} must be done before it is exported; run `mixflow train` with the same --set")
    with scratch_directory() as scratch:
        return load_weights(artifact.fetch(scratch) / "weights.safetensors")


def _check_target(target: Path, *, directory: bool = False, endings: tuple[str, ...] = FILES) -> None:
    if directory != (target.suffix not in endings):
        rule = "be a directory, diffusers' layout" if directory else f"end in {' or '.join(endings)}"
        raise ValueError(f"the target must {rule}, got {str(target)!r}")
    if target.exists():
        raise ValueError(f"the target must not exist, got {str(target)!r}; remove it or choose another")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"the target's directory must exist, got {str(target)!r}; make it")
