"""Every recorded case of the published REPA, through the project's public functions.

REPA's time runs from data (0) to noise (1); its network's velocity is minus ours at one minus its time.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from toys import assert_full_size, golden, published_keys

from mixflow_core.ema import EMA
from mixflow_core.guidance import classifier_free
from mixflow_core.interpolant import Interpolant
from mixflow_core.loss import alignment_loss, per_sample_loss
from mixflow_core.mixture import SlowedMixture, TimePair, TrainingPair
from mixflow_core.samplers import Diffusion, euler, final, heun, sde, time_grid
from workers.models.sit import SiT, SiTConfig, drop_labels, position_table

GOLDEN = {family: golden(family) for family in ("repa", "repa_qk")}
CASES = {f"{family}/{case['name']}": case for family, (info, _) in GOLDEN.items() for case in info["cases"]}
PATHS = {"linear": "linear", "cosine": "gvp"}


@dataclass(frozen=True)
class Case:
    """One recorded case: `given` and `expected` are its tensors, as REPA had them."""

    params: dict
    given: dict[str, Tensor]
    expected: dict[str, Tensor]
    model: SiT

    @property
    def interpolant(self) -> Interpolant:
        return Interpolant(PATHS[self.params.get("path") or self.params["path_type"]])


def load(name: str) -> Case:
    (info, tensors), case = GOLDEN[name.split("/")[0]], CASES[name]
    c = info["models"]["model"]["config"]
    config = SiTConfig(
        c["input_size"], c["patch_size"], c["in_channels"], c["hidden_size"], c["depth"], c["num_heads"],
        c["num_classes"], c["class_dropout_prob"], mlp_ratio=c["mlp_ratio"], noise_at=1, qk_norm=c["qk_norm"],
        projector_dims=tuple(c["z_dims"]), projector_depth=c["encoder_depth"], projector_width=c["projector_dim"],
    )  # fmt: skip
    model = SiT(config)
    model.load_state_dict({key: tensors[f"model/{key}"] for key in info["models"]["model"]["keys"]}, strict=True)
    given, expected = ({key: tensors[where] for key, where in case[part].items()} for part in ("inputs", "outputs"))
    return Case(case["params"], given, expected, model.eval())


def close(actual: Tensor, expected: Tensor, rtol: float = 5e-6) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def check_forward(case: Case) -> None:
    y = case.given["y"]
    if case.params["train"]:
        y = drop_labels(y, case.given["drop_u"], case.model.config)
        assert torch.equal(y != case.given["y"], case.given["drop_mask"])
        assert bool(case.given["drop_mask"].any())
    out, projections = case.model(case.given["x"], 1 - case.given["t"], y, align=True)
    close(-out, case.expected["out"])
    assert len(projections) == 1
    close(projections[0], case.expected["zs_0"])
    assert torch.equal(case.model(case.given["x"], 1 - case.given["t"], y), out)


def standard_pair(case: Case, x0: Tensor, x1: Tensor, t: Tensor) -> TrainingPair:
    mixture = SlowedMixture(time_law="uniform", slowing_law="interval", gamma=0.0, target_time="m")
    return mixture.pair(case.interpolant, TimePair(t, t), x0=x0, x1=x1)


def losses(case: Case, pair: TrainingPair, y: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity loss a sample, and REPA's projection loss, one number."""
    projected: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out, projections = case.model(x, t, y, align=True)
        projected.extend(projections)
        return out

    return per_sample_loss(predict, pair, case.interpolant), alignment_loss(projected[0], features).mean()


def check_repa_loss(case: Case) -> None:
    given = case.given
    pair = standard_pair(case, given["noise"], given["images"], 1 - given["t"].flatten())
    close(pair.x_m, case.expected["xt"], 1e-6)
    close(-pair.target, case.expected["ut"], 1e-6)
    velocity, projection = losses(case, pair, given["y"], given["z_target_0"])
    close(velocity, case.expected["denoising_loss"])
    close(projection.reshape(1), case.expected["proj_loss"].reshape(1))


def check_repa_time(case: Case) -> None:
    law = {"linear": "logit_normal", "cosine": "log_normal_angle"}[case.params["path"]]
    mixture = SlowedMixture(time_law=law, slowing_law="interval", gamma=0.0, target_time="m")
    normal = case.given["normal"].flatten().double()
    u = torch.special.ndtr(-normal)  # the law is symmetric: the time of -n is one minus the time of n
    t = mixture.draw(torch.stack([u, u], 1)).t
    torch.testing.assert_close(1 - t, case.expected["t"].flatten().double(), rtol=1e-6, atol=1e-7)


def check_mixflow_loss(case: Case) -> None:
    given, params = case.given, case.params
    mixture = SlowedMixture(
        time_law="beta", slowing_law="interval", gamma=params["gamma"], target_time=params["target_at"]
    )
    times = mixture.draw(torch.stack([given["u1"].flatten(), given["u2"].flatten()], 1))
    close(1 - times.t, given["t"].flatten(), 1e-6)
    close(1 - times.m, given["m"].flatten(), 1e-6)
    pair = mixture.pair(case.interpolant, times, x0=given["x0"], x1=given["x1"])
    close(pair.x_m, case.expected["xm"], 1e-6)
    close(-pair.target, case.expected["target"], 1e-6)
    close(-case.model(pair.x_m, pair.t, given["y"]), case.expected["pred"])
    velocity, projection = losses(case, pair, given["y"], given["z_target_0"])
    close(velocity, case.expected["loss"])
    close(projection.reshape(1), case.expected["proj_loss"].reshape(1))


def check_train_steps(case: Case) -> None:
    given, params, model = case.given, case.params, case.model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(dict(model.named_parameters())) - set(parameters) == {"pos_embed"}
    average = EMA(parameters, params["ema_decay"])
    adam = {"lr": params["lr"], "betas": params["betas"], "eps": params["eps"], "weight_decay": params["weight_decay"]}
    optimiser = torch.optim.AdamW(parameters.values(), **adam)
    found, norms = [], []
    for k in range(3):
        y = drop_labels(given[f"y_{k}"], given[f"u_{k}"], model.config)
        pair = standard_pair(case, given[f"noise_{k}"], given[f"images_{k}"], 1 - given[f"t_{k}"].flatten())
        velocity, projection = losses(case, pair, y, given[f"z_0_{k}"])
        loss = velocity.mean() + params["proj_coeff"] * projection
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), params["grad_clip"])))
        optimiser.step()
        found.append(float(loss.detach()))
        average.update(list(parameters.values()), step=100_000 + k)  # past the warm-up that REPA does not have
    assert found == pytest.approx(params["losses"], rel=5e-6)
    assert norms == pytest.approx(params["grad_norms_before_clip"], rel=1e-5)
    close(model.final_layer.linear.weight, case.expected["final_linear_weight"], 2e-6)
    assert {n: float(p.detach().norm()) for n, p in model.named_parameters()} == pytest.approx(
        params["param_norms"], rel=1e-5
    )
    close(average.shadow["blocks.0.attn.qkv.weight"], case.expected["ema_qkv0"], 1e-6)


def check_coefficients(case: Case) -> None:
    s, v, x = (case.given[key].double() for key in "tvx")
    t = 1 - s.flatten()
    score = case.interpolant.score_from_velocity(-v, x=x, t=t)
    torch.testing.assert_close(score, case.expected["score_from_velocity"].double(), rtol=1e-6, atol=1e-6)
    # Its g^2 = 2 s is twice the diffusion w.
    double = 2 * Diffusion("linear")(case.interpolant, t)
    torch.testing.assert_close(double, case.expected["diffusion"].double().flatten(), rtol=1e-6, atol=1e-7)


def network(case: Case):
    """State and times in float64, the network in float32, as REPA samples."""
    return lambda x, t, y: case.model(x.float(), t.float(), y).double()


def guided(case: Case, low: float, high: float):
    scale, null = case.params.get("cfg_scale", 1.0), case.params["null_label_used"]
    interval = (1 - high - 1e-6, 1 - low + 1e-6)  # closed, and float32 times round
    return classifier_free(network(case), case.given["y"], guidance_scale=scale, null_label=null, interval=interval)


def check_repa_ode(case: Case) -> None:
    params, z = case.params, case.given["z"].double()
    low, high = params.get("guidance_low", 0.0), params.get("guidance_high", 1.0)
    field, grid = guided(case, low, high), time_grid(params["num_steps"]).double()
    with torch.no_grad():
        if not params.get("heun"):
            end = final(euler(field, z, grid))
        else:
            # Its corrector looks at the step's start to decide on guidance, and its last step has none.
            unguided = guided(case, 2.0, 3.0)
            first = 1 if high < 1 else 0
            state = final(heun(unguided, z, grid[: first + 1]))
            state = final(heun(field, state, grid[first:-1]))
            end = final(euler(field, state, grid[-2:]))
    close(end, case.expected["final"].double())


def check_repa_sde(case: Case) -> None:
    params, noise = case.params, case.given["noise"].double()
    field = guided(case, params.get("guidance_low", 0.0), params.get("guidance_high", 1.0))
    grid = time_grid(params["num_steps"] - 1, end=0.96).double()
    with torch.no_grad():
        states = sde(
            field, case.given["z"].double(), grid, case.interpolant, lambda k: noise[k], diffusion=Diffusion("linear")
        )
        end = final(states)
    close(end, case.expected["final"].double(), 2e-5)


CHECKS = {
    "forward": check_forward,
    "repa_loss": check_repa_loss,
    "repa_time": check_repa_time,
    "mixflow_loss": check_mixflow_loss,
    "train_steps": check_train_steps,
    "coefficients": check_coefficients,
    "repa_ode": check_repa_ode,
    "repa_sde": check_repa_sde,
}


@pytest.mark.parametrize("name", CASES)
def test_published_case(name):
    CHECKS[CASES[name]["kind"]](load(name))


def test_every_recorded_case_has_a_check():
    assert len(CASES) == sum(len(info["cases"]) for info, _ in GOLDEN.values()) == 26
    assert {case["kind"] for case in CASES.values()} == set(CHECKS)


@pytest.mark.parametrize("name", published_keys("repa"))
def test_state_dict_of_a_published_size(name):
    truth = published_keys("repa")[name]
    _, size, _, pixels, widths = name.split("_", 4)
    dims = tuple(int(width) for width in widths[1:].split("_"))
    with torch.device("meta"):
        model = SiT(SiTConfig.repa(size, image_size=int(pixels), projector_dims=dims))
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert state == dict(truth["entries"])
    assert sum(p.numel() for p in model.parameters()) == truth["num_parameters_total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == truth["num_parameters_trainable"]


def test_full_size_network():
    model = SiT(SiTConfig.repa("B")).eval()
    table = position_table(model.config.hidden_size, 16)[None]
    assert_full_size(model, "repa_B_2_256", table, 1 - torch.tensor([0.25, 0.8]), -1)
