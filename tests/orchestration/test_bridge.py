"""Mixtures in other trainers' words: executed as those trainers read them, they give this project's samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toys import PATHS, normals, path_coefficients, uniforms

from mixflow_core.interpolant import Interpolant
from orchestration.cli import main
from orchestration.recipe import load, read

X0, X1, U = normals(1, 50, 3), normals(2, 50, 3), uniforms(3, 50, 2)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXFLOW_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


def export(capsys, arm: str, target: Path, *overrides: str) -> dict:
    settings = [word for override in overrides for word in ("--set", override)]
    assert main(["export", "quickstart", arm, str(target), *settings, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def alone(law: str) -> str:
    """A law of one arm, which then needs no control."""
    return f"arms.mixflow={{judged: false, mixture: {{{law}}}}}"


def ours(arm: str, path: str, overrides):
    experiment = load("quickstart", overrides)
    mixture = experiment.mixture_of(arm)
    return mixture.pair(Interpolant(path), mixture.draw(U), x0=X0, x1=X1)


@pytest.mark.parametrize("shift", [1, 3])
def test_simpletuner_draws_the_same_samples_from_the_settings(tmp_path, capsys, shift):
    """Its own words: sigma = 1 - sqrt(U), shifted; input sigma + U' gamma (1 - sigma); target noise - data."""
    overrides = [f"mixture.shift={shift}", "mixture.gamma=0.4"]
    answer = export(capsys, "mixflow", tmp_path / "out.json", *overrides)
    config = json.loads((tmp_path / "out.json").read_text())
    assert config == answer["settings"]
    assert config["mixflow_enabled"] is True
    sigma = 1 - U[:, 0].sqrt()
    sigma = config["flow_schedule_shift"] * sigma / (1 + (config["flow_schedule_shift"] - 1) * sigma)
    inner = sigma + U[:, 1] * config["mixflow_gamma"] * (1 - sigma)
    pair = ours("mixflow", "linear", overrides)
    torch.testing.assert_close(1 - sigma, pair.t)
    torch.testing.assert_close((1 - inner)[:, None] * X1 + inner[:, None] * X0, pair.x_m)
    torch.testing.assert_close(X1 - X0, pair.target)
    assert any("learning rate" in text for text in answer["no_counterpart"])


@pytest.mark.parametrize(
    ("arm", "override", "words"),
    [
        ("matched", "seed=0", "mixture.condition_on must be 't' for SimpleTuner, got 'm' in arm 'matched'"),
        ("standard", "seed=0", "mixture.time_law must be 'beta' for SimpleTuner, got 'uniform' in arm 'standard'"),
        ("mixflow", alone("interval: [0.1, 1]"), "mixture.interval must be [0.0, 1.0] for SimpleTuner, got [0.1, 1.0]"),
        ("mixflow", "mixture.order=slow_then_shift", "mixture.order must be 'shift_then_slow' for SimpleTuner"),
        ("mixflow", "path=gvp", "path must be 'linear' for SimpleTuner's flow matching, got 'gvp'"),
        ("none", "seed=0", "the arm to export must be one of standard, mixflow, matched, got 'none'"),
    ],
)
def test_what_simpletuner_cannot_express_is_refused(tmp_path, capsys, arm, override, words):
    words_found = refusal(capsys, "export", "quickstart", arm, str(tmp_path / "x.json"), "--set", override)
    assert words in words_found
    assert not (tmp_path / "x.json").exists()


def test_other_remedies_and_predictions_are_refused(tmp_path, capsys):
    target = str(tmp_path / "x.json")
    remedy = "arms.mixed={corrective: {input_perturbation: 0.1}, judged: false}"
    assert "arms.mixed.corrective must be left out for SimpleTuner" in refusal(
        capsys, "export", "quickstart", "mixed", target, "--set", remedy
    )
    noise = ["prediction=noise", "evaluation.samplers=[{method: euler, num_steps: 20, start: 0.001, end: 0.999}]",
             "evaluation.primary=fd_digits/euler20-from0.001-to0.999/s1"]  # fmt: skip
    settings = [word for override in noise for word in ("--set", override)]
    assert "prediction must be 'velocity' for an export of a mixture, got 'noise'" in refusal(
        capsys, "export", "quickstart", "mixflow", target, *settings
    )
    Path(target).write_text("kept")
    assert "the target must not exist" in refusal(capsys, "export", "quickstart", "mixflow", target)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("arm", "override"),
    [
        ("mixflow", "mixture.gamma=0.8"),
        ("mixflow", "mixture.shift=3"),
        ("mixflow", "mixture.target_time=t"),
        ("mixflow", "mixture.time_law=uniform"),
        ("mixflow", "mixture={time_law: beta, slowing_law: independent, gamma: 0, target_time: m}"),
        ("matched", "mixture.gamma=0.5"),
    ],
)
def test_the_change_to_a_transport_gives_this_projects_samples(tmp_path, capsys, path, arm, override):
    """The lines are the same on every path, which the transport has in its `plan`."""
    target = tmp_path / "change.py"
    export(capsys, arm, target, override)
    space: dict = {}
    exec(compile(target.read_text(), str(target), "exec"), space)

    def plan(t, x0, x1):
        """As a SiT-style path answers, from the definitions of alpha and sigma."""
        alpha, sigma, d_alpha, d_sigma = (torch.from_numpy(c)[:, None] for c in path_coefficients(path, t.numpy()))
        return t, alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0

    x, t, found = space["slowed"](X0, X1, U, plan)
    pair = ours(arm, path, [override])
    for mine, theirs in ((pair.x_m, x), (pair.t, t), (pair.target, found)):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_the_paper_changes_three_lines_and_more_is_refused(tmp_path, capsys):
    export(capsys, "mixflow", tmp_path / "a.py")
    text = (tmp_path / "a.py").read_text()
    assert "These 3 lines" in text
    body = [line for line in text.partition("plan):")[2].splitlines()[2:] if line.strip()]
    assert len(body) == 4, "and the one that returns"
    laws = (alone("time_law: logit_normal"), alone("interval: [0, 0.9]"), "mixture.order=slow_then_shift")
    for law in laws:
        message = refusal(capsys, "export", "quickstart", "mixflow", str(tmp_path / "b.py"), "--set", law)
        assert "for the few lines, got" in message


# ------------------------------------------------------------------------------------------------------- the alias


def written(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_mixflow_gamma_is_mixture_gamma():
    assert load("quickstart", ["mixflow_gamma=0.3"]) == load("quickstart", ["mixture.gamma=0.3"])
    assert load("quickstart", ["mixflow_gamma=0.3", "mixture.gamma=0.3"]).mixture.gamma == 0.3
    assert load("quickstart", ["mixflow_gamma=0.3", "mixflow_gamma=0.4"]).mixture.gamma == 0.4, "the later counts"


def test_mixflow_gamma_in_a_file(tmp_path):
    file = written(tmp_path, "a.yaml", "mixflow_gamma: 0.3\nmixture: {time_law: beta}\n")
    assert read(file) == {"mixture": {"time_law": "beta", "gamma": 0.3}}
    child = written(tmp_path, "b.yaml", f"extends: {file}\nname: b\n")
    assert read(child)["mixture"]["gamma"] == 0.3
    other = written(tmp_path, "c.yaml", "extends: quickstart\nmixflow_gamma: 0.25\n")
    assert load(other) == load("quickstart", ["mixture.gamma=0.25"])
    scaled = written(tmp_path, "d.yaml", "extends: quickstart\nscales: {small: {mixflow_gamma: 0.5}}\n")
    assert load(scaled, ["scale=small"]).mixture.gamma == 0.5
    assert load(scaled, ["scale=small", "mixflow_gamma=0.75"]).mixture.gamma == 0.75
    assert read(written(tmp_path, "e.yaml", "mixflow_gamma: 0.3\nmixture: {gamma: 0.3}\n"))["mixture"] == {"gamma": 0.3}


def test_mixflow_gamma_may_not_contradict(tmp_path, capsys):
    file = written(tmp_path, "a.yaml", "mixflow_gamma: 0.3\nmixture: {gamma: 0.4}\n")
    assert refusal(capsys, "plan", file) == (
        f"error: {file}: mixflow_gamma must equal mixture.gamma where both are given, got 0.3 and 0.4; remove one\n"
    )
    both = ["--set", "mixture.gamma=0.4", "--set", "mixflow_gamma=0.3"]
    assert "--set mixflow_gamma must equal mixture.gamma where both are given, got 0.3 and 0.4" in refusal(
        capsys, "plan", "quickstart", *both
    )
    assert "gamma must lie in [0, 1], got 1.5" in refusal(capsys, "plan", "quickstart", "--set", "mixflow_gamma=1.5")
