"""Stable Diffusion 3.5 in miniature, made offline: a transformer, its captions, and its three text encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from workers.models.sd3 import SD3, SD3Config, full_weights, is_adapter

TOKENS = 5  # of a random caption
SHAPE = {
    "input_size": 8,
    "num_classes": 3,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
    "sample_size": 16,
    "dual_attention_layers": (0, 1),
}
CLIP_WIDTHS = (8, 12)  # together the pooled width
T5_WIDTH = 40


def config(**changes: Any) -> SD3Config:
    return SD3Config(**{**SHAPE, **changes})


def randomise(model: nn.Module, seed: int, scale: float = 0.15) -> None:
    """Moves every parameter off its start: a fresh network's output is zero, which hides what it depends on."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=numbers))


def captions(shape: SD3Config, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random embeddings, one row a caption and one for the empty one."""
    numbers, rows = np.random.default_rng(seed), shape.num_classes + 1
    text = numbers.standard_normal((rows, TOKENS, shape.joint_attention_dim), np.float32)
    return text, numbers.standard_normal((rows, shape.pooled_projection_dim), np.float32)


def sd3(seed: int = 0, **changes: Any) -> SD3:
    """A random network with captions; adapters, if any, at their start."""
    shape = config(**changes)
    model = SD3(shape).initialise(seed)
    whole = SD3(config(**{**changes, "lora_rank": 0, "lora_alpha": None})).initialise(seed)
    randomise(whole, seed)
    model.load_state_dict(whole.state_dict())
    model.set_captions(*captions(shape))
    return model


def theirs(model: SD3) -> nn.Module:
    """Diffusers' own transformer with the same weights, adapters merged."""
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(**model.config.transformer)
    transformer.load_state_dict(full_weights(model.config, model.state_dict()), strict=True)
    return transformer


def batch(seed: int = 0, size: int = 4):
    numbers = torch.Generator().manual_seed(seed)
    y = torch.arange(size) % (SHAPE["num_classes"] + 1)
    return torch.randn(size, 4, 8, 8, generator=numbers), torch.rand(size, generator=numbers), y


def lora(seed: int = 0) -> SD3:
    """A random network whose adapters do something."""
    model = sd3(seed, lora_rank=2, lora_alpha=3.0)
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=numbers))
    return model


def gradients_of_half(rank: int, world_size: int, directory: Path) -> None:
    """One process of a gloo group: each takes its part of the batch, and leaves the gradients that DDP gave it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=world_size)
    for make in (sd3, lora):
        model, inputs = make(), [part.chunk(world_size)[rank] for part in batch()]
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        for _ in range(2):  # a parameter without a part in the first pass would stop the second
            parallel.zero_grad()
            (parallel(*inputs).square().sum() * world_size).backward()  # DDP divides by the number of processes
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        save_file(gradients, directory / f"{make.__name__}-{rank}.safetensors")
    dist.destroy_process_group()


def tiny_text_encoders(directory: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes two CLIPs and a T5 with random weights and tokenizers of single letters, in the pipeline's layout.

    The scheduler, transformer and vae that the index names are not there: text embeddings need none of them.
    """
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    kinds: dict[str, Any] = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for width, suffix in zip(CLIP_WIDTHS, ("", "_2"), strict=True):
            vocabulary = {piece: number for number, piece in enumerate(pieces)}
            # Published CLIPs end a text with the highest number and pad with it, or with "!".
            padding = {"pad_token": "!"} if suffix else {}
            tokenizer = CLIPTokenizer(vocabulary, [], model_max_length=24, **padding)
            tokenizer.save_pretrained(directory / f"tokenizer{suffix}")
            clip = CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(pieces),
                    hidden_size=width,
                    projection_dim=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    max_position_embeddings=24,
                    bos_token_id=len(pieces) - 2,
                    eos_token_id=2,  # as published: the pooled token is the one with the highest number
                    initializer_factor=5.0,
                )
            )
            clip.to(dtype).save_pretrained(directory / f"text_encoder{suffix}")
            kinds[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
            kinds[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection"]
        scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((piece, -3.0) for piece in letters)]
        T5Tokenizer(scores, extra_ids=0).save_pretrained(directory / "tokenizer_3")
        shape = T5Config(vocab_size=len(scores), d_model=T5_WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=2)
        T5EncoderModel(shape).to(dtype).save_pretrained(directory / "text_encoder_3")
    kinds["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    kinds["text_encoder_3"] = ["transformers", "T5EncoderModel"]
    kinds["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    kinds["vae"] = ["diffusers", "AutoencoderKL"]
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", **kinds}))
