"""The classifier and what is measured in its features."""

from __future__ import annotations

import pytest
import torch

from workers.data import digits
from workers.evaluate import METRICS, DigitFeatures, extract, reference_of, score, train_features


@pytest.fixture(scope="module")
def splits():
    return digits(8, 597)


@pytest.fixture(scope="module")
def trained(splits):
    torch.set_num_threads(1)
    return train_features(splits["train"], splits["held_out"], 10)


@pytest.fixture(scope="module")
def held_out(splits):
    return torch.from_numpy(splits["held_out"].images)


@pytest.fixture(scope="module")
def reference(trained, held_out):
    return reference_of(trained[0], held_out)


def test_the_classifier_knows_unseen_digits(trained, splits, held_out):
    net, accuracy = trained
    hits = sum(
        int(net(image[None]).argmax()) == int(label)
        for image, label in zip(held_out, splits["held_out"].labels, strict=True)
    )
    assert accuracy == pytest.approx(hits / 597)
    assert accuracy > 0.95


def test_its_training_repeats_bit_for_bit(trained, splits):
    torch.manual_seed(123)
    again, accuracy = train_features(splits["train"], splits["held_out"], 10)
    assert accuracy == trained[1]
    for name, value in trained[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_images_are_at_no_distance_from_themselves(trained, held_out, reference):
    found = score(trained[0], held_out, reference)
    assert tuple(found) == METRICS
    assert found["fd_digits"] == pytest.approx(0, abs=1e-6)
    assert found["fd_pixels"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1.0, 1.0)
    # The unbiased estimate of a set against itself is not 0 but leaves the diagonal out on one side only.
    features = reference.features.double().numpy()
    kernel = (features @ features.T / 64 + 1) ** 3
    expected = 2 * (kernel.mean() - kernel.diagonal().mean()) / (597 - 1)
    assert found["kid_digits"] == pytest.approx(expected, rel=1e-6)


def test_distances_order_real_blurred_and_random_images(trained, splits, held_out, reference):
    numbers = torch.Generator().manual_seed(0)
    real = torch.from_numpy(splits["train"].images[:597].copy())
    noisy = (real + torch.randint(-40, 41, real.shape, generator=numbers)).clamp(0, 255).to(torch.uint8)
    noise = torch.randint(0, 256, real.shape, generator=numbers, dtype=torch.uint8)
    scores = [score(trained[0], images, reference) for images in (real, noisy, noise)]
    for key in ("fd_digits", "fd_pixels", "kid_digits"):
        assert scores[0][key] < scores[1][key] < scores[2][key], key
    assert scores[2]["fd_digits"] > 20 * scores[0]["fd_digits"]
    assert scores[0]["precision"] > 0.7
    assert scores[0]["recall"] > 0.7
    assert scores[2]["precision"] < 0.1
    assert scores[2]["recall"] < 0.1


def test_images_of_one_class_lose_recall(trained, splits, reference):
    chosen = splits["train"].images[splits["train"].labels == 3]
    found = score(trained[0], torch.from_numpy(chosen.copy()), reference)
    assert found["precision"] > 0.7
    assert found["recall"] < 0.3


def test_pixel_distance_is_that_of_the_gaussians(trained, held_out, reference):
    """A shift of every pixel by one step moves the mean alone: 64 dimensions times (1 / 127.5)^2."""
    shifted = held_out.clamp(max=254) + 1
    base = reference_of(trained[0], held_out.clamp(max=254))
    assert score(trained[0], shifted, base)["fd_pixels"] == pytest.approx(64 / 127.5**2, rel=1e-4)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_features_are_the_penultimate_activations_at_every_size(size):
    net = DigitFeatures(1, size, 10)
    pixels = torch.randint(0, 256, (7, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = extract(net, pixels, batch_size=3)
    assert features.shape == (7, 64)
    assert features.min() >= 0
    torch.testing.assert_close(features @ net.head.weight.T + net.head.bias, net(pixels))
