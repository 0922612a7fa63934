"""What is measured of images, against definitions worked out in NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor
from torch.nn import functional

from mixflow_core.metrics import Moments
from workers.data import digits
from workers.evaluate import (
    BATCH,
    Measured,
    Reference,
    join_scores,
    metric_names,
    metrics_of,
    patch_moments,
    score,
)
from workers.extractors import Extractor, Features

CPU = torch.device("cpu")


class Pixels(Extractor):
    """Pixels as they are for features, with all that the Inception has beside."""

    def __init__(self, name: str = "inception", dimension: int = 64) -> None:
        self.name, self.identity, self.device, self.size = name, "0" * 64, CPU, dimension
        self.batches: list[int] = []

    @property
    def dimension(self) -> int:
        return self.size

    def extract(self, pixels: Tensor) -> Features:
        self.batches.append(len(pixels))
        flat = pixels.flatten(1).float() / 255
        if self.name != "inception":
            return Features(flat[:, : self.size])
        return Features(flat[:, : self.size], flat[:, :5], flat[:, :10])


@pytest.fixture(scope="module")
def splits():
    return {name: torch.from_numpy(split.images.copy()) for name, split in digits(8, 597).items()}


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula, by SciPy."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b + 1e-14 * np.eye(len(cov_a))).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def test_numbers_of_other_networks_carry_their_names():
    assert metric_names("inception")["frechet"] == "fid"
    assert metrics_of(["digits", "dinov2"]) == [
        "fd_digits", "kid_digits", "precision_digits", "recall_digits",
        "fd_dinov2", "kid_dinov2", "precision_dinov2", "recall_dinov2", "fd_patches",
    ]  # fmt: skip
    assert metrics_of(["inception", "clip"]) == [
        "fid", "sfid", "inception_score", "kid", "precision", "recall", "clip_score", "fd_patches",
    ]  # fmt: skip


def test_features_come_in_fixed_batches_and_join_in_order(splits):
    extractor, images = Pixels(), splits["train"][:130]
    whole = Measured.of(extractor, images)
    assert extractor.batches == [BATCH, BATCH, 30]
    assert torch.equal(whole.pooled, images.flatten(1).float() / 255)
    assert whole.spatial
    assert whole.logits is not None
    values = images.flatten(1).double()[:, :5] / 255
    torch.testing.assert_close(whole.spatial.mean, values.mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(whole.spatial.covariance, values.T.cov(), rtol=1e-6, atol=1e-9)
    joined = Measured.join([Measured.of(extractor, images[:100]), Measured.of(extractor, images[100:])])
    assert torch.equal(joined.pooled, whole.pooled)
    assert torch.equal(joined.spatial.scatter, whole.spatial.scatter)
    assert torch.equal(joined.logits, whole.logits)


def test_scores_are_those_of_their_definitions(splits):
    real, found = splits["held_out"], splits["train"][:600]
    extractor = Pixels(dimension=20)
    reference = Reference.of(Measured.of(extractor, real))
    scores = score("inception", Measured.of(extractor, found), reference, CPU)
    a, b = (images.flatten(1).double().numpy() / 255 for images in (found, real))
    # Pixels that are always black make the covariance singular: the tolerance is the textbook formula's.
    assert scores["fid"] == pytest.approx(frechet(a[:, :20], b[:, :20]), abs=2e-6)
    assert scores["sfid"] == pytest.approx(frechet(a[:, :5], b[:, :5]), abs=2e-6)
    p = np.exp(a[:, :10]) / np.exp(a[:, :10]).sum(1, keepdims=True)
    kl = [np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()) for part in np.split(p, 10)]
    assert scores["inception_score"] == pytest.approx(np.mean(kl), rel=1e-6)
    assert scores["step"] == {"precision": 1 / 600, "recall": 1 / len(real)}
    for metric, step in scores["step"].items():
        assert round(scores[metric] / step) == pytest.approx(scores[metric] / step)
    assert 0 <= scores["precision"] <= 1
    assert 0 <= scores["recall"] <= 1
    assert scores["by_count"]["fid"]["600"] == scores["fid"]
    assert scores["by_count"]["fid"]["150"] == pytest.approx(frechet(a[:150, :20], b[:, :20]), abs=2e-6)
    assert list(scores["by_count"]["fid"]) == ["150", "300", "600"]


def test_the_variation_within_a_seed_is_that_of_other_draws(splits):
    """Resampled images vary as much as new ones: the latter are drawn here 40 times from the same Gaussian."""
    numbers = torch.Generator().manual_seed(0)
    features = [torch.randn(400, 6, generator=numbers) for _ in range(41)]
    reference = Reference(Moments.of(torch.randn(4000, 6, generator=numbers) + 1).gaussian)
    scores = [score("digits", Measured(values), reference, CPU) for values in features]
    between = float(np.std([s["fd_digits"] for s in scores], ddof=1))
    within = float(np.mean([s["within"]["fd_digits"] for s in scores]))
    assert within == pytest.approx(between, rel=0.25)


@pytest.mark.parametrize("law", ["equal", "random"])
def test_the_variation_within_a_seed_follows_the_law_of_the_labels(law):
    """Classes that lie far apart: their numbers, if random, make nearly all of the variation, and if equal none."""
    numbers = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 5 if law == "equal" else torch.randint(5, (count,), generator=numbers)
        return torch.randn(count, 6, generator=numbers) + 15 * functional.one_hot(labels, 6), labels

    reference = Reference(Moments.of(draw(20000)[0] + torch.tensor([4.0, -4, 0, 0, 0, 0])).gaussian)
    drawn = [draw(300) for _ in range(60)]
    scores = [score("digits", Measured(x), reference, CPU, y if law == "equal" else None) for x, y in drawn]
    between = float(np.std([s["fd_digits"] for s in scores], ddof=1))
    within = float(np.mean([s["within"]["fd_digits"] for s in scores]))
    assert within == pytest.approx(between, rel=0.25)


def test_images_that_all_have_a_class_of_their_own_show_no_variation_within_a_seed(splits):
    found = Measured.of(Pixels("digits"), splits["train"][:200])
    scores = score("digits", found, Reference.of(found), CPU, torch.arange(200))
    assert scores["within"] == {}
    assert "200" in scores["by_count"]["fd_digits"]


def test_distances_order_real_blurred_and_random_images(splits):
    numbers, real = torch.Generator().manual_seed(0), splits["train"][:597]
    noisy = (real + torch.randint(-40, 41, real.shape, generator=numbers)).clamp(0, 255).to(torch.uint8)
    noise = torch.randint(0, 256, real.shape, generator=numbers, dtype=torch.uint8)
    extractor = Pixels("digits")
    reference = Reference.of(Measured.of(extractor, splits["held_out"]))
    scores = [score("digits", Measured.of(extractor, images), reference, CPU) for images in (real, noisy, noise)]
    for key in ("fd_digits", "kid_digits"):
        assert scores[0][key] < scores[1][key] < scores[2][key], key
    assert scores[0]["precision_digits"] > 0.7 > 0.1 > scores[2]["precision_digits"]
    assert scores[0]["recall_digits"] > 0.7 > 0.1 > scores[2]["recall_digits"]


def test_a_reference_of_statistics_alone_gives_distances_alone(splits):
    extractor = Pixels(dimension=20)
    whole = Reference.of(Measured.of(extractor, splits["held_out"]))
    scores = score("inception", Measured.of(extractor, splits["train"]), Reference(whole.gaussian), CPU)
    assert set(scores) == {"fid", "inception_score", "within", "by_count", "step"}
    assert scores["step"] == {}, "nothing here is a share of images"


def test_too_few_images_for_a_covariance_are_refused(splits):
    reference = Reference.of(Measured.of(Pixels("digits"), splits["held_out"]))
    with pytest.raises(ValueError, match="must number more than their dimension 64 for a Frechet distance, got 64"):
        score("digits", Measured.of(Pixels("digits"), splits["train"][:64]), reference, CPU)


def test_a_reference_is_kept_to_the_bit(splits, tmp_path):
    reference = Reference.of(Measured.of(Pixels(), splits["held_out"]))
    reference.save(tmp_path / "r.safetensors")
    found = Reference.load(tmp_path / "r.safetensors")
    assert torch.equal(found.gaussian.covariance, reference.gaussian.covariance)
    assert torch.equal(found.spatial.mean, reference.spatial.mean)
    assert torch.equal(found.features, reference.features)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (20, 1), (4, 1)])
def test_patches_are_all_of_an_images_pixels(side, channels):
    numbers = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (BATCH + 7, channels, side, side), generator=numbers, dtype=torch.uint8)
    patch = min(side, 8)
    rows = []
    places = {20: [0, 8, 12]}.get(side, range(0, side - patch + 1, patch))
    for image in pixels.numpy() / 127.5 - 1:
        for top in places:
            for left in places:
                rows.append(image[:, top : top + patch, left : left + patch].ravel())
    found = patch_moments(pixels)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean.numpy(), np.mean(rows, 0), atol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(np.array(rows), rowvar=False), atol=1e-12)


def test_residual_noise_shows_at_full_resolution():
    """Noise that averages away over 8 x 8 pixels still moves the patches: by its variance in each of 64 dimensions."""
    numbers = torch.Generator().manual_seed(2)
    grey = torch.full((500, 1, 32, 32), 128, dtype=torch.uint8)
    noise = torch.randint(-10, 11, grey.shape, generator=numbers)
    moments = patch_moments((grey + noise).to(torch.uint8))
    variance = np.arange(-10, 11).var() / 127.5**2
    assert float(moments.covariance.trace()) == pytest.approx(64 * variance, rel=0.01)
    assert isinstance(moments, Moments)


def test_cells_join_the_scores_of_several_networks():
    one = {"fd_a": 1.0, "within": {"fd_a": 0.1}, "by_count": {"fd_a": {"10": 1.0}}}
    two = {"fd_b": 2.0, "within": {"fd_b": 0.2}, "by_count": {"fd_b": {"10": 2.0}}}
    assert join_scores([one, two, {"fd_patches": 3.0}]) == {
        "fd_a": 1.0,
        "fd_b": 2.0,
        "fd_patches": 3.0,
        "within": {"fd_a": 0.1, "fd_b": 0.2},
        "by_count": {"fd_a": {"10": 1.0}, "fd_b": {"10": 2.0}},
    }
