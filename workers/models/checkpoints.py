"""Weights from files and back: this project's and the published layouts, told apart by content, never by pickle."""

from __future__ import annotations

import argparse
import lzma
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workers.models.ddt import DiTDHConfig
from workers.models.family import ModelConfig
from workers.models.sd3 import load_sd3, save_tensors
from workers.models.sit import SIT_SIZES, SiTConfig
from workers.models.unreadable import why_unreadable

HEADS = {width: heads for _, width, heads in SIT_SIZES.values()}
# Whatever a file that was cut off or altered makes of torch's reader.
_TORCH_RAISES = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError, AttributeError,
    AssertionError, struct.error, MemoryError, OverflowError, RecursionError,
)  # fmt: skip
NULL_ROWS = {1000: 0.0, 1001: 0.1}  # rows of an ImageNet label table -> the dropout its published training used


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors` file, a `.pt` file in a published layout, or a diffusers directory of SD3.

    A `.pt` may be a bare state dict (REPA's and SiT's published files) or a dict with an `ema` entry (what their
    trainers and RAE's write; the average is what the published samplers read). Old REPA files name the blocks after
    the projectors `decoder_blocks`; they are renamed. Nothing but tensors and the argparse.Namespace that SiT's trainer
    stores is unpickled.

    Raises:
        ValueError: the file is of another kind, unreadable, or holds no state dict.
    """
    if path.is_dir():
        return load_sd3(path)[1]
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {path.name} must be a readable safetensors file; {error}") from error
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"checkpoint must end in .safetensors, .pt or .pth, got {path.name!r}")
    _check_sums(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _TORCH_RAISES as error:
        raise _unreadable(path, error) from error
    weights = content.get("ema", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise ValueError(f"checkpoint {path.name} must be a state dict or hold one as 'ema', got neither")
    for name, value in weights.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise ValueError(
                f"checkpoint {path.name} must hold dense tensors of plain numbers, got another kind in {name} "
                f"({_kind_of(value)}); convert it (to_dense, dequantize) and save it again"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"checkpoint {path.name} must hold every number of its tensors, got {tuple(value.shape)} made of "
                f"{value.untyped_storage().nbytes()} bytes in {name}; save it again after contiguous()"
            )
    return _renamed(dict(weights))


def _kind_of(value: Tensor) -> str:
    if value.is_nested or value.is_meta:
        return "nested" if value.is_nested else "meta, without numbers"
    return f"quantised, {value.dtype}" if value.is_quantized else str(value.layout)


def _unreadable(path: Path, error: Exception) -> ValueError:
    rule = f"checkpoint {path.name} must hold tensors only, in torch's own format"
    return ValueError(f"{rule}; {why_unreadable(path, error)}")


def _check_sums(path: Path) -> None:
    """Torch writes a zip with a checksum of each tensor, and does not look at it when it reads.

    It compresses nothing, so what unpacks to more than the file has is none of torch's.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(2)
    if head[:1] not in (b"P", b"\x80"):  # of tars, which torch would unpack first, it wrote its last in 2017
        raise _unreadable(path, ValueError("neither a zip nor a pickle"))
    if head != b"PK":  # older files are no zips
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > path.stat().st_size:
                raise zipfile.BadZipFile("it is compressed")
            altered = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, *_TORCH_RAISES) as error:
        raise _unreadable(path, error) from error
    if altered:
        raise ValueError(
            f"checkpoint {path.name} must be as it was written, but its {altered} was altered; get it anew"
        )


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """REPA's older names: decoder_blocks.k follow the last of blocks."""
    if not any(name.startswith("decoder_blocks.") for name in weights):
        return weights
    behind = count_of(weights, "blocks")
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda found: f"blocks.{int(found[1]) + behind}", name): value
        for name, value in weights.items()
    }


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes a state dict: bare as `.safetensors`, or as a `.pt` with `ema`, which the published samplers read.

    Raises:
        ValueError: another ending.
    """
    if path.suffix == ".safetensors":
        save_tensors(weights, path)
    elif path.suffix == ".pt":
        torch.save({"ema": {name: value.detach().cpu().contiguous() for name, value in weights.items()}}, path)
    else:
        raise ValueError(f"the file to write must end in .safetensors or .pt, got {path.name!r}")


def infer_config(weights: Mapping[str, Tensor], *, family: str | None = None, **given: Any) -> ModelConfig:
    """The configuration that a state dict fits, from its names and shapes.

    Args:
        weights: in a published layout.
        family: `sit`, `repa` or `rae`, where names do not say it: a REPA file without projectors looks like a SiT's
            without learn_sigma.
        given: settings that a file cannot say: num_heads of an unpublished width, num_classes and class_dropout_prob of
            a label table other than ImageNet's, projector_depth.

    Raises:
        ValueError: the names are of no known family or of another than was given, or something must be given.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    kind = family_of(shapes)
    try:
        if kind == "ddt" and family in (None, "rae"):
            return _infer_ddt(shapes, given)
        if kind == "sit" and family in (None, "sit", "repa"):
            return _infer_sit(shapes, family, given)
    except KeyError as error:
        owners = "RAE" if kind == "ddt" else "SiT and REPA"
        raise ValueError(
            f"checkpoint must have {error.args[0]}, which every file of {owners} has; got none, the file is incomplete"
        ) from error
    except (IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"checkpoint must have tensors of its family's shapes, got others ({error})") from error
    raise ValueError(
        f"checkpoint must be of a known family{f' ({family})' if family else ''}: SiT and REPA have a y_embedder, RAE "
        f"an s_embedder too, SD3 is a diffusers directory; got {', '.join(sorted(shapes)[:3])} ..."
    )


def family_of(names: Iterable[str]) -> str | None:
    """The model family whose parts these tensors are named after, `sit`, `ddt` or `sd3`; None for none of them.

    A REPA file is a `sit`; a file that lacks some of its tensors is still told.
    """
    parts = {name.partition(".")[0] for name in names}
    if "transformer_blocks" in parts:
        return "sd3"
    if parts & {"s_embedder", "s_projector", "enc_feat_rope", "dec_feat_rope"}:
        return "ddt"
    return "sit" if "blocks" in parts and parts & {"x_embedder", "y_embedder"} else None


def _infer_sit(shapes: Mapping[str, tuple[int, ...]], family: str | None, given: Mapping[str, Any]) -> SiTConfig:
    width, channels, patch = (shapes["x_embedder.proj.weight"][place] for place in (0, 1, 2))
    projectors = sorted(name for name in shapes if re.fullmatch(r"projectors\.\d+\.4\.weight", name))
    qk_norm = "blocks.0.attn.q_norm.weight" in shapes
    heads = width // shapes["blocks.0.attn.q_norm.weight"][0] if qk_norm else HEADS.get(width)
    settings: dict[str, Any] = {
        "input_size": math.isqrt(shapes["pos_embed"][1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": count_of(shapes, "blocks"),
        "num_heads": given.get("num_heads", heads),
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * patch**2,
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
        "noise_at": _noise_at(shapes, family),
        "qk_norm": qk_norm,
        "projector_dims": tuple(shapes[name][0] for name in projectors),
        "projector_width": shapes["projectors.0.0.weight"][0] if projectors else 2048,
        **_labels(shapes, given),
    }
    if settings["num_heads"] is None:
        raise ValueError(f"num_heads must be given for a width of {width}, which no published size has")
    settings["projector_depth"] = given.get("projector_depth", 8) if projectors else 8
    return SiTConfig(**settings)


def noise_at_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The end of its own time at which noise lies, as a file of SiT (0) or REPA (1) tells it; None where none does.

    REPA's have projectors, SiT's twice the channels in their last layer.
    """
    if "projectors.0.0.weight" in shapes:
        return 1
    channels, patch = shapes["x_embedder.proj.weight"][1:3]
    return 0 if shapes["final_layer.linear.weight"][0] == 2 * channels * patch**2 else None


def _noise_at(shapes: Mapping[str, tuple[int, ...]], family: str | None) -> int:
    """The same, by the family where the file does not tell it."""
    told = noise_at_of(shapes)
    if told is None and family is None:
        raise ValueError(
            "family must be sit or repa for a file with neither projectors nor twice the channels in its output, which "
            "both have and nothing in it tells whose time is its own, got none; give --family"
        )
    if told is None or family is None:
        return int(family == "repa") if told is None else told
    its = "repa" if told else "sit"
    if family != its:
        has = "projectors" if told else "twice the input's channels in its output and no projectors"
        raise ValueError(f"family must be {its} for a file that has {has}, got {family!r}; leave it out")
    return told


def _infer_ddt(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> DiTDHConfig:
    encoder, channels = shapes["s_embedder.proj.weight"][:2]
    decoder = shapes["x_embedder.proj.weight"][0]
    widths = [shapes[f"blocks.{i}.norm1.weight"][0] for i in range(count_of(shapes, "blocks"))]
    heads = tuple(
        width // shapes[f"{part}_feat_rope.freqs_cos"][1] for part, width in (("enc", encoder), ("dec", decoder))
    )
    if encoder == decoder:
        if "depth" not in given:
            raise ValueError(f"depth must be given (encoder and decoder blocks) where both have the width {encoder}")
        depth = tuple(given["depth"])
    else:
        depth = (widths.count(encoder), widths.count(decoder))
    if len(depth) != 2 or sum(depth) != len(widths):
        raise ValueError(f"depth must be two numbers that add up to the file's {len(widths)} blocks, got {list(depth)}")
    return DiTDHConfig(
        input_size=math.isqrt(shapes["pos_embed"][1]),
        in_channels=channels,
        hidden_size=(encoder, decoder),
        depth=(depth[0], depth[1]),
        num_heads=(heads[0], heads[1]),
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        **_labels(shapes, given),
    )


def _labels(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Classes and whether there is a row for none: 1,001 rows are ImageNet's classes and none, 1,000 are without."""
    rows = shapes["y_embedder.embedding_table.weight"][0]
    classes = given.get("num_classes")
    if classes is None and rows not in NULL_ROWS:
        raise ValueError(
            f"num_classes must be given for a label table of {rows} rows; with or without one for no class?"
        )
    if classes is not None and rows - classes not in (0, 1):
        raise ValueError(f"num_classes must be {rows} or {rows - 1} for a label table of {rows} rows, got {classes}")
    dropout = NULL_ROWS[rows] if classes is None else 0.1 * (rows - classes)
    return {"num_classes": classes or 1000, "class_dropout_prob": given.get("class_dropout_prob", dropout)}


def count_of(names: Mapping[str, Any], part: str) -> int:
    """How many numbered modules `part` has."""
    numbers = [int(found[1]) for name in names if (found := re.match(rf"{part}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
