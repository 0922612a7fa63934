"""What a trial of a sweep is judged by while it trains: one metric of samples from fixed noise, as `metrics` has it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mixflow_core.metrics import Moments, frechet_distance
from orchestration.measuring import open_extractors
from orchestration.site import Inputs, Site
from orchestration.workflow import Stage
from workers.config import RunConfig
from workers.evaluate import Measured, Reference, merged, one_score, patch_moments
from workers.models.family import Network
from workers.sample import SampleSet, sample_batch


class Objective:
    """The judge of a trial. The workers share the images; each value is the same on all of them.

    Args:
        site: of this worker.
        stage: the trial.
        inputs: features and reference.
        what: the images, from fixed noise.
        guide: the weaker model of autoguidance.
        decode: samples to uint8 pixels.
    """

    def __init__(
        self,
        site: Site,
        stage: Stage,
        inputs: Inputs,
        what: SampleSet,
        guide: Network | None,
        decode: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.site, self.what, self.guide, self.decode = site, what, guide, decode
        self.run = RunConfig.model_validate_json(json.dumps(stage.settings["run"]))
        self.every, self.metric = stage.settings["every"], stage.settings["metric"]
        self.key = f"eval/{self.metric}/{what.sampler.name}"
        self.extractors = open_extractors(site, inputs["features"], self.metric)
        self.kind = next(iter(self.extractors), "patches")
        self.reference = Reference.load(inputs["reference"].fetch(site.cache) / f"{self.kind}.safetensors")

    def restored(self, history: Sequence[Mapping[str, float]]) -> None:
        """Tells again what was measured before a restart: whoever schedules trials may not have heard of it."""
        for row in history:
            if self.key in row:
                self._tell(int(row["step"]), row[self.key])

    def measure(self, step: int, model: nn.Module) -> dict[str, float]:
        """The objective every so many steps and at the end; not a number where the samples are not finite."""
        if step % self.every and step != self.run.training.steps:
            return {}
        was_training = model.training
        model.eval()
        parts = self.site.gather(self._my_part(model))
        model.train(was_training)
        value = self.site.agree(self._value(parts) if self.site.rank == 0 else None)
        if math.isfinite(value):
            self._tell(step, value)
        return {self.key: value}

    def _tell(self, step: int, value: float) -> None:
        # The end is told by whoever finds the trial's result: a scheduler that stops the trial here would undo it.
        if step < self.run.training.steps:
            self.site.rung(step, value)

    def _my_part(self, model: nn.Module) -> dict[int, Any] | None:
        """This rank's logical batches by number, None if one of them is not finite."""
        count, found, finite = self.what.num_batches, dict[int, Any](), True
        for first in range(0, count, self.site.world_size):
            mine = first + self.site.rank
            if mine >= count and not self.run.training.sharded:
                break
            try:  # a sharded network needs all ranks at every pass, also those with nothing left to do
                number = min(mine, count - 1)
                done = sample_batch(
                    model, self.run, self.what, number, self.site.device, guide=self.guide, decode=self.decode
                )
            except FloatingPointError:
                finite = False
                continue
            if mine < count:
                found[mine] = self._measured(done.pixels)
        return found if finite else None

    def _measured(self, pixels: torch.Tensor) -> Measured | Moments:
        return Measured.of(self.extractors[self.kind], pixels) if self.extractors else patch_moments(pixels)

    def _value(self, parts: Sequence[Mapping[int, Any] | None]) -> float:
        """Of all ranks' batches, in the order of their numbers."""
        batches: dict[int, Any] = {}
        for part in parts:
            if part is None:
                return math.nan
            batches.update(part)
        ordered = [batches[number] for number in sorted(batches)]
        reference = self.reference.to(self.site.device)
        if self.extractors:
            return float(one_score(self.metric, self.kind, Measured.join(ordered), reference, self.site.device))
        moments = merged(ordered)
        assert moments, "a set of samples has images"
        return float(frechet_distance(moments, self.reference.gaussian))
