"""The loop: MixFlow post-training (and the base's own training, which is the same loop), read top to bottom."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixflow_core.interpolant import Interpolant
from mixflow_core.loss import alignment_loss, per_sample_loss, times_defined, velocity_field
from mixflow_core.rng import generator
from workers.checkpoint import TrainState
from workers.config import RunConfig
from workers.data import Batch, ImageSet, join, shard_batch
from workers.io import Judge, RunIO, StoppedError
from workers.models.sd3 import SD3
from workers.state import Trained, Weights, whole

NUM_HELD_OUT = 512
GATHERED = 2**24  # numbers of a gradient that are brought together at once


class NonFiniteLossError(Exception):
    """The loss, its gradient or what is measured is not finite; raised on every rank, before the update.

    Args:
        step: the step that was not made (steps done so far).
        ranks: where the loss itself was not finite; empty if only the gradient was not.
        last_checkpoint: where the run can go on from.
        measured: the metric that was not finite, "" if it was the loss or its gradient.
    """

    def __init__(self, step: int, ranks: Sequence[int], last_checkpoint: str, measured: str = "") -> None:
        super().__init__(step, list(ranks), last_checkpoint, measured)  # the arguments, so that it survives pickling
        self.step, self.ranks, self.last_checkpoint, self.measured = step, list(ranks), last_checkpoint, measured

    def __str__(self) -> str:
        what = (
            f"loss is not finite on ranks {self.ranks}"
            if self.ranks
            else f"{self.measured or 'gradient, the sum over all ranks,'} is not finite"
        )
        return f"{what} at step {self.step} (last checkpoint: {self.last_checkpoint}); stopped before the update"


def post_train(
    run: RunConfig,
    data: ImageSet,
    held_out: ImageSet,
    io: RunIO,
    *,
    initial: Weights | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    judge: Judge | None = None,
) -> TrainState:
    """Trains to `run.training.steps`, from the newest checkpoint if there is one, and returns the final state.

    Called on every worker, inside a torch.distributed process group if there is more than one.

    Args:
        run: what to train.
        data: training images.
        held_out: images for the held-out loss, which decides the best checkpoint.
        io: this worker's surroundings.
        initial: weights to start from (rank 0's count), None for fresh ones.
        device: where to compute.
        judge: what measures the averaged weights at checkpoints; its metrics stand beside the held-out loss in the
            history, before the checkpoint is written, so that no step is measured twice.

    Raises:
        NonFiniteLossError: on every rank.
        StoppedError: on every rank, after the step during which one of them was asked to stop.
    """
    training, interpolant = run.training, Interpolant(run.path)
    set_precision(training.precision)
    trained = Trained(run, initial, io, device)
    model, parameters, optimizer = trained.model, trained.parameters, trained.optimizer
    if data.captions and isinstance(model, SD3):
        model.set_captions(data.captions.text, data.captions.pooled)
    step, history, loss_sum = trained.restore()
    if judge:
        judge.restored(history)

    def look() -> float:
        """Measures the averaged weights after `step` steps; the held-out loss."""
        with trained.averaged() as averaged:
            score = held_out_loss(run, averaged, held_out, io, device)
            found = {"eval/loss": score}
            if judge and math.isfinite(score):
                set_precision("fp32")  # measuring is always in fp32
                found |= judge.measure(step, averaged)
                set_precision(training.precision)
        broken = next((key for key, value in found.items() if not math.isfinite(value)), None)
        if broken:  # the same on all ranks
            io.wait()
            raise NonFiniteLossError(step, [], io.last_checkpoint, broken)
        history.append({"step": step, **found})
        if io.rank == 0:
            io.report(step, found)
        return score

    if 0 < step < training.steps and step % training.checkpoint_every == 0 and "eval/loss" not in history[-1]:
        trained.save(step, history, look())  # who was asked to stop at this step did not stay for it

    shards = _shards_of(io.rank, io.world_size, training.num_shards, training.reproducible)
    gradients = (_OrderedGradients if training.reproducible else _JoinedGradients)(run, model, io.world_size)
    if step < training.steps:
        gradients.warm_up(_passes(run, data, step, shards, device), interpolant)

    window_loss = torch.full((), loss_sum, dtype=torch.float64, device=device)
    window_first, window_start = step, time.perf_counter()
    for batches in _prefetch(lambda k: _passes(run, data, k, shards, device), step, training.steps):
        loss, stopping = gradients.compute(batches, interpolant, step / training.steps, io.stopping())
        norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None], foreach=True)
        if training.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters.values(), training.grad_clip, norm, foreach=True)
        # The reduced numbers and the norm of the reduced gradient are the same on all ranks: all of them stop together.
        norm = whole(norm)
        finite, stop = torch.stack([torch.isfinite(loss + norm), stopping > 0]).tolist()
        if not finite:
            io.wait()  # the error names the checkpoint that is still being written
            raise NonFiniteLossError(step, _ranks_not_finite(io, gradients.local_loss), io.last_checkpoint)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        trained.ema.update(list(parameters.values()), step)

        window_loss += loss
        if step % training.log_every == 0 or step == training.steps:
            steps_done = (step - 1) % training.log_every + 1
            row = {"train/loss": window_loss.item() / steps_done, "train/grad_norm": norm.item()}
            history.append({"step": step, **row})
            elapsed = time.perf_counter() - window_start
            speed = {"time/images_per_s": (step - window_first) * training.global_batch_size / elapsed}
            if io.rank == 0:
                io.report(step, {**row, **speed})  # the speed is not part of the history, which must repeat exactly
            window_loss.zero_()
            window_first, window_start = step, time.perf_counter()
        if stop and step < training.steps:
            trained.save(step, history, None, window_loss.item())
            io.wait()
            raise StoppedError(f"stopped after step {step}, whose state is kept")
        if step % training.checkpoint_every == 0 or step == training.steps:
            trained.save(step, history, look())
            window_start = time.perf_counter()
    io.wait()
    return trained.state(step, history)


@torch.no_grad()
def held_out_loss(run: RunConfig, model: nn.Module, held_out: ImageSet, io: RunIO, device: torch.device) -> float:
    """The run's own velocity loss on held-out images at fixed noise and evenly spread times."""
    interpolant, count = Interpolant(run.path), min(NUM_HELD_OUT, len(held_out.labels))
    x1 = held_out.x1(slice(0, count), generator(0, "eval", 1))
    y, numbers = held_out.y(slice(0, count)), generator(0, "eval", 0)
    x0, u = torch.randn(x1.shape, generator=numbers), torch.rand(count, 2, generator=numbers)
    u[:, 0] = (torch.randperm(count, generator=numbers) + 0.5) / count

    # One sum for each logical shard, added in their order: the same bits whatever the number of workers.
    num_shards = run.training.num_shards
    # No pass has more images than training's may have, whatever the number of workers.
    at_once = run.training.global_batch_size // num_shards * (run.training.shards_per_pass or num_shards)
    sums = torch.zeros(num_shards, dtype=torch.float64, device=device)
    for shard in range(io.rank, num_shards, io.world_size):
        for rows in torch.arange(count)[shard::num_shards].split(at_once):
            batch = Batch(x1[rows], y[rows], x0[rows], u[rows]).to(device)
            sums[shard] += _loss(run, model, batch, interpolant)
    if io.world_size > 1:
        dist.all_reduce(sums)
    return sums.sum().item() / count


# ------------------------------------------------------------------------------------------------- gradients


def _loss(
    run: RunConfig, model: Callable[..., Any], batch: Batch, interpolant: Interpolant, progress: float | None = None
) -> Tensor:
    """Sum over the batch of Algorithm 1's loss, and of REPA's alignment loss where the batch has its targets.

    `progress` is the step over the number of steps, for a corrective of the input; None leaves the input alone.
    """
    pair = run.mixture.pair(interpolant, run.mixture.draw(batch.u), x0=batch.x0, x1=batch.x1)
    projected: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if batch.features is None:
            return model(x, t, batch.y)
        out, projections = model(x, t, batch.y, align=True)
        projected.extend(projections)
        return out

    with torch.autocast(batch.x1.device.type, torch.bfloat16, enabled=run.training.precision == "bf16"):
        if progress is not None and not run.corrective.is_off:
            pair = run.corrective.apply(
                pair,
                interpolant,
                velocity_field(lambda x, t: model(x, t, batch.y), interpolant, run.prediction),
                progress=progress,
                noise=batch.more_noise,
                u=batch.u_rollout,
                start=times_defined(run.path, run.prediction)[0],
            )
        losses = per_sample_loss(predict, pair, interpolant, prediction=run.prediction, weighting=run.weighting)
        if batch.features is not None:
            losses = losses + run.alignment_weight * alignment_loss(projected[0], batch.features)
    return losses.sum()


class _JoinedGradients:
    """The default: shards joined into passes, gradients reduced by DDP while they are computed."""

    def __init__(self, run: RunConfig, model: nn.Module, world_size: int) -> None:
        self.run, self.world_size = run, world_size
        self.local_loss = torch.zeros(())
        self.model: nn.Module = model
        if world_size > 1 and not run.training.sharded:
            self.model = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def warm_up(self, batches: list[Batch], interpolant: Interpolant) -> None:
        """DDP lays its buckets out anew after the first backward pass, and with them the order of its sums.

        One pass whose gradient is thrown away puts every start, fresh or resumed, behind that point.
        """
        if self.world_size > 1:
            self.compute(batches, interpolant, 0.0, False)
            self.model.zero_grad()

    def compute(
        self, batches: list[Batch], interpolant: Interpolant, progress: float, stop: bool
    ) -> tuple[Tensor, Tensor]:
        """Leaves the gradient of the global mean loss in the parameters; that loss, and how many ranks are to stop."""
        scale = 1 / self.run.training.global_batch_size
        total = torch.zeros(2, device=batches[0].x1.device)  # the loss, and how many ranks are to stop
        total[1] = stop
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self._accumulating(last):
                loss = _loss(self.run, self.model, batch, interpolant, progress) * scale
                total[0] += loss.detach()
                if last:
                    # Reduced while the last backward pass runs.
                    self.local_loss = total[0].clone()
                    reducing = dist.all_reduce(total, async_op=True) if self.world_size > 1 else None
                (loss * self.world_size).backward()  # DDP and FSDP divide by the number of workers
        if reducing:
            reducing.wait()
        return total[0], total[1]

    def _accumulating(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """DDP reduces gradients in the last pass only; FSDP in each, or they would lie whole on every worker."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()


class _OrderedGradients:
    """The reproducible mode: one gradient a shard, added in shard order whatever worker computed it."""

    def __init__(self, run: RunConfig, model: nn.Module, world_size: int) -> None:
        self.run, self.model, self.world_size = run, model, world_size
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.local_loss = torch.zeros(())

    def warm_up(self, batches: list[Batch], interpolant: Interpolant) -> None:
        """Nothing to lay out."""

    def compute(
        self, batches: list[Batch], interpolant: Interpolant, progress: float, stop: bool
    ) -> tuple[Tensor, Tensor]:
        """Leaves the gradient of the global mean loss in the parameters; that loss, and above 0 to stop."""
        scale = 1 / self.run.training.global_batch_size
        num_shards = self.run.training.num_shards
        size = sum(p.numel() for p in self.parameters) + 2  # the last numbers are the loss and whether to stop
        total = torch.zeros(size, device=batches[0].x1.device)
        local = []
        for first in range(0, num_shards, self.world_size):
            if first // self.world_size < len(batches):
                batch = batches[first // self.world_size]
                loss = _loss(self.run, self.model, batch, interpolant, progress) * scale
                mine = torch.cat([*self._gradient(loss), loss.detach().reshape(1), torch.full_like(total[-1:], stop)])
                local.append(loss.detach())
            else:
                mine = torch.zeros_like(total)
            for start in range(0, size, GATHERED):
                piece = slice(start, start + GATHERED)
                for shard in self._gather(mine[piece])[: num_shards - first]:
                    total[piece] += shard
        self.local_loss = torch.stack(local).sum()
        parts = total[:-2].split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return total[-2].clone(), total[-1].clone()  # views would keep all gradients until the next step's end

    def _gradient(self, loss: Tensor) -> Iterator[Tensor]:
        return (gradient.reshape(-1) for gradient in torch.autograd.grad(loss, self.parameters))

    def _gather(self, mine: Tensor) -> list[Tensor]:
        if self.world_size == 1:
            return [mine]
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return parts


def _shards_of(rank: int, world_size: int, num_shards: int, interleaved: bool) -> list[int]:
    """This worker's logical shards: every world_size-th, or a contiguous run of them (3 workers of 8: 3, 3, 2)."""
    if interleaved:
        return list(range(rank, num_shards, world_size))
    most, extra = divmod(num_shards, world_size)
    first = rank * most + min(rank, extra)
    return list(range(first, first + most + (rank < extra)))


def _passes(run: RunConfig, data: ImageSet, step: int, shards: list[int], device: torch.device) -> list[Batch]:
    """This worker's part of the global batch, cut into forward passes."""
    per_pass = 1 if run.training.reproducible else run.training.shards_per_pass or len(shards)
    groups = [shards[i : i + per_pass] for i in range(0, len(shards), per_pass)]
    return [join([shard_batch(run, data, step, shard) for shard in group]).to(device) for group in groups]


def _prefetch(make: Callable[[int], list[Batch]], start: int, stop: int) -> Iterator[list[Batch]]:
    """make(start), ..., make(stop - 1), each made in a thread while the one before it is used."""
    if start >= stop:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming = pool.submit(make, start)
        for step in range(start, stop):
            batches = coming.result()
            if step + 1 < stop:
                coming = pool.submit(make, step + 1)
            yield batches


def _ranks_not_finite(io: RunIO, local_loss: Tensor) -> list[int]:
    finite = bool(torch.isfinite(local_loss).item())
    if io.world_size == 1:
        return [] if finite else [0]
    flags: list[bool] = [True] * io.world_size
    dist.all_gather_object(flags, finite)
    return [rank for rank, ok in enumerate(flags) if not ok]


def set_precision(precision: str) -> None:
    """Deterministic kernels always: a resumed run must repeat the uninterrupted one.

    Args:
        precision: of training; "fp32" for what is measured and sampled.
    """
    # cuBLAS is deterministic only with a workspace of fixed size, and reads this when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Or every new tensor is filled first, for code that reads what it never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in torch's types
    torch.backends.cudnn.benchmark = False
    # TF32 on GPUs: 10 bits of mantissa in fp32 matrix products and convolutions.
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
