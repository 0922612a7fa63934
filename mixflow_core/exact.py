"""The error-free field of a finite set of images: what a network would return had it learnt their law perfectly.

On x_t = alpha x1 + sigma x0 with x0 ~ N(0, I) and x1 one of the images, all equally likely, the posterior of x1 given
x_t = x has the weights softmax_i(-|x - alpha x1_i|^2 / (2 sigma^2)). Its mean gives the marginal velocity
E[alpha' x1 + sigma' x0 | x_t = x], the minimiser of the flow-matching loss. It knows these images alone and ends on
them, which a network that generalises does not: a reference for a diagnostic, not a model to wish for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_core.interpolant import Interpolant


class UndefinedFieldError(ValueError):
    """The field was asked at a time at which it has no finite value."""


class EmpiricalField:
    """The exact marginal velocity of images by class; called like a model, model(x, t, y), for samplers and guidance.

    Args:
        images: x1, (N, ...), kept in float64: near the data a difference of squares is divided by sigma^2.
        labels: their classes, (N,).
        interpolant: the path.
        null_label: the label that means all images, for guidance; None without.
    """

    def __init__(self, images: Tensor, labels: Tensor, interpolant: Interpolant, null_label: int | None = None) -> None:
        self.images, self.labels = images.flatten(1).double(), labels.to(images.device)
        self.interpolant, self.null_label = interpolant, null_label

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity at x (B, ...), t (B,) for classes y (B,), of x's shape and type.

        It takes 8 N bytes a row beside the images.

        Raises:
            UndefinedFieldError: sigma is 0 or the time lies beyond the path.
            ValueError: a class has no image.
        """
        t64 = t.double()
        c = self.interpolant.coefficients(t64)
        if not bool((c.sigma > 0).all()):
            raise UndefinedFieldError(
                f"the error-free field of images has no finite value at t = {float(t.max()):g}, where sigma is not "
                "above 0; let the sampler's end lie below it"
            )
        data = torch.empty(x.flatten(1).shape, dtype=torch.float64, device=x.device)
        for label in y.unique():
            rows = y == label
            data[rows] = self._posterior_mean(x.flatten(1)[rows].double(), int(label), c.alpha[rows], c.sigma[rows])
        at = [value[:, None] for value in c]
        noise = (x.flatten(1).double() - at[0] * data) / at[1]
        return (at[2] * data + at[3] * noise).reshape(x.shape).to(x.dtype)

    def _posterior_mean(self, x: Tensor, label: int, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x1 | x_t = x], (B, D)."""
        images = self.images if label == self.null_label else self.images[self.labels == label]
        if len(images) == 0:
            raise ValueError(f"y must be classes with images, got {label}, which has none")
        alpha, sigma = alpha[:, None], sigma[:, None]
        # -|x - alpha x1|^2 / (2 sigma^2) without the term |x|^2, which is the same for every image.
        logits = (alpha * (x @ images.T) - alpha**2 * images.square().sum(1) / 2) / sigma**2
        return logits.softmax(1) @ images
