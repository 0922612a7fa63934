"""RAE's DiT-DH, a transformer with a wide shallow head, with its published state-dict names (bytetriper/RAE)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixflow_core.rng import generator
from workers.models.sit import position_table

# name: (hidden_size, depth, num_heads) of the encoder. XL and S are published; B is what their authors describe.
DDT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "XL": (1152, 28, 16)}
DDT_HEAD = (2048, 2, 16)


@dataclass(frozen=True, kw_only=True)
class DiTDHConfig:
    """Shape of a DiT-DH. Pairs are (encoder, decoder); patches have side 1, so every pixel of the latent is a token.

    Attributes:
        family: tells this configuration from those of other networks.
        input_size: side of the square latent (16 for 256-px images, 32 for 512-px ones).
        in_channels: channels of the latent (768 for DINOv2-base features).
        hidden_size: widths, multiples of num_heads; the width of a head is a multiple of 4 (rotary tables).
        depth: numbers of blocks.
        num_heads: attention heads.
        num_classes: classes, labelled 0 .. num_classes - 1; label num_classes is "no class" if class_dropout_prob > 0.
        class_dropout_prob: share of training labels replaced by "no class", in [0, 1); 0 leaves no row for it, so no
            classifier-free guidance either.
        mlp_ratio: 3/2 of the gated MLP's width over hidden_size.
        qk_norm: queries and keys are normalised; the published networks do without.
        train_tables: whether the position table and the random frequencies of the time embedding are trained. To be
            chosen for the run that is continued or compared with: the published constructor freezes both, and so did
            the first published trainer, but the present one unfreezes every parameter before it builds its optimiser.
    """

    family: Literal["ddt"] = "ddt"
    input_size: int
    in_channels: int = 768
    hidden_size: tuple[int, int]
    depth: tuple[int, int]
    num_heads: tuple[int, int]
    num_classes: int
    class_dropout_prob: float = 0.1
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    train_tables: bool = False

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, not a field

    def __post_init__(self) -> None:
        """Raises ValueError when the sizes do not fit together."""
        for name in ("input_size", "in_channels", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("hidden_size", "depth", "num_heads"):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < 1:
                raise ValueError(f"{name} must be two numbers of at least 1, encoder and decoder, got {pair}")
        if max(self.depth) > 1000:
            raise ValueError(f"depth must be at most 1000, got {self.depth}; (28, 2) is the largest published")
        for width, heads in zip(self.hidden_size, self.num_heads, strict=True):
            if width % (4 * heads):
                raise ValueError(
                    f"hidden_size must be a multiple of 4 times num_heads {self.num_heads}, got {self.hidden_size}"
                )
        if not 2 / min(self.hidden_size) <= self.mlp_ratio < 1000:
            raise ValueError(f"mlp_ratio must leave the MLP a width, got {self.mlp_ratio}; 4 is the published ratio")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), got {self.class_dropout_prob}")

    @classmethod
    def published(cls, size: str, *, image_size: int = 256, train_tables: bool = False) -> DiTDHConfig:
        """A size of RAE's authors: `S`, `B` or `XL`, for images of 256 or 512 px, 16 times as wide as their latents."""
        hidden_size, depth, num_heads = zip(DDT_SIZES[size], DDT_HEAD, strict=True)
        return cls(
            input_size=image_size // 16,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=1000,
            train_tables=train_tables,
        )

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, None where the model has none."""
        return self.num_classes if self.class_dropout_prob > 0 else None


class DiTDH(nn.Module):
    """(x (B, C, H, H), t (B,) in [0, 1], y (B,) labels) -> prediction (B, C, H, H), velocity for the published files.

    An encoder sees the noisy latent, the time and the label; its tokens are the condition of a second, wider
    transformer, which sees the noisy latent again. The published network counts time from the data to the noise: it is
    asked at 1 - t, and what it answers changes its sign. Labels are given as they are, as in SiT.
    """

    def __init__(self, config: DiTDHConfig) -> None:
        super().__init__()
        self.config = config
        (width, head_width), grid = config.hidden_size, config.input_size
        table = position_table(width, grid)[None]
        self.pos_embed = nn.Parameter(table, requires_grad=config.train_tables)
        self.x_embedder = _TokenEmbedder(config.in_channels, head_width)
        self.s_embedder = _TokenEmbedder(config.in_channels, width)
        self.s_projector = nn.Identity() if width == head_width else nn.Linear(width, head_width)
        self.t_embedder = _TimeEmbedder(width, trained=config.train_tables)
        self.y_embedder = _LabelEmbedder(config)
        self.final_layer = _FinalLayer(head_width, config.in_channels)
        self.enc_feat_rope, self.dec_feat_rope = (
            _Rotary(wide // heads, grid) for wide, heads in zip(config.hidden_size, config.num_heads, strict=True)
        )
        self.blocks = nn.ModuleList(_Block(config, part) for part in (0, 1) for _ in range(config.depth[part]))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction at x for the told time t and label y."""
        blocks, depth = list(self.blocks), self.config.depth[0]
        pixels = x.flatten(2).transpose(1, 2).contiguous()
        time = self.t_embedder(1 - t)
        # The published network applies SiLU to this sum, and each block again: the second is taken here for all blocks.
        condition = functional.silu(functional.silu(time + self.y_embedder(y)))[:, None]
        encoded, factors = self.s_embedder(pixels) + self.pos_embed, self.enc_feat_rope()
        for block in blocks[:depth]:
            encoded = block(encoded, condition, factors)
        # Likewise. The label reaches the decoder through the encoder only.
        condition = functional.silu(self.s_projector(functional.silu(time[:, None] + encoded)))
        tokens, factors = self.x_embedder(pixels), self.dec_feat_rope()
        for block in blocks[depth:]:
            tokens = block(tokens, condition, factors)
        return -self.final_layer(tokens, condition).transpose(1, 2).contiguous().view(x.shape)

    def initialise(self, seed: int) -> DiTDH:
        """Fresh weights as published: PyTorch's linears, zero gates and output, so the output is zero at first."""
        numbers = generator(seed, "init", 0)
        nn.init.normal_(self.t_embedder.W, generator=numbers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                    nn.init.zeros_(module.bias)
                    continue
                bound = module.in_features**-0.5
                nn.init.uniform_(module.bias, -bound, bound, generator=numbers)
                if name.startswith("t_embedder"):
                    nn.init.normal_(module.weight, std=0.02, generator=numbers)
                else:
                    nn.init.uniform_(module.weight, -bound, bound, generator=numbers)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight.view(module.out_channels, -1), generator=numbers)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=numbers)
        return self


class _TokenEmbedder(nn.Module):
    """A convolution with patches of side 1; on pixels (B, T, C) it is a linear layer, whose tokens are contiguous."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return functional.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


class _TimeEmbedder(nn.Module):
    """Random Fourier features of the published time. Their frequencies are drawn once and belong to the weights."""

    def __init__(self, width: int, *, trained: bool, num_frequencies: int = 256) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(num_frequencies), requires_grad=trained)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        angles = time.float()[:, None] * self.W * 2 * math.pi
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class _LabelEmbedder(nn.Module):
    def __init__(self, config: DiTDHConfig) -> None:
        super().__init__()
        rows = config.num_classes + (config.null_label is not None)
        self.embedding_table = nn.Embedding(rows, config.hidden_size[0])

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class _Rotary(nn.Module):
    """Rotary positions on a grid: half of a head turns with the row, half with the column.

    Frequency k of d/2, d = head_dim / 2, is 10000^(-2k/d). Each serves an adjacent pair of entries and stands twice in
    the tables (T, head_dim), which published files contain.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
        axis = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies.repeat_interleave(2)
        angles = torch.cat([axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)], 1)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self) -> Tensor:
        """The rotations (T, 1, head_dim / 2, 2) as cosine and sine, to turn all heads of a token alike."""
        return torch.stack([self.freqs_cos[:, None, ::2], self.freqs_sin[:, None, ::2]], -1).float()


def rotated(x: Tensor, factors: Tensor) -> Tensor:
    """Adjacent pairs of x (B, T, heads, head_dim) as complex numbers, times factors; in float32, one pass over x."""
    if torch.compiler.is_compiling():  # Inductor fuses real arithmetic, and leaves complex numbers to slow kernels
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = factors.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(factors)).flatten(-2).type_as(x)


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = _Norm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = _Norm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, factors: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = rotated(self.q_norm(q), factors), rotated(self.k_norm(k), factors)
        heads = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(heads.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    """Gated by SiLU: w12 makes the gate and the values."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * values)


class _Modulation(nn.Sequential):
    """The adaLN linear at index 1, of a condition (B, 1 or T, width); its SiLU is applied in DiTDH.forward."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.Identity(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return super().forward(condition).chunk(self.parts, dim=-1)


class _Block(nn.Module):
    """A block of the encoder (part 0) or the decoder (part 1)."""

    def __init__(self, config: DiTDHConfig, part: int) -> None:
        super().__init__()
        width = config.hidden_size[part]
        self.norm1, self.norm2 = _Norm(width), _Norm(width)
        self.attn = _Attention(width, config.num_heads[part], config.qk_norm)
        self.mlp = _MLP(width, int(2 / 3 * int(width * config.mlp_ratio)))
        self.adaLN_modulation = _Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor, factors: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)
        x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1), factors))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class _FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = _Norm(width)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = _Modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class _Norm(nn.RMSNorm):
    """RMSNorm, whose fused kernel wants the gain in the type of its input (they differ under autocast)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
