"""A small classifier, trained on the experiment's own classes, whose features serve where no published network fits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mixflow_core.rng import generator
from workers.data import ImageSet
from workers.extractors import Extractor, Features

NUM_FEATURES = 64


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


class DigitExtractor(Extractor):
    """See Extractor: the classifier's penultimate features, of images with any number of channels.

    Args:
        path: its weights.
        sha256: of them.
        device: where it computes.
    """

    def __init__(self, path: Path, sha256: str, device: torch.device) -> None:
        weights = load_file(path)
        channels, classes = weights["convolutions.0.weight"].shape[1], len(weights["head.bias"])
        convolutions = sum(name.startswith("convolutions") and name.endswith("weight") for name in weights)
        self.name, self.identity, self.device = "digits", sha256, device
        self.net = DigitFeatures(channels, 8 * 2 ** (convolutions - 2), classes)
        self.net.load_state_dict(weights)
        self.net.to(device).eval().requires_grad_(False)

    @property
    def dimension(self) -> int:
        """See Extractor."""
        return NUM_FEATURES

    def extract(self, pixels: Tensor) -> Features:
        """See Extractor."""
        return Features(self.net.features(pixels.to(self.device)))
