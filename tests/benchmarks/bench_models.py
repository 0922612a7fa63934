"""Our networks against plain ones: the same mathematics as published, module by module, with the same weights."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial

import torch
from bench_note import Figure, Outcome, figure
from torch import Tensor, nn
from torch.nn import functional

from workers.models.ddt import DiTDHConfig
from workers.models.family import blocks_of, build
from workers.models.sit import SiTConfig

NETWORKS: dict[str, SiTConfig | DiTDHConfig] = {
    "SiT-B/2": SiTConfig.published("B"),
    "DiT-DH S": DiTDHConfig.published("S"),
}
# device: images a pass, turns of a forward pass, turns of a training step
PLAN = {"cpu": (1, 8, 6), "cuda": (32, 50, 50)}
AIM_CPU, AIM_GPU = 1.0, 1 / 1.15
LARGEST_DIFFERENCE = 1e-4


def models(quick: bool) -> Outcome:
    """Forward passes and training steps of SiT-B/2 and DiT-DH S, ours and plain ones taking turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: list[Figure] = []
    with _settings(device):
        for name, config in NETWORKS.items():
            figures += compare(name, config, device, quick)
            gc.collect()
    images, *_ = PLAN[device.type]
    settings = {"networks": {name: asdict(config) for name, config in NETWORKS.items()}, "images": images}
    about = (
        "Seconds of a forward pass (no gradients) and of a training step (forward and backward, no optimiser) on "
        "256-px latents: our networks, and plain ones in this file which compute as published (RMSNorm "
        "written out, SiLU in each block, rotary positions by sines and cosines, fused attention where timm has it), "
        "with the same weights. They take turns in one process, the first of a turn changing; a ratio is of the two "
        "of one turn. On a CPU one thread, fp32, the seconds that it computed; on a GPU bf16 autocast, ours also with "
        "each block compiled. "
        "`difference` is the largest between their outputs, over the largest output, in fp32; the benchmark fails "
        f"where it passes {LARGEST_DIFFERENCE:g}."
    )
    return Outcome("models", about, figures, {**settings, "device": device.type})


@contextlib.contextmanager
def _settings(device: torch.device) -> Iterator[None]:
    """One thread on a CPU; no deterministic kernels, which are the loop's choice; no TF32 where fp32 is compared."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)


def compare(name: str, config: SiTConfig | DiTDHConfig, device: torch.device, quick: bool) -> list[Figure]:
    """Figures of one network.

    Raises:
        RuntimeError: the two do not compute the same.
    """
    images, forwards, steps = PLAN[device.type]
    forwards, steps = (1, 1) if quick else (forwards, steps)
    ours, plain = _pair(config, device)
    x = torch.randn(images, config.in_channels, config.input_size, config.input_size, device=device)
    t, y = torch.rand(images, device=device), torch.randint(0, config.num_classes, (images,), device=device)
    figures = [_same(name, ours, plain, (x, t, y))]
    rivals: dict[str, nn.Module] = {"ours": ours, "plain": plain}
    figures += _both(name, rivals, (x, t, y), forwards, steps)
    if device.type == "cuda":
        for block in blocks_of(ours):  # type: ignore[arg-type]  # it is one of the family
            block.compile()
        figures += _both(f"{name}, compiled", rivals, (x, t, y), forwards, steps)
    return figures


def _both(
    name: str, rivals: dict[str, nn.Module], inputs: tuple[Tensor, ...], forwards: int, steps: int
) -> list[Figure]:
    """A forward pass and a training step of each."""
    found: list[Figure] = []
    for what, run, turns in (("forward", _forward, forwards), ("training step", _train, steps)):
        passes = {key: partial(run, model, inputs) for key, model in rivals.items()}
        found += _compared(f"{name}: {what}", _turns(passes, turns, inputs[0].device))
    return found


def _pair(config: SiTConfig | DiTDHConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Our network and the plain one with the same weights, none of them zero."""
    torch.manual_seed(0)
    ours = build(config).initialise(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            if not parameter.any():  # behind zero gates the blocks would not show in the output
                parameter.normal_(std=0.02)
    plain = PlainSiT(config) if isinstance(config, SiTConfig) else PlainDiTDH(config)
    plain.load_state_dict(ours.state_dict())
    return ours.to(device), plain.to(device)


def _same(name: str, ours: nn.Module, plain: nn.Module, inputs: tuple[Tensor, ...]) -> Figure:
    with torch.no_grad():
        a, b = ours(*inputs), plain(*inputs)
    difference = float((a - b).abs().max() / b.abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"{name} must compute what the plain network does, got a difference of {difference:g}")
    return figure(f"{name}: difference", "1e-6 of the largest", [1e6 * difference])


# ----------------------------------------------------------------------------------------------------- taking turns


def _forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad(), _autocast(inputs[0]):
        model(*inputs)


def _train(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    model.zero_grad()
    with _autocast(inputs[0]):
        loss = model(*inputs).float().square().mean()
    loss.backward()


def _autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


def _turns(passes: Mapping[str, Callable[[], None]], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each pass, turn by turn, after one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(turns + 1):
        order = list(passes) if turn % 2 else list(passes)[::-1]
        for name in order:
            start = _now(device)
            passes[name]()
            if turn:
                found[name].append(_now(device) - start)
    return found


def _now(device: torch.device) -> float:
    """Seconds; on the CPU those that this process used, which other work on the machine leaves alone."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _compared(name: str, seconds: dict[str, list[float]]) -> list[Figure]:
    aim = AIM_GPU if torch.cuda.is_available() else AIM_CPU
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return [
        *(figure(f"{name}, {key}", "ms", [1000 * s for s in values]) for key, values in seconds.items()),
        figure(f"{name}, ours over plain", "", ratios, aim),
        figure(f"{name}, ours over plain, fastest", "", [min(seconds["ours"]) / min(seconds["plain"])]),
    ]


# ----------------------------------------------------------------------------------------------------- plain networks


class PlainSiT(nn.Module):
    """SiT as published, with the names of its state dict."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, width), requires_grad=False)
        self.x_embedder = _Patches(config.in_channels, width, config.patch_size)
        self.t_embedder = _SiTTime(width)
        self.y_embedder = _Labels(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(_SiTBlock(config) for _ in range(config.depth))
        self.final_layer = _SiTFinal(config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """See SiT.forward."""
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        tokens = self.final_layer(tokens, condition)
        patch, channels = self.config.patch_size, self.config.out_channels
        grid = self.config.input_size // patch
        tokens = tokens.reshape(len(x), grid, grid, patch, patch, channels)
        out = torch.einsum("nhwpqc->nchpwq", tokens).reshape(len(x), channels, grid * patch, grid * patch)
        return out.chunk(2, dim=1)[0] if self.config.learn_sigma else out


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class _Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _Labels(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class _SiTTime(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[:, None].float() * frequencies[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class _Attention(nn.Module):
    """As in timm; with rotary tables as in RAE."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: _Rotary | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if rope is not None:
            q, k = rope(q), rope(k)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class _SiTMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _SiTBlock(nn.Module):
    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = _Attention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = _SiTMLP(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (part.unsqueeze(1) for part in parts)
        x = x + gate1 * self.attn(_modulated(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(_modulated(self.norm2(x), shift2, scale2))


class _SiTFinal(nn.Module):
    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = (part.unsqueeze(1) for part in self.adaLN_modulation(condition).chunk(2, dim=1))
        return self.linear(_modulated(self.norm_final(x), shift, scale))


class PlainDiTDH(nn.Module):
    """RAE's DiT-DH as published, with the names of its state dict; time and velocity turned round at its doors."""

    def __init__(self, config: DiTDHConfig) -> None:
        super().__init__()
        self.depth, (width, head_width) = config.depth, config.hidden_size
        tokens = config.input_size**2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        self.x_embedder = _Patches(config.in_channels, head_width, 1)
        self.s_embedder = _Patches(config.in_channels, width, 1)
        self.s_projector = nn.Linear(width, head_width)
        self.t_embedder = _DiTDHTime(width)
        self.y_embedder = _Labels(config.num_classes + 1, width)
        self.final_layer = _DiTDHFinal(head_width, config.in_channels)
        self.enc_feat_rope, self.dec_feat_rope = (
            _Rotary(tokens, wide // heads) for wide, heads in zip(config.hidden_size, config.num_heads, strict=True)
        )
        self.blocks = nn.ModuleList(
            _DiTDHBlock(config.hidden_size[part], config.num_heads[part], config.mlp_ratio)
            for part in (0, 1)
            for _ in range(config.depth[part])
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """See DiTDH.forward."""
        time_vector = self.t_embedder(1 - t)
        condition = functional.silu(time_vector + self.y_embedder(y)).unsqueeze(1)
        encoded = self.s_embedder(x) + self.pos_embed
        for number in range(self.depth[0]):
            encoded = self.blocks[number](encoded, condition, self.enc_feat_rope)
        condition = self.s_projector(functional.silu(time_vector.unsqueeze(1) + encoded))
        tokens = self.x_embedder(x)
        for number in range(self.depth[0], sum(self.depth)):
            tokens = self.blocks[number](tokens, condition, self.dec_feat_rope)
        return -self.final_layer(tokens, condition).transpose(1, 2).reshape(x.shape)


class _DiTDHTime(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(256), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.W[None] * 2 * math.pi
        return self.mlp(torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1))


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class _Rotary(nn.Module):
    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, tokens: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs_cos", torch.zeros(tokens, head_dim))
        self.register_buffer("freqs_sin", torch.zeros(tokens, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack((-second, first), dim=-1).flatten(-2)
        return (x * self.freqs_cos + turned * self.freqs_sin).type_as(x)


class _SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * values)


class _DiTDHBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = _RMSNorm(width), _RMSNorm(width)
        self.attn = _Attention(width, num_heads)
        self.mlp = _SwiGLU(width, int(2 / 3 * int(width * mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, rope: _Rotary) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(_modulated(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(_modulated(self.norm2(x), shift2, scale2))


class _DiTDHFinal(nn.Module):
    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = _RMSNorm(width)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(_modulated(self.norm_final(x), shift, scale))
