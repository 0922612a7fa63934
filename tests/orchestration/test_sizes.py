"""Sizes that are counted beforehand, against what encoding really makes and against the experiment's own stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_sources import class_folder, pictures
from twins import HELD_OUT, IMAGES, twin

from orchestration import sizes
from orchestration.cli import main
from orchestration.experiment import Experiment
from orchestration.inputs import check_inputs
from orchestration.recipe import filled, load, read, validated
from orchestration.storage import open_storage
from orchestration.workflow import Workspace
from workers.cost import cost_of
from workers.encode import Encoder, plan_encoding
from workers.shards import captions_path, read_captions, read_shards, shard_path

CPU = torch.device("cpu")
COUNTS = {"train": IMAGES - HELD_OUT, "held_out": HELD_OUT}


def really_encoded(experiment: Experiment, directory: Path) -> tuple[int, int, int]:
    """Bytes of all arrays of the encoded shards, and number and tokens of their captions."""
    plan = plan_encoding(experiment.data.images, experiment.codec)
    directory.mkdir()
    encoder = Encoder(plan.recipe, CPU)
    for shard in plan.shards:
        encoder.encode(shard, shard_path(directory, shard.split, shard.number))
    for number, captions in enumerate(plan.caption_parts):
        encoder.encode_captions(captions, captions_path(directory, number))
    total, tables = 0, list(read_captions(directory))
    for split in ("train", "held_out"):
        for part, _ in read_shards(directory, split):
            arrays = (part.images, part.labels, part.features, part.pixels)
            total += sum(array.nbytes for array in arrays if array is not None)
    if not tables:
        return total, 0, 0
    embeddings = sum(table.text.nbytes + table.pooled.nbytes for table in tables)
    return total + embeddings, len(plan.captions), tables[0].text.shape[1]


@pytest.mark.parametrize("keep", ["all", "held_out"])
@pytest.mark.parametrize("recipe", ["sit-xl-256", "repa-xl-256", "rae-xl-256", "sd35-medium"])
def test_data_are_as_large_as_counted(recipe, keep, tmp_path, monkeypatch):
    experiment = twin(recipe, tmp_path)
    settings = experiment.data.images.model_copy(update={"keep_pixels": keep})
    experiment = experiment.model_copy(update={"data": experiment.data.model_copy(update={"images": settings})})
    found, captions, tokens = really_encoded(experiment, tmp_path / "shards")
    monkeypatch.setattr(sizes, "CAPTION_TOKENS", tokens)  # the tiny encoders have shorter texts
    assert sizes.encoded_bytes(experiment, COUNTS, captions) == found
    assert bool(captions) == (recipe == "sd35-medium")


def test_pixels_are_as_large_as_counted_and_planned(tmp_path, capsys, monkeypatch):
    source = class_folder(tmp_path / "images", pictures(IMAGES))
    images = f"{{images: {{source: {source}, held_out: {HELD_OUT}, flip: true, keep_pixels: all}}}}"
    codec = "codec={kind: identity, image_size: 32}"
    sets = [f"data={images}", codec, "model.input_size=32", "model.in_channels=3", "model.patch_size=4"]
    experiment = load("quickstart", sets)
    assert sizes.encoded_bytes(experiment, COUNTS) == really_encoded(experiment, tmp_path / "shards")[0]
    workspace = Workspace(experiment, open_storage(str(tmp_path / "ws")))
    assert check_inputs(workspace).to_encode == COUNTS
    monkeypatch.setenv("MIXFLOW_WORKSPACE", str(tmp_path / "ws"))
    argv = ["plan", "quickstart", *(part for value in sets for part in ("--set", value))]
    assert main([*argv, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    data = (2 * COUNTS["train"] + COUNTS["held_out"]) * (3 * 32 * 32 + 8) / 2**30
    assert plan["storage_gib_by_part"]["data"] == pytest.approx(data)
    assert plan["storage_gib"] == pytest.approx(sum(plan["storage_gib_by_part"].values()))
    assert main(argv) == 0
    assert f"\nencode      {IMAGES} images to {data:,.3f} GiB of data\n" in capsys.readouterr().out


def test_a_million_images_of_the_published_recipes():
    """By hand: ImageNet with flips is 2 x 2 x 4 x 32 x 32 numbers an image, RAE's latents 2 x 768 x 16 x 16."""
    label = 8

    def of(recipe: str) -> int | None:
        return sizes.bytes_for_a_million(validated(recipe, filled(read(recipe))))

    assert of("sit-xl-256") == 1e6 * 2 * (4 * 2 * 4 * 32 * 32 + label)
    assert of("repa-xl-256") == 1e6 * (4 * 2 * 4 * 32 * 32 + 2 * 256 * 768 + label)
    assert of("rae-xl-256") == 1e6 * 2 * (4 * 768 * 16 * 16 + label)
    embedding = 2 * (333 * 4096 + 2048)
    assert of("sd35-medium") == 1e6 * (4 * 2 * 16 * 64 * 64 + label) + (1e6 + 1) * embedding
    assert of("quickstart") is None


@pytest.mark.parametrize("recipe", ["quickstart", "correctives", "paper-ablation", "paper-steps"])
def test_steps_and_samples_of_a_whole_experiment_are_those_of_its_stages(recipe, tmp_path):
    experiment = load(recipe)
    stages = Workspace(experiment, open_storage(str(tmp_path))).stages.values()
    total = sizes.whole(experiment, cost_of(experiment.model))
    assert total["all_steps"] == sum(training.steps for training in sizes.trainings_of(stages))
    pixels = [s.settings["num_samples"] * len(s.settings["samplers"]) for s in stages if s.kind == "samples"]
    side = experiment.model.input_size
    assert total["all_sample_bytes"] == sum(pixels) * side * side
