"""Weights from files: this project's checkpoints and the published layouts, never by arbitrary pickle."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workers.models.sit import SiT, SiTConfig


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors` file, or from a `.pt` file in one of SiT's published layouts.

    A `.pt` may be a bare state dict or a dict with an `ema` entry, which is what the published samplers read. Nothing
    but tensors and the argparse.Namespace that SiT's trainer stores is unpickled.

    Raises:
        ValueError: the file is of another kind, unreadable, or holds no state dict.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {path.name} must be a readable safetensors file; {error}") from error
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"checkpoint must end in .safetensors, .pt or .pth, got {path.name!r}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"checkpoint {path.name} must hold tensors only, in torch's own format; {reason}") from error
    weights = content.get("ema", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"checkpoint {path.name} must be a state dict or hold one as 'ema', got neither")
    return dict(weights)


def check_architecture(weights: Mapping[str, Tensor], config: SiTConfig, name: str) -> None:
    """Compares names and shapes with those of the model.

    Raises:
        ValueError: they differ; the message names the first difference and, for learn_sigma, the cure.
    """
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in SiT(config).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if found == expected:
        return
    last = "final_layer.linear.weight"
    if last in found and found[last][0] != expected[last][0] and found[last][1:] == expected[last][1:]:
        other = "false" if config.learn_sigma else "true"
        if found[last][0] in (expected[last][0] * 2, expected[last][0] // 2):
            raise ValueError(
                f"checkpoint {name} must fit the model, but learn_sigma differs; set learn_sigma to {other}"
            )
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    differing = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    if missing:
        problem = f"{missing[0]} is missing ({len(missing)} in all)"
    elif unknown:
        problem = f"{unknown[0]} is not part of it ({len(unknown)} in all)"
    else:
        problem = f"{differing[0]} has shape {found[differing[0]]} instead of {expected[differing[0]]}"
    raise ValueError(f"checkpoint {name} must fit the model, but {problem}; set the model's sizes to the checkpoint's")
