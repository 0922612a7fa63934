"""SiT, the scalable interpolant transformer, with the state-dict names of its published checkpoints (willisma/SiT).

REPA (sihyun-yu/REPA) is the same network with projectors, trained in reversed time: `noise_at` 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixflow_core.rng import generator

# name: (depth, hidden_size, num_heads), as published
SIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclass(frozen=True)
class SiTConfig:
    """Shape of a SiT.

    Attributes:
        family: `sit`.
        input_size: side of the square input (32 for 256-px latents, 64 for 512-px ones), a multiple of patch_size.
        patch_size: side of a patch: 2, 4 or 8 in the published sizes.
        in_channels: channels of the input (4 for latents of the usual autoencoder).
        hidden_size: width; a multiple of 4 (position table) and of num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: classes, labelled 0 .. num_classes - 1; label num_classes is "no class" if class_dropout_prob > 0.
        class_dropout_prob: share of training labels replaced by "no class", in [0, 1); 0 leaves no row for it, so no
            classifier-free guidance either.
        learn_sigma: the output has twice the channels, the second half unused (as in the published files).
        mlp_ratio: width of the MLP over hidden_size.
        noise_at: the end of the network's own time at which noise lies: 0 in SiT's files, 1 in REPA's. It is turned
            round inside, so that the caller's time and velocity always run from noise to data.
        qk_norm: LayerNorm of queries and keys (an option of REPA, off in its published files).
        projector_dims: width of each alignment target (768 for DINOv2-B); empty for no projector.
        projector_depth: the projectors read the tokens after this many blocks.
        projector_width: hidden width of a projector.
    """

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    class_dropout_prob: float = 0.1
    learn_sigma: bool = False
    mlp_ratio: float = 4.0
    noise_at: Literal[0, 1] = 0
    qk_norm: bool = False
    projector_dims: tuple[int, ...] = ()
    projector_depth: int = 8
    projector_width: int = 2048
    family: Literal["sit"] = "sit"

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, not a field

    def __post_init__(self) -> None:
        """Raises ValueError when the sizes do not fit together."""
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depth > 1000:
            raise ValueError(f"depth must be at most 1000, got {self.depth}; 28 is the largest published")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size must be a multiple of patch_size {self.patch_size}, got {self.input_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of 4 and of num_heads {self.num_heads}, got {self.hidden_size}"
            )
        if not 1 / self.hidden_size <= self.mlp_ratio < 1000:
            raise ValueError(f"mlp_ratio must leave the MLP a width, got {self.mlp_ratio}; 4 is the published ratio")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), got {self.class_dropout_prob}")
        if self.noise_at not in (0, 1):
            raise ValueError(f"noise_at must be 0 (SiT's files) or 1 (REPA's), got {self.noise_at}")
        if self.projector_dims and not 1 <= self.projector_depth <= self.depth:
            raise ValueError(f"projector_depth must lie in [1, depth {self.depth}], got {self.projector_depth}")
        if min((*self.projector_dims, self.projector_width)) < 1:
            raise ValueError(f"projector_dims and projector_width must be at least 1, got {self.projector_dims}")

    @classmethod
    def published(cls, size: str, *, patch_size: int = 2, image_size: int = 256, learn_sigma: bool = True) -> SiTConfig:
        """A published size: `S`, `B`, `L` or `XL`, for images of 256 or 512 px (latents of an eighth of the side)."""
        depth, hidden_size, num_heads = SIT_SIZES[size]
        return cls(
            image_size // 8, patch_size, 4, hidden_size, depth, num_heads, num_classes=1000, learn_sigma=learn_sigma
        )

    @classmethod
    def repa(cls, size: str, *, image_size: int = 256, projector_dims: tuple[int, ...] = (768,)) -> SiTConfig:
        """A size that REPA published: `B`, `L` or `XL` with patches of 2, its projectors after block 8."""
        published = cls.published(size, image_size=image_size, learn_sigma=False)
        return replace(published, noise_at=1, projector_dims=projector_dims)

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, None where the model has none."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    @property
    def num_tokens(self) -> int:
        """Patches of an image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Channels of the network's last layer."""
        return self.in_channels * (2 if self.learn_sigma else 1)


class SiT(nn.Module):
    """(x (B, C, H, H), t (B,) in [0, 1], y (B,) labels) -> prediction (B, C, H, H), velocity for the published files.

    Labels are given as they are: replacing some by the null label in training is the caller's part (`drop_labels`).
    """

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        width, grid = config.hidden_size, config.input_size // config.patch_size
        # Frozen and in the state dict, as in the published files.
        self.pos_embed = nn.Parameter(position_table(width, grid)[None], requires_grad=False)
        self.x_embedder = _PatchEmbedder(config)
        self.t_embedder = _TimeEmbedder(width)
        self.y_embedder = _LabelEmbedder(config)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        if config.projector_dims:
            self.projectors = nn.ModuleList(_projector(config, width) for width in config.projector_dims)
        self.final_layer = _FinalLayer(config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, align: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The prediction at x for the told time t and label y; with `align` also each projector's (B, tokens, width).

        The prediction of a network with `noise_at` 1 is a velocity; its sign turns with its time.
        """
        tokens = self.x_embedder(x) + self.pos_embed
        own_time = t if self.config.noise_at == 0 else 1 - t
        condition = functional.silu(self.t_embedder(own_time) + self.y_embedder(y))
        projections: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, condition)
            if align and number == self.config.projector_depth:
                projections = [projector(tokens) for projector in self.projectors]
        out = self._unpatchify(self.final_layer(tokens, condition))
        out = out if self.config.noise_at == 0 else -out
        return (out, projections) if align else out

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        p, grid = self.config.patch_size, self.config.input_size // self.config.patch_size
        image = tokens.reshape(-1, grid, grid, p, p, self.config.out_channels)
        image = image.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, grid * p, grid * p)
        return image[:, : self.config.in_channels]

    def initialise(self, seed: int) -> SiT:
        """Fresh weights as published: Xavier-uniform linears, zero gates and output, so the output is zero at first."""
        numbers = generator(seed, "init", 0)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("t_embedder"):
                    nn.init.normal_(module.weight, std=0.02, generator=numbers)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=numbers)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight.view(module.out_channels, -1), generator=numbers)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=numbers)
        return self


class Labelled(Protocol):
    """What a network's configuration says of its labels."""

    @property
    def class_dropout_prob(self) -> float:
        """Share of training labels that are dropped."""

    @property
    def null_label(self) -> int | None:
        """What a dropped label becomes; None where labels are never dropped."""


def drop_labels(y: Tensor, u: Tensor, config: Labelled) -> Tensor:
    """Labels with those replaced by the null label whose u, uniform in [0, 1), lies below class_dropout_prob; (B,)."""
    if config.null_label is None:
        return y
    return torch.where(u < config.class_dropout_prob, config.null_label, y)


def position_table(width: int, grid: int) -> Tensor:
    """The 2-D sine-cosine table (grid * grid, width), row-major: first half from the column, second from the row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)
    return torch.cat([columns, rows], 1).float()


class _PatchEmbedder(nn.Module):
    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # In the layout of what follows: the strides of the convolution's output would stay with every block's tokens.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class _TimeEmbedder(nn.Module):
    frequencies: Tensor

    def __init__(self, width: int, num_features: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))
        half = num_features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


def _projector(config: SiTConfig, width: int) -> nn.Sequential:
    hidden = config.projector_width
    return nn.Sequential(
        nn.Linear(config.hidden_size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
    )


class _LabelEmbedder(nn.Module):
    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        rows = config.num_classes + (config.null_label is not None)
        self.embedding_table = nn.Embedding(rows, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width // num_heads, eps=1e-5) if qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class _Modulation(nn.Sequential):
    """The adaLN linear at index 1; the SiLU published at index 0 is applied once for all blocks, in SiT.forward."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.Identity(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return super().forward(condition)[:, None].chunk(self.parts, dim=-1)


class _Block(nn.Module):
    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = _Attention(width, config.num_heads, config.qk_norm)
        self.mlp = _MLP(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = _Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)
        x = x + gate1 * self.attn(_modulated(x, shift1, scale1))
        return x + gate2 * self.mlp(_modulated(x, shift2, scale2))


class _FinalLayer(nn.Module):
    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = _Modulation(config.hidden_size, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)
        return self.linear(_modulated(x, shift, scale))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift."""
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)
