"""What the representation autoencoder (RAE) adds to DINOv2: its pixel decoder and the statistics of its latents."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.models.checkpoints import load_weights

_VARIANCE_EPS = 1e-5
_LAYER_NORM_EPS = 1e-12  # in every published configuration (ViT-B, ViT-L, ViT-XL)


class _Layer(nn.Module):
    """A pre-norm transformer layer; the nesting is that of the published names."""

    def __init__(self, width: int, mlp_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"attention": projections, "output": _dense(width, width)})
        self.intermediate = _dense(width, mlp_width)
        self.output = _dense(mlp_width, width)
        self.layernorm_before = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.layernorm_after = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) to tokens."""
        x = x + self._attend(self.layernorm_before(x))
        hidden = functional.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](hidden)

    def _attend(self, x: Tensor) -> Tensor:
        projections = self.attention.get_submodule("attention")
        heads = [
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)
            for layer in projections.children()
        ]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.attention.get_submodule("output.dense")(mixed)


def _dense(inputs: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs)})


class RAEDecoder(nn.Module):
    """Latent tokens to image patches, with the published state-dict names: a ViT with a class token of its own.

    Args:
        channels: of a latent token.
        width: of the layers, a multiple of num_heads.
        mlp_width: of the layers' MLP.
        depth: layers.
        num_heads: attention heads (16 in the published ViT-L and ViT-XL, 12 in ViT-B).
        num_tokens: latent tokens, a square number.
        patch_size: side of the square of pixels that a token becomes.
    """

    def __init__(
        self, *, channels: int, width: int, mlp_width: int, depth: int, num_heads: int, num_tokens: int, patch_size: int
    ) -> None:
        super().__init__()
        self.channels, self.grid, self.patch_size = channels, math.isqrt(num_tokens), patch_size
        self.decoder_embed = nn.Linear(channels, width)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, num_tokens + 1, width))
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_layers = nn.ModuleList(_Layer(width, mlp_width, num_heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, patch_size**2 * 3)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), not normalised, to images (B, 3, h * patch, w * patch), ImageNet-normalised."""
        tokens = self.decoder_embed(z.flatten(2).transpose(1, 2))
        x = torch.cat([self.trainable_cls_token.expand(len(z), -1, -1), tokens], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        patches = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        patches = patches.unflatten(1, (self.grid, self.grid)).unflatten(-1, (self.patch_size, self.patch_size, 3))
        # (B, row, column, row in patch, column in patch, 3) => (B, 3, height, width)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def load_rae_decoder(path: Path, *, num_heads: int) -> RAEDecoder:
    """The decoder of a published state dict, in fp32, for inference; all sizes but the heads are read from the file.

    Raises:
        ValueError: the file is unreadable or not such a state dict, or its width is no multiple of num_heads.
    """
    weights = {name: value.float() for name, value in load_weights(path).items()}
    try:
        width, channels = weights["decoder_embed.weight"].shape
        mlp_width, _ = weights["decoder_layers.0.intermediate.dense.weight"].shape
        outputs, _ = weights["decoder_pred.weight"].shape
        _, positions, _ = weights["decoder_pos_embed"].shape
    except KeyError as error:
        raise ValueError(f"decoder {path.name} must be RAE's ViT decoder, but {error.args[0]} is missing") from error
    except ValueError as error:
        raise ValueError(f"decoder {path.name} must be RAE's ViT decoder, but a shape has another rank") from error
    if width % num_heads:
        raise ValueError(f"decoder_heads must divide the decoder's width {width}, got {num_heads}")
    if math.isqrt(positions - 1) ** 2 != positions - 1 or math.isqrt(outputs // 3) ** 2 * 3 != outputs:
        raise ValueError(f"decoder {path.name} must have squares of tokens and patches, got {positions - 1}, {outputs}")
    with torch.device("meta"):
        decoder = RAEDecoder(
            channels=channels,
            width=width,
            mlp_width=mlp_width,
            depth=len({name.split(".")[1] for name in weights if name.startswith("decoder_layers.")}),
            num_heads=num_heads,
            num_tokens=positions - 1,
            patch_size=math.isqrt(outputs // 3),
        )
    expected = {name: value.shape for name, value in decoder.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        shapes = [tuple(side[name]) if name in side else "nothing" for side in (expected, found)]
        raise ValueError(f"decoder {path.name} must be RAE's ViT decoder, but {name} is {shapes[1]}, not {shapes[0]}")
    decoder.load_state_dict(weights, assign=True)
    return decoder.eval().requires_grad_(False)


def load_rae_statistics(path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, element by element, the latter as RAE takes it: sqrt(var + 1e-5).

    Raises:
        ValueError: the file is unreadable, lacks `mean` or `var`, or they are of another shape or not finite.
    """
    values = load_weights(path)
    for name in ("mean", "var"):
        if name not in values:
            raise ValueError(f"statistics {path.name} must hold mean and var, but {name} is missing")
        if tuple(values[name].shape) != shape:
            raise ValueError(f"statistics {path.name}: {name} must be {shape}, got {tuple(values[name].shape)}")
        if not torch.isfinite(values[name]).all():
            raise ValueError(f"statistics {path.name}: {name} must be finite, got NaN or infinity; make it again")
    if values["var"].min() < 0:
        raise ValueError(f"statistics {path.name}: var must not be negative, got {float(values['var'].min())}")
    return values["mean"].float(), torch.sqrt(values["var"].float() + _VARIANCE_EPS)
