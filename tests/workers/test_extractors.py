"""Features and CLIP's score, against the libraries' own calls and resampling worked out from its definition."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import tiny_clip, tiny_dinov2
from torch import Tensor, nn
from torch.nn import functional

from workers import extractors
from workers.codecs import directory_hash
from workers.extractors import FID_INCEPTION, ClipScore, ExtractorConfig, open_extractor

CPU = torch.device("cpu")
ZEROS = "0" * 64
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def pixels(count: int, height: int, width: int | None = None) -> Tensor:
    """Images with structure at every scale, so that each way of resizing gives another one."""
    numbers = np.random.default_rng(5)
    images = np.zeros((count, 3, height, width or height))
    for side in (2, 8, 32, 128):
        coarse = numbers.uniform(-80, 80, (count, 3, side, side))
        rows, columns = (np.arange(size) * side // size for size in images.shape[2:])
        images += coarse[:, :, rows][..., columns]
    return torch.from_numpy(np.clip(images + 128, 0, 255).astype(np.uint8))


def dino_config(path: Path, *, registers: bool = False, **changes) -> ExtractorConfig:
    return ExtractorConfig(**{"kind": "dinov2", "weights": str(path), "sha256": tiny_dinov2(path, registers)} | changes)


def refused(call, *arguments) -> str:
    """The one line with which something fails."""
    with pytest.raises(ValueError, match=r".") as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- dinov2


def cubic(places: np.ndarray, size: int) -> np.ndarray:
    """Rows of weights of bicubic resampling (a = -3/4) at these places, edges repeated, from its definition."""
    weights = np.zeros((len(places), size))
    for row, place in enumerate(places):
        for neighbour in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x = abs(place - neighbour)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
            weights[row, min(max(neighbour, 0), size - 1)] += near if x <= 1 else far
    return weights


def test_dinov2_gives_the_class_token_at_the_published_positions(tmp_path):
    """The library's model, its table of positions resampled by hand: a scale of 16.1 for 16 patches."""
    from transformers import Dinov2Model

    extractor, images = open_extractor(dino_config(tmp_path), CPU), pixels(3, 224)
    model = Dinov2Model.from_pretrained(tmp_path)
    table = model.embeddings.position_embeddings.detach().double().numpy()[0]
    weights = cubic((np.arange(16) + 0.5) * 5 / 16.1 - 0.5, 5)
    squares = np.einsum("iy,jx,yxd->ijd", weights, weights, table[1:].reshape(5, 5, -1))
    resampled = np.concatenate([table[:1], squares.reshape(256, -1)])
    model.embeddings.position_embeddings = nn.Parameter(torch.from_numpy(resampled[None]).float())
    normalised = (images.numpy() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    with torch.no_grad():
        expected = model(torch.from_numpy(normalised).float())
    found = extractor.extract(images)
    torch.testing.assert_close(found.pooled, expected.pooler_output, rtol=1e-4, atol=1e-5)
    assert found.spatial is None
    assert found.logits is None
    assert found.pooled.shape == (3, extractor.dimension) == (3, 12)
    assert found.pooled.dtype == torch.float32
    assert not found.pooled.requires_grad
    assert found.pooled.std(0).min() > 0.001  # features, not a constant


@pytest.mark.parametrize("shape", [(448, 448), (256, 256), (64, 64), (300, 150)])
def test_other_sizes_are_resized_as_pillow_does(tmp_path, shape):
    """Against torch's own antialiased bicubic of bytes, which differs from Pillow's by one at most."""
    extractor, images = open_extractor(dino_config(tmp_path), CPU), pixels(4, *shape)
    resized = functional.interpolate(images, (224, 224), mode="bicubic", antialias=True)
    difference = extractor.extract(images).pooled - extractor.extract(resized).pooled
    assert difference.abs().mean() < 3e-3  # 9e-3 and more for bilinear, or without antialiasing


def test_features_are_the_same_whatever_the_surroundings(tmp_path):
    extractor, images = open_extractor(dino_config(tmp_path), CPU), pixels(2, 64)
    expected = extractor.extract(images).pooled
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor.extract(images).pooled, expected)
    assert torch.equal(extractor.extract(images.to(memory_format=torch.channels_last)).pooled, expected)


def test_an_extractor_says_what_it_is(tmp_path):
    config = dino_config(tmp_path)
    extractor = open_extractor(config, CPU)
    assert (extractor.name, extractor.identity, extractor.device) == ("dinov2", config.sha256, CPU)


def test_a_dinov2_with_registers_is_refused(tmp_path):
    message = refused(open_extractor, dino_config(tmp_path, registers=True), CPU)
    assert message == f"weights {tmp_path} must hold a DINOv2 without registers, got one with them"


@pytest.mark.parametrize("images", [pixels(2, 8).float(), pixels(2, 8)[:, :1], pixels(2, 8)[..., 0]])
def test_other_pixels_are_refused(tmp_path, images):
    extractor = open_extractor(dino_config(tmp_path), CPU)
    assert refused(extractor.extract, images).startswith("pixels must be torch.uint8 (B, 3, H, W), got ")


# ---------------------------------------------------------------------------------------------------- inception


class Found(NamedTuple):
    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class StubInception(nn.Module):
    """In the place of the real one: features of the right shapes from the sums of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout()

    def forward(self, images: Tensor) -> Found:
        assert images.dtype == torch.uint8
        sums = self.dropout(self.scale * images.flatten(1).float().sum(1, keepdim=True))
        return Found(sums.expand(-1, 2048), sums.expand(-1, 2023) + 1, sums.expand(-1, 1008) + 2)


def test_the_inception_gives_all_three(tmp_path, monkeypatch):
    opened = []
    stub = ModuleType("workers.inception")
    stub.load_inception = lambda path: opened.append(path) or StubInception()
    monkeypatch.setitem(sys.modules, "workers.inception", stub)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(extractors, "FID_INCEPTION", digest)
    extractor, images = open_extractor(ExtractorConfig("inception", str(file), digest), CPU), pixels(3, 16)
    sums = 2 * images.numpy().astype(np.int64).sum((1, 2, 3))
    found = extractor.extract(images)
    assert opened == [file]
    assert (extractor.name, extractor.identity, extractor.dimension) == ("inception", digest, 2048)
    assert found.pooled.shape == (3, extractor.dimension)
    assert not found.pooled.requires_grad
    for values, offset in zip(found, (0, 1, 2), strict=True):
        assert values[:, -1].tolist() == [number + offset for number in sums]


# --------------------------------------------------------------------------------------------------------- clip


CAPTIONS = ["a red cat", "b", "cat, cat", "Red  dog!"]


def clip_score(path: Path) -> ClipScore:
    return ClipScore(str(path), directory_hash(path), CPU)


@pytest.mark.parametrize("shape", [(28, 28), (40, 40), (90, 31)])
def test_a_score_is_a_hundred_times_the_cosine_of_the_librarys_pipeline(tmp_path, shape):
    from PIL import Image
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    tiny_clip(tmp_path, seed=1)  # with cosines of both signs
    images = pixels(4, *shape)
    # The library would take torchvision for itself, were it there.
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path))
    model = CLIPModel.from_pretrained(tmp_path)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    inputs = processor(text=CAPTIONS, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        cosines = (model(**inputs).logits_per_image / model.logit_scale.exp()).numpy()
    scorer, seen = clip_score(tmp_path), []
    for shift in range(4):
        found = scorer.score(images, CAPTIONS[shift:] + CAPTIONS[:shift])
        assert found.dtype == torch.float32
        expected = [100 * max(cosines[i, (i + shift) % 4], 0) for i in range(4)]
        assert found.tolist() == pytest.approx(expected, abs=1e-3)
        seen += expected
    assert min(seen) == 0 < 5 < max(seen)  # both sides of the bend


def test_a_score_does_not_depend_on_the_other_captions(tmp_path):
    tiny_clip(tmp_path, seed=7)
    scorer, images = clip_score(tmp_path), pixels(2, 28)
    beside_short, beside_long = (scorer.score(images, ["red cat", other]) for other in ("b", "a b c d e f g h"))
    assert beside_short[0] > 1
    assert torch.equal(beside_short[0], beside_long[0])
    assert scorer.clip.tokens(["b"])["input_ids"].shape == (1, 12)  # products of other sizes differ in the last bit
    assert scorer.identity == directory_hash(tmp_path)


@pytest.mark.parametrize("truncates", [False, True])
def test_a_caption_that_is_too_long_is_not_cut(tmp_path, truncates):
    tiny_clip(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    if truncates:  # as published files do
        limit = {"max_length": 12, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": limit}))
    scorer = clip_score(tmp_path)
    assert scorer.score(pixels(1, 28), ["a b c d e f g h i j"]).shape == (1,)
    message = refused(scorer.score, pixels(1, 28), ["a b c d e f g h i j k"])
    assert message == (
        "captions must have at most 12 tokens for this CLIP, got 13 for 'a b c d e f g h i j k'; shorten it"
    )


def test_files_beside_the_tokenizer_do_not_decide_a_score(tmp_path):
    tiny_clip(tmp_path, seed=7)
    expected = clip_score(tmp_path).score(pixels(1, 28), ["red cat"])
    assert expected > 0
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\n")
    assert torch.equal(clip_score(tmp_path).score(pixels(1, 28), ["red cat"]), expected)


def test_a_clip_with_buffers_of_older_versions_is_read(tmp_path):
    """As the published openai/clip-vit-large-patch14."""
    tiny_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name, size in (("text", 12), ("vision", 5)):
        weights[f"{name}_model.embeddings.position_ids"] = torch.arange(size)[None]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert clip_score(tmp_path).score(pixels(1, 28), ["red cat"]).shape == (1,)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_a_clip_without_one_of_its_files_is_refused(tmp_path, name):
    tiny_clip(tmp_path)
    (tmp_path / name).unlink()
    message = refused(clip_score, tmp_path)
    assert message.startswith(f"{tmp_path} must ")
    assert name in message


def test_every_image_has_a_caption(tmp_path):
    tiny_clip(tmp_path)
    message = refused(clip_score(tmp_path).score, pixels(3, 28), ["a", "b"])
    assert message == "captions must be one for each image, got 2 for 3 images"


# -------------------------------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("kind", "what", "where"),
    [
        ("inception", "the file of the FID-Inception", "github.com/toshas/torch-fidelity"),
        ("inception", "the file of the FID-Inception", "pt_inception-2015-12-05-6726825d.pth"),
        ("dinov2", "a DINOv2 in transformers' layout", "huggingface.co/facebook/dinov2-large"),
        ("clip", "a CLIP in transformers' layout", "huggingface.co/openai/clip-vit-large-patch14"),
    ],
)
@pytest.mark.parametrize("directory", [False, True])
def test_absent_weights_are_said_where_to_get(tmp_path, kind, what, where, directory):
    path = tmp_path / "weights"
    if directory:
        path.mkdir()
    digest = FID_INCEPTION if kind == "inception" else "a" * 64
    if kind == "clip":
        message = refused(ClipScore, str(path), digest, CPU)
    else:
        message = refused(open_extractor, ExtractorConfig(kind, str(path), digest), CPU)
    assert message.startswith(f"weights must be {what} with the SHA-256 {digest}, got {path}, which is none; get ")
    assert where in message


def test_a_wrong_hash_is_answered_with_the_right_one(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"other")
    dino, clip = dino_config(tmp_path / "dino"), tiny_clip(tmp_path / "clip")
    for message, path, digest in (
        (refused(open_extractor, replace(dino, sha256=ZEROS), CPU), dino.weights, dino.sha256),
        (refused(ClipScore, str(tmp_path / "clip"), ZEROS, CPU), tmp_path / "clip", clip),
    ):
        assert message.startswith(f"weights {path} must have the SHA-256 {ZEROS}, got {digest}; get ")
    message = refused(open_extractor, ExtractorConfig("inception", str(file), FID_INCEPTION), CPU)
    found = hashlib.sha256(b"other").hexdigest()
    assert message.startswith(f"weights {file} must have the SHA-256 {FID_INCEPTION}, got {found}; get ")


DINO = {"kind": "dinov2", "weights": "v", "sha256": ZEROS}


def test_an_extractor_is_read_from_json():
    assert TypeAdapter(ExtractorConfig).validate_json(json.dumps(DINO)) == ExtractorConfig(**DINO)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({**DINO, "kind": "clap"}, "'digits', 'inception', 'dinov2' or 'clip'"),
        ({**DINO, "kind": "digits"}, "weights must be left out for digits, which are trained here, got 'v'"),
        (
            {**DINO, "weights": ""},
            "weights must be given for the extractor dinov2, got ''; name the path or URI of a DINO",
        ),
        ({**DINO, "kind": "inception", "weights": ""}, "of the file of the FID-Inception: pt_inception-2015-12-05-672"),
        ({**DINO, "kind": "inception"}, f"sha256 of inception must be {FID_INCEPTION}, got '{ZEROS}'; distances in"),
        ({**DINO, "sha256": "A" * 64}, f"must be 64 hexadecimal digits, got '{'A' * 64}'; 64 times 'f' makes"),
        ({**DINO, "size": 224}, "size"),
    ],
)
def test_a_wrong_setting_is_refused(values, problem):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(ExtractorConfig).validate_json(json.dumps(values))
    assert problem in str(caught.value)
