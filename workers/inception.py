"""The FID-Inception: the network of 2015 in whose features FID, sFID, KID and the Inception Score are published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from workers.models.checkpoints import load_weights

SIDE = 299
NUM_SPATIAL = 7  # channels of sFID's layer that the ADM evaluator keeps
PUBLISHED = (
    "pt_inception-2015-12-05-6726825d.pth (SHA-256 6726825d...) of github.com/mseitzer/pytorch-fid's release "
    "fid_weights, or weights-inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity's release v0.2.0"
)

_AVERAGE = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_MAXIMUM = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
_HALVE = partial(functional.max_pool2d, kernel_size=3, stride=2)

_Layer = tuple[int, int | tuple[int, int]]  # channels out, side of the kernel or its height and width
_Chain = Sequence[_Layer | list[_Layer]]  # a list stands for layers side by side on the same input


class InceptionOutput(NamedTuple):
    """What the network says of images, float32.

    Attributes:
        pooled: (B, 2048), graph tensor `pool_3:0`, for FID, KID, precision and recall.
        spatial: (B, 2023), sFID's 17 x 17 places of 7 channels, channels fastest: the order of the means and
            covariances in the ADM evaluator's reference files.
        logits: (B, 1008), without the bias of the last layer, as the Inception Score takes them.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class FIDInception(nn.Module):
    """Inception v3 as in the graph `inception-2015-12-05`, under the names of the published PyTorch file.

    It differs from torchvision's: 1,008 classes, averages that leave the padding out, a maximum instead of the average
    in the last block, and its own resizing. sFID's layer is the graph tensor `mixed_6/conv:0`: the first branch of the
    block called Mixed_6d here, after its ReLU, the last operation in the scope of a convolution in that graph.

    For inference. As built it has its normalisations apart and needs `eval()`; load_inception merges them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, padded=False)
        self.Mixed_5b = _mixed_5(192, 32)
        self.Mixed_5c = _mixed_5(256, 64)
        self.Mixed_5d = _mixed_5(288, 64)
        self.Mixed_6a = _halving(288, branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        self.Mixed_6b = _mixed_6(128)
        self.Mixed_6c = _mixed_6(160)
        self.Mixed_6d = _mixed_6(160)
        self.Mixed_6e = _mixed_6(192)
        self.Mixed_7a = _halving(
            768, branch3x3=[(192, 1), (320, 3)], branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
        )
        self.Mixed_7b = _mixed_7(1280, _AVERAGE)
        self.Mixed_7c = _mixed_7(2048, _MAXIMUM)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels: Tensor) -> InceptionOutput:
        """Features of pixels (B, 3, H, W), uint8, of any size: resized to 299 x 299, then (x - 128) / 128.

        Raises:
            ValueError: the pixels are of another type or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be torch.uint8 (B, 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
        x = (resize_as_tensorflow(pixels.float(), SIDE) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)  # the faster layout on a CPU
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :NUM_SPATIAL].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pooled = x.mean((2, 3))
        return InceptionOutput(pooled, spatial, pooled @ self.fc.weight.T)


def load_inception(path: Path) -> FIDInception:
    """The network with the published file's weights, on the CPU, in evaluation mode and without gradients.

    The caller checks the file's SHA-256. Nothing but tensors is unpickled.

    Raises:
        ValueError: there is no such file, it is unreadable, or its tensors are not this network's: other names or
            shapes, or values that are not finite. The message says which file it should be and where people get it.
    """
    if not path.is_file():
        raise ValueError(f"inception weights must be a local file, got {path}, which is none; get {PUBLISHED}")
    try:
        weights = load_weights(path)
    except ValueError as error:
        raise ValueError(f"{error}; get {PUBLISHED}") from error
    with torch.device("meta"):  # fresh values would be drawn for nothing
        net = FIDInception()
    if problem := _difference(weights, {name: tuple(value.shape) for name, value in net.state_dict().items()}):
        raise ValueError(f"{path.name} must hold the FID-Inception's weights, but {problem}; get {PUBLISHED}")
    net.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    net.eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, _Convolution):
            module.merge()
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def _difference(weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with the weights, "" if nothing. Counts of training batches may be missing: they are not used."""
    counts = {name for name in expected if name.endswith(".num_batches_tracked")}
    missing, unknown = sorted(expected.keys() - weights.keys() - counts), sorted(weights.keys() - expected.keys())
    if missing:
        return f"{missing[0]} is missing ({len(missing)} in all)"
    if unknown:
        return f"{unknown[0]} is not part of it ({len(unknown)} in all)"
    for name, value in weights.items():
        if tuple(value.shape) != expected[name]:
            return f"{name} has shape {tuple(value.shape)} instead of {expected[name]}"
        if not bool(torch.isfinite(value).all()):
            return f"{name} holds numbers that are not finite"
    return ""


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Bilinear resizing of images (B, C, H, W), floating point, to a square, as TensorFlow 1's ResizeBilinear has it.

    Output pixel i lies at i * H / side, in float32, with neither half-pixel centres nor aligned corners. The order of
    operations is TensorFlow's too (columns, then rows), so float32 results are equal bit for bit on a CPU.
    """
    return _stretch(_stretch(images, 3, side), 2, side)


def _stretch(images: Tensor, axis: int, side: int) -> Tensor:
    length = images.shape[axis]
    if length == side:
        return images
    step = torch.tensor(length / side, dtype=torch.float32, device=images.device)
    place = torch.arange(side, dtype=torch.float32, device=images.device) * step
    before = place.long()
    after = (before + 1).clamp(max=length - 1)  # beyond the last pixel it is repeated
    share = (place - before).reshape([-1 if i == axis else 1 for i in range(4)])
    low, high = images.index_select(axis, before), images.index_select(axis, after)
    return low + (high - low) * share


# -------------------------------------------------------------------------------------------------------- blocks


class _Convolution(nn.Module):
    """Convolution, normalisation by the file's statistics, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], *, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride=stride, padding=padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(self.bn(self.conv(x)))

    def merge(self) -> None:
        """Puts the normalisation into the convolution's weights, in double precision."""
        assert isinstance(self.bn, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv.double(), self.bn.double()).float()
        self.bn = nn.Identity()


class _Mixed(nn.ModuleDict):
    """Branches side by side, joined by channels: chains of convolutions, the last behind a 3 x 3 pooling.

    A convolution is called after its branch and its place in the chain, `branch5x5_2`; the only one of a chain after
    the branch alone; those side by side `branch3x3_2a` and `branch3x3_2b`.

    Args:
        inputs: channels.
        pool: what comes before the last branch.
        halves: whether the last convolution of each branch has stride 2 and no padding.
        branches: chains by name, in the order of the channels.
    """

    def __init__(
        self, inputs: int, *, pool: Callable[[Tensor], Tensor], halves: bool = False, **branches: _Chain
    ) -> None:
        super().__init__()
        self.pool, self.halves = pool, halves
        self.chains = [self._add(inputs, branch, chain) for branch, chain in branches.items()]

    def _add(self, width: int, branch: str, chain: _Chain) -> list[list[str]]:
        """Makes the convolutions of a branch; returns their names, step by step."""
        names = []
        for place, step in enumerate(chain, 1):
            layers = step if isinstance(step, list) else [step]
            name = branch if len(chain) == 1 else f"{branch}_{place}"
            halving = self.halves and place == len(chain)
            names.append([name + letter for letter in ("ab" if len(layers) > 1 else [""])])
            for name, (outputs, kernel) in zip(names[-1], layers, strict=True):
                self[name] = _Convolution(width, outputs, kernel, stride=1 + halving, padded=not halving)
            width = sum(outputs for outputs, _ in layers)
        return names

    def forward(self, x: Tensor) -> Tensor:
        *plain, behind_pool = self.chains
        return torch.cat([*(self._run(chain, x) for chain in plain), self._run(behind_pool, self.pool(x))], dim=1)

    def _run(self, chain: list[list[str]], x: Tensor) -> Tensor:
        for names in chain:
            x = torch.cat([self[name](x) for name in names], dim=1) if len(names) > 1 else self[names[0]](x)
        return x


def _halving(inputs: int, **branches: _Chain) -> _Mixed:
    return _Mixed(inputs, pool=_HALVE, halves=True, **branches, branch_pool=[])


def _mixed_5(inputs: int, pooled: int) -> _Mixed:
    return _Mixed(
        inputs,
        pool=_AVERAGE,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pooled, 1)],
    )


def _mixed_6(width: int) -> _Mixed:
    row, column = (width, (1, 7)), (width, (7, 1))
    return _Mixed(
        768,
        pool=_AVERAGE,
        branch1x1=[(192, 1)],
        branch7x7=[(width, 1), row, (192, (7, 1))],
        branch7x7dbl=[(width, 1), column, row, column, (192, (1, 7))],
        branch_pool=[(192, 1)],
    )


def _mixed_7(inputs: int, pool: Callable[[Tensor], Tensor]) -> _Mixed:
    both: list[_Layer] = [(384, (1, 3)), (384, (3, 1))]
    return _Mixed(
        inputs,
        pool=pool,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), both],
        branch3x3dbl=[(448, 1), (384, 3), both],
        branch_pool=[(192, 1)],
    )
