"""What an experiment computes and writes, counted from its settings before anything is there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from orchestration.experiment import Experiment, is_captioned
from orchestration.workflow import Stage
from workers.config import Training
from workers.cost import CAPTION_TOKENS, Cost
from workers.encode import FEATURE_PATCH
from workers.models.sd3 import SD3Config

MILLION = 1_000_000
DINOV2_B = 768  # width of REPA's usual alignment targets, where no projector says another


def encoded_bytes(experiment: Experiment, images: Mapping[str, int], captions: int = 0) -> int:
    """What data.images become, uncompressed: numbers of latents hardly compress.

    Args:
        experiment: with data.images and a codec, whose latents its model fits.
        images: of the source, by split; mirrored copies are added here.
        captions: distinct ones, 0 with class labels.
    """
    settings, codec, model = experiment.data.images, experiment.codec, experiment.model
    assert settings is not None, "only images are encoded"
    assert codec is not None, "and by a codec, which is given with them"
    moments = 2 if codec.kind == "vae" else 1  # mean and standard deviation
    number = 1 if codec.kind == "identity" else 4  # bytes
    image = moments * number * model.in_channels * model.input_size**2 + 8  # and its label
    if settings.features:
        width = (getattr(model, "projector_dims", ()) or (DINOV2_B,))[0]
        image += 2 * (codec.image_size // FEATURE_PATCH) ** 2 * width
    pixels = math.prod(experiment.image_shape) if codec.description else 0
    rows = {"train": images["train"] * (2 if settings.flip else 1), "held_out": images["held_out"]}
    seen = sum(rows.values()) if settings.keep_pixels == "all" else rows["held_out"]
    total = sum(rows.values()) * image + seen * pixels
    if captions and isinstance(model, SD3Config):
        embedding = CAPTION_TOKENS * model.joint_attention_dim + model.pooled_projection_dim
        total += 2 * (captions + 1) * embedding  # and the empty one
    return total


def bytes_for_a_million(experiment: Experiment) -> int | None:
    """What a million training images become, each with a caption of its own if any; None without data.images."""
    if not experiment.data.images:
        return None
    captions = MILLION if is_captioned(experiment.model) else 0
    return encoded_bytes(experiment, {"train": MILLION, "held_out": 0}, captions)


def sample_bytes(experiment: Experiment, images: int) -> int:
    """So many samples, as pixels."""
    return math.prod(experiment.image_shape) * images


def whole(experiment: Experiment, cost: Cost) -> dict[str, Any]:
    """Steps and bytes of all runs and samples of an experiment, whatever is done already."""
    arms = {experiment.arm_run(name, 0).model_dump_json() for name, arm in experiment.arms.items() if arm.train}
    runs, base = len(arms) * experiment.num_pairs, experiment.base.train
    cells = sum(len(experiment.evaluation.cells_of(experiment.base_of(pair))) for pair in range(experiment.num_pairs))
    images = cells * len(experiment.arms) * experiment.evaluation.num_samples
    return {
        "arm_steps": experiment.training.steps,
        "num_trained_arms": len(arms),
        "num_pairs": experiment.num_pairs,
        "all_steps": runs * experiment.training.steps + (experiment.bases * base.steps if base else 0),
        "all_run_bytes": runs * cost.run_bytes(experiment.training)
        + (experiment.bases * cost.run_bytes(base) if base else 0),
        "all_sample_bytes": sample_bytes(experiment, images),
    }


def trainings_of(stages: Iterable[Stage]) -> list[Training]:
    """The trainings among these stages; one that arms share which differ in their sampling alone stands once."""
    runs = [stage.settings["run"] for stage in stages if "training" in stage.settings.get("run", {})]
    distinct = {json.dumps(run, sort_keys=True): run["training"] for run in runs}
    return [Training.model_validate(training) for training in distinct.values()]
