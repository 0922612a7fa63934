"""Shared truth for tests, written in NumPy from definitions and sharing no code with the packages it judges."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
PATHS = ("linear", "gvp", "vp")


def alpha_sigma(path: str, t):
    """alpha and sigma of a path at t (real or complex), from their definitions."""
    if path == "linear":
        return t, 1 - t
    if path == "gvp":
        return np.sin(np.pi * t / 2), np.cos(np.pi * t / 2)
    alpha = np.exp(-((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.1 / 2)
    return alpha, np.sqrt(1 - alpha**2)


def path_coefficients(path: str, t: np.ndarray):
    """alpha, sigma and their derivatives, by the complex step, which is exact to rounding."""
    step = 1e-30
    values, moved = alpha_sigma(path, t), alpha_sigma(path, t + 1j * step)
    return *values, *(m.imag / step for m in moved)


@dataclass(frozen=True)
class GaussianFlow:
    """Data N(mean, sd^2) in every dimension: the error-free field, its flow and its marginals, in closed form."""

    path: str
    mean: float
    sd: float

    def marginal(self, t: float) -> tuple[float, float]:
        """Mean and standard deviation of x_t."""
        alpha, sigma = alpha_sigma(self.path, t)
        return alpha * self.mean, float(np.sqrt(alpha**2 * self.sd**2 + sigma**2))

    def flow(self, x0: Tensor, t: float) -> Tensor:
        """The state at t of the exact ODE started at x0: every standardised coordinate is conserved."""
        mean, sd = self.marginal(t)
        return mean + sd * x0

    def posterior_data(self, x: Tensor, t: float) -> Tensor:
        """E[x1 | x_t = x]."""
        alpha, sigma = alpha_sigma(self.path, t)
        gain = alpha * self.sd**2 / (alpha**2 * self.sd**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def field(self, x: Tensor, t: Tensor) -> Tensor:
        """E[alpha' x1 + sigma' x0 | x_t = x] at x (B, ...), t (B,): what a perfectly trained network returns."""
        assert t.shape == x.shape[:1], "a field is told one time for each sample"
        shape = (-1,) + (1,) * (x.ndim - 1)
        if bool((t == t[0]).all()):
            t = t[:1]
        alpha, sigma, d_alpha, d_sigma = (
            torch.as_tensor(c, dtype=x.dtype).reshape(shape) for c in path_coefficients(self.path, t.double().numpy())
        )
        variance = alpha**2 * self.sd**2 + sigma**2
        covariance = d_alpha * alpha * self.sd**2 + d_sigma * sigma
        return d_alpha * self.mean + covariance / variance * (x - alpha * self.mean)


def uniforms(seed: int, *shape: int) -> Tensor:
    """Uniform float64 numbers in [0, 1)."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


def normals(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 numbers."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def golden(family: str) -> tuple[dict, dict[str, Tensor]]:
    """Description and tensors of one family of golden cases."""
    return json.loads((GOLDEN / f"{family}.json").read_text()), load_file(GOLDEN / f"{family}.safetensors")


def published_keys(family: str = "sit") -> dict:
    """State-dict names and shapes of a family's published sizes."""
    return json.loads(gzip.decompress((GOLDEN / f"{family}_keys.json.gz").read_bytes()))


def recipe_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A weight or input of the full-size cases; the recipe is stated in fullsize.json."""
    bits = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
    value = torch.from_numpy(bits.standard_normal(shape, np.float32))
    if name in ("input_x", "t_embedder.W"):
        return value
    if len(shape) == 1:
        return 1 + 0.2 * value if name.endswith(".weight") else 0.1 * value
    fan_in = int(np.prod(shape[1:]))
    if "embedding_table" in name:
        return 0.5 * value
    return (0.3 if "adaLN_modulation" in name else 0.8) * value / fan_in**0.5


def inception_weights(seed: int) -> dict[str, Tensor]:
    """A state dict of the FID-Inception's published names and shapes whose activations neither fade nor grow.

    By the recipe of recipe_tensor, matrices and kernels times 1.75; variances are 0.6 plus 5 times its absolute value.
    """
    weights = {}
    for name, shape in published_keys("inception").items():
        value = recipe_tensor(name, tuple(shape), seed)
        if name.endswith(".num_batches_tracked"):
            value = torch.tensor(0)
        elif name.endswith(".running_var"):
            value = 0.6 + 5 * value.abs()
        elif len(shape) > 1:
            value = 1.75 * value
        weights[name] = value
    return weights


def recipe_pixels(shape: tuple[int, ...], seed: int) -> Tensor:
    """uint8 images: the recipe's normals of the name input_x, times 50, plus 128, cut to [0, 255]."""
    return (50 * recipe_tensor("input_x", shape, seed) + 128).clamp(0, 255).to(torch.uint8)


def assert_full_size(model: torch.nn.Module, name: str, position_table: Tensor, t: Tensor, sign: int) -> None:
    """A real-size network with the recipe's weights says what the published one said; sign -1 for reversed time."""
    info = json.loads((GOLDEN / "fullsize.json").read_text())
    truth, config = info["models"][name]["out"], model.config
    named = dict(model.named_parameters())
    weights = {key: recipe_tensor(key, tuple(p.shape), info["seed"]) for key, p in named.items() if key != "pos_embed"}
    model.load_state_dict({**model.state_dict(), **weights, "pos_embed": position_table})
    x = recipe_tensor("input_x", (2, config.in_channels, config.input_size, config.input_size), info["seed"])
    with torch.no_grad():
        out = sign * model(x, t, torch.tensor([207, 1000]))
    assert list(out.shape) == truth["shape"]
    np.testing.assert_allclose([float(out.mean()), float(out.std())], [truth["mean"], truth["std"]], atol=1e-5)
    flat = out.flatten()[np.linspace(0, out.numel() - 1, 64).astype(int)]
    torch.testing.assert_close(flat, torch.tensor(truth["values"]), rtol=1e-4, atol=2e-5)
