"""Whether weights fit a model, and where they do not, what they are instead and which settings mend it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workers.models.checkpoints import HEADS, count_of, family_of, infer_config, noise_at_of
from workers.models.ddt import DiTDHConfig
from workers.models.family import ModelConfig, build
from workers.models.sd3 import SD3Config
from workers.models.sit import SiTConfig

_A = {"sit": "a sit", "ddt": "a ddt", "sd3": "an sd3"}


def check_architecture(
    weights: Mapping[str, Tensor], config: ModelConfig, name: str, *, section: str = "model."
) -> None:
    """Compares names and shapes with those of the model.

    Args:
        weights: of the file.
        config: of the model.
        name: of the file, for messages.
        section: what stands before a setting's name in messages.

    Raises:
        ValueError: they differ, and the message names the first difference and the cure, or what the file is instead;
            or its time runs the other way; or a tensor holds no finite numbers.
    """
    plain = replace(config, lora_rank=0, lora_alpha=None) if isinstance(config, SD3Config) else config
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in build(plain).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if found == expected:
        told = noise_at_of(found) if isinstance(config, SiTConfig) else None
        if isinstance(config, SiTConfig) and told not in (None, config.noise_at):
            has = "projectors, as REPA's have" if told else "twice the channels in its output, as SiT's have"
            raise ValueError(
                f"checkpoint {name} must run in its own time, noise_at {told}, since it has {has}, "
                f"got {config.noise_at}; set {section}noise_at to {told}"
            )
        for key, value in weights.items():
            numbers = value.float() if value.itemsize == 1 else value  # isfinite does not know every 8-bit float
            if not value.is_floating_point() or not bool(torch.isfinite(numbers).all()):
                raise ValueError(f"checkpoint {name} must hold finite numbers, got others in {key}; take a sound file")
        return
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    differing = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    if missing:
        problem = f"{missing[0]} is missing ({len(missing)} in all)"
    elif unknown:
        problem = f"{unknown[0]} is not part of it ({len(unknown)} in all)"
    else:
        problem = f"{differing[0]} has shape {found[differing[0]]} instead of {expected[differing[0]]}"
    raise ValueError(f"checkpoint {name} must fit the model, but {problem}; {_cure(weights, config, section)}")


def _cure(weights: Mapping[str, Tensor], config: ModelConfig, section: str) -> str:
    """What to set, from what the file says of itself."""
    family = family_of(weights)
    if family is None:
        return "it is of no known family; give a file of SiT, REPA, RAE or Stable Diffusion 3"
    if family != config.family:
        prints = "" if family == "sd3" else "; mixflow import prints its model section"
        return f"it is {_A[family]}; set {section}family{prints}"
    try:
        other = _nearest(weights, config)
    except (LookupError, TypeError, ZeroDivisionError):
        other = config
    except ValueError as error:
        if not str(error).startswith("checkpoint "):
            return f"it is {_A[family]} whose {error}"
        other = config
    if other == config:
        return f"the file is incomplete or was altered, by its other tensors it is {_A[family]} with these settings"
    mine = {key: value for key, value in vars(other).items() if value != vars(config)[key]}
    cure = "set " + ", ".join(f"{section}{key} to {_plain(value)}" for key, value in mine.items())
    if len(mine.get("projector_dims", (0,))) != 1:  # the alignment loss reads one projector
        cure += ", and alignment_weight to 0"
    untold = []
    if isinstance(other, SiTConfig) and "hidden_size" in mine and not other.qk_norm and other.hidden_size not in HEADS:
        untold.append(f"{section}num_heads {other.num_heads}")
    if isinstance(other, SiTConfig) and noise_at_of({name: tuple(w.shape) for name, w in weights.items()}) is None:
        untold.append(f"{section}noise_at {other.noise_at} ({'REPA' if other.noise_at else 'SiT'})")
    if untold:
        cure += f"; nothing in the file tells whether {' and '.join(untold)} is what it was trained with"
    return cure


def _nearest(weights: Mapping[str, Tensor], config: ModelConfig) -> ModelConfig:
    """The model's configuration with all that a file of its family says of itself."""
    given: dict[str, Any] = {"num_classes": config.num_classes}
    if isinstance(config, SD3Config):
        return replace(config, **_settings_of_sd3({name: tuple(value.shape) for name, value in weights.items()}))
    if isinstance(config, DiTDHConfig):
        return infer_config(weights, **given, depth=config.depth)
    depth = count_of(weights, "blocks") if "projectors.0.0.weight" in weights else config.projector_depth
    given |= {"projector_depth": min(config.projector_depth, depth)}
    width = weights["x_embedder.proj.weight"].shape[0]
    if "blocks.0.attn.q_norm.weight" not in weights:  # nothing tells the heads, but a published width has its own
        given |= {"num_heads": config.num_heads if width == config.hidden_size else HEADS.get(width, config.num_heads)}
    told = noise_at_of({name: tuple(value.shape) for name, value in weights.items()})
    # Where nothing in a file tells which way its time runs, the model's own setting stays.
    noise_at = config.noise_at if told is None else told
    found = infer_config(weights, family="repa" if noise_at else "sit", **given)
    if isinstance(found, SiTConfig) and not found.projector_dims:  # the other settings of projectors say nothing then
        found = replace(found, projector_depth=config.projector_depth, projector_width=config.projector_width)
    return found


def _settings_of_sd3(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Fields of SD3Config that shapes tell: all of the transformer but sample_size, and the heads without qk_norm."""
    width, channels, patch = shapes["pos_embed.proj.weight"][:3]
    layers = count_of(shapes, "transformer_blocks")
    has_norm = "transformer_blocks.0.attn.norm_q.weight" in shapes
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0] if has_norm else None
    return {
        "num_layers": layers,
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "in_channels": channels,
        "patch_size": patch,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "qk_norm": "rms_norm" if has_norm else None,
        "dual_attention_layers": tuple(
            layer for layer in range(layers) if f"transformer_blocks.{layer}.attn2.to_q.weight" in shapes
        ),
        **({"num_attention_heads": width // head, "attention_head_dim": head} if head else {}),
    }


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)
