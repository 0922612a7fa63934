"""What a run trains, on every rank: network, averaged weights and optimiser, whole on each or sharded over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from mixflow_core.ema import EMA
from workers.checkpoint import TrainState, Writers
from workers.config import RunConfig
from workers.io import RunIO
from workers.models.family import Network, blocks_of, build

T = TypeVar("T")
Weights = Mapping[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")


class Trained:
    """The network of a run with all that its training changes.

    With `training.sharded` (FSDP2) parameters, gradients, averages and moments lie in shards over the ranks. To be kept
    they are put together a tensor at a time, each on the rank that writes its file: a checkpoint has the same files
    whatever the number of workers.

    Args:
        run: what is trained.
        initial: weights to start from (rank 0's count), None for fresh ones.
        io: this rank's surroundings.
        device: where it computes.

    Raises:
        ValueError: the logical shards of a sharded training cannot be shared out evenly.
    """

    def __init__(self, run: RunConfig, initial: Weights | None, io: RunIO, device: torch.device) -> None:
        self.run, self.io, self.device = run, io, device
        if run.training.sharded and run.training.num_shards % io.world_size:
            raise ValueError(
                f"num_shards must be a multiple of the {io.world_size} workers where training is sharded, so that all "
                f"make the same passes, got {run.training.num_shards}"
            )
        self.model: Network = build(run.model).initialise(run.seed)
        if hasattr(self.model, "projectors"):
            self.model.projectors.requires_grad_(run.alignment_weight > 0)
        for block in blocks_of(self.model):
            if run.training.compile:  # first: a compiled checkpoint would fall back to running all below it eagerly
                block.forward = torch.compile(block.forward)
            if run.training.activation_checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if initial is not None:
            self.model.load_state_dict(dict(initial))
        given = {}
        if initial is not None and io.world_size > 1:  # kept whole, because sharding leaves this rank its part only
            given = {name: value.clone() for name, value in self.model.state_dict().items()}
        if run.training.sharded:
            _shard(self.model, device, run.training.precision)
        self.model.to(device)
        if io.world_size > 1 and from_rank_0(io, initial is not None):
            self._fill(dict(self.model.state_dict()), given)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = _optimizer(run, self.parameters)
        self.ema = EMA(self.parameters, run.training.ema_decay)
        self.writers = Writers(_gloo_beside(dist.group.WORLD)) if run.training.sharded and io.world_size > 1 else None

    def restore(self) -> tuple[int, list[dict[str, float]], float]:
        """Takes up the newest checkpoint; returns its step, history and sum of losses, (0, [], 0) if there is none."""
        state = self.io.restore() if self.io.rank == 0 else None
        found = (state.step, state.history, state.loss_sum) if state else (0, [], 0.0)
        step, history, loss_sum = from_rank_0(self.io, found)
        if step:
            self._fill(self._saved(), state.model if state else {})
            self._fill(self.ema.shadow, state.ema if state else {})
            for key in MOMENTS:
                moments = {f"{key}/{name}": self._moment(name, key) for name in self.parameters}
                self._fill(moments, state.optimizer if state else {})
            for parameter in self.parameters.values():
                self.optimizer.state[parameter]["step"].fill_(step)
        return step, history, loss_sum

    def state(self, step: int, history: list[dict[str, float]]) -> TrainState:
        """The whole state; of shards, which all ranks must ask for together, the tensors are rank 0's alone."""
        state = self._state(step, history, 0.0)
        if self.run.training.sharded:
            _put_together(state, lambda file: 0, self.io.rank)
        return state

    def save(self, step: int, history: list[dict[str, float]], score: float | None, loss_sum: float = 0.0) -> None:
        """Hands the state over to be kept, on all ranks together; see RunIO.save."""
        if self.io.rank and not self.writers:
            return
        state = self._state(step, history, loss_sum)
        if self.run.training.sharded:
            _put_together(state, lambda file: file % self.io.world_size, self.io.rank)
        self.io.save(state, score, self.writers)

    def _state(self, step: int, history: list[dict[str, float]], loss_sum: float) -> TrainState:
        weights = self._saved()
        moments = {f"{key}/{name}": self._moment(name, key) for name in self.parameters for key in MOMENTS}
        return TrainState(step, weights, {**weights, **self.ema.shadow}, moments, history, loss_sum)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with the averaged weights in place of its own, which come back afterwards to the bit."""
        self._exchange()
        try:
            yield self.model
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, average in zip(self.parameters.values(), self.ema.shadow.values(), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def _saved(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the network: everything, or with LoRA only the adapters (the rest is the base)."""
        state = {name: value.detach() for name, value in self.model.state_dict().items()}
        if getattr(self.run.model, "lora_rank", 0):
            return {name: value for name, value in state.items() if name in self.parameters}
        return state

    def _moment(self, name: str, key: str) -> Tensor:
        moment: Tensor = self.optimizer.state[self.parameters[name]][key]
        return moment

    @torch.no_grad()
    def _fill(self, targets: Weights, values: Weights) -> None:
        """Writes rank 0's values into the targets of all ranks; a target without a value keeps its own."""
        names = from_rank_0(self.io, [name for name in targets if name in values])
        for name in names:
            target, value = targets[name], values.get(name)
            if isinstance(target, DTensor):
                full = torch.empty(target.shape, dtype=target.dtype, device=self.device) if value is None else value
                target.copy_(distribute_tensor(full.to(self.device), target.device_mesh, target.placements))
                continue
            if value is not None:
                target.copy_(value)
            if self.io.world_size > 1:
                dist.broadcast(target, 0)


def _put_together(state: TrainState, owner: Callable[[int], int], rank: int) -> None:
    """Replaces shards by whole tensors in CPU memory, on the rank that owns the file of that number.

    One tensor at a time fits on a device that the model does not. Of the others' files the tensors' shapes are left.
    """
    for number, (part, names) in enumerate(state.files().values()):
        tensors = getattr(state, part)
        for name in names:
            full = whole(tensors[name])
            tensors[name] = full.cpu() if owner(number) == rank else full.to("meta")


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards, if it has any."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def from_rank_0(io: RunIO, value: T) -> T:
    """Rank 0's value, on every rank."""
    if io.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


@lru_cache(maxsize=1)
def _gloo_beside(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that reduces in CPU memory: one, however many trainings a process serves."""
    return dist.new_group(backend="gloo")


def _shard(model: Network, device: torch.device, precision: str) -> None:
    """Each block is a unit that is gathered when it computes: memory for two blocks, not for the model."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]  # not in torch's types
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Gathered as they are computed with: autocast would keep a bf16 copy of every weight until the backward pass.
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=bf16 if precision == "bf16" else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)


def _optimizer(run: RunConfig, parameters: Weights) -> torch.optim.AdamW:
    training = run.training
    optimizer = torch.optim.AdamW(
        list(parameters.values()),
        lr=training.learning_rate,
        betas=(0.9, training.adam_beta2),
        weight_decay=training.weight_decay,
        fused=True,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
