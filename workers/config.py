"""What one run is. The core's frozen dataclasses are fields here: their ranges are stated once, where they are used."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mixflow_core.correctives import TrainingCorrective
from mixflow_core.interpolant import PathName
from mixflow_core.loss import Prediction, Weighting
from mixflow_core.mixture import SlowedMixture
from workers.models.family import ModelConfig


class Frozen(BaseModel):
    """A configuration section: immutable, and an unknown key or a value of another type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Training(Frozen):
    """How long and how a model is trained.

    Attributes:
        steps: optimiser steps.
        global_batch_size: images a step over all workers; a multiple of num_shards.
        num_shards: logical shards of the global batch, which own the random numbers; the most workers a run can have.
        shards_per_pass: shards joined into one forward pass (the rest is gradient accumulation); 0: all of a worker's.
        learning_rate: of AdamW, constant.
        adam_beta2: AdamW's second-moment decay.
        weight_decay: AdamW's.
        grad_clip: largest gradient norm, 0 for none.
        ema_decay: of the averaged weights that are evaluated, in [0, 1), warmed up: after k steps it is at most
            (1 + k) / (10 + k), .99 after 890 steps, .999 after 8,990, .9999 after 89,990.
        precision: `fp32`, `tf32` (GPU matrix products) or `bf16` (autocast).
        reproducible: compute shard by shard and add gradients in shard order, so that every number of workers gives the
            same bits; slower and with two more copies of the gradients a worker.
        sharded: FSDP2, for a model that does not fit one GPU; DDP otherwise. Not with `reproducible`.
        activation_checkpointing: compute each block again in the backward pass instead of keeping its activations.
        compile: compile each block; the bits differ from the uncompiled run's.
        log_every: steps between metrics (each the mean over those steps).
        checkpoint_every: steps between checkpoints, a multiple of log_every.
        keep_checkpoints: checkpoints kept besides the best by held-out loss.
    """

    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1, le=2**24)
    num_shards: int = Field(default=8, ge=1)
    shards_per_pass: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float = Field(default=0.0, ge=0)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    reproducible: bool = False
    sharded: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    log_every: int = Field(default=100, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1, le=1000)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.global_batch_size % self.num_shards:
            raise ValueError(
                f"global_batch_size must be a multiple of num_shards {self.num_shards}, got {self.global_batch_size}; "
                f"choose {self.global_batch_size // self.num_shards * self.num_shards or self.num_shards}"
            )
        if self.sharded and self.reproducible:
            raise ValueError("sharded must be false where reproducible is true, whose gradients are whole; choose one")
        if self.steps * self.num_shards >= 2**32:
            raise ValueError(
                f"steps times num_shards must lie below 2**32, got {self.steps} x {self.num_shards}; lower one"
            )
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every must be a multiple of log_every {self.log_every}, got {self.checkpoint_every}; "
                "otherwise a resumed run could not log the same means"
            )
        return self


class RunConfig(Frozen):
    """One training run, complete: with the data and the initial weights it determines every bit of the result.

    Attributes:
        model: the network's shape.
        path: the interpolant.
        prediction: what the network predicts.
        weighting: of the loss, for noise and score prediction.
        mixture: the law of (t, m).
        corrective: other remedies for exposure bias in the input of training; the defaults are none.
        training: how long and how.
        alignment_weight: of REPA's alignment loss, added to the velocity loss; 0 trains without it, and leaves the
            projectors as they are. It needs a model with one projector and data with features.
        seed: of the data order, times, noise, label dropout and, where nothing else is given, the initial weights.
    """

    model: ModelConfig
    path: PathName = "linear"
    prediction: Prediction = "velocity"
    weighting: Weighting = "none"
    mixture: SlowedMixture
    corrective: TrainingCorrective = TrainingCorrective()
    training: Training
    alignment_weight: float = Field(default=0.0, ge=0)
    seed: int = Field(ge=0)
