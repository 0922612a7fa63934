"""Stable Diffusion 3.5: diffusers' transformer in this project's time convention, post-trained whole or by LoRA."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixflow_core.rng import generator
from workers.pretrained import build_sd3, check_index, read_json

# name: (num_layers, num_attention_heads, pos_embed_max_size, leading blocks with dual attention), as published
SD3_SIZES = {"medium": (24, 24, 384, 13), "large": (38, 38, 192, 0)}
# The linear layers of every attention, of the joint ones and of the image's own: these have adapters under LoRA.
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# What scales a normalised stream or its residual, and the last layer; zero in fresh weights.
GATES = ("norm1.linear.", "norm1_context.linear.", "norm_out.linear.", "proj_out.")

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True, kw_only=True)
class SD3Config:
    """Shape of a Stable Diffusion 3.5 transformer; names are those of its config.json where it has them.

    Attributes:
        family: tells the model families apart.
        input_size: side of the square latent that is trained and sampled: 64 for 512 px, 128 for 1024 px; a multiple
            of patch_size, at most patch_size * pos_embed_max_size.
        num_classes: captions of the data set, numbered 0 .. num_classes - 1; num_classes is the empty caption.
        num_layers: number of blocks.
        num_attention_heads: attention heads.
        caption_projection_dim: width of the text stream, which must be the image stream's: heads * head width.
        pos_embed_max_size: side of the position table in patches; the middle of it is used.
        in_channels: channels of the latent, and of the output.
        patch_size: side of a patch.
        attention_head_dim: width of a head.
        joint_attention_dim: width of the token embeddings of a caption.
        pooled_projection_dim: width of the pooled embedding of a caption.
        sample_size: latent side whose patches lie one unit apart in the position table.
        qk_norm: normalisation of queries and keys, None for none (Stable Diffusion 3).
        dual_attention_layers: blocks whose image stream has a second attention of its own, ascending.
        class_dropout_prob: share of training captions replaced by the empty one, in [0, 1).
        lora_rank: 0 trains every weight; above, only adapters of this rank on the attentions' linear layers.
        lora_alpha: the adapters' output is multiplied by lora_alpha / lora_rank; None is lora_rank, a factor of 1.
    """

    family: Literal["sd3"] = "sd3"
    input_size: int
    num_classes: int
    num_layers: int
    num_attention_heads: int
    caption_projection_dim: int
    pos_embed_max_size: int
    in_channels: int = 16
    patch_size: int = 2
    attention_head_dim: int = 64
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    sample_size: int = 128
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    dual_attention_layers: tuple[int, ...] = ()
    class_dropout_prob: float = 0.1
    lora_rank: int = 0
    lora_alpha: float | None = None

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, not a field

    def __post_init__(self) -> None:
        """Raises ValueError when the sizes do not fit together."""
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1 and name != "lora_rank":
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_layers > 1000:
            raise ValueError(f"num_layers must be at most 1000, got {self.num_layers}; 38 is the largest published")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size must be a multiple of patch_size {self.patch_size}, got {self.input_size}")
        largest = self.patch_size * self.pos_embed_max_size
        if self.input_size > largest:
            raise ValueError(f"input_size must be at most {largest}, the position table's side, got {self.input_size}")
        width = self.num_attention_heads * self.attention_head_dim
        if width % 4:
            raise ValueError(f"attention_head_dim must make the width a multiple of 4, got {width}")
        if self.caption_projection_dim != width:
            raise ValueError(
                f"caption_projection_dim must be num_attention_heads * attention_head_dim = {width}, "
                f"got {self.caption_projection_dim}"
            )
        if list(self.dual_attention_layers) != sorted(set(self.dual_attention_layers) & set(range(self.num_layers))):
            raise ValueError(
                f"dual_attention_layers must be ascending numbers of the {self.num_layers} blocks, "
                f"got {list(self.dual_attention_layers)}"
            )
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), got {self.class_dropout_prob}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}; 0 trains every weight")
        if self.lora_alpha is not None and not (self.lora_rank and 0 < self.lora_alpha < math.inf):
            raise ValueError(f"lora_alpha must be above 0 and needs a lora_rank, got {self.lora_alpha}; leave it out")

    @classmethod
    def published(
        cls,
        size: str,
        *,
        image_size: int = 1024,
        num_classes: int = 1,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
    ) -> SD3Config:
        """Stable Diffusion 3.5 `medium` or `large`, for images of this side in px (latents of an eighth of it)."""
        num_layers, heads, table, dual = SD3_SIZES[size]
        return cls(
            input_size=image_size // 8,
            num_classes=num_classes,
            num_layers=num_layers,
            num_attention_heads=heads,
            caption_projection_dim=64 * heads,
            pos_embed_max_size=table,
            dual_attention_layers=tuple(range(dual)),
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
        )

    @property
    def null_label(self) -> int:
        """The empty caption's number; there always is one, whatever class_dropout_prob."""
        return self.num_classes

    @property
    def lora_scale(self) -> float:
        """What the adapters' output is multiplied by."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    @property
    def transformer(self) -> dict[str, Any]:
        """The settings of diffusers' SD3Transformer2DModel, as they stand in its config.json."""
        same = {name: getattr(self, name) for name in _TRANSFORMER_FIELDS}
        return {**same, "out_channels": self.in_channels, "dual_attention_layers": list(self.dual_attention_layers)}


_TRANSFORMER_FIELDS = (
    "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size", "qk_norm",
    "dual_attention_layers",
)  # fmt: skip


class SD3(nn.Module):
    """(x (B, C, H, H), t (B,) in [0, 1], y (B,) captions) -> velocity towards the data (B, C, H, H).

    Parameters and buffers have the names that they have in diffusers' transformer. Under LoRA a linear layer that has
    an adapter is called `<name>.base_layer`, beside `<name>.lora_A.default` and `<name>.lora_B.default`; weights
    without adapters load all the same, and leave the adapters as they are.
    """

    _transformer: nn.Module

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # diffusers and peft draw their first weights from the global generator
            transformer = build_sd3(config.transformer)
            if config.lora_rank:
                _add_adapters(transformer, config)
        # Its parts are this module's, so that names have no prefix; it is kept, unregistered, for its forward.
        for name, part in transformer.named_children():
            self.add_module(name, part)
        self.__dict__["_transformer"] = transformer
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not config.lora_rank or is_adapter(name))
        self._captions: tuple[np.ndarray, np.ndarray] | None = None
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        if config.lora_rank:
            self.register_load_state_dict_pre_hook(_accept_weights_without_adapters)

    def set_captions(self, text: np.ndarray, pooled: np.ndarray) -> None:
        """Gives the captions that y numbers; the arrays stay where they are (memory-mapped files, for instance).

        Args:
            text: token embeddings (num_classes + 1, L, joint_attention_dim); the last row is the empty caption.
            pooled: pooled embeddings (num_classes + 1, pooled_projection_dim), in the same order.

        Raises:
            ValueError: they have other shapes.
        """
        rows, c = self.config.num_classes + 1, self.config
        if text.ndim != 3 or (text.shape[0], text.shape[2]) != (rows, c.joint_attention_dim):
            raise ValueError(f"caption text must have shape ({rows}, any, {c.joint_attention_dim}), got {text.shape}")
        if pooled.shape != (rows, c.pooled_projection_dim):
            raise ValueError(
                f"caption pooled must have shape ({rows}, {c.pooled_projection_dim}), got {pooled.shape}; "
                "encode the captions with the model's own text encoders"
            )
        self._captions, self._last = (text, pooled), None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity at x for the told time t and the captions y.

        Raises:
            ValueError: there are no captions, or y has a number that is none of theirs.
        """
        if self._captions is None:
            raise ValueError("captions must be set before the network is called, got none; call set_captions first")
        text, pooled = (table.to(x.dtype) for table in self._embeddings(y, x.device, self._captions))
        # Published with 1000 for noise, 0 for data, and the velocity from data to noise.
        velocity = self._transformer(
            hidden_states=x,
            timestep=(1 - t) * 1000,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return -velocity

    def _embeddings(
        self, y: Tensor, device: torch.device, captions: tuple[np.ndarray, np.ndarray]
    ) -> tuple[Tensor, Tensor]:
        """The captions of y. A sampler asks for the same ones at every step: they are not read again."""
        if self._last is None or self._last[0] is not y:
            rows = y.cpu().numpy()
            if len(rows) and (rows.min() < 0 or rows.max() > self.config.null_label):
                raise ValueError(f"y must lie in [0, {self.config.null_label}], got {rows.min()} to {rows.max()}")
            text, pooled = (torch.from_numpy(table[rows]).to(device) for table in captions)
            self._last = y, text, pooled
        return self._last[1:]

    @torch.no_grad()
    def initialise(self, seed: int) -> SD3:
        """Fresh weights, the same whether or not there are adapters.

        Xavier-uniform matrices and convolutions, zero biases, unit norms, zero gates and last layer, so the output is
        zero at first. Adapters: A uniform with variance 1 / (3 inputs), B zero, so they change nothing at first.
        """
        numbers = generator(seed, "init", 0)
        parameters = dict(self.named_parameters())
        for name, parameter in parameters.items():
            if is_adapter(name):
                continue
            if name.endswith(".bias") or any(gate in name for gate in GATES):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=numbers)
        for name, parameter in parameters.items():
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound, generator=numbers)
            elif ".lora_B." in name:
                nn.init.zeros_(parameter)
        return self


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def _add_adapters(transformer: nn.Module, config: SD3Config) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    # peft's annotation says int; it divides by the rank and nothing else.
    alpha: Any = config.lora_scale * config.lora_rank
    adapters = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=list(PROJECTIONS))
    inject_adapter_in_model(adapters, transformer)


def _accept_weights_without_adapters(module: nn.Module, weights: dict[str, Tensor], *_: object) -> None:
    """Renames a transformer's own weights to where they are beside adapters, and keeps the adapters if none come."""
    own = module.state_dict()
    for name in [name for name in weights if name not in own]:
        stem, _dot, kind = name.rpartition(".")
        if f"{stem}.base_layer.{kind}" in own:
            weights[f"{stem}.base_layer.{kind}"] = weights.pop(name)
    if not any(map(is_adapter, weights)):
        weights.update({name: value for name, value in own.items() if is_adapter(name)})


def beside_adapters(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's own weights under the names that they have beside these adapters."""
    adapted = {name.partition(".lora_")[0] for name in adapters if is_adapter(name)}
    found = {}
    for name, value in weights.items():
        layer, _dot, kind = name.rpartition(".")
        found[f"{layer}.base_layer.{kind}" if layer in adapted else name] = value
    return found


# ------------------------------------------------------------------------------------------------ diffusers' layouts


def full_weights(config: SD3Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's weights under diffusers' names, adapters added to what they adapt: W + lora_scale B A.

    The sum is made in float64 and rounded once to W's type.
    """
    merged = {}
    for name, value in weights.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            a, b = (weights[f"{layer}.{part}.default.weight"].double() for part in ("lora_A", "lora_B"))
            value = (value.double() + config.lora_scale * (b @ a)).to(value.dtype)
        merged[name.replace(".base_layer.", ".")] = value
    return merged


def save_sd3(directory: Path, config: SD3Config, weights: Mapping[str, Tensor]) -> None:
    """Writes a transformer that diffusers' SD3Transformer2DModel.from_pretrained reads; adapters are merged."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"_class_name": "SD3Transformer2DModel", **config.transformer}
    (directory / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    save_tensors(full_weights(config, weights), directory / WEIGHTS_FILE, {"format": "pt"})


def load_sd3(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a transformer in diffusers' layout, in one file or several, in its stored precision.

    Args:
        directory: the transformer's, or that of a pipeline, which has it as `transformer`.

    Returns:
        The fields of SD3Config that its config.json determines (all but input_size, num_classes and what training
        chooses), and the weights under diffusers' names.

    Raises:
        ValueError: it is not in that layout, or describes another model.
    """
    if (directory / "model_index.json").is_file():
        directory = directory / "transformer"
    content = read_json(directory / "config.json")
    if content.get("_class_name") != "SD3Transformer2DModel":
        raise ValueError(f"{directory} must hold an SD3Transformer2DModel, got {content.get('_class_name')!r}")
    # Absent from files that were written before diffusers had them.
    content = {"qk_norm": None, "dual_attention_layers": (), **content}
    fields = {name: value for name, value in content.items() if not name.startswith("_")}
    out_channels = fields.pop("out_channels", None)
    odd = sorted(fields.keys() ^ set(_TRANSFORMER_FIELDS))
    if odd:
        problem = "does not have" if odd[0] in _TRANSFORMER_FIELDS else "has, unknown here,"
        raise ValueError(f"{directory}/config.json must describe Stable Diffusion 3 or 3.5, but it {problem} {odd[0]}")
    if out_channels not in (None, fields["in_channels"]):
        raise ValueError(f"out_channels must equal in_channels {fields['in_channels']}, got {out_channels}")
    dual = fields["dual_attention_layers"]
    if not isinstance(dual, list | tuple):
        raise ValueError(f"{directory}/config.json must have a list as dual_attention_layers, got {dual!r}; correct it")
    fields["dual_attention_layers"] = tuple(dual)
    index = directory / f"{WEIGHTS_FILE}.index.json"
    return fields, _load_parts(index) if index.is_file() else _load(directory / WEIGHTS_FILE)


def _load_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of several files, which are those that their index lists."""
    listed = check_index(index)
    weights: dict[str, Tensor] = {}
    for name in sorted(set(listed.values())):
        part = _load(index.parent / name)
        elsewhere = sorted(key for key in part if listed.get(key, name) != name)
        if elsewhere:
            raise ValueError(
                f"{index} must list the tensors of its files, but {elsewhere[0]} is in {name} and listed in "
                f"{listed[elsewhere[0]]}; get the directory anew"
            )
        weights.update(part)
    odd = sorted(listed.keys() ^ weights.keys())
    if odd:
        problem = "is in no file" if odd[0] in listed else "is not listed"
        raise ValueError(f"{index} must list the tensors of its files, but {odd[0]} {problem}; get the directory anew")
    return weights


def save_lora(directory: Path, config: SD3Config, weights: Mapping[str, Tensor]) -> None:
    """Writes the adapters alone, as diffusers' load_lora_weights and load_lora_adapter read them.

    Offline they want to be told the file: weight_name="pytorch_lora_weights.safetensors", use_safetensors=True.
    Rank, lora_alpha and the adapted layers stand in the file's metadata; a reader that ignores it takes lora_alpha
    for the rank.

    Raises:
        ValueError: there are no adapters.
    """
    adapters = {f"transformer.{name.replace('.default.', '.')}": w for name, w in weights.items() if is_adapter(name)}
    if not adapters:
        raise ValueError("weights must hold LoRA adapters, got none; a model with lora_rank 0 is exported whole")
    settings = {
        "transformer.r": config.lora_rank,
        "transformer.lora_alpha": config.lora_scale * config.lora_rank,
        "transformer.target_modules": list(PROJECTIONS),
    }
    directory.mkdir(parents=True, exist_ok=True)
    about = {"format": "pt", LORA_METADATA: json.dumps(settings, sort_keys=True)}
    save_tensors(adapters, directory / LORA_FILE, about)


def save_tensors(weights: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the mode that the umask gives: the library's own is for its owner alone."""
    plain, places = dict[str, Tensor](), set[int]()
    for name, value in weights.items():
        tensor = value.detach().cpu().contiguous()
        # The library refuses two names for one tensor.
        plain[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    beside = path.with_name(f".{path.name}.part")
    beside.touch()
    mode = beside.stat().st_mode
    try:
        save_file(plain, beside, metadata)
        beside.chmod(mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a readable safetensors file; {error}") from error
