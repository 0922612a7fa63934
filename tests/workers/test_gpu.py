"""The published sizes on a GPU: trained in bf16, resumed, sharded, compiled, sampled; and the same, tiny, on a CPU.

What a GPU alone can show needs one. The tiny variant, which runs everywhere, keeps the tests themselves in order.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity
from worker_toys import differences, local_io

from mixflow_core.mixture import SlowedMixture
from mixflow_core.samplers import Sampler
from workers.checkpoint import TrainState, Writers
from workers.config import RunConfig
from workers.cost import cost_of
from workers.data import ImageSet
from workers.io import RunIO
from workers.models.ddt import DiTDHConfig
from workers.models.family import build
from workers.models.sit import SiTConfig
from workers.sample import SampleSet, sample_batch, start_noise
from workers.train import post_train

STEPS, STOP = 4, 2
Config = SiTConfig | DiTDHConfig
TINY: dict[str, Config] = {
    "sit": SiTConfig(8, 2, 4, 64, 2, 4, 10, learn_sigma=True),
    "ddt": DiTDHConfig(
        input_size=4, in_channels=16, hidden_size=(32, 64), depth=(2, 1), num_heads=(2, 4), num_classes=10
    ),
}
PUBLISHED: dict[str, Config] = {"sit": SiTConfig.published("XL"), "ddt": DiTDHConfig.published("XL")}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass(frozen=True)
class Case:
    """A network on a device, with weights and data for it."""

    config: Config
    device: torch.device

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Random everywhere: behind the zero gates of fresh weights no block would have any say."""
        return randomised(self.config).state_dict()

    def data(self, count: int, seed: int) -> ImageSet:
        """Latents, as far as arithmetic is concerned."""
        numbers, config = np.random.default_rng(seed), self.config
        shape = (count, config.in_channels, config.input_size, config.input_size)
        return ImageSet(numbers.standard_normal(shape, np.float32), numbers.integers(0, config.num_classes, count))

    def run(self, **training: object) -> RunConfig:
        """A run in bf16; keywords change its training section."""
        values = {"steps": STEPS, "global_batch_size": 8, "precision": "bf16", "log_every": 1, "checkpoint_every": STOP}
        mixture = SlowedMixture("beta", "interval", 0.8, "m")
        sections = {"model": self.config, "mixture": mixture, "training": {**values, **training}}
        return RunConfig.model_validate({**sections, "seed": 7})

    def train(self, io: RunIO, *, fresh: bool = True, **training: object) -> TrainState:
        """Trains to the end, without initial weights if not `fresh`; what is left of it lies on the CPU."""
        weights, data, held_out = self.weights if fresh else None, self.data(24, 0), self.data(8, 1)
        return post_train(self.run(**training), data, held_out, io, initial=weights, device=self.device).snapshot()


def randomised(config: Config) -> nn.Module:
    """Initialised, with random numbers where it would start from zeros."""
    model, numbers = build(config).initialise(1), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=numbers)
    return model


class Unsaved(RunIO):
    """Surroundings that keep nothing."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1

    def restore(self) -> None:
        return None

    def stopping(self) -> bool:
        return False

    def save(self, state: TrainState, score: float | None, writers: Writers | None = None) -> None:
        pass

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def wait(self) -> None:
        pass


@pytest.fixture(
    scope="module",
    params=[
        "cpu-sit",
        "cpu-ddt",
        pytest.param("cuda-sit", marks=(pytest.mark.gpu, needs_gpu)),
        pytest.param("cuda-ddt", marks=(pytest.mark.gpu, needs_gpu)),
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    # post_train asks for it too, which is too late where a test before has started CUDA.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device, family = request.param.split("-")
    return Case((PUBLISHED if device == "cuda" else TINY)[family], torch.device(device))


@dataclass(frozen=True)
class Finished:
    """An uninterrupted run, its checkpoints, and the types of what its linear layers answered."""

    state: TrainState
    directory: Path
    linear_types: set[torch.dtype]


@pytest.fixture(scope="module")
def finished(case: Case) -> Iterator[Finished]:
    types: set[torch.dtype] = set()

    def note(module: nn.Module, given: object, out: Tensor) -> None:
        if isinstance(module, nn.Linear):
            types.add(out.dtype)

    with TemporaryDirectory(prefix="mixflow-gpu-") as scratch:  # at these sizes not to be left to pytest's tmp_path
        handle = register_module_forward_hook(note)
        state = case.train(local_io(Path(scratch)))
        handle.remove()
        yield Finished(state, Path(scratch), types)


def losses(state: TrainState) -> list[float]:
    return [row["train/loss"] for row in state.history if "train/loss" in row]


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of b, all tensors together."""
    assert a.keys() == b.keys()
    squares = [((a[name] - value).square().sum(), value.square().sum()) for name, value in b.items()]
    return float(sum(d for d, _ in squares) / sum(s for _, s in squares)) ** 0.5


def test_bf16_computes_with_fp32_weights_averages_and_moments(case: Case, finished: Finished) -> None:
    state = finished.state
    assert finished.linear_types == {torch.bfloat16}
    kept = [*state.model.values(), *state.ema.values(), *state.optimizer.values()]
    assert {value.dtype for value in kept} == {torch.float32}
    assert len(losses(state)) == STEPS
    assert np.isfinite(losses(state)).all()
    trained = {name for name, p in build(case.config).named_parameters() if p.requires_grad}
    for name, before in case.weights.items():
        assert torch.equal(state.model[name], before) == (name not in trained), name
        assert torch.equal(state.ema[name], before) == (name not in trained), name
        assert torch.equal(state.ema[name], state.model[name]) == (name not in trained), name


def test_stopped_after_a_checkpoint_it_goes_on_to_the_same_bits(case: Case, finished: Finished) -> None:
    for path in (finished.directory / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > STOP:
            shutil.rmtree(path)
    io = local_io(finished.directory)
    restored = io.restore()
    assert restored
    assert restored.step == STOP
    assert differences(case.train(io, fresh=False), finished.state) == []


def test_sharded_it_trains_the_same_and_is_put_together(case: Case, finished: Finished) -> None:
    try:
        state = case.train(Unsaved(), sharded=True)
        assert dist.get_backend() == ("nccl" if case.device.type == "cuda" else "gloo")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert losses(state) == pytest.approx(losses(finished.state), rel=1e-4)
    assert distance(state.model, finished.state.model) < 1e-4
    assert distance(state.ema, finished.state.ema) < 1e-4
    assert distance(state.optimizer, finished.state.optimizer) < 1e-3  # the gradients, which the weights hardly show


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_compiled_it_trains_the_same(case: Case, precision: str, tolerance: float) -> None:
    eager = case.train(Unsaved(), steps=2, precision=precision)
    torch._dynamo.reset()
    counters.clear()
    compiled = case.train(Unsaved(), steps=2, precision=precision, compile=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(compiled) == pytest.approx(losses(eager), rel=tolerance)


def test_a_steps_memory_is_what_was_estimated(case: Case) -> None:
    training = case.run().training
    estimate = cost_of(case.config).memory_bytes(training, training.global_batch_size, 1)
    assert estimate == pytest.approx(peak_bytes(case), rel=0.25)


def peak_bytes(case: Case) -> float:
    """The most that two steps without checkpoints hold at once."""
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.train(Unsaved(), steps=2)
        return torch.cuda.max_memory_allocated() - before
    case.weights  # noqa: B018 - before the measurement
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        case.train(Unsaved(), steps=2)
    assert profile.profiler
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_samples_in_bf16_are_close_to_those_in_fp32(case: Case) -> None:
    model, run = randomised(case.config).to(case.device).eval(), case.run()
    torch.set_float32_matmul_precision("highest")  # a run in bf16 leaves it at "high"
    exact, rounded = (sampled(model, run, case.device, bf16=bf16) for bf16 in (False, True))
    moved = exact - start_noise(run, 3, range(len(exact)))
    assert torch.isfinite(rounded).all()
    assert 0 < (rounded - exact).norm() < 0.02 * moved.norm()


def sampled(model: nn.Module, run: RunConfig, device: torch.device, *, bf16: bool) -> Tensor:
    """Latents (B, C, H, W)."""
    what = SampleSet(Sampler(method="euler", num_steps=4), num_samples=2, batch_size=2, seed=3)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return sample_batch(model, run, what, 0, device, decode=lambda latents: latents).pixels
