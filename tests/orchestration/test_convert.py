"""`mixflow import`, `export` and the costs of `plan`, by the command line in this process."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_sd3 import config as sd3_config
from tiny_sd3 import randomise

from orchestration.cli import main
from workers.manifest import measure
from workers.models.checkpoints import load_weights
from workers.models.ddt import DiTDH, DiTDHConfig
from workers.models.sd3 import SD3, SD3Config, save_sd3
from workers.models.sit import SiT, SiTConfig

NETWORKS = {
    "sit": SiT(SiTConfig(4, 2, 4, 384, 1, 6, 1000, learn_sigma=True)),
    "repa": SiT(SiTConfig(4, 2, 4, 384, 1, 6, 1000, noise_at=1, projector_dims=(6,), projector_depth=1)),
    "rae": DiTDH(DiTDHConfig(input_size=2, in_channels=6, hidden_size=(8, 16), depth=(1, 1), num_heads=(2, 2),
                             num_classes=1000)),
}  # fmt: skip


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("family", NETWORKS)
def test_an_official_file_is_imported_to_the_bit_and_says_what_it_is(family, ending, tmp_path, capsys):
    network = NETWORKS[family]
    randomise(network, 1)
    source, target = tmp_path / "official.pt", tmp_path / f"imported.{ending}"
    torch.save(network.state_dict() if family == "repa" else {"ema": network.state_dict()}, source)
    more = ["--set", "projector_depth=1"] if family == "repa" else []
    found = answer(capsys, "import", str(source), str(target), *more)
    assert same(load_weights(target), network.state_dict())
    assert found["base"] == {"checkpoint": str(target), "sha256": measure(target).sha256}
    config = type(network.config)(**{k: tuple(v) if isinstance(v, list) else v for k, v in found["model"].items()})
    assert config == network.config
    # And back: equal bit for bit, in the layout that the published samplers read.
    answer(capsys, "import", str(target), str(tmp_path / "back.pt"), *more)
    assert same(torch.load(tmp_path / "back.pt", weights_only=True)["ema"], network.state_dict())


def test_what_is_printed_is_a_piece_of_an_experiment_file(tmp_path, capsys):
    torch.save(NETWORKS["sit"].state_dict(), tmp_path / "x.pt")
    assert main(["import", str(tmp_path / "x.pt"), str(tmp_path / "x.safetensors")]) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    assert document["model"]["learn_sigma"] is True
    assert document["base"]["sha256"] == measure(tmp_path / "x.safetensors").sha256


def test_a_diffusers_directory_goes_in_and_comes_out(tmp_path, capsys):
    config = sd3_config()
    network = SD3(config).initialise(0)
    randomise(network, 2)
    save_sd3(tmp_path / "theirs", config, network.state_dict())
    found = answer(capsys, "import", str(tmp_path / "theirs"), str(tmp_path / "sd3.safetensors"))
    assert same(load_weights(tmp_path / "sd3.safetensors"), network.state_dict())
    assert (found["model"]["input_size"], found["model"]["num_classes"]) == ("TO-BE-GIVEN", "TO-BE-GIVEN")
    model = {**found["model"], "dual_attention_layers": tuple(found["model"]["dual_attention_layers"])}
    assert SD3Config(**{**model, "input_size": 8, "num_classes": 3}) == config
    line = refusal(capsys, "import", str(tmp_path / "theirs"), str(tmp_path / "b.pt"), "--set", "num_layers=9")
    assert "--set must be one of input_size, num_classes for SD3, got 'num_layers'" in line


def _edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def _retensor(directory: Path, change) -> None:
    path = directory / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("damage", "given", "message"),
    [
        (lambda d: _retensor(d, lambda w: {k: v for k, v in w.items() if k != "proj_out.weight"}), (),
         "proj_out.weight is missing (1 in all); the file is incomplete"),
        (lambda d: _retensor(d, lambda w: {**w, "zzz": torch.zeros(2)}), (), "zzz is not part of it (1 in all)"),
        (lambda d: _retensor(d, lambda w: {**w, "proj_out.weight": w["proj_out.weight"] * torch.nan}), (),
         "must hold finite numbers, got others in proj_out.weight"),
        (lambda d: _edit(d / "config.json", lambda c: {**c, "num_layers": 4}), (), "set config.json's num_layers to 3"),
        (lambda d: _edit(d / "config.json", lambda c: {**c, "num_attention_heads": "x"}), (),
         "theirs/config.json: num_attention_heads must be an integer, got 'x'"),
        (lambda d: _edit(d / "config.json", lambda c: {**c, "patch_size": "x"}), (),
         "theirs/config.json: patch_size must be an integer, got 'x'"),
        (lambda d: _edit(d / "config.json", lambda c: {**c, "patch_size": 0}), (),
         "theirs/config.json: patch_size must be at least 1, got 0"),
        (lambda d: _edit(d / "config.json", lambda c: {**c, "dual_attention_layers": None}), (),
         "theirs/config.json must have a list as dual_attention_layers, got None"),
        (lambda d: _edit(d / "config.json", lambda c: [c]), (), "theirs/config.json must hold a map of settings, got"),
        (lambda d: None, ("input_size=abc",), "--set input_size must be a whole number, got 'abc'"),
        (lambda d: None, ("input_size=-3", "num_classes=0"), "--set input_size must be at least 1, got -3"),
        (lambda d: None, ("num_classes=0",), "--set num_classes must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_diffusers_directory_that_is_not_sound_is_not_imported(damage, given, message, tmp_path, capsys):
    save_sd3(tmp_path / "theirs", sd3_config(), SD3(sd3_config()).initialise(0).state_dict())
    damage(tmp_path / "theirs")
    argv = [part for setting in given for part in ("--set", setting)]
    assert message in refusal(capsys, "import", str(tmp_path / "theirs"), str(tmp_path / "o.safetensors"), *argv)
    assert not (tmp_path / "o.safetensors").exists()


def test_a_tensor_that_was_altered_in_a_pt_file_is_noticed(tmp_path, capsys):
    path = tmp_path / "x.pt"
    torch.save(NETWORKS["sit"].state_dict(), path)
    content = bytearray(path.read_bytes())
    place = content.find(NETWORKS["sit"].state_dict()["final_layer.linear.bias"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert "was altered; get it anew" in refusal(capsys, "import", str(path), str(tmp_path / "out.pt"))


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_bad_files_are_refused_in_one_line(tmp_path, capsys):
    mark, target = tmp_path / "executed", str(tmp_path / "out.safetensors")

    def given(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    assert "must exist" in refusal(capsys, "import", str(tmp_path / "absent.pt"), target)
    assert "must hold tensors only" in refusal(capsys, "import", given("a.pt", pickle.dumps(Hostile(mark))), target)
    assert not mark.exists()
    torch.save(NETWORKS["sit"].state_dict(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    assert "must hold tensors only" in refusal(capsys, "import", given("cut.pt", content[:-1000]), target)
    assert "must end in .safetensors, .pt or .pth" in refusal(capsys, "import", given("x.bin", content), target)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    assert "must be of a known family" in refusal(capsys, "import", str(tmp_path / "other.pt"), target)
    whole = str(tmp_path / "whole.pt")
    assert "must be of a known family (rae)" in refusal(capsys, "import", whole, target, "--family", "rae")
    assert "must end in .safetensors or .pt" in refusal(capsys, "import", whole, str(tmp_path / "out.bin"))
    assert "must not exist" in refusal(capsys, "import", whole, whole)
    assert "directory must exist" in refusal(capsys, "import", whole, str(tmp_path / "no" / "x.pt"))
    incomplete = {n: v for n, v in NETWORKS["sit"].state_dict().items() if n != "final_layer.linear.weight"}
    torch.save(incomplete, tmp_path / "incomplete.pt")
    line = refusal(capsys, "import", str(tmp_path / "incomplete.pt"), target)
    assert "checkpoint must have final_layer.linear.weight, which every file of SiT and REPA has" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_layer.linear.bias": None}, "final_layer.linear.bias is missing (1 in all); the file is incomplete"),
        ({"stray": torch.zeros(2)}, "stray is not part of it (1 in all)"),
        ({"pos_embed": torch.zeros(1, 7, 384)}, "pos_embed has shape (1, 7, 384) instead of"),
        ({"pos_embed": torch.zeros(384)}, "must have tensors of its family's shapes"),
        ({"x_embedder.proj.weight": torch.zeros(384, 16)}, "must have tensors of its family's shapes"),
        ({"pos_embed": torch.full((1, 4, 384), torch.nan)}, "must hold finite numbers, got others in pos_embed"),
        ({"pos_embed": torch.zeros(1, 4, 384, dtype=torch.int64)}, "must hold finite numbers, got others in pos_embed"),
        ({3: torch.zeros(2)}, "must be a state dict or hold one as 'ema'"),
    ],
)
def test_a_file_that_is_not_quite_a_familys_is_not_imported(change, message, tmp_path, capsys):
    weights = {**NETWORKS["sit"].state_dict(), **change}
    torch.save({name: value for name, value in weights.items() if value is not None}, tmp_path / "x.pt")
    line = refusal(capsys, "import", str(tmp_path / "x.pt"), str(tmp_path / "out.safetensors"))
    assert message in line
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("foo=1", "must be one of num_heads, "),
        ("num_heads=two", "--set num_heads must be a whole number, got 'two'"),
        ("num_heads=[1,2]", "--set num_heads must be a whole number, got [1, 2]"),
        ("num_classes=1000.0", "--set num_classes must be a whole number, got 1000.0"),
        ("depth=3", "must be one of num_heads, num_classes, class_dropout_prob for this file, got 'depth'; leave it"),
        ("projector_depth=5", "class_dropout_prob for this file, got 'projector_depth'; leave it out"),
        ("class_dropout_prob=0", "; set class_dropout_prob to 0.1"),
        ("class_dropout_prob=x", "--set class_dropout_prob must be a number, got 'x'"),
    ],
)
def test_what_is_given_must_be_known(given, message, tmp_path, capsys):
    torch.save(NETWORKS["sit"].state_dict(), tmp_path / "x.pt")
    assert message in refusal(capsys, "import", str(tmp_path / "x.pt"), str(tmp_path / "o.pt"), "--set", given)
    torch.save({**NETWORKS["sit"].state_dict(), "pos_embed": torch.eye(4).to_sparse()}, tmp_path / "sparse.pt")
    line = refusal(capsys, "import", str(tmp_path / "sparse.pt"), str(tmp_path / "o.pt"))
    assert "sparse.pt must hold dense tensors of plain numbers, got another kind in pos_embed" in line
    (tmp_path / "text.pt").write_text("hello")
    assert "must hold tensors only" in refusal(capsys, "import", str(tmp_path / "text.pt"), str(tmp_path / "o.pt"))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("repa", (), "projector_depth must lie in [1, depth 1], got 8; give --set projector_depth=..."),
        ("rae", ("depth=[2.0,1.0]",), "--set depth must be two whole numbers, encoder and decoder, got [2.0, 1.0]"),
        ("rae", ("depth=3",), "--set depth must be two whole numbers, encoder and decoder, got 3"),
        ("rae", ("num_heads=[1,2]",), "--set must be one of num_classes, class_dropout_prob, depth for this file"),
    ],
)
def test_what_is_given_must_be_the_familys(name, given, message, tmp_path, capsys):
    torch.save(NETWORKS[name].state_dict(), tmp_path / "x.pt")
    argv = [part for setting in given for part in ("--set", setting)]
    assert message in refusal(capsys, "import", str(tmp_path / "x.pt"), str(tmp_path / "o.pt"), *argv)


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("repa", "sit", "family must be repa for a file that has projectors, got 'sit'; leave it out"),
        ("sit", "repa", "family must be sit for a file that has twice the input's channels in its output"),
        ("bare", None, "family must be sit or repa for a file with neither projectors nor"),
    ],
)
def test_the_family_is_the_files(name, family, message, tmp_path, capsys):
    weights = NETWORKS["repa" if name == "bare" else name].state_dict()
    kept = {key: value for key, value in weights.items() if name != "bare" or not key.startswith("projectors")}
    torch.save(kept, tmp_path / "x.pt")
    asked = ["--family", family] if family else []
    assert message in refusal(capsys, "import", str(tmp_path / "x.pt"), str(tmp_path / "o.pt"), *asked)
    if name == "bare":
        for number, its in enumerate(("sit", "repa")):
            found = answer(capsys, "import", str(tmp_path / "x.pt"), str(tmp_path / f"{its}.pt"), "--family", its)
            assert found["model"]["noise_at"] == number


def test_export_refuses_what_there_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MIXFLOW_WORKSPACE", str(tmp_path / "ws"))
    out = str(tmp_path / "out.pt")
    assert "must be one of base, standard, mixflow, matched, got 'none'" in refusal(
        capsys, "export", "quickstart", "none", out
    )
    assert "replicate must lie in [0, 2], got 3" in refusal(
        capsys, "export", "quickstart", "mixflow", out, "--replicate", "3"
    )
    assert "arms/mixflow/0 must be done before it is exported" in refusal(
        capsys, "export", "quickstart", "mixflow", out
    )
    assert "must end in .safetensors or .pt" in refusal(capsys, "export", "quickstart", "base", str(tmp_path / "d"))


def test_plan_of_a_published_recipe_costs_without_any_file_and_then_fails(capsys):
    assert main(["plan", "sit-xl-256", "--mfu", "0.5", "--peak-tflops", "400"]) == 2
    out, err = capsys.readouterr()
    assert "237.2 GFLOP an image forward, 711.7 trained" in out
    hours = 711.7e9 * 500_000 * 256 / (0.5 * 400e12) / 3600
    assert f"{hours:,.1f}"[:-1] in out
    assert "to be given: data.images.source, codec.weights, codec.sha256, base.checkpoint, base.sha256" in err
    assert err.count("\n") == 1
    assert "at 50% of 400 TFLOP/s, as given" in out
    assert "500,000 an arm, 3 arms that train, 3 pairs; 4,500,000 in all" in out
    # Of each run the best checkpoint and two more (weights, average, two moments), and the final average.
    runs = 9 * 4 * (3 * (2 * 675_129_632 + 2 * 674_834_720) + 675_129_632) / 2**30
    samples = 3 * 4 * 4 * 50_000 * 3 * 256 * 256 / 2**30
    parts = f"{runs:,.2f} of checkpoints and weights, {samples:,.2f} of samples"
    assert f"storage     {runs + samples:,.2f} GiB in all: {parts}\n" in out
    assert "61.05 GiB encoded from each million images of the source\n" in out
    assert main(["plan", "sit-xl-256", "--mfu", "0"]) == 2
    assert "--mfu must lie in (0, 1], got 0.0" in capsys.readouterr().err


def test_plan_counts_repas_projectors_where_the_loss_has_them(capsys):
    for override, counted in (("alignment_weight=0.5", (241.39, 724.2)), ("alignment_weight=0", (237.23, 711.7))):
        assert main(["plan", "repa-xl-256", "--json", "--set", override]) == 2
        plan = json.loads(capsys.readouterr().out)
        assert plan["forward_gflops_per_image"] == pytest.approx(counted[0], abs=0.005)
        assert plan["training_gflops_per_image"] == pytest.approx(counted[1], abs=0.1)


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989), ("tf32", 494.7), ("fp32", 66.9)])
def test_hours_are_those_of_the_precision(precision, peak, capsys):
    assert main(["plan", "sit-xl-256", "--set", f"training.precision={precision}"]) == 2
    out = capsys.readouterr().out
    hours = 711.7185 * 500_000 * 256 / (0.4 * peak * 1e3) / 3600
    assert f"{hours:,.2f} device-hours at 40% of {peak:g} TFLOP/s, an H100's in {precision}\n" in out
