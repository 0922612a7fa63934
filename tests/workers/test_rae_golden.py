"""Every recorded case of the published RAE, through the project's public functions.

RAE's time s runs from the data to the noise: everything recorded at s is asked here at t = 1 - s, and its velocities
change their sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import assert_full_size, golden, published_keys

from mixflow_core.ema import EMA
from mixflow_core.guidance import autoguided, classifier_free
from mixflow_core.interpolant import Interpolant
from mixflow_core.loss import per_sample_loss
from mixflow_core.mixture import SlowedMixture, TimePair, TrainingPair, shift_time
from mixflow_core.samplers import CountedField, Diffusion, Sampler, dopri5, euler, heun, sde, time_grid
from workers.models.ddt import DiTDH, DiTDHConfig, rotated
from workers.models.sit import drop_labels, position_table

INFO, TENSORS = golden("rae")
CASES = {case["name"]: case for case in INFO["cases"]}
SIZES = ("S", "B", "XL")
# What the published configuration says and ours has as its only choice.
FIXED = {
    "patch_size": 1, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False, "use_pos_embed": True
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One recorded case: `given` and `expected` are its tensors."""

    name: str
    params: dict
    given: dict[str, Tensor]
    expected: dict[str, Tensor]
    model: DiTDH

    @property
    def interpolant(self) -> Interpolant:
        return Interpolant(self.params["path"].lower())


def network(prefix: str, **changes) -> DiTDH:
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in INFO["models"][prefix]["config"].items()}
    assert {key: values.pop(key) for key in FIXED} == FIXED
    model = DiTDH(DiTDHConfig(qk_norm=values.pop("use_qknorm"), **values, **changes))
    assert list(model.state_dict()) == INFO["models"][prefix]["keys"]
    model.load_state_dict({key: TENSORS[f"{prefix}/{key}"] for key in model.state_dict()}, strict=True)
    return model.eval()


def load(name: str) -> Case:
    case = CASES[name]
    given, expected = ({key: TENSORS[where] for key, where in case[part].items()} for part in ("inputs", "outputs"))
    model = network(case["model"], train_tables=case["params"].get("all_trainable", False))
    return Case(name, case["params"], given, expected, model)


def close(actual: Tensor, expected: Tensor, rtol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


# Kinds of cases


def check_forward(case: Case) -> None:
    y = case.given["y"]
    if case.params["train"]:
        y = drop_labels(y, case.given["drop_u"], case.model.config)
        assert torch.equal(y != case.given["y"], case.given["drop_mask"])
        assert bool(case.given["drop_mask"].any())
    close(-case.model(case.given["x"], 1 - case.given["t"], y), case.expected["out"])


def check_intermediates(case: Case) -> None:
    seen = {}

    def remember(name):
        return lambda module, inputs, output: seen.update({name: output})

    for name in case.expected:
        case.model.get_submodule(name.replace("blocks_", "blocks.")).register_forward_hook(remember(name))
    # In float64 1 - (1 - s) is s again, and the published frequencies make the most of a time's last bit.
    case.model(case.given["x"], 1 - case.given["t"].double(), case.given["y"])
    for name, value in case.expected.items():
        close(seen[name], value)


def check_rope(case: Case) -> None:
    q = case.given["q"].transpose(1, 2)  # ours turns (B, tokens, heads, head_dim)
    close(rotated(q, case.model.enc_feat_rope()).transpose(1, 2), case.expected["out"])


def own_interval(params: dict) -> tuple[float, float]:
    lowest, highest = params["cfg_interval"]
    return 1 - highest, 1 - lowest


def check_forward_cfg(case: Case) -> None:
    x, t, y, null = case.given["x"], 1 - case.given["t"], case.given["y"], case.params["null_label"]
    assert null == case.model.config.null_label
    assert bool((y[2:] == null).all())
    guided = classifier_free(
        case.model,
        y[:2],
        guidance_scale=case.params["cfg_scale"],
        null_label=null,
        interval=own_interval(case.params),
    )
    field = -guided(x[:2], t[:2])
    close(torch.cat([field, field]), case.expected["out"])


def check_forward_autoguidance(case: Case) -> None:
    x, t, y = case.given["x"], 1 - case.given["t"], case.given["y"]
    scale, interval = case.params["cfg_scale"], own_interval(case.params)
    guided = autoguided(case.model, network("ag_model"), y, guidance_scale=scale, interval=interval)
    close(-guided(x, t), case.expected["out"])


def check_shift(case: Case) -> None:
    for name, shift in case.params["shift_values"].items():
        s = 1 - shift_time(1 - case.given["t"], shift)
        torch.testing.assert_close(s, case.expected[name], rtol=1e-12, atol=1e-13)
    # The laws are symmetric, s <-> 1 - s; ours count their quantiles from the noise.
    u = torch.stack([1 - case.given["u"].double(), torch.zeros(6)], 1)
    for law in ("uniform", "logit_normal"):
        shift = case.params["shift_values"]["sqrt48"]
        mixture = SlowedMixture(law, "interval", gamma=0.0, target_time="m", shift=shift, interval=(0.001, 1.0))
        expected = case.expected["uniform_train_t" if law == "uniform" else "logitnormal_0_1_train_t"]
        close(1 - mixture.draw(u).t, expected.double(), 1e-6)


def check_plan(case: Case) -> None:
    given = {"x0": case.given["x0"], "x1": case.given["x1"], "t": 1 - case.given["t"]}
    close(case.interpolant.interpolate(**given), case.expected["xt"], 1e-6)
    close(-case.interpolant.velocity(**given), case.expected["ut"], 1e-6)


def check_coefficients(case: Case) -> None:
    interpolant, (s, x, v) = case.interpolant, (case.given[key] for key in "txv")
    t = 1 - s
    alpha, sigma, d_alpha, d_sigma = interpolant.coefficients(t)
    found = {
        "alpha": alpha,
        "sigma": sigma,
        "d_alpha": -d_alpha,
        "d_sigma": -d_sigma,
        "drift_var": -interpolant.drift_variance(t),
        "score_from_velocity": interpolant.score_from_velocity(-v, x=x, t=t),
        "drift_mean_of_ones": d_alpha / alpha,
    }
    for form in ("sigma", "linear", "decreasing", "increasing-decreasing"):
        found[f"diffusion_{form}"] = Diffusion(form.replace("-", "_"))(interpolant, t)
    found["diffusion_inccreasing-decreasing"] = found.pop("diffusion_increasing-decreasing")  # spelt so by RAE
    assert found.keys() == case.expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, case.expected[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )


def standard_pair(case: Case, x0: Tensor, x1: Tensor, t: Tensor) -> TrainingPair:
    mixture = SlowedMixture(time_law="uniform", slowing_law="interval", gamma=0.0, target_time="m")
    return mixture.pair(case.interpolant, TimePair(1 - t, 1 - t), x0=x0, x1=x1)


def check_loss(case: Case) -> None:
    given, prediction = case.given, case.params["prediction"]
    # Only a velocity has a direction in time: a network that predicts noise or a score is asked for it as it is.
    sign = 1 if prediction == "velocity" else -1
    loss = per_sample_loss(
        lambda x, t: sign * case.model(x, t, given["y"]),
        standard_pair(case, given["x0"], given["x1"], given["t"]),
        case.interpolant,
        prediction=prediction,
        weighting=case.params["loss_weight"] or "none",
    )
    assert loss.shape == (3,)
    torch.testing.assert_close(loss.detach(), case.expected["loss"], rtol=5e-6, atol=0)


def check_grad(case: Case) -> None:
    given = case.given
    pair = standard_pair(case, given["x0"], given["x1"], given["t"])
    loss = per_sample_loss(lambda x, t: case.model(x, t, given["y"]), pair, case.interpolant).mean()
    loss.backward()
    close(loss, case.expected["loss"].reshape(()))
    close(case.model.final_layer.linear.weight.grad, case.expected["grad_final_linear_weight"], 5e-6)
    close(case.model.s_embedder.proj.bias.grad, case.expected["grad_s_embedder_bias"], 5e-6)
    parameters = dict(case.model.named_parameters())
    assert [name for name, p in parameters.items() if p.grad is None] == case.params["no_grad_params"]
    norms = {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in parameters.items()}
    assert norms == pytest.approx(case.params["grad_norms"], rel=5e-6)


def check_mixflow_loss(case: Case) -> None:
    given, params = case.given, case.params
    mixture = SlowedMixture(
        time_law="beta", slowing_law="interval", gamma=params["gamma"], target_time=params["target_at"]
    )
    times = mixture.draw(torch.stack([given["u1"], given["u2"]], 1))
    close(1 - times.t, given["t"], 1e-6)
    close(1 - times.m, given["m"], 1e-6)
    pair = mixture.pair(case.interpolant, times, x0=given["x0"], x1=given["x1"])
    close(pair.x_m, case.expected["xm"], 1e-6)
    close(-pair.target, case.expected["target"], 1e-6)
    close(-case.model(pair.x_m, pair.t, given["y"]), case.expected["pred"], 5e-6)
    loss = per_sample_loss(lambda x, t: case.model(x, t, given["y"]), pair, case.interpolant)
    close(loss, case.expected["loss"], 5e-6)


def check_train_steps(case: Case) -> None:
    params, model = case.params, case.model
    given = load("train3").given  # both cases have the same batches
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    average = EMA(parameters, params["ema_decay"])
    adam = {"lr": params["lr"], "betas": params["betas"], "eps": params["eps"], "weight_decay": params["weight_decay"]}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **adam)
    losses, norms = [], []
    for k in range(3):
        y = drop_labels(given[f"y_{k}"], given[f"u_{k}"], model.config)
        pair = standard_pair(case, given[f"x0_{k}"], given[f"x1_{k}"], given[f"t_{k}"])
        loss = per_sample_loss(lambda x, t, y=y: model(x, t, y), pair, case.interpolant).mean()
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), params["grad_clip"])))
        optimiser.step()
        losses.append(float(loss.detach()))
        # RAE's average has no warm-up; ours is past its own from step 17,990 on.
        average.update(list(parameters.values()), step=100_000 + k)

    def distances(values):
        return {name: float((value - start[name]).norm()) for name, value in values.items()}

    assert losses == pytest.approx(params["losses"], rel=5e-6)
    assert losses == pytest.approx(case.expected["losses"].tolist(), rel=5e-6)
    assert norms == pytest.approx(params["grad_norms_before_clip"], rel=5e-6)
    close(model.final_layer.linear.weight, case.expected["final_linear_weight"], 1e-6)
    close(model.t_embedder.W, case.expected["t_embedder_W"], 1e-6)
    # Adam divides gradients by their own size: those that are only rounding (a key's bias has none) move weights too.
    moved = {name: p.detach() for name, p in parameters.items()}
    assert distances(moved) == pytest.approx(params["param_delta_norms"], rel=2e-3)
    assert {n: float(p.norm()) for n, p in moved.items()} == pytest.approx(params["param_norms"], rel=1e-5)
    # The average moves by some float32 roundings an entry, so its distances are known to some per cent only. Where the
    # parameters stand still (frozen tables, labels not drawn), d p + (1 - d) p leaves roundings and ours none.
    frozen = set() if params["all_trainable"] else {"pos_embed", "t_embedder.W"}
    still = {"y_embedder.embedding_table.weight", *frozen}
    truth = {name: value for name, value in params["ema_delta_norms"].items() if name not in still}
    found = {name: value for name, value in distances(average.shadow).items() if name not in still}
    assert found == pytest.approx(truth, rel=0.35)
    assert {name for name in ("pos_embed", "t_embedder.W") if torch.equal(moved[name], start[name])} == frozen


class Recorder:
    """A field that remembers the published times it was called at."""

    def __init__(self, field) -> None:
        self.field, self.times = field, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        self.times.append(1 - float(t[0]))
        return self.field(x, t)


def published_field(case: Case):
    """The field of RAE's scripts: with classifier-free guidance both halves of the batch follow the first."""
    model, y, params = case.model, case.given["y"], case.params
    scale, interval = params["cfg_scale"], own_interval(params)
    if params["guidance"] == "autoguidance":
        return autoguided(model, network("ag_model"), y, guidance_scale=scale, interval=interval)
    if scale == 1:
        return lambda x, t: model(x, t, y)
    half = len(y) // 2
    assert bool((y[half:] == model.config.null_label).all())
    null = model.config.null_label
    guided = classifier_free(model, y[:half], guidance_scale=scale, null_label=null, interval=interval)
    return lambda x, t: guided(x[:half], t[:half]).repeat(2, 1, 1, 1)


def published_grid(params: dict, end: float = 0.999) -> Tensor:
    return time_grid(params["num_steps"] - 1, end=end, shift=params["time_dist_shift"])


def check_ode(case: Case) -> None:
    params, solve = case.params, {"euler": euler, "heun2": heun, "dopri5": dopri5}[case.params["method"]]
    grid = published_grid(params)
    torch.testing.assert_close(1 - grid, case.given["t_grid"], rtol=0, atol=1e-7)
    recorder = Recorder(published_field(case))
    field = CountedField(recorder)
    options = {"atol": params["atol"], "rtol": params["rtol"]} if params["method"] == "dopri5" else {}
    with torch.no_grad():
        states = list(solve(field, case.given["z"], grid, **options))
    assert field.nfe == params["nfe"]
    # The error estimate of the adaptive solver's first steps is nothing but rounding, and its step sizes follow it.
    adaptive = params["method"] == "dopri5"
    assert recorder.times == pytest.approx(params["eval_times"], rel=0, abs=1e-2 if adaptive else 1e-7)
    # Its first step's size differs between CPUs for the same reason: 2e-5 apart on some and 8e-5 on others.
    close(torch.stack(states)[-len(case.expected["traj"]) :], case.expected["traj"], 2e-4 if adaptive else 5e-6)
    assert len(states) == params["num_steps"]


def check_sde(case: Case) -> None:
    params, noise = case.params, case.given["noise"]
    recorder = Recorder(published_field(case))

    def steps(x, grid, last_step):
        diffusion, corrector = Diffusion(params["diffusion_form"]), params["method"] == "heun"
        states = sde(
            recorder,
            x,
            grid,
            case.interpolant,
            lambda k: noise[k],
            diffusion=diffusion,
            corrector=corrector,
            last_step=last_step,
        )
        return list(states)

    end = 1 - params["last_step_size"]
    with torch.no_grad():
        states = steps(case.given["z"], published_grid(params, end), "none")
        # RAE takes the last step at this time even where its shifted grid ended at another: here a grid of one time.
        states += steps(states[-1], torch.tensor([end]), params["last_step"].lower())[1:]
    close(torch.stack(states[-2:]), case.expected["traj"], 5e-6)
    # RAE evaluates the network for the drift and again for the score, we once for both.
    assert recorder.times == pytest.approx(params["eval_times"][::2], rel=0, abs=1e-7)


CHECKS = {
    "forward": check_forward,
    "intermediates": check_intermediates,
    "rope": check_rope,
    "forward_cfg": check_forward_cfg,
    "forward_autoguidance": check_forward_autoguidance,
    "rae_shift": check_shift,
    "plan": check_plan,
    "coefficients": check_coefficients,
    "loss": check_loss,
    "grad": check_grad,
    "mixflow_loss": check_mixflow_loss,
    "train_steps": check_train_steps,
    "ode": check_ode,
    "sde": check_sde,
}


@pytest.mark.parametrize("name", CASES)
def test_published_case(name):
    CHECKS[CASES[name]["kind"]](load(name))


def test_every_recorded_case_has_a_check():
    assert len(CASES) == len(INFO["cases"]) == 45
    assert {case["kind"] for case in INFO["cases"]} == set(CHECKS)


def test_the_published_protocol_is_a_sampler():
    case = load("ode_euler_shift")
    sampler = Sampler("euler", num_steps=4, shift=case.params["time_dist_shift"], end=0.999)
    with torch.no_grad():
        sample = sampler.run(published_field(case), case.given["z"], case.interpolant, lambda k: torch.zeros(0))
    close(sample, case.expected["traj"][-1], 5e-6)


# Tables


def rotary_angles(head_dim: int, grid: int) -> np.ndarray:
    """Angle of every token (row-major) and entry of a head, entry by entry from the definition."""
    half = head_dim // 2
    return np.array(
        [
            [position[j // half] * 10000.0 ** (-2 * (j % half // 2) / half) for j in range(head_dim)]
            for position in np.ndindex(grid, grid)
        ]
    )


def test_the_tables_are_the_published_ones():
    model = DiTDH(network("model").config)
    close(model.pos_embed, TENSORS["init/pos_embed"], 1e-6)
    assert not torch.equal(TENSORS["model/pos_embed"], TENSORS["init/pos_embed"])
    for name in (f"{part}_feat_rope.freqs_{wave}" for part in ("enc", "dec") for wave in ("cos", "sin")):
        close(model.get_buffer(name), TENSORS[f"model/{name}"], 1e-7)


@pytest.mark.parametrize("grid", [16, 32])
def test_rotary_tables_of_a_published_size(grid):
    shape = {"hidden_size": (64, 72), "depth": (1, 1), "num_heads": (1, 1)}
    rope = DiTDH(DiTDHConfig(input_size=grid, in_channels=1, num_classes=1, **shape)).dec_feat_rope
    angles = rotary_angles(72, grid)
    close(rope.freqs_cos, torch.from_numpy(np.cos(angles)).float(), 1e-7)
    close(rope.freqs_sin, torch.from_numpy(np.sin(angles)).float(), 1e-7)


# Published sizes


@pytest.mark.parametrize("image_size", [256, 512])
@pytest.mark.parametrize("size", SIZES)
def test_state_dict_of_a_published_size(size, image_size):
    truth = published_keys("rae")[f"rae_ditdh_{size}_{image_size}"]
    with torch.device("meta"):
        model = DiTDH(DiTDHConfig.published(size, image_size=image_size))
    state, parameters = model.state_dict(), dict(model.named_parameters())

    def kind(name):
        if name not in parameters:
            return "buffer"
        return "param" if parameters[name].requires_grad else "param_frozen"

    assert [[name, list(value.shape), kind(name)] for name, value in state.items()] == truth["entries"]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert sum(p.numel() for p in parameters.values()) == truth["num_parameters_total"]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == truth["num_parameters_trainable"]


def test_full_size_network():
    model = DiTDH(DiTDHConfig.published("S")).eval()
    assert_full_size(model, "rae_ditdh_S_256", position_table(384, 16)[None], 1 - torch.tensor([0.25, 0.8]), -1)
