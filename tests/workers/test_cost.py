"""FLOPs and memory against published figures, hand counts and what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_sd3 import config as sd3_config
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from worker_toys import TRAINING

from mixflow_core.interpolant import Interpolant
from mixflow_core.mixture import SlowedMixture
from workers.config import RunConfig, Training
from workers.cost import cost_of
from workers.data import Batch
from workers.models.ddt import DiTDHConfig
from workers.models.family import ModelConfig, build
from workers.models.sd3 import SD3, SD3Config
from workers.models.sit import SiT, SiTConfig
from workers.train import _loss


def test_sit_xl_at_256_costs_what_its_paper_says():
    cost = cost_of(SiTConfig.published("XL"))
    assert cost.parameters == 675_129_632
    assert cost.forward_flops / 2e9 == pytest.approx(118.6, abs=0.05)  # the papers count multiply-adds
    assert cost.forward_flops / 1e9 == pytest.approx(237.2, abs=0.05)
    assert cost.training_flops / 1e9 == pytest.approx(711.7, abs=0.1)


def test_repas_projectors_are_counted_where_they_are_trained():
    config = SiTConfig.repa("XL")
    cost, without = cost_of(config, align=True), cost_of(config)
    projector = 256 * 2 * (1152 * 2048 + 2048 * 2048 + 2048 * 768)  # tokens, multiply-adds
    assert cost.forward_flops - without.forward_flops == projector
    assert cost.training_flops - without.training_flops == 3 * projector
    assert cost.forward_flops / 1e9 == pytest.approx(241.39, abs=0.005)
    assert cost.training_flops / 1e9 == pytest.approx(724.2, abs=0.05)
    weights = 1152 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 768 + 768
    assert (cost.parameters, cost.trainable) == (without.parameters, without.trainable + weights)
    assert cost.activation_bytes > without.activation_bytes


TINY = SiTConfig(16, 2, 4, 64, 4, 4, 10)
TINY_DDT = DiTDHConfig(input_size=4, in_channels=6, hidden_size=(8, 12), depth=(2, 1), num_heads=(2, 3), num_classes=10)


def real_step(config: ModelConfig, alignment_weight: float, images: int) -> int:
    """FLOPs of the loop's own loss and its gradient on the CPU, with attention as plain matrix products."""
    run = RunConfig(
        model=config,
        mixture=SlowedMixture("beta", "interval", gamma=0.8, target_time="m"),
        training=Training.model_validate(TRAINING),
        alignment_weight=alignment_weight,
        seed=0,
    )
    model = build(config).initialise(0)
    if isinstance(model, SD3):
        rows, widths = config.num_classes + 1, (model.config.joint_attention_dim, model.config.pooled_projection_dim)
        model.set_captions(np.zeros((rows, 333, widths[0]), np.float16), np.zeros((rows, widths[1]), np.float16))
    x = torch.zeros(2, images, config.in_channels, config.input_size, config.input_size)
    features = torch.ones(images, TINY.num_tokens, 6) if alignment_weight else None
    batch = Batch(x[0], torch.zeros(images, dtype=torch.int64), x[1], torch.rand(images, 2), features)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _loss(run, model, batch, Interpolant("linear")).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "alignment_weight"),
    [
        (TINY, 0.0),
        (replace(TINY, projector_dims=(6,), projector_depth=2, noise_at=1), 0.0),
        (replace(TINY, projector_dims=(6,), projector_depth=2, noise_at=1), 0.5),
        (TINY_DDT, 0.0),
        (sd3_config(), 0.0),
        (sd3_config(lora_rank=2), 0.0),
    ],
)
def test_training_is_what_a_real_step_computes(config, alignment_weight):
    cost = cost_of(config, align=alignment_weight > 0)
    assert real_step(config, alignment_weight, 3) == 3 * cost.training_flops


def test_frozen_weights_have_no_gradients_to_compute():
    whole, adapters = (cost_of(SD3Config.published("medium", image_size=512, lora_rank=rank)) for rank in (0, 64))
    assert 2.99 < whole.training_flops / whole.forward_flops < 3
    assert 2.1 < adapters.training_flops / adapters.forward_flops < 2.2
    assert adapters.saved == adapters.trainable < whole.saved == whole.parameters


def test_a_run_leaves_its_checkpoints_and_the_final_average():
    cost = cost_of(TINY)
    model, trained = cost.parameters, cost.trainable
    assert trained == model - 64 * 64  # the table of positions
    for steps, checkpoints in ((50, 3), (20, 2), (5, 1)):
        training = Training.model_validate({**TRAINING, "steps": steps, "keep_checkpoints": 2})
        assert cost.run_bytes(training) == 4 * (checkpoints * (2 * model + 2 * trained) + model)


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
