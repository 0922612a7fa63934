"""What an experiment is given, checked before any worker starts: data, codecs, encoders, references, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from orchestration.differences import recall_beside
from orchestration.experiment import LEAST_HELD_OUT, Experiment
from orchestration.given import (
    files_at,
    given_base,
    given_guide,
    given_weights,
    local_codec,
    local_copy,
    local_encoders,
    local_extractor,
    of_section,
    readable,
    unreadable,
)
from orchestration.launch import cache_directory
from orchestration.retry import PREFLIGHT
from orchestration.storage import open_storage
from orchestration.workflow import Workspace
from workers import shards
from workers.adm import AdmReference, read_reference
from workers.classifier import NUM_FEATURES
from workers.codecs import CodecConfig, dino_width, latent_shape_of
from workers.data import SPLITS, Split
from workers.encode import FEATURE_PATCH, Images, plan_encoding
from workers.evaluate import PATCH, metric_names
from workers.extractors import dimension_of
from workers.manifest import measure
from workers.models.sd3 import SD3Config
from workers.pretrained import text_widths
from workers.sources import is_there, list_source

FACTS_VERSION = 2
USUAL_RMS = 0.2, 5.0  # of what a model sees; noise has 1, and published latents are scaled to it
MANY = 10  # images a feature; with fewer a warning says that a Frechet distance is biased


class Checked(NamedTuple):
    """What was found of an experiment's inputs.

    Attributes:
        warnings: for the user, a line each.
        to_encode: numbers of images that are still to be encoded, by split; empty where none are.
    """

    warnings: list[str]
    to_encode: dict[str, int]


def check_inputs(workspace: Workspace, forced: Sequence[str] = ()) -> Checked:
    """Reads everything that was given or that an earlier run left, before any worker is started.

    Args:
        workspace: of the experiment.
        forced: stages that are to be done anew, whatever an earlier run left.

    Raises:
        ValueError: data or a checkpoint that cannot be used; CorruptError: an artifact that was altered.
    """
    experiment, cache = workspace.experiment, cache_directory()
    _check_uris(workspace, forced)
    if experiment.data.shards:
        with readable("data.shards", experiment.data.shards):
            if workspace.artifact("data") is None:
                raise ValueError(
                    f"data.shards must be a directory with a manifest.json, got {experiment.data.shards!r}; "
                    "publish it, or correct the URI"
                )
    if experiment.codec:
        _check_codec(experiment, experiment.codec)
    facts, warnings, to_encode = dict[str, Any](), list[str](), dict[str, int]()
    if workspace.artifact("data") and (experiment.data.shards or "data" not in forced):
        facts = check_data(workspace)
        warnings = [*source_changes(workspace), *odd_scales(facts)]
    elif experiment.data.images and experiment.codec:
        source = readable("data.images.source", experiment.data.images.source)
        with source, of_section("data.images", *Images.model_fields):
            settings = local_encoders(experiment.data.images)
            plan = plan_encoding(settings, experiment.codec)
        if experiment.codec.description and settings.keep_pixels != "all" and "train" in _splits_seen(experiment):
            raise _lacks_pixels("train")
        found, warnings = plan.recipe.num_classes, _left_out(experiment.data.images, plan.left_out)
        facts = {split: {"num_images": count} for split, count in plan.num_rows.items()}
        to_encode = {split: sum(len(s.places) for s in plan.shards if s.split == split) for split in SPLITS}
        if found != experiment.model.num_classes:
            raise ValueError(
                f"model.num_classes must be the {found} of data.images.source, got {experiment.model.num_classes}"
            )
        _check_encoders(experiment, settings, experiment.codec.image_size)
    warnings += _check_evaluation(experiment, facts)
    for checkpoint in (given_base(experiment), given_guide(experiment)):
        if checkpoint and (checkpoint.stage in forced or workspace.artifact(checkpoint.stage) is None):
            with given_weights(checkpoint):
                pass  # readable, of the right hash and architecture
    for stage in workspace.stages.values():
        artifact = None if stage.name in forced else workspace.artifact(stage.name)
        if artifact and workspace.storage.is_local:  # elsewhere what is read is verified when it is read
            artifact.fetch(cache)
    return Checked(warnings, to_encode)


def _left_out(settings: Images, files: Sequence[str]) -> list[str]:
    if not files:
        return []
    return [
        f"data.images.source {settings.source} has files that are left out, neither images that are read nor beside "
        f"one: {len(files)}, the first {files[0]}"
    ]


def _check_uris(workspace: Workspace, forced: Sequence[str]) -> None:
    """Looks at what lies elsewhere, also where this machine has its content already: the other machines may not.

    It does so with a preflight's patience: nobody should wait for minutes to hear of a wrong address.

    Raises:
        ValueError: a URI is none, or nothing can be read there; the message names its setting.
    """
    experiment = workspace.experiment
    made_of = {  # what is of no use any more once a stage is done
        f"{given.section}.checkpoint": given.stage
        for given in (given_base(experiment), given_guide(experiment))
        if given
    } | dict.fromkeys(("data.images.features", "data.images.text_encoders"), "data")
    for name, uri in _uris(experiment):
        try:
            open_storage(uri)
        except ValueError as error:
            raise ValueError(f"{name} {str(error).removeprefix('storage ')}") from error
        stage = made_of.get(name)
        is_made = stage is not None and stage not in forced and workspace.artifact(stage) is not None
        if uri.startswith("s3://") and not is_made:
            try:
                files_at(name, uri, PREFLIGHT)
            except OSError as error:
                raise unreadable(name, uri, error) from error


def _uris(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """All that is given by path or URI, by its setting; the images' source is always a path."""
    data, evaluation = experiment.data, experiment.evaluation
    given: dict[str, str | None] = {"data.shards": data.shards, "evaluation.reference.npz": evaluation.reference.npz}
    for name in ("features", "text_encoders"):
        given[f"data.images.{name}"] = getattr(data.images, name, None)
    for name in ("weights", "decoder", "statistics"):
        given[f"codec.{name}"] = getattr(experiment.codec, name, None)
    for number, extractor in enumerate(evaluation.extractors):
        given[f"evaluation.extractors.{number}.weights"] = extractor.weights
    for checkpoint in (given_base(experiment), given_guide(experiment)):
        if checkpoint:
            given[f"{checkpoint.section}.checkpoint"] = checkpoint.uri
    return ((name, uri) for name, uri in given.items() if uri)


# ----------------------------------------------------------------------------------------------------- evaluation


def _check_evaluation(experiment: Experiment, facts: Mapping[str, Any]) -> list[str]:
    """Opens what images are compared with and in, and looks whether there are enough of them.

    Args:
        experiment: whose evaluation.
        facts: of the data, as they will be at best while they are not encoded; empty for digits still to be made.

    Returns:
        A line for a warning of each metric that will be biased or missing.

    Raises:
        ValueError: weights or a reference that cannot be used, fewer images than a covariance needs, or a primary
            metric on which no verdict can be taken.
    """
    evaluation, warnings = experiment.evaluation, list[str]()
    known, split = _known_reference(experiment), evaluation.reference.split
    split_images = facts[split]["num_images"] if split and facts else None
    missing = _check_primary(experiment, known)
    if missing:
        names = ", ".join(sorted(missing))
        warnings.append(f"evaluation.reference does not hold what {names} would be compared with: not measured")
    for number, config in enumerate(evaluation.extractors):
        if config.kind == "digits":
            dimension = NUM_FEATURES
        else:
            with of_section(f"evaluation.extractors.{number}", "weights", "sha256"):
                found_dimension = dimension_of(local_extractor(config))
            if found_dimension is None:
                continue
            dimension = found_dimension
        for setting, num_samples in _images_measured(experiment, config.kind).items():
            if dimension < num_samples < MANY * dimension:
                warnings.append(
                    f"{setting} {num_samples} is less than {MANY} times the {dimension} features of {config.kind}: "
                    "with so few its Frechet distance is much too large, and a difference may be one of that bias"
                )
            if num_samples <= dimension:
                raise ValueError(
                    f"{setting} must be more than the {dimension} features of {config.kind}, or their covariance has "
                    f"no full rank, got {num_samples}; raise it"
                )
        images_there = split_images
        if known and config.kind != "inception":  # whose statistics are given
            images_there = known.num_images or 0
        if images_there is not None and images_there <= dimension:
            mend = "leave this one out" if split else "compare with a split, or leave this one out"
            if split == "held_out":
                enough = facts["train"]["num_images"] > dimension
                mend = f"hold out more, or {'compare with train' if enough else 'leave this one out'}"
            raise ValueError(
                f"evaluation.reference must have more than the {dimension} features of {config.kind}, got "
                f"{images_there} images in {split or 'npz'}; {mend}"
            )
    _check_patches(experiment, known.num_images if known else split_images)
    return warnings


def _known_reference(experiment: Experiment) -> AdmReference | None:
    """What an npz to compare with holds; None where a split of the data is compared with."""
    evaluation, reference = experiment.evaluation, experiment.evaluation.reference
    if not reference.npz:
        return None
    with of_section("evaluation.reference", "npz", "sha256"):
        path = Path(local_copy("npz", reference.npz, reference.sha256 or ""))
        if not path.is_file():
            raise ValueError(f"npz must be a file, got {path}, which is none; correct the path")
        if (found := measure(path).sha256) != reference.sha256:
            raise ValueError(f"sha256 must be that of npz, {found}, got {reference.sha256}; correct it")
        known = read_reference(path, image_size=experiment.image_shape[1])
    kinds = [config.kind for config in evaluation.extractors]
    if "inception" not in kinds:
        raise ValueError(
            "evaluation.extractors must have inception where evaluation.reference is an npz, whose statistics are "
            f"of its features, got {', '.join(kinds)}; add it"
        )
    return known


def _images_measured(experiment: Experiment, kind: str) -> dict[str, int]:
    """The numbers of images that an extractor sees, by setting: of every cell, and of a sweep's objective."""
    found, sweep = {"evaluation.num_samples": experiment.evaluation.num_samples}, experiment.sweep
    if sweep and sweep.num_samples and experiment.objective.partition("/")[0] in metric_names(kind).values():
        found["sweep.num_samples"] = sweep.num_samples
    return found


def _check_patches(experiment: Experiment, reference_images: int | None) -> None:
    """Whether there are more patches than numbers in one, without which their covariance has no full rank."""
    evaluation, (channels, side, _) = experiment.evaluation, experiment.image_shape
    patch = min(PATCH, side)
    numbers, patches = channels * patch**2, math.ceil(side / patch) ** 2
    for name, count in (("num_samples", evaluation.num_samples), ("reference", reference_images)):
        if count is not None and count * patches <= numbers:
            raise ValueError(
                f"evaluation.{name} must have more than {numbers // patches} images, or the covariance of fd_patches "
                f"has no full rank, got {count}; take more"
            )


def _check_primary(experiment: Experiment, known: AdmReference | None) -> set[str]:
    """The metrics that a reference of statistics alone does not give: not the primary one, nor the recall beside it."""
    evaluation = experiment.evaluation
    metric, measured = evaluation.primary.partition("/")[0], set(evaluation.metrics)
    names = metric_names("inception")
    if known and known.spatial_mean is None:
        if metric == names["spatial"]:
            raise ValueError("evaluation.primary must not be sfid where evaluation.reference has no mu_s and sigma_s")
        measured.discard(names["spatial"])
    if known and known.num_images is None:
        of_images = {names["kernel"], names["precision"], names["recall"], "fd_patches"}
        if metric in of_images:
            raise ValueError(
                f"evaluation.primary must not be {metric} where evaluation.reference has no images (arr_0)"
            )
        measured -= of_images
    if any(arm.judged for arm in experiment.arms.values()):
        recall_beside(metric, measured)
    return set(evaluation.metrics) - measured


# ----------------------------------------------------------------------------------------------------------- data


def check_data(workspace: Workspace) -> dict[str, Any]:
    """Whether the data fit the model, the codec and the metrics; their facts by split, which are read once and kept.

    Raises:
        ValueError: they do not; CorruptError: they were altered.
    """
    artifact, storage = workspace.result("data"), workspace.storage
    # Kept by the data's content, because reading a large set takes hours.
    kept = f"checks/{artifact.manifest.digest[:16]}-{shards.SCHEMA_VERSION}-{FACTS_VERSION}.json"
    facts: dict[str, Any] = json.loads(storage.read(kept)) if storage.exists(kept) else {}
    directory = None if facts else artifact.fetch(cache_directory())
    for split in SPLITS:
        if directory:
            facts[split] = shards.facts_of(directory, split)
        _check_split(workspace.experiment, split, facts[split])
    if directory:
        storage.put(kept, json.dumps(facts).encode())
    return facts


def odd_scales(facts: Mapping[str, Any]) -> list[str]:
    """A line for a warning of each split whose values are far larger or smaller than the noise they are mixed with."""
    low, high = USUAL_RMS
    return [
        f"data of {split} have a root mean square of {its['rms']:.3g} where models are made for about 1; compare the "
        "codec's scale and shift with those of the data"
        for split, its in facts.items()
        if not low <= its["rms"] <= high
    ]


def source_changes(workspace: Workspace) -> list[str]:
    """A line for a warning where data that are kept were encoded from a source that holds something else by now.

    A source that is no longer there says nothing: the data are published.
    """
    settings, artifact = workspace.experiment.data.images, workspace.artifact("data")
    then = artifact.manifest.meta if artifact else {}
    if not settings or "fingerprint" not in then or not is_there(settings.source):
        return []
    try:
        source = list_source(settings.source, captions=settings.text_encoders is not None)
    except (ValueError, OSError) as error:
        found = f"cannot be listed any more ({' '.join(str(error).split())})"
    else:
        if source.fingerprint == then["fingerprint"]:
            return []
        found = f"holds {len(source.places)} images, and held {then['num_images']} when it was encoded"
        if len(source.places) == then["num_images"]:
            found += ", of other names, sizes or labels"
    return [f"data.images.source {settings.source} {found}; the encoded data are kept, --force data redoes them"]


def _check_split(experiment: Experiment, name: Split, facts: Mapping[str, Any]) -> None:
    model, codec = experiment.model, experiment.codec.description if experiment.codec else None
    if facts["codec"] != codec:
        _refuse_codec(facts["codec"], codec)
    shape = tuple(facts["shape"])
    if shape != (model.in_channels, model.input_size, model.input_size):
        raise ValueError(
            f"model.input_size and in_channels must fit the data's shape {shape}, "
            f"got {model.input_size} and {model.in_channels}"
        )
    if facts["num_classes"] != model.num_classes:
        raise ValueError(f"model.num_classes must be the data's {facts['num_classes']}, got {model.num_classes}")
    if (model.family == "sd3") != facts["has_captions"]:
        raise ValueError(
            f"data must have {'captions' if model.family == 'sd3' else 'labels'} for model.family "
            f"{model.family}, got the other; encode it for this model"
        )
    if codec is None and facts["dtype"] != "uint8":
        raise ValueError(f"data must be uint8 pixels, got {facts['dtype']} in {name}; the metrics read pixels")
    if codec is not None and facts["image_size"] is None and name in _splits_seen(experiment):
        raise _lacks_pixels(name)
    if experiment.alignment_weight and name == "train":
        _check_features(experiment, facts["features"])
    if name == "train" and facts["absent_class"] is not None and model.family != "sd3":
        raise ValueError(
            f"data must hold training images of every class, got none of class {facts['absent_class']}; add some"
        )
    if name == "held_out" and facts["num_images"] < least_held_out(experiment):
        raise ValueError(
            f"data must hold out at least {LEAST_HELD_OUT} images to compare with, got {facts['num_images']}; add some"
        )


def _lacks_pixels(split: str) -> ValueError:
    return ValueError(f"data must keep the pixels of {split}, which the metrics read; set data.images.keep_pixels: all")


def least_held_out(experiment: Experiment) -> int:
    """Held-out images without which nothing can be compared with them; 1 where nothing is."""
    return LEAST_HELD_OUT if "held_out" in _splits_seen(experiment) else 1


def _splits_seen(experiment: Experiment) -> set[str]:
    """The splits whose pixels are looked at, by the classifier or as the reference."""
    evaluation = experiment.evaluation
    by_classifier = SPLITS if any(e.kind == "digits" for e in evaluation.extractors) else ()
    return {*by_classifier, *([evaluation.reference.split] if evaluation.reference.split else [])}


def _refuse_codec(found: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None) -> None:
    if found is None or wanted is None:
        kinds = [codec["kind"] if codec else "pixels" for codec in (found, wanted)]
        raise ValueError(f"codec must be that of the data, {kinds[0]}, got {kinds[1]}; correct codec or the data")
    key = next(key for key in {**found, **wanted} if found.get(key) != wanted.get(key))
    raise ValueError(
        f"codec.{key} must be the data's {found.get(key)!r}, got {wanted.get(key)!r}; encode the data anew"
    )


def _check_features(experiment: Experiment, found: list[int] | None) -> None:
    wanted = [experiment.model.num_tokens, experiment.model.projector_dims[0]]  # type: ignore[union-attr]
    if found != wanted:
        raise ValueError(
            f"data must hold alignment features of {wanted[0]} tokens and width {wanted[1]}, got {found or 'none'}; "
            "encode them with data.images.features, or set alignment_weight: 0"
        )


# ------------------------------------------------------------------------------------------------- codecs, encoders


def _check_codec(experiment: Experiment, config: CodecConfig) -> None:
    """Opens it: hashes, files, and the shape of its latents."""
    with of_section("codec", *(field.name for field in fields(CodecConfig))):
        shape = latent_shape_of(local_codec(config))
    model = experiment.model
    if shape != (model.in_channels, model.input_size, model.input_size):
        raise ValueError(
            f"model.in_channels and input_size must fit the codec's latents {shape}, "
            f"got {model.in_channels} and {model.input_size}"
        )


def _check_encoders(experiment: Experiment, settings: Images, image_size: int) -> None:
    """Opens what makes features and embeddings of captions, and looks whether the model takes what they make."""
    model = experiment.model
    if settings.features:
        with of_section("data.images.features"):
            width = dino_width(settings.features, settings.features_sha256 or "", image_size)
        if experiment.alignment_weight:
            makes = [(image_size // FEATURE_PATCH) ** 2, width]
            takes = [model.num_tokens, model.projector_dims[0]]  # type: ignore[union-attr]
            if makes != takes:
                raise ValueError(
                    f"data.images.features must make the {takes[0]} tokens of the model, of the width "
                    f"model.projector_dims {takes[1]}, got {makes[0]} of width {makes[1]}; give the DINOv2 that fits"
                )
    if settings.text_encoders:
        assert isinstance(model, SD3Config), "the experiment was validated"
        with of_section("data.images.text_encoders"):
            widths = text_widths(Path(settings.text_encoders))
        if widths != (model.joint_attention_dim, model.pooled_projection_dim):
            raise ValueError(
                "data.images.text_encoders must make the widths model.joint_attention_dim "
                f"{model.joint_attention_dim} and pooled_projection_dim {model.pooled_projection_dim}, got {widths[0]} "
                f"and {widths[1]}; give the model's own"
            )


# -------------------------------------------------------------------------------------------------------- wording
