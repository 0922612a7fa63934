"""FLOPs and memory against published figures, hand counts and what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from tiny_sd3 import config as sd3_config
from torch.autograd.graph import saved_tensors_hooks
from worker_toys import TRAINING

from workers.config import Training
from workers.cost import cost_of
from workers.models.ddt import DiTDHConfig
from workers.models.family import build
from workers.models.sit import SiT, SiTConfig


def test_sit_xl_at_256_costs_what_its_paper_says():
    cost = cost_of(SiTConfig.published("XL"))
    assert cost.parameters == 675_129_632
    assert cost.forward_flops / 2e9 == pytest.approx(118.6, abs=0.05)  # the papers count multiply-adds
    assert cost.forward_flops / 1e9 == pytest.approx(237.2, abs=0.05)
    assert cost.training_flops / 1e9 == pytest.approx(711.7, abs=0.1)


@pytest.mark.parametrize("size", ["S", "B"])
def test_flops_are_those_of_a_hand_count(size):
    config = SiTConfig.published(size)
    d, depth, tokens, patch = config.hidden_size, config.depth, 256, 2 * 2 * 4
    a_token = depth * (3 + 1 + 4 + 4) * d * d + patch * d + d * 2 * patch
    attention = depth * 2 * tokens * tokens * d
    once = 256 * d + d * d + depth * 6 * d * d + 2 * d * d
    assert cost_of(config).forward_flops == 2 * (tokens * a_token + attention + once)


def really_kept(config: SiTConfig, images: int) -> int:
    """Bytes that autograd keeps in a real forward pass on the CPU, whose fused attention keeps no matrices."""
    model = SiT(config).initialise(0)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with saved_tensors_hooks(pack, lambda kept: kept):
        out = model(torch.zeros(images, 4, 16, 16), torch.zeros(images), torch.zeros(images, dtype=torch.int64))
    assert out.shape == (images, 4, 16, 16)
    return sum(sizes.values())


def test_activations_are_those_that_a_real_step_keeps():
    config = SiTConfig(16, 2, 4, 64, 4, 4, 10)
    for images in (1, 3):
        assert images * cost_of(config).activation_bytes == pytest.approx(really_kept(config, images), rel=0.05)


def test_computing_activations_again_keeps_what_enters_the_blocks_and_one_block():
    few, many = (cost_of(SiTConfig(16, 2, 4, 64, depth, 4, 10)) for depth in (4, 8))
    entering = 64 * 64 * 4  # tokens, width, bytes
    assert many.checkpointed_bytes - few.checkpointed_bytes == 4 * entering
    assert many.activation_bytes == pytest.approx(2 * few.activation_bytes, rel=0.05)
    assert few.checkpointed_bytes < few.activation_bytes


def test_memory_follows_the_mode():
    cost = cost_of(SiTConfig.published("S"))

    def memory(workers: int = 4, **changes: object) -> float:
        return cost.memory_bytes(Training.model_validate({**TRAINING, **changes}), 8, workers)

    states = 4 * (cost.parameters + 4 * cost.trainable)
    assert memory() == states + 8 * cost.activation_bytes
    assert memory(sharded=True) == states / 4 + 8 * cost.largest_block + 8 * cost.activation_bytes
    assert memory(activation_checkpointing=True) == states + 8 * cost.checkpointed_bytes
    assert memory(precision="bf16") == pytest.approx(states + 0.6 * 8 * cost.activation_bytes + 2 * cost.parameters)


@pytest.mark.parametrize("config", [DiTDHConfig.published("S"), sd3_config(), sd3_config(lora_rank=2)])
def test_every_family_is_counted(config):
    cost = cost_of(config)
    with torch.device("meta"):
        parameters = list(build(config).parameters())
    assert cost.parameters == sum(p.numel() for p in parameters)
    assert cost.trainable == sum(p.numel() for p in parameters if p.requires_grad) <= cost.parameters
    assert cost.forward_flops > 2 * cost.largest_block
    assert 0 < cost.checkpointed_bytes < cost.activation_bytes
