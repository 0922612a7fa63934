"""Tiny third-party models with random weights, written to disk in the layouts of their libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workers.codecs import directory_hash
from workers.manifest import measure


def tiny_vae(directory: Path, *, seed: int = 0, latent_channels: int = 4, **stated: float | None) -> str:
    """An AutoencoderKL whose latents have an eighth of the image's side; returns its directory_hash.

    Its config.json states no other factors than `stated`, as those of Stable Diffusion's first autoencoders.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
    )
    _scatter(vae, seed).save_pretrained(directory)
    path = directory / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if not name.endswith("_factor")}
    path.write_text(json.dumps({**config, **stated}))
    return directory_hash(directory)


def tiny_dinov2(directory: Path, registers: bool = True, *, seed: int = 0) -> str:
    """A DINOv2 of width 12 with patches of 14 px and a 5 x 5 table of positions; returns its directory_hash."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    shape = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 70,
        "patch_size": 14,
    }
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=4))
    else:
        model = Dinov2Model(Dinov2Config(**shape))
    _scatter(model, seed).save_pretrained(directory)
    return directory_hash(directory)


def tiny_clip(directory: Path, *, seed: int = 0, tokens: int = 12) -> str:
    """A CLIP of so many tokens and images of 28 px, with the files of published ones; returns its directory_hash."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    signs = [chr(code) for code in range(33, 127)]
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    words = [*signs, *(f"{sign}</w>" for sign in signs), *(a + b for a, b in merges)]
    vocab = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=tokens).save_pretrained(directory)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    text = {**shape, **special, "vocab_size": len(vocab), "max_position_embeddings": tokens}
    vision = {**shape, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    _scatter(CLIPModel(config), seed).save_pretrained(directory)
    preprocess = {
        "crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 28,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return directory_hash(directory)


def tiny_rae_decoder(file: Path, *, seed: int = 0, grid: int = 2) -> str:
    """RAE's decoder for latents (12, grid, grid) and patches of 16 px, with 2 heads; returns the file's SHA-256."""
    width, mlp_width = 16, 24
    shapes = {
        "decoder_embed.weight": (width, 12),
        "decoder_embed.bias": (width,),
        "decoder_pos_embed": (1, grid * grid + 1, width),
        "trainable_cls_token": (1, 1, width),
        "decoder_norm.weight": (width,),
        "decoder_norm.bias": (width,),
        "decoder_pred.weight": (16 * 16 * 3, width),
        "decoder_pred.bias": (16 * 16 * 3,),
    }
    for layer in ("decoder_layers.0", "decoder_layers.1"):
        for name, (outputs, inputs) in {
            "attention.attention.query": (width, width),
            "attention.attention.key": (width, width),
            "attention.attention.value": (width, width),
            "attention.output.dense": (width, width),
            "intermediate.dense": (mlp_width, width),
            "output.dense": (width, mlp_width),
        }.items():
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = (outputs, inputs), (outputs,)
        for name in ("layernorm_before", "layernorm_after"):
            shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (width,)
    numbers = np.random.default_rng(seed)
    weights = {name: torch.from_numpy(numbers.normal(0, 0.4, shape)).float() for name, shape in shapes.items()}
    return save_tensors(file, weights)


def tiny_rae_statistics(file: Path, *, seed: int = 0, grid: int = 2) -> str:
    """Mean and variance of latents (12, grid, grid); returns the file's SHA-256."""
    numbers = np.random.default_rng(seed)
    mean, var = numbers.normal(0, 1, (12, grid, grid)), numbers.uniform(0.01, 2, (12, grid, grid))
    return save_tensors(file, {"mean": torch.from_numpy(mean).float(), "var": torch.from_numpy(var).float()})


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> str:
    """Writes tensors as the file's ending says; returns its SHA-256."""
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return measure(file).sha256


def _scatter(model: nn.Module, seed: int) -> nn.Module:
    """Random weights everywhere, also where libraries begin at zero or one, so that no part can be left out unseen."""
    numbers = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.from_numpy(numbers.normal(0, 0.3, parameter.shape)).float()
            parameter.copy_(value + 1 if "norm" in name and name.endswith("weight") else value)
    return model.eval()
