"""torch-fidelity, from a folder of its own and without torchvision.

Of torchvision it takes data sets, transforms of image files and LPIPS's VGG, none of which is compared here, and
imports it all the same. A torchvision from PyPI does not import beside a CPU build of torch, and where one is installed
transformers and diffusers import it too. So torch-fidelity lies outside the environment's packages (.ci/install
--tests), and empty modules stand in for torchvision, in the processes of these tests and of one benchmark alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / ".venv" / "fidelity"


def _stand_in() -> None:
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    modules = [ModuleType(name) for name in names]
    package, datasets, transforms, functional = modules
    package.datasets, package.transforms, transforms.functional = datasets, transforms, functional
    datasets.CIFAR10 = datasets.CIFAR100 = datasets.STL10 = object
    sys.modules.update(zip(names, modules, strict=True))


_stand_in()
sys.path.append(str(FOLDER))
try:
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
except ImportError as error:
    raise ImportError(f"torch_fidelity must be importable or lie in {FOLDER}; run .ci/install --tests") from error

assert torch_fidelity.__version__ == "0.4.0", torch_fidelity.__version__


class PeerInception:
    """torch-fidelity's FID-Inception with the weights of a file, and what it says at sFID's layer."""

    def __init__(self, path: Path) -> None:
        wanted = ["2048", "logits_unbiased"]
        self.net = FeatureExtractorInceptionV3("peer", wanted, feature_extractor_weights_path=str(path))
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def double(self) -> PeerInception:
        """In float64, which its own option for that does not give: it is read as float32."""
        self.net.double().feature_extractor_internal_dtype = torch.float64
        return self

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # The first 7 channels of the graph's (B, 17, 17, 192), flattened, as the ADM evaluator does it.
        self.spatial = output.permute(0, 2, 3, 1)[..., :7].reshape(len(output), -1).float()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features, sFID's features, logits without bias."""
        with torch.no_grad():
            pooled, logits = self.net(pixels)
        return pooled, self.spatial, logits
