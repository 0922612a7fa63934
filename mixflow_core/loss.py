"""Per-sample training losses of a model on a TrainingPair, for each thing a model may predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional

from mixflow_core.checks import require_choice
from mixflow_core.interpolant import Interpolant, PathName, broadcast
from mixflow_core.mixture import TrainingPair

Prediction = Literal["velocity", "noise", "score", "data"]
Weighting = Literal["none", "velocity", "likelihood"]
Model = Callable[[Tensor, Tensor], Tensor]


def per_sample_loss(
    model: Model,
    pair: TrainingPair,
    interpolant: Interpolant,
    *,
    prediction: Prediction = "velocity",
    weighting: Weighting = "none",
) -> Tensor:
    """Squared error of model(x_m, t), averaged over all but the batch dimension: shape (B,).

    The last line of Algorithm 1 for `velocity`: || u_theta(x_m, t) - u* ||^2. For `noise` the residual is out - x0, for
    `score` it is sigma out + x0, for `data` out - x1 (SiT's losses, where m = t). `weighting` multiplies the noise and
    score losses by (drift_variance / sigma)^2 (`velocity`) or drift_variance / sigma^2 (`likelihood`), taken at the
    target's time; it does not apply to the others.

    Raises:
        ValueError: an unknown prediction or weighting, or a weighting where none is defined.
    """
    require_choice("prediction", prediction, Prediction)
    require_choice("weighting", weighting, Weighting)
    if weighting != "none" and prediction not in ("noise", "score"):
        raise ValueError(f"weighting must be 'none' for {prediction} prediction, got {weighting!r}")
    out = model(pair.x_m, pair.t)
    if prediction == "velocity":
        return _mean_square(out - pair.target)
    if prediction == "data":
        return _mean_square(out - pair.x1)
    sigma = interpolant.coefficients(pair.target_time).sigma
    loss = _mean_square(out - pair.x0 if prediction == "noise" else broadcast(sigma, out) * out + pair.x0)
    if weighting == "velocity":
        return loss * (interpolant.drift_variance(pair.target_time) / sigma) ** 2
    if weighting == "likelihood":
        return loss * interpolant.drift_variance(pair.target_time) / sigma**2
    return loss


def _mean_square(residual: Tensor) -> Tensor:
    return residual.square().flatten(1).mean(1)


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """REPA's alignment of a network's tokens with an encoder's: minus the mean cosine similarity over tokens, (B,).

    Args:
        projected: what the network's projector makes of its tokens, (B, T, D).
        features: the encoder's patch tokens of the clean image, (B, T, D).

    Raises:
        ValueError: the shapes differ.
    """
    if projected.shape != features.shape:
        raise ValueError(
            f"features must have the projector's shape {tuple(projected.shape)}, got {tuple(features.shape)}"
        )
    return -functional.cosine_similarity(projected, features, dim=-1, eps=1e-12).mean(1)


def times_defined(path: PathName, prediction: Prediction) -> tuple[float, float]:
    """The part of [0, 1] on which this prediction determines a velocity safely, as SiT's published code has it.

    Velocity on linear and GVP is defined everywhere; noise, score and data divide by alpha or sigma at an end, and VP's
    sigma has no derivative at t = 1.
    """
    if prediction == "velocity" and path != "vp":
        return (0.0, 1.0)
    return (0.0, 0.999) if path == "vp" else (0.001, 0.999)


def velocity_field(model: Model, interpolant: Interpolant, prediction: Prediction) -> Model:
    """The velocity u(x, t) that a model of any prediction type implies, for samplers.

    Of noise and score it is undefined at t = 0 on `linear` and `gvp`, of data at t = 1: start or end the grid inside.
    """
    require_choice("prediction", prediction, Prediction)
    if prediction == "velocity":
        return model
    convert = {
        "noise": interpolant.velocity_from_noise,
        "score": interpolant.velocity_from_score,
        "data": interpolant.velocity_from_data,
    }[prediction]
    return lambda x, t: convert(model(x, t), x=x, t=t)
