"""An arm's mixture for other trainers: SimpleTuner's settings, and the change that makes a SiT-style transport slowed.

SimpleTuner (its page "MixFlow Training") keeps noise-ward sigmas: 0 is data, 1 is noise, so its sigma is 1 - t here. It
draws sigma = 1 - sqrt(U), applies `flow_schedule_shift`, tells the network that sigma and interpolates at
sigma + U' gamma (1 - sigma), which is 1 - m of `shift_then_slow` with the Beta(2, 1) law. Its target is noise - data on
the straight path, the negative of the velocity here.
"""

from __future__ import annotations

from typing import Any

from mixflow_core.mixture import SlowedMixture
from orchestration.experiment import Experiment

NO_COUNTERPART = (
    "seeds and data order: SimpleTuner draws its own times and noise, so runs are alike in law, not in numbers",
    "training: learning rate, batch, steps, precision and average are SimpleTuner's own settings, not written here",
    "the matched-marginal control and other time laws: SimpleTuner's mixflow has none; its control is mixflow_enabled "
    "false, which also changes the law of times",
)


def simpletuner_settings(experiment: Experiment, arm: str) -> dict[str, Any]:
    """The keys of SimpleTuner's config.json that stand for an arm's mixture.

    Raises:
        ValueError: SimpleTuner cannot express it; the message says which part.
    """
    mixture = _trained_on(experiment, arm)
    laws: dict[str, tuple[Any, list[Any]]] = {
        "time_law": (mixture.time_law, ["beta"]),
        "interval": (list(mixture.interval), [[0.0, 1.0]]),
        "slowing_law": (mixture.slowing_law, ["interval"]),
        "order": (mixture.order, ["shift_then_slow"]),
        "condition_on": (mixture.condition_on, ["t"]),
    }
    _require(experiment, arm, laws, "SimpleTuner")
    if experiment.path != "linear":
        raise ValueError(f"path must be 'linear' for SimpleTuner's flow matching, got {experiment.path!r}")
    return {
        "mixflow_enabled": True,
        "mixflow_gamma": mixture.gamma,
        "flow_schedule_shift": mixture.shift,
        "flow_schedule_auto_shift": False,
    }


def transport_change(experiment: Experiment, arm: str) -> str:
    """Python text that explains an arm's mixture on a SiT-style transport: the lines to change, as a function.

    Raises:
        ValueError: it takes more than the few lines; the message says which part.
    """
    mixture = _trained_on(experiment, arm)
    laws: dict[str, tuple[Any, list[Any]]] = {
        "time_law": (mixture.time_law, ["beta", "uniform"]),
        "interval": (list(mixture.interval), [[0.0, 1.0]]),
        "order": (mixture.order, ["shift_then_slow"]),
    }
    _require(experiment, arm, laws, "the few lines")
    lines = _lines(mixture)
    return TRANSPORT.format(
        arm=arm, path=experiment.path, count=len(lines), lines="\n".join(f"    {line}" for line in lines)
    )


TRANSPORT = '''\
"""MixFlow on a SiT-style transport, as arm {arm} trains (path {path}, velocity). t = 0 is noise, t = 1 data.

In the loss such a transport draws t and asks its path for the sample and the target there: `plan(t, x0, x1)` answers
(t, x_t, u_t), and the network is called as model(x_t, t). These {count} lines take the place of drawing and asking:
call the network as model(x, t) with what they return and compare it with target. What follows in the loss, and
sampling, stay as they are. A code whose time is 0 at the data has s = 1 - t: its slowed time is s + U gamma (1 - s),
and its velocities are minus these.
"""

import torch


def slowed(x0, x1, u, plan):
    """x, t, target from noise x0, data x1 and u = torch.rand(batch, 2)."""
{lines}
    return x, t, target
'''


def _lines(mixture: SlowedMixture) -> list[str]:
    lines = ["t = torch.sqrt(u[:, 0])  # Beta(2, 1)" if mixture.time_law == "beta" else "t = u[:, 0]  # uniform"]
    if mixture.shift != 1:
        s = f"{mixture.shift!r} * (1 - t) / (1 + {mixture.shift - 1!r} * (1 - t))"
        lines.append(f"t = 1 - {s}  # the shift towards the noise, before slowing")
    slowed = f"t - {mixture.gamma!r} * t * u[:, 1]  # uniform on [(1 - gamma) t, t]"
    lines.append(f"m = {slowed if mixture.slowing_law == 'interval' else 'u[:, 1]  # independent of t'}")
    lines.append("_, x, target = plan(m, x0, x1)  # the sample and its target lie at m, the network is told t")
    if mixture.condition_on == "m":
        lines.append("t = m  # the matched-marginal control: the network is told where the sample lies")
    if mixture.target_time == "t":
        lines.append("_, _, target = plan(t, x0, x1)  # the target at the told time, which differs on curved paths")
    return lines


def _trained_on(experiment: Experiment, arm: str) -> SlowedMixture:
    trained = [name for name, its in experiment.arms.items() if its.train]
    if arm not in trained:
        raise ValueError(f"the arm to export must be one of {', '.join(trained)}, got {arm!r}; it has a mixture")
    if experiment.prediction != "velocity":
        raise ValueError(f"prediction must be 'velocity' for an export of a mixture, got {experiment.prediction!r}")
    return experiment.mixture_of(arm)


def _require(experiment: Experiment, arm: str, laws: dict[str, tuple[Any, list[Any]]], whose: str) -> None:
    for name, (value, known) in laws.items():
        if value not in known:
            raise ValueError(
                f"mixture.{name} must be {' or '.join(map(repr, known))} for {whose}, got {value!r} in arm {arm!r}, "
                "which has no counterpart there; export another arm"
            )
    if not experiment.arms[arm].corrective.is_off:
        raise ValueError(
            f"arms.{arm}.corrective must be left out for {whose}, which knows the mixture alone; export another arm"
        )
