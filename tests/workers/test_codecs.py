"""Pixels to latents and back, against the libraries' own calls and numbers worked out by hand."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import save_tensors, tiny_dinov2, tiny_rae_decoder, tiny_rae_statistics, tiny_vae
from torch.nn import functional

from workers.codecs import (
    CodecConfig,
    centre_crop,
    dino_features,
    directory_hash,
    open_codec,
    open_dinov2,
    quantise,
)
from workers.data import to_latent
from workers.manifest import measure
from workers.models.rae_decoder import load_rae_decoder

CPU = torch.device("cpu")
ZEROS = "0" * 64
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pixels(count: int, size: int, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (count, channels, size, size), dtype=np.uint8))


def normals(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(6).standard_normal(shape)).float()


def vae_config(path: Path, **changes) -> CodecConfig:
    digest = directory_hash(path) if path.exists() else tiny_vae(path)
    values = {"kind": "vae", "image_size": 32, "weights": str(path), "sha256": digest, "scale": 1.5305, "shift": 0.0609}
    return CodecConfig(**{**values, **changes})


def rae_config(path: Path, *, image_size: int = 32, registers: bool = True, **changes) -> CodecConfig:
    grid = image_size // 16
    values = {
        "kind": "rae",
        "image_size": image_size,
        "weights": str(path / "dinov2"),
        "sha256": tiny_dinov2(path / "dinov2", registers),
        "decoder": str(path / "decoder.pt"),
        "decoder_sha256": tiny_rae_decoder(path / "decoder.pt", grid=grid),
        "decoder_heads": 2,
        "statistics": str(path / "stat.pt"),
        "statistics_sha256": tiny_rae_statistics(path / "stat.pt", grid=grid),
    }
    return CodecConfig(**{**values, **changes})


def refused(config: CodecConfig) -> str:
    """The one line with which opening a codec fails."""
    with pytest.raises(ValueError, match=r".") as caught:
        open_codec(config, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ identity


def test_the_identity_gives_every_pixel_back():
    codec = open_codec(CodecConfig("identity", 16, channels=1), CPU)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    stored = codec.encode(images)
    assert codec.latent_shape == (1, 16, 16)
    assert stored.dtype == torch.uint8
    assert torch.equal(stored, images)
    latent = to_latent(codec.config.description, stored, None)
    assert latent.dtype == torch.float32
    assert latent.flatten()[[0, 51, 255]].tolist() == pytest.approx([-1, -0.6, 1], abs=1e-7)
    assert torch.equal(codec.decode(latent), images)


@pytest.mark.parametrize(
    "images", [pixels(2, 8).float(), pixels(2, 16), pixels(2, 8, channels=1), pixels(2, 8).to(torch.int64)]
)
def test_other_pixels_are_refused(images):
    with pytest.raises(ValueError, match=r"pixels must be torch\.uint8 \(B, 3, 8, 8\), got "):
        open_codec(CodecConfig("identity", 8), CPU).encode(images)


# ----------------------------------------------------------------------------------------------------------- vae


def test_a_vae_stores_the_moments_of_the_librarys_posterior(tmp_path):
    from diffusers import AutoencoderKL

    codec = open_codec(vae_config(tmp_path / "vae"), CPU)
    vae, images = AutoencoderKL.from_pretrained(tmp_path / "vae"), pixels(2, 32)
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(images.numpy() / np.float32(127.5) - np.float32(1))).latent_dist
    stored = codec.encode(images)
    assert codec.latent_shape == (4, 4, 4)
    assert stored.dtype == torch.float32
    assert not stored.requires_grad
    torch.testing.assert_close(stored[:, :4], expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stored[:, 4:], torch.exp(0.5 * expected.logvar), rtol=1e-5, atol=1e-6)
    assert stored[:, 4:].std() > 0.01  # deviations, not a constant


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_a_latent_is_shifted_then_scaled(tmp_path, posterior):
    """In float64, from the definition."""
    config = vae_config(tmp_path / "vae", posterior=posterior)
    stored, noise = normals(3, 8, 4, 4), normals(3, 4, 4, 4)
    drawn = stored[:, :4].double() + (stored[:, 4:].double() * noise if posterior == "sample" else 0)
    expected = ((drawn - 0.0609) * 1.5305).float()
    torch.testing.assert_close(to_latent(config.description, stored, noise), expected)
    torch.testing.assert_close(to_latent(config.description, stored.half(), noise), expected, rtol=2e-2, atol=1e-2)


def test_drawing_needs_noise_of_the_latents_shape(tmp_path):
    config = vae_config(tmp_path / "vae")
    for noise in (None, normals(3, 8, 4, 4)):
        with pytest.raises(ValueError, match=r"noise must have the latents' shape \(3, 4, 4, 4\) for posterior sample"):
            to_latent(config.description, normals(3, 8, 4, 4), noise)
    at_the_mean = vae_config(tmp_path / "vae", posterior="mean").description
    assert to_latent(at_the_mean, normals(3, 8, 4, 4), None).shape == (3, 4, 4, 4)


@pytest.mark.parametrize("changes", [{}, {"scale": 0.18215, "shift": 0.0}])
def test_a_vae_decodes_as_the_library_does(tmp_path, changes):
    from diffusers import AutoencoderKL

    config = vae_config(tmp_path / "vae", **changes)
    latent, vae = normals(2, 4, 4, 4), AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        images = vae.decode(latent / config.scale + config.shift).sample.double().numpy()
    expected = np.clip((images + 1) * 127.5, 0, 255)
    decoded = open_codec(config, CPU).decode(latent)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (2, 3, 32, 32)
    assert np.abs(decoded.numpy() - expected).max() < 0.501
    assert 20 < decoded.float().std() < 120  # neither constant nor all clamped


def test_a_vae_may_decode_with_another_one_than_encodes(tmp_path):
    tiny_vae(tmp_path / "two", seed=1)
    one, two = vae_config(tmp_path / "one"), vae_config(tmp_path / "two")
    both = replace(one, decoder=two.weights, decoder_sha256=two.sha256)
    latent = normals(2, 4, 4, 4)
    assert torch.equal(open_codec(both, CPU).decode(latent), open_codec(two, CPU).decode(latent))
    assert not torch.equal(open_codec(both, CPU).decode(latent), open_codec(one, CPU).decode(latent))
    images = pixels(2, 32)
    assert torch.equal(open_codec(both, CPU).encode(images), open_codec(one, CPU).encode(images))
    assert both.description == one.description
    with pytest.raises(ValueError, match=r"decoder .* must have the SHA-256 0+, got"):
        open_codec(replace(both, decoder_sha256="0" * 64), CPU)
    tiny_vae(tmp_path / "three", latent_channels=2)
    digest = directory_hash(tmp_path / "three")
    with pytest.raises(ValueError, match=r"decoder must have the \(levels, latent channels\) \(4, 4\) of weights, got"):
        open_codec(replace(both, decoder=str(tmp_path / "three"), decoder_sha256=digest), CPU)


def test_published_autoencoders_with_the_old_names_of_attention_are_read(tmp_path):
    """The files of Stable Diffusion's first autoencoders say query, key, value and proj_attn."""
    before = open_codec(vae_config(tmp_path / "vae"), CPU).encode(pixels(1, 32))
    new, file = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}, tmp_path / "vae" / WEIGHTS
    weights = {}
    for name, value in load_file(file).items():
        for ours, old in new.items():
            name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid_block.attentions.0.{old}.")
        weights[name] = value
    assert any("proj_attn" in name for name in weights)
    save_file(weights, file, {"format": "pt"})
    after = open_codec(vae_config(tmp_path / "vae"), CPU).encode(pixels(1, 32))
    assert torch.equal(before, after)


def test_the_surrounding_precision_does_not_reach_a_codec(tmp_path, monkeypatch):
    codec = open_codec(vae_config(tmp_path / "vae"), CPU)
    expected, seen = codec.encode(pixels(1, 32)), []
    encode = codec.vae.encode

    def watched(images):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()))
        return encode(images)

    monkeypatch.setattr(codec.vae, "encode", watched)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            stored = codec.encode(pixels(1, 32))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(stored, expected)
    assert seen == [("highest", False, False)]
    assert torch.backends.cudnn.allow_tf32


# ----------------------------------------------------------------------------------------------------------- rae


def dinov2(path: Path, registers: bool):
    from transformers import Dinov2Model, Dinov2WithRegistersModel

    return (Dinov2WithRegistersModel if registers else Dinov2Model).from_pretrained(path).eval()


def imagenet(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], normalised in float64."""
    return torch.from_numpy((images.double().numpy() - MEAN[:, None, None]) / STD[:, None, None])


@pytest.mark.parametrize("image_size", [32, 64])
def test_rae_latents_are_tokens_before_the_affine_norm(tmp_path, image_size):
    """From the library's affine output, undone: n = (n w + b - b) / w."""
    codec = open_codec(rae_config(tmp_path, image_size=image_size), CPU)
    model, images, grid = dinov2(tmp_path / "dinov2", True), pixels(2, image_size), image_size // 16
    small = functional.interpolate(images.double() / 255, (14 * grid, 14 * grid), mode="bicubic", align_corners=False)
    with torch.no_grad():
        tokens = model(imagenet(small).float()).last_hidden_state[:, 5:]
    plain = ((tokens - model.layernorm.bias) / model.layernorm.weight).detach().double().numpy()
    grids = np.stack([image.reshape(grid, grid, 12).transpose(2, 0, 1) for image in plain])
    statistics = torch.load(tmp_path / "stat.pt")
    expected = (grids - statistics["mean"].numpy()) / np.sqrt(statistics["var"].double().numpy() + 1e-5)
    stored = codec.encode(images)
    assert codec.latent_shape == (12, grid, grid)
    assert stored.dtype == torch.float32
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(to_latent(codec.config.description, stored, None), stored)


def test_a_tiny_variance_is_kept_from_zero(tmp_path):
    """eps is added to the variance, not to the deviation: var = 0 divides by sqrt(1e-5)."""
    config = rae_config(tmp_path)
    zero = torch.zeros(12, 2, 2)
    before = open_codec(config, CPU)
    digest = save_tensors(tmp_path / "stat.pt", {"mean": zero, "var": zero})
    after = open_codec(replace(config, statistics_sha256=digest), CPU)
    latent = before.encode(pixels(1, 32)) * before.std + before.mean
    torch.testing.assert_close(after.encode(pixels(1, 32)), latent / 1e-5**0.5)


def library_decoder(weights: dict[str, torch.Tensor], grid: int):
    """diffusers' port of the decoder, which has other names for the same weights."""
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    decoder = RAEDecoder(
        hidden_size=12, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=24, num_patches=grid * grid, patch_size=16, image_size=16 * grid,
    )  # fmt: skip
    names = {"query": "to_q", "key": "to_k", "value": "to_v"}
    renamed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(f"attention.attention.{old}", f"attention.{new}")
        renamed[name.replace("attention.output.dense", "attention.to_out.0")] = value
    decoder.decoder_pos_embed.copy_(renamed.pop("decoder_pos_embed"))
    decoder.load_state_dict(renamed)
    return decoder.eval()


@pytest.mark.parametrize(("image_size", "size_of_tokens"), [(32, 1.0), (64, 1.0), (32, 1e-5)])
def test_rae_decodes_as_the_librarys_port_does(tmp_path, image_size, size_of_tokens):
    """Also with tokens so small that the norms' eps decides."""

    def shrink(weights):
        for name in ("decoder_embed.weight", "decoder_embed.bias", "decoder_pos_embed", "trainable_cls_token"):
            weights[name] *= size_of_tokens

    config = changed_decoder(rae_config(tmp_path, image_size=image_size, rounding="truncate"), shrink)
    grid = image_size // 16
    latent, statistics = normals(2, 12, grid, grid), torch.load(tmp_path / "stat.pt")
    z = latent.double() * torch.sqrt(statistics["var"].double() + 1e-5) + statistics["mean"]
    decoder = library_decoder(torch.load(tmp_path / "decoder.pt"), grid)
    with torch.no_grad():
        patches = decoder(z.float().flatten(2).transpose(1, 2)).logits
        images = decoder.unpatchify(patches).double().numpy()
    expected = np.clip(images * STD[:, None, None] + MEAN[:, None, None], 0, 1) * 255
    decoded = open_codec(config, CPU).decode(latent).double().numpy()
    assert decoded.shape == (2, 3, image_size, image_size)
    assert (expected - decoded).min() > -0.01  # truncated: never above
    assert (expected - decoded).max() < 1.01
    assert 20 < decoded.std() < 120


def test_the_decoder_is_the_librarys_port_in_float64(tmp_path):
    """Eight bits would hide which approximation of GELU is taken."""
    tiny_rae_decoder(tmp_path / "decoder.pt")
    z, library = normals(2, 12, 2, 2).double(), library_decoder(torch.load(tmp_path / "decoder.pt"), 2).double()
    with torch.no_grad():
        expected = library.unpatchify(library(z.flatten(2).transpose(1, 2)).logits)
    decoder = load_rae_decoder(tmp_path / "decoder.pt", num_heads=2).double()
    torch.testing.assert_close(decoder(z), expected, rtol=1e-9, atol=1e-9)


def test_rae_takes_a_safetensors_decoder(tmp_path):
    config = rae_config(tmp_path)
    digest = save_tensors(tmp_path / "d.safetensors", torch.load(tmp_path / "decoder.pt"))
    other = replace(config, decoder=str(tmp_path / "d.safetensors"), decoder_sha256=digest)
    latent = normals(1, 12, 2, 2)
    assert torch.equal(open_codec(config, CPU).decode(latent), open_codec(other, CPU).decode(latent))


@pytest.mark.parametrize("kind", ["identity", "vae", "rae"])
def test_shapes_and_values_do_not_depend_on_the_batch(tmp_path, kind):
    configs = {"vae": lambda: vae_config(tmp_path / "vae"), "rae": lambda: rae_config(tmp_path)}
    config = configs.get(kind, lambda: CodecConfig("identity", 32))()
    codec, images = open_codec(config, CPU), pixels(3, 32)
    together = codec.encode(images)
    alone = torch.cat([codec.encode(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(together, codec.encode(images))
    latent = to_latent(config.description, together, normals(3, *codec.latent_shape))
    assert latent.shape == (3, *codec.latent_shape)
    decoded = codec.decode(latent)
    singly = torch.cat([codec.decode(one[None]) for one in latent])
    assert (decoded.int() - singly.int()).abs().max() <= 1
    assert torch.equal(decoded, codec.decode(latent))


# ------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("registers", [True, False])
def test_features_are_normalised_patch_tokens(tmp_path, registers):
    """Against the library with a table resampled by Pillow, which antialiases."""
    digest = tiny_dinov2(tmp_path / "dinov2", registers)
    model, images = dinov2(tmp_path / "dinov2", registers), pixels(2, 32)
    table = model.embeddings.position_embeddings.detach()
    channels = [Image.fromarray(c.numpy()) for c in table[0, 1:].T.reshape(12, 5, 5)]
    small = np.stack([np.asarray(c.resize((2, 2), Image.Resampling.BICUBIC)) for c in channels])
    resampled = torch.cat([table[:, :1], torch.from_numpy(small).flatten(1).T[None]], dim=1)
    model.embeddings.position_embeddings = torch.nn.Parameter(resampled)
    seen = functional.interpolate(imagenet(images / 255).float(), (28, 28), mode="bicubic")
    with torch.no_grad():
        expected = model(seen).last_hidden_state[:, 5 if registers else 1 :]
    features = dino_features(open_dinov2(str(tmp_path / "dinov2"), digest, 32, CPU), images, 28)
    assert features.shape == (2, 4, 12)
    assert not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_features_need_a_fitting_size_and_the_right_weights(tmp_path):
    tiny_dinov2(tmp_path / "dinov2")
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 16 for DINOv2's features, got 40"):
        open_dinov2(str(tmp_path / "dinov2"), ZEROS, 40, CPU)
    with pytest.raises(ValueError, match=f"must have the SHA-256 {ZEROS}"):
        open_dinov2(str(tmp_path / "dinov2"), ZEROS, 32, CPU)


# ------------------------------------------------------------------------------------------------------ rounding


def published(rule: str, v: np.ndarray) -> np.ndarray:
    """SiT's, REPA's and this project's expressions for v in [-1, 1], in float32."""
    one = np.float32
    if rule == "half_up":
        return np.clip(one(127.5) * v + one(128), 0, 255).astype(np.uint8)
    if rule == "truncate":
        return np.clip(one(255) * ((v + one(1)) / one(2)), 0, 255).astype(np.uint8)
    return np.clip(np.rint((v + one(1)) * one(127.5)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("rule", ["round", "half_up", "truncate"])
def test_rounding_is_the_published_one_to_the_last_bit(rule):
    """Also where a value sits on a boundary, so that the order of the operations decides."""
    edges = np.concatenate([np.arange(512) / np.float32(255) - 1, np.arange(-40, 300) / np.float32(127.5) - 1])
    edges = edges.astype(np.float32)
    values = np.concatenate([edges, np.nextafter(edges, np.float32(9)), np.nextafter(edges, np.float32(-9))])
    assert np.array_equal(quantise(torch.from_numpy(values)[None], rule)[0], published(rule, values))


def exact(rule: str, level: Fraction) -> int:
    """A level in [0, 255] to its pixel, in rational numbers."""
    level = min(max(level, Fraction(0)), Fraction(255))
    return int(level) if rule == "truncate" else int(level + Fraction(1, 2))  # no tie but 127.5, which both give 128


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("rule", ["round", "half_up", "truncate"])
def test_rounding_of_exact_values(rule, unit):
    """Multiples of 1/1024, for which every rule is exact in float32."""
    numbers = range(-1200, 1200)
    levels = [Fraction(n, 1024) * 255 if unit else (Fraction(n, 1024) + 1) * Fraction(255, 2) for n in numbers]
    images = torch.tensor([n / 1024 for n in numbers])[None]
    assert quantise(images, rule, unit=unit)[0].tolist() == [exact(rule, level) for level in levels]


def test_the_three_rules_differ():
    images = torch.tensor([[[[126.4, 126.6, 127.5, 254.6]]]]) / 127.5 - 1
    assert quantise(images, "round").flatten().tolist() == [126, 127, 128, 255]
    assert quantise(images, "half_up").flatten().tolist() == [126, 127, 128, 255]
    assert quantise(images, "truncate").flatten().tolist() == [126, 126, 127, 254]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(bad):
    images = torch.zeros(3, 3, 2, 2)
    images[1, 2, 0, 0] = bad
    with pytest.raises(FloatingPointError, match="decoded images must be finite, but image 1 is not"):
        quantise(images, "round")


# ---------------------------------------------------------------------------------------------------------- crop


def picture(array: np.ndarray) -> Image.Image:
    """An image with red as given, green its complement and blue constant."""
    red = array.astype(np.uint8)
    return Image.fromarray(np.stack([red, 255 - red, np.full_like(red, 7)], axis=2))


def check(crop: np.ndarray, red: np.ndarray, within: int = 0) -> None:
    assert crop.dtype == np.uint8
    assert crop.shape == (3, *red.shape)
    assert np.abs(crop[0].astype(int) - red).max() <= within
    assert np.abs(crop[1].astype(int) - (255 - red)).max() <= within
    assert (crop[2] == 7).all()


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),
    [(3, 3, 0, 0), (3, 4, 0, 0), (3, 6, 0, 1), (3, 9, 0, 3), (4, 3, 0, 0), (8, 3, 2, 0)],
)
def test_an_image_of_the_right_size_is_only_cropped(height, width, top, left):
    numbers = np.arange(height * width).reshape(height, width)
    check(centre_crop(picture(numbers), 3), numbers[top : top + 3, left : left + 3])


def test_a_large_image_is_halved_by_means_of_squares():
    """4 x 6 to 2 x 3, then cropped to 2 x 2 from the left."""
    numbers = np.array([[0, 4, 20, 20, 90, 92], [8, 12, 24, 24, 90, 92], [40, 40, 1, 3, 5, 5], [40, 40, 5, 7, 5, 5]])
    check(centre_crop(picture(numbers), 2), np.array([[6, 22], [40, 4]]))


def test_halving_is_repeated_while_both_halves_suffice():
    """16 x 16 to 8 x 8, to 4 x 4 and, because 4 is twice 2, to 2 x 2."""
    blocks = np.repeat(np.repeat(np.array([[10, 200], [60, 120]]), 8, 0), 8, 1)
    check(centre_crop(picture(blocks), 2), np.array([[10, 200], [60, 120]]))
    checkers = np.indices((16, 16)).sum(0) % 2 * 200
    check(centre_crop(picture(checkers), 2), np.full((2, 2), 100))


def bicubic(size: int, new: int) -> np.ndarray:
    """Rows of weights of antialiased bicubic resampling (a = -1/2), from its definition."""
    scale = size / new
    places = (np.arange(size) + 0.5 - (np.arange(new)[:, None] + 0.5) * scale) / max(scale, 1)
    x = np.abs(places)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("height", "width", "size", "resized", "left"),
    [(3, 7, 2, (2, 5), 1), (7, 12, 5, (5, 9), 2), (9, 9, 5, (5, 5), 0), (2, 3, 4, (4, 6), 1), (5, 14, 4, (4, 11), 3)],
)
def test_the_rest_is_bicubic_with_the_longer_side_rounded(height, width, size, resized, left):
    numbers = np.random.default_rng(3).integers(60, 190, (height, width))
    expected = np.clip(bicubic(height, resized[0]) @ numbers @ bicubic(width, resized[1]).T, 0, 255)
    check(centre_crop(picture(numbers), size), np.rint(expected[:, left : left + size]), within=1)


def test_grey_images_become_colours():
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert np.array_equal(centre_crop(Image.fromarray(grey), 4), np.stack([grey] * 3))


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_rounded_to_eight(tmp_path, kind):
    ramp = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    path = tmp_path / f"ramp.{kind}"
    if kind == "pgm":
        path.write_bytes(b"P5 64 64 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(path)
    with Image.open(path) as image:
        found = centre_crop(image, 64)
    assert np.array_equal(found, np.stack([np.rint(ramp / 65535 * 255).astype(np.uint8)] * 3))
    assert set(found[0].flat) == set(range(256))


def test_numbers_without_a_known_range_are_refused(tmp_path):
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)):
        Image.fromarray(values).save(tmp_path / "x.tiff")
        with Image.open(tmp_path / "x.tiff") as image, pytest.raises(ValueError, match="of 8 or 16 bits, got Pillow's"):
            centre_crop(image, 4)


# -------------------------------------------------------------------------------------------------- wrong inputs


def test_a_directory_is_known_by_its_weights_configurations_and_tokenizers(tmp_path):
    files = {
        "model.safetensors": b"weights",
        "config.json": b"{}",
        "sub/a.json": b"1",
        "sub/merges.txt": b"r e",
        "words/spiece.model": b"z",
        "README.md": b"x",
        "old.bin": b"y",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    names = ("config.json", "model.safetensors", "sub/a.json", "sub/merges.txt", "words/spiece.model")
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in names]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    shell = r"find * -type f | grep -E '\.(json|safetensors|txt|model)$'"
    shell += " | LC_ALL=C sort | xargs sha256sum | sha256sum"
    answer = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert directory_hash(tmp_path) == expected == answer.split()[0]
    (tmp_path / "README.md").write_bytes(b"other")
    assert directory_hash(tmp_path) == expected
    for name in names:
        (tmp_path / name).write_bytes(b"other")
        assert directory_hash(tmp_path) != expected, name
        (tmp_path / name).write_bytes(files[name])
    (tmp_path / "sub/a.json").rename(tmp_path / "sub/b.json")
    assert directory_hash(tmp_path) != expected


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_directory_without_weights_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / name} must be a local directory with" in refused(
        CodecConfig("vae", 32, weights=str(tmp_path / name), sha256=ZEROS, scale=1.0)
    )


def test_a_file_is_read_again_only_where_it_may_have_changed(tmp_path, monkeypatch):
    file, read = tmp_path / "config.json", []
    monkeypatch.setattr("workers.codecs.measure", lambda path: read.append(path) or measure(path))
    found = {}
    for content, seconds in (("{}", 1), ("[]", 2)):  # of one size
        file.write_text(content)
        os.utime(file, (seconds, seconds))
        found[content] = {directory_hash(tmp_path) for _ in range(3)}
        line = f"{hashlib.sha256(content.encode()).hexdigest()}  config.json\n"
        assert found[content] == {hashlib.sha256(line.encode()).hexdigest()}
    assert len(read) == 2
    file.write_text("{}")  # just now: a second change would have the same time
    assert {directory_hash(tmp_path) for _ in range(3)} == found["{}"]
    assert len(read) == 5


def test_a_wrong_hash_is_answered_with_the_right_one(tmp_path):
    vae = vae_config(tmp_path / "vae")
    assert refused(vae_config(tmp_path / "vae", sha256=ZEROS)) == (
        f"weights {tmp_path / 'vae'} must have the SHA-256 {ZEROS}, got {vae.sha256}; get the right files or state it"
    )
    rae = rae_config(tmp_path)
    for name in ("decoder", "statistics"):
        path, digest = getattr(rae, name), getattr(rae, f"{name}_sha256")
        assert refused(replace(rae, **{f"{name}_sha256": ZEROS})) == (
            f"{name} {path} must have the SHA-256 {ZEROS}, got {digest}; get the right files or state it"
        )
        message = refused(replace(rae, **{name: path + "x"}))
        assert message == f"{name} must be a local file, got {path}x, which is none"


@pytest.mark.parametrize(("kind", "name"), [("vae", "decoder.conv_out.bias"), ("rae", "layernorm.bias")])
def test_models_with_a_weight_too_few_or_too_many_are_refused(tmp_path, kind, name):
    config = vae_config(tmp_path / "vae") if kind == "vae" else rae_config(tmp_path)
    directory = Path(config.weights)
    (file,) = directory.glob("*.safetensors")
    weights = load_file(file)
    save_file({other: value for other, value in weights.items() if other != name}, file, {"format": "pt"})
    assert f"but missing_keys has {name}" in refused(replace(config, sha256=directory_hash(directory)))
    save_file({**weights, "extra": torch.zeros(1)}, file, {"format": "pt"})
    assert "but unexpected_keys has extra" in refused(replace(config, sha256=directory_hash(directory)))


@pytest.mark.parametrize("kind", ["vae", "rae"])
def test_damaged_weights_are_named_in_one_line(tmp_path, kind):
    config = vae_config(tmp_path / "vae") if kind == "vae" else rae_config(tmp_path)
    (file,) = Path(config.weights).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    message = refused(replace(config, sha256=directory_hash(Path(config.weights))))
    assert message.startswith(f"weights {config.weights} must hold a readable")


@pytest.mark.parametrize("kind", ["vae", "rae"])
def test_pickled_weights_are_not_read(tmp_path, kind):
    config = vae_config(tmp_path / "vae") if kind == "vae" else rae_config(tmp_path)
    directory = Path(config.weights)
    (file,) = directory.glob("*.safetensors")
    pickled = {"vae": "diffusion_pytorch_model.bin", "rae": "pytorch_model.bin"}[kind]
    torch.save(load_file(file), directory / pickled)
    file.unlink()
    assert "must hold a readable" in refused(replace(config, sha256=directory_hash(directory)))


def test_an_image_must_be_a_multiple_of_what_becomes_one_latent(tmp_path):
    assert refused(vae_config(tmp_path / "vae", image_size=36)) == (
        "image_size must be a multiple of 8 for this vae, got 36"
    )


def changed_decoder(config: CodecConfig, change) -> CodecConfig:
    weights = torch.load(config.decoder)
    change(weights)
    return replace(config, decoder_sha256=save_tensors(Path(config.decoder), weights))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w.pop("decoder_embed.weight"), "must be RAE's ViT decoder, but decoder_embed.weight is missing"),
        (
            lambda w: w.pop("decoder_layers.1.output.dense.bias"),
            "but decoder_layers.1.output.dense.bias is nothing, not (16,)",
        ),
        (lambda w: w.update(mask_token=torch.zeros(1, 1, 16)), "but mask_token is (1, 1, 16), not nothing"),
        (
            lambda w: w.update({"decoder_norm.bias": torch.zeros(15)}),
            "but decoder_norm.bias is (15,), not (16,)",
        ),
        (lambda w: w.update(decoder_pos_embed=torch.zeros(5, 16)), "but a shape has another rank"),
        (lambda w: w.update(decoder_pos_embed=torch.zeros(1, 6, 16)), "must have squares of tokens and patches"),
        (lambda w: w.update(decoder_pos_embed=torch.zeros(1, 10, 16)), "(12, 2, 32), got (12, 3, 48)"),
        (lambda w: w.update({"decoder_embed.weight": torch.zeros(16, 11)}), "(12, 2, 32), got (11, 2, 32)"),
    ],
)  # fmt: skip
def test_a_decoder_that_does_not_fit_is_refused(tmp_path, change, problem):
    assert problem in refused(changed_decoder(rae_config(tmp_path), change))


def test_a_decoders_heads_must_divide_its_width(tmp_path):
    config = replace(rae_config(tmp_path), decoder_heads=3)
    assert refused(config) == "decoder_heads must divide the decoder's width 16, got 3"


def test_a_damaged_decoder_is_named(tmp_path):
    config = rae_config(tmp_path)
    file = Path(config.decoder)
    file.write_bytes(file.read_bytes()[:-200])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert refused(replace(config, decoder_sha256=digest)).startswith("decoder checkpoint decoder.pt must hold tensors")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"mean": torch.zeros(12, 2, 2)}, "statistics stat.pt must hold mean and var, but var is missing"),
        (
            {"mean": torch.zeros(12), "var": torch.ones(12, 2, 2)},
            "statistics stat.pt: mean must be (12, 2, 2), got (12,)",
        ),
        (
            {"mean": torch.zeros(12, 2, 2), "var": torch.full((12, 2, 2), torch.nan)},
            "statistics stat.pt: var must be finite, got NaN or infinity; make it again",
        ),
        (
            {"mean": torch.zeros(12, 2, 2), "var": -torch.ones(12, 2, 2)},
            "statistics stat.pt: var must not be negative, got -1.0",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, content, problem):
    config = rae_config(tmp_path)
    digest = save_tensors(tmp_path / "stat.pt", content)
    assert refused(replace(config, statistics_sha256=digest)) == problem


VAE = {"kind": "vae", "image_size": 256, "weights": "v", "sha256": ZEROS, "scale": 0.18215}
RAE = {
    "kind": "rae", "image_size": 256, "weights": "v", "sha256": ZEROS, "decoder": "d", "decoder_sha256": ZEROS,
    "statistics": "s", "statistics_sha256": ZEROS,
}  # fmt: skip
IDENTITY = {"kind": "identity", "image_size": 32}


@pytest.mark.parametrize("values", [VAE, RAE, IDENTITY, {**IDENTITY, "channels": 1}, {**VAE, "posterior": "mean"}])
def test_a_codec_is_read_from_json(values):
    read = TypeAdapter(CodecConfig).validate_json(json.dumps(values))
    assert read == CodecConfig(**values)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({**VAE, "image_size": 0}, "image_size must be at least 1, got 0"),
        ({**VAE, "image_size": True}, "valid integer"),
        ({**VAE, "sclae": 1.0}, "sclae"),
        ({**VAE, "rounding": "floor"}, "'round', 'half_up' or 'truncate'"),
        ({**VAE, "scale": 0.0}, "scale must be positive, got 0.0; 0.18215 for SD's, 1.5305 for SD3's"),
        ({**VAE, "scale": -1.0}, "scale must be positive, got -1.0"),
        ({**VAE, "shift": float("inf")}, "shift must be finite, got inf"),
        ({**VAE, "channels": 1}, "channels must be 3 for the codec vae, got 1"),
        ({**VAE, "weights": ""}, "weights must be given for the codec vae, got ''; name a path or URI"),
        (
            {**VAE, "sha256": "abc"},
            "sha256 must be 64 hexadecimal digits, got 'abc'; 64 times 'f' makes",
        ),
        ({**VAE, "decoder": "d"}, "decoder_sha256 must be 64 hexadecimal digits, got ''"),
        ({**VAE, "decoder_sha256": "0" * 64}, "decoder must be given for the codec vae, got ''; name a path or URI"),
        ({**VAE, "statistics": "s"}, "statistics must be left out for the codec vae, got 's'"),
        ({**RAE, "statistics": ""}, "statistics must be given for the codec rae, got ''; name a path or URI"),
        ({**RAE, "decoder_sha256": ""}, "decoder_sha256 must be 64 hexadecimal digits, got ''"),
        ({**RAE, "image_size": 250}, "image_size must be a multiple of 16 for rae, got 250"),
        ({**RAE, "shift": 0.1}, "scale, shift and posterior must be left out for the codec rae, which has none"),
        ({**IDENTITY, "rounding": "truncate"}, "rounding must be round for the codec identity, got truncate"),
        ({**IDENTITY, "posterior": "mean"}, "scale, shift and posterior must be left out for the codec identity"),
        ({**IDENTITY, "sha256": ZEROS}, f"weights must be left out for the codec identity, got '{ZEROS}'"),
    ],
)
def test_a_wrong_setting_is_refused(values, problem):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(CodecConfig).validate_json(json.dumps(values))
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["weights", "decoder"])
@pytest.mark.parametrize(
    ("stated", "scale", "shift", "wrong"),
    [
        ({}, 0.5, 0.1, None),
        ({"scaling_factor": 0.18215, "shift_factor": None}, 0.18215, 0.0, None),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 1.5305, 0.0609, None),
        ({"scaling_factor": 0.13025}, 0.18215, 0.0, "scale must be 0.13025, the scaling_factor in the config.json of "),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 1.5305, 0.0, "shift must be 0.0609, the shift_factor in "),
        ({"shift_factor": None}, 1.5305, 0.0609, "shift must be 0.0, the shift_factor in the config.json of "),
    ],
)
def test_a_vaes_own_factors_are_the_codecs(tmp_path, name, stated, scale, shift, wrong):
    digest = tiny_vae(tmp_path / "vae", **stated)
    given = {"weights": str(tmp_path / "vae"), "sha256": digest}
    if name == "decoder":
        given |= {"decoder": given["weights"], "decoder_sha256": digest}
        given |= {"weights": str(tmp_path / "first"), "sha256": tiny_vae(tmp_path / "first")}
    config = CodecConfig("vae", 32, scale=scale, shift=shift, **given)
    if wrong is None:
        assert open_codec(config, torch.device("cpu")).latent_shape == (4, 4, 4)
        return
    with pytest.raises(ValueError, match=re.escape(wrong)) as caught:
        open_codec(config, torch.device("cpu"))
    assert f"of {name} {tmp_path}/vae, got {shift if wrong.startswith('shift') else scale}; set it" in str(caught.value)


def test_a_vae_that_lacks_a_tensor_is_refused_without_lines_of_the_library(tmp_path, capfd):
    digest, path = tiny_vae(tmp_path), tmp_path / "diffusion_pytorch_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if name != "encoder.conv_in.weight"}
    save_file(kept, path)
    config = CodecConfig("vae", 32, weights=str(tmp_path), sha256=directory_hash(tmp_path), scale=1.0)
    assert config.sha256 != digest
    with pytest.raises(ValueError, match=r"missing_keys has encoder\.conv_in\.weight"):
        open_codec(config, torch.device("cpu"))
    assert capfd.readouterr().err == ""
