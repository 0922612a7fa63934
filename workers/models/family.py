"""The model families under one roof: a configuration chooses its network, and every network is called the same way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Discriminator, Tag
from torch import nn

from workers.models.ddt import DiTDH, DiTDHConfig
from workers.models.sd3 import SD3, SD3Config
from workers.models.sit import SiT, SiTConfig


def _family(value: Any) -> str:
    """`family` as it is written, or SiT where it is not."""
    if isinstance(value, dict):
        return str(value.get("family", "sit"))
    return str(getattr(value, "family", "sit"))


ModelConfig = Annotated[
    Annotated[SiTConfig, Tag("sit")] | Annotated[DiTDHConfig, Tag("ddt")] | Annotated[SD3Config, Tag("sd3")],
    Discriminator(_family),
]
Network = SiT | DiTDH | SD3
CONFIGS: dict[str, type] = {"sit": SiTConfig, "ddt": DiTDHConfig, "sd3": SD3Config}


def build(config: ModelConfig) -> Network:
    """The network of a configuration, not initialised.

    Its forward(x (B, C, H, H), t (B,), y (B,)) runs from noise at t = 0 to data at t = 1 whatever its files say, and
    its state dict has the names of its published checkpoints.
    """
    if isinstance(config, SiTConfig):
        return SiT(config)
    return DiTDH(config) if isinstance(config, DiTDHConfig) else SD3(config)


def blocks_of(network: Network) -> Iterator[nn.Module]:
    """Its transformer blocks: the units of sharding, of checkpointed activations and of compilation."""
    yield from network.get_submodule("transformer_blocks" if isinstance(network, SD3) else "blocks").children()
