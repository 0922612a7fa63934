"""What is measured of samples: distances to held-out images in the features of a classifier, and in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixflow_core.metrics import Moments, frechet_distance, kernel_distance, precision_recall
from mixflow_core.rng import generator
from workers.data import ImageSet

METRICS = ("fd_digits", "kid_digits", "precision", "recall", "fd_pixels")
NUM_FEATURES = 64
MOST_PIXELS = 1024


class DigitFeatures(nn.Module):
    """A small classifier whose penultimate activations are the feature space of `fd_digits`; never called FID."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        # Larger images are brought down to 8 x 8 first, so that every size costs about the same.
        strides = [*([2] * max(0, (image_size // 8).bit_length() - 1)), 1, 1]
        widths = [in_channels, 32, *([64] * (len(strides) - 1))]
        convolutions = [
            nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in zip(widths, widths[1:], strides, strict=False)
        ]
        self.convolutions = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.ReLU())))
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.penultimate = nn.Linear(widths[-1] * 16, NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        """Features (B, 64) of uint8 pixels (B, C, H, W)."""
        x = self.convolutions(pixels.float() / 127.5 - 1)
        return functional.relu(self.penultimate(self.pool(x).flatten(1)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.features(pixels))


def train_features(data: ImageSet, held_out: ImageSet, num_classes: int) -> tuple[DigitFeatures, float]:
    """Trains the classifier on the train split, always the same way; returns it and its held-out accuracy."""
    images, labels = torch.from_numpy(data.seen.copy()), data.y(slice(None))
    net = DigitFeatures(images.shape[1], images.shape[2], num_classes)
    numbers = generator(0, "init", 0)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.kaiming_uniform_(module.weight, generator=numbers)
            nn.init.zeros_(module.bias)
    epochs, batch_size = 30, 128
    steps = epochs * -(-len(labels) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator(0, "order", epoch)).split(batch_size):
            functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    net.eval()
    with torch.no_grad():
        hits = net(torch.from_numpy(held_out.seen.copy())).argmax(1) == held_out.y(slice(None))
    return net, hits.double().mean().item()


class Reference(NamedTuple):
    """Held-out images in both spaces, computed once."""

    features: Tensor
    moments: Moments
    pixels: Moments


@torch.no_grad()
def reference_of(net: DigitFeatures, pixels: Tensor) -> Reference:
    """The reference that samples are compared with, from uint8 pixels (N, C, H, W)."""
    features = extract(net, pixels)
    return Reference(features, Moments.of(features), Moments.of(as_vectors(pixels)))


@torch.no_grad()
def score(net: DigitFeatures, pixels: Tensor, reference: Reference) -> Mapping[str, float]:
    """All METRICS of a sample set, uint8 pixels (N, C, H, W)."""
    features = extract(net, pixels)
    precision, recall = precision_recall(reference.features, features)
    return {
        "fd_digits": frechet_distance(Moments.of(features), reference.moments),
        "kid_digits": kernel_distance(features, reference.features),
        "precision": precision,
        "recall": recall,
        # Held-out images may be fewer than pixels; as many of them for every arm, so arms can be compared all the same.
        "fd_pixels": frechet_distance(Moments.of(as_vectors(pixels)).gaussian, reference.pixels.gaussian),
    }


def extract(net: DigitFeatures, pixels: Tensor, batch_size: int = 500) -> Tensor:
    """Features in fixed batches, (N, 64)."""
    return torch.cat([net.features(part) for part in pixels.split(batch_size)])


def as_vectors(pixels: Tensor) -> Tensor:
    """Pixels scaled to [-1, 1] as vectors (N, D): distances in them see residual noise that features miss.

    Images of more than MOST_PIXELS values are halved by averaging until they have no more: a covariance grows with the
    square of them, and the time for its root with the cube.
    """
    x = pixels.double() / 127.5 - 1
    while x[0].numel() > MOST_PIXELS:
        x = functional.avg_pool2d(x, 2)
    return x.flatten(1)
