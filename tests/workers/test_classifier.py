"""The classifier whose features serve where no published network fits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from workers.classifier import DigitExtractor, DigitFeatures, train_features
from workers.data import digits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits():
    return digits(8, 597)


@pytest.fixture(scope="module")
def trained(splits):
    torch.set_num_threads(1)
    return train_features(splits["train"], splits["held_out"], 10)


def test_the_classifier_knows_unseen_digits(trained, splits):
    net, accuracy = trained
    images = torch.from_numpy(splits["held_out"].images)
    hits = sum(
        int(net(image[None]).argmax()) == int(label)
        for image, label in zip(images, splits["held_out"].labels, strict=True)
    )
    assert accuracy == pytest.approx(hits / 597)
    assert accuracy > 0.95


def test_its_training_repeats_bit_for_bit(trained, splits):
    torch.manual_seed(123)
    again, accuracy = train_features(splits["train"], splits["held_out"], 10)
    assert accuracy == trained[1]
    for name, value in trained[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (16, 3), (32, 1)])
def test_features_are_the_penultimate_activations_at_every_size(tmp_path, size, channels):
    net = DigitFeatures(channels, size, 7)
    save_file(net.state_dict(), tmp_path / "classifier.safetensors")
    extractor = DigitExtractor(tmp_path / "classifier.safetensors", "abc", CPU)
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, channels, size, size), generator=numbers, dtype=torch.uint8)
    features = extractor.extract(pixels).pooled
    assert (extractor.name, extractor.identity, extractor.dimension) == ("digits", "abc", 64)
    assert features.shape == (7, 64)
    assert features.min() >= 0
    torch.testing.assert_close(features @ net.head.weight.T + net.head.bias, net(pixels))
