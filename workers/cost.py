"""What a network costs, without computing anything: parameters, FLOPs and memory, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from workers.config import Training
from workers.models.family import ModelConfig, Network, blocks_of, build
from workers.models.sd3 import SD3, SD3Config
from workers.models.sit import SiT

CAPTION_TOKENS = 333  # 77 of the two CLIP encoders side by side, 256 of T5: what SD3 is sampled with


@dataclass(frozen=True)
class Cost:
    """What one image costs in a network.

    Attributes:
        parameters: of the network; `trainable`: those of them that train; `saved`: those that its files hold, which are
            the trainable ones under LoRA.
        largest_block: parameters of its largest block.
        forward_flops: of one forward pass, 2 for each multiply-add (papers that say Gflops count multiply-adds).
        training_flops: of a forward and a backward pass. Three times as many, but for what needs no gradient: a LoRA's
            frozen weights, and the inputs. What activations computed again cost is not counted.
        activation_bytes: kept for the backward pass in fp32, without the attention matrices, which fused kernels spare.
        checkpointed_bytes: the same where blocks are computed again: what enters each block, and the largest block's.
    """

    parameters: int
    trainable: int
    saved: int
    largest_block: int
    forward_flops: int
    training_flops: int
    activation_bytes: int
    checkpointed_bytes: int

    def run_bytes(self, training: Training) -> int:
        """What a training leaves: its checkpoints (weights, average, two moments) in fp32, and the final average."""
        made = -(-training.steps // training.checkpoint_every)
        kept = min(training.keep_checkpoints + 1, made)  # the best one beside the newest
        return 4 * (kept * 2 * (self.saved + self.trainable) + self.saved)

    def memory_bytes(self, training: Training, images: int, num_workers: int) -> float:
        """Estimate of a worker's peak for passes of `images` images.

        Weights, gradients, two moments and the average in fp32, divided by the workers where they are sharded (and two
        blocks whole), and two gradients more where they are added in the order of the shards; activations, at 0.6 of
        the size under bf16 (residuals and norms stay in fp32) and with a cast copy of the weights.
        """
        states: float = 4 * (self.parameters + 4 * self.trainable)
        if training.reproducible:
            states += 2 * 4 * self.trainable
        if training.sharded:
            states = states / num_workers + 2 * 4 * self.largest_block
        kept = self.checkpointed_bytes if training.activation_checkpointing else self.activation_bytes
        if training.precision == "bf16":
            return states + 0.6 * kept * images + 2 * (2 * self.largest_block if training.sharded else self.parameters)
        return states + kept * images


def cost_of(config: ModelConfig, *, align: bool = False) -> Cost:
    """Counts a network of this configuration on one image.

    Args:
        config: of the network.
        align: with REPA's projectors, as in training with an alignment loss; sampling is without them.
    """
    if isinstance(config, SD3Config):
        config = replace(config, num_classes=1)  # captions of a whole data set would be in the way
    with torch.device("meta"):
        model = build(config)
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        t, y = torch.empty(1), torch.zeros(1, dtype=torch.int64)
    if isinstance(model, SiT) and model.config.projector_dims:
        model.projectors.requires_grad_(align)  # as training does
    if isinstance(model, SD3):
        sizes = (CAPTION_TOKENS, model.config.joint_attention_dim), (model.config.pooled_projection_dim,)
        model.set_captions(*(np.zeros((config.num_classes + 1, *size), np.float16) for size in sizes))
        y = torch.zeros(1, dtype=torch.int64)  # rows are looked up on the CPU

    def forward() -> list[Tensor]:
        if not (align and isinstance(model, SiT)):
            return [model(x, t, y)]
        out, projections = model(x, t, y, align=True)
        return [out, *projections]

    with FlopCounterMode(display=False) as counter:
        answers = forward()
        forward_flops = counter.get_total_flops()
        torch.stack([answer.sum() for answer in answers]).sum().backward()
    kept = _Kept(model)
    kept.count(forward)
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(
        parameters=parameters,
        trainable=trainable,
        saved=trainable if isinstance(config, SD3Config) and config.lora_rank else parameters,
        largest_block=max(blocks),
        forward_flops=forward_flops,
        training_flops=counter.get_total_flops(),
        activation_bytes=sum(sum(sizes.values()) for sizes in kept.by_block.values()),
        checkpointed_bytes=kept.outside + kept.entering + max(kept.of_blocks),
    )


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values and its output, no matrix of all pairs of tokens."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """An output of the right shape; nothing is computed on the meta device."""
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


@contextmanager
def _fused_attention() -> Iterator[None]:
    """The meta device would take attention apart into matrix products, whose results autograd keeps."""
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: _FusedAttention.apply(q, k, v)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


class _Kept:
    """Bytes that autograd keeps in a forward pass, by the block that keeps them (-1 outside of them)."""

    def __init__(self, model: Network) -> None:
        self.model, self.block, self.entering = model, -1, 0
        self.by_block: dict[int, dict[int, int]] = {}
        self.weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    @property
    def outside(self) -> int:
        """Of what lies outside the blocks."""
        return sum(self.by_block.get(-1, {}).values())

    @property
    def of_blocks(self) -> list[int]:
        """Of each block."""
        return [sum(sizes.values()) for number, sizes in self.by_block.items() if number >= 0]

    def count(self, forward: Callable[[], object]) -> None:
        """One forward pass, observed."""
        handles = []
        for number, block in enumerate(blocks_of(self.model)):
            handles.append(block.register_forward_pre_hook(self._enter(number), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave))
        with saved_tensors_hooks(self._pack, lambda kept: kept), _fused_attention():
            self.out = forward()  # held, so that no storage's address is given twice
        for handle in handles:
            handle.remove()

    def _enter(self, number: int) -> Any:
        def hook(module: Any, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.block = number
            given = [value for value in (*positional, *keywords.values()) if isinstance(value, Tensor)]
            self.entering += max(value.numel() * value.element_size() for value in given)

        return hook

    def _leave(self, *_: Any) -> None:
        self.block = -1

    def _pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        known = any(storage._cdata in sizes for sizes in self.by_block.values())
        if storage._cdata not in self.weights and not known:
            self.by_block.setdefault(self.block, {})[storage._cdata] = storage.nbytes()
        return value
