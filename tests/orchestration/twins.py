"""Tiny twins of the published recipes: the same families, classes and stages, small and random, on real images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from image_sources import captioned_folder, class_folder, pictures
from pydantic import TypeAdapter
from tiny_models import tiny_clip, tiny_dinov2, tiny_rae_decoder, tiny_rae_statistics, tiny_vae
from tiny_sd3 import randomise, tiny_text_encoders

from mixflow_core.samplers import Sampler
from orchestration import encode
from orchestration.convert import import_weights
from orchestration.experiment import Experiment
from orchestration.recipe import read, validated
from workers.codecs import directory_hash
from workers.encode import Plan
from workers.manifest import measure
from workers.models.family import ModelConfig, build
from workers.models.sd3 import SD3Config, save_sd3

RECIPES = ("sit-b-256", "sit-xl-256", "sit-xl-512", "repa-xl-256", "rae-xl-256", "rae-xl-512", "sd35-medium")
IMAGES, HELD_OUT, IMAGE_SIZE = 260, 110, 32
SIT = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
DDT = {
    "input_size": 2,
    "in_channels": 12,
    "hidden_size": [8, 16],
    "depth": [2, 1],
    "num_heads": [2, 2],
    "num_classes": 10,
}
SD3 = {
    "input_size": 4, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 40, "caption_projection_dim": 16, "pooled_projection_dim": 20, "pos_embed_max_size": 12,
    "sample_size": 16, "dual_attention_layers": [0], "num_classes": 10,
}  # fmt: skip
MODELS = {
    "sit": SIT,
    "repa": {**SIT, "projector_dims": [12], "projector_depth": 1, "projector_width": 8},
    "rae": DDT,
    "sd35": SD3,
}
EXTRACTORS = {"sit": "fd_digits", "repa": "fd_digits", "rae": "fd_dinov2", "sd35": "clip_score"}
TRAINING = {
    "steps": 4, "global_batch_size": 16, "num_shards": 8, "log_every": 2, "checkpoint_every": 2, "precision": "fp32",
    "sharded": False, "learning_rate": 0.01,
}  # fmt: skip


def twin(recipe: str, home: Path, **changes: Any) -> Experiment:
    """The experiment of a recipe with everything in it made small; `changes` go into its model section."""
    raw = read(recipe)
    family = recipe.split("-")[0]
    home.mkdir(parents=True, exist_ok=True)
    raw["model"] |= MODELS[family] | changes
    raw["training"] |= TRAINING | {"shards_per_pass": min(1, raw["training"].get("shards_per_pass", 0))}
    raw["replicates"] = 2
    raw["cluster"] = {"num_workers": 1}
    raw["evaluation"] |= {"num_samples": 100, "sample_batch_size": 50, "slow_flow_samples": 20}
    samplers: list[dict[str, Any]] = []
    for sampler in raw["evaluation"]["samplers"]:
        small = sampler | {"num_steps": 3}
        if small not in samplers:
            samplers.append(small)
    raw["evaluation"] |= {"samplers": samplers, **_extractors(family, home)}
    raw["evaluation"]["primary"] = f"{EXTRACTORS[family]}/{Sampler(**samplers[0]).name}"
    raw["evaluation"].pop("reference", None)
    _give_images(raw, home, captioned=family == "sd35")
    _give_codec(raw["codec"], home)
    if raw["data"]["images"].get("features"):
        raw["data"]["images"] |= {"features": str(home / "dino"), "features_sha256": tiny_dinov2(home / "dino")}
    raw["base"] |= _base(raw["model"], home, family)
    if "guide" in raw:
        raw["guide"]["model"] |= {**DDT, "hidden_size": [8, 8], "depth": [1, 1]}
        raw["guide"] |= _weights(raw["guide"]["model"], home / "guide.pt", seed=1)
    return validated(recipe, raw)


def _extractors(family: str, home: Path) -> dict[str, Any]:
    """The classifier for latents of autoencoders; DINOv2 for RAE; CLIP too where there are captions."""
    if family == "rae":
        digest = tiny_dinov2(home / "judge", registers=False)
        return {"extractors": [{"kind": "dinov2", "weights": str(home / "judge"), "sha256": digest}]}
    found: list[dict[str, str]] = [{"kind": "digits"}]
    if family == "sd35":
        found.append({"kind": "clip", "weights": str(home / "clip"), "sha256": tiny_clip(home / "clip", tokens=40)})
    return {"extractors": found}


def _give_images(raw: dict[str, Any], home: Path, *, captioned: bool) -> None:
    source = (captioned_folder if captioned else class_folder)(home / "images", pictures(IMAGES))
    raw["data"]["images"] |= {"source": source, "held_out": HELD_OUT, "rows_per_shard": 64, "keep_pixels": "all"}
    if captioned:
        tiny_text_encoders(home / "text")
        raw["data"]["images"] |= {
            "text_encoders": str(home / "text"),
            "text_encoders_sha256": directory_hash(home / "text"),
        }


def _give_codec(codec: dict[str, Any], home: Path) -> None:
    codec["image_size"] = IMAGE_SIZE
    if codec["kind"] == "vae":
        codec |= {"weights": str(home / "vae"), "sha256": tiny_vae(home / "vae")}
        if codec.get("decoder"):
            codec |= {"decoder": str(home / "vae2"), "decoder_sha256": tiny_vae(home / "vae2", seed=1)}
        return
    codec |= {"weights": str(home / "dino"), "sha256": tiny_dinov2(home / "dino"), "decoder_heads": 2}
    codec |= {"decoder": str(home / "decoder.pt"), "decoder_sha256": tiny_rae_decoder(home / "decoder.pt")}
    codec |= {"statistics": str(home / "stat.pt"), "statistics_sha256": tiny_rae_statistics(home / "stat.pt")}


def _base(model: dict[str, Any], home: Path, family: str) -> dict[str, str]:
    """A checkpoint in the layout in which the family publishes its own."""
    if family != "sd35":
        return _weights(model, home / "base.pt", seed=0, bare=family == "repa", trainer=family == "sit")
    config: Any = TypeAdapter(ModelConfig).validate_json(json.dumps({**model, "lora_rank": 0}))
    assert isinstance(config, SD3Config)
    network = build(config).initialise(0)
    randomise(network, 0)
    save_sd3(home / "transformer", config, network.state_dict())
    return dict(import_weights(home / "transformer", home / "base.safetensors", family=None, given={})["base"])


def _weights(
    model: dict[str, Any], path: Path, *, seed: int, bare: bool = False, trainer: bool = False
) -> dict[str, str]:
    config: Any = TypeAdapter(ModelConfig).validate_json(json.dumps(model))
    network = build(config).initialise(seed)
    randomise(network, seed)
    weights = network.state_dict()
    content: Any = weights if bare else {"ema": weights}
    if trainer:  # SiT's stores its arguments too
        other = {name: value + 1 for name, value in weights.items()}
        content = {"model": other, "ema": weights, "opt": {}, "args": argparse.Namespace(model="SiT-XL/2")}
    torch.save(content, path)
    return {"checkpoint": str(path), "sha256": measure(path).sha256}


def one_by_one(plan: Plan, task: encode.Task, *_: Any) -> Iterator[dict[str, Any]]:
    """In place of `encode._run`: what Ray Data would spread over its actors, one after the other in this process."""
    worker = encode.Worker(task)
    for piece in encode._pieces(plan):
        yield json.loads(worker(pa.table({"piece": [piece]}))["answer"][0].as_py())
