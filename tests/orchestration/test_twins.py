"""Every published recipe from images to an exported checkpoint, on its tiny twin: encode, post-train, sample, decode,
evaluate, report, export. In this process; one of them on a Ray cluster by the command line.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from clusters import Run
from twins import HELD_OUT, IMAGES, RECIPES, one_by_one, twin

from orchestration import encode, results, run
from orchestration.convert import export_weights
from orchestration.progress import Progress
from orchestration.report import write_report
from orchestration.run import Place
from orchestration.site import Site
from orchestration.stages import run_stages
from orchestration.storage import open_storage
from orchestration.workflow import Workspace
from workers.models.checkpoints import infer_config, load_weights
from workers.models.family import build
from workers.models.sd3 import SD3Config, full_weights
from workers.sample import read_part
from workers.shards import open_shards


class Finished:
    """A twin that went through all its stages in this process."""

    def __init__(self, recipe: str, home: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
        self.home, self.experiment = home, twin(recipe, home, **changes)
        self.place = Place(open_storage(str(home / "ws")), "", [])
        self.workspace, self.told = Workspace(self.experiment, self.place.storage), []
        # What Ray Data would spread over its actors, one after the other.
        monkeypatch.setattr(encode, "_run", one_by_one)
        monkeypatch.setattr(run, "join_cluster", lambda *_: None)
        run.check_inputs(self.workspace)
        stages = list(self.workspace.stages.values())
        progress = Progress([stage.name for stage in stages], 0)
        run._driver_stages(self.workspace, stages, progress, None)
        progress.close()
        site = Site(self.workspace, 0, 1, torch.device("cpu"), home / "cache", lambda *told: self.told.append(told))
        run_stages(site, [stage for stage in stages if not stage.on_driver])
        self.summary = results.summarise(self.workspace)
        report = home / "report"
        report.mkdir()
        write_report(self.workspace, self.summary, report)
        self.report = (report / "report.html").read_text()

    @property
    def data(self):
        artifact = self.workspace.result("data")
        return open_shards(Path(artifact.full_uri), artifact.manifest, self.home / "cache" / "data")

    def weights(self, stage: str) -> dict[str, torch.Tensor]:
        return load_weights(Path(self.workspace.result(stage).full_uri) / "weights.safetensors")


def check_data(finished: Finished, flips: bool) -> None:
    data, model = finished.data, finished.experiment.model
    assert len(data["held_out"].labels) == HELD_OUT
    assert len(data["train"].labels) == (IMAGES - HELD_OUT) * (1 + flips)
    assert data["train"].shape == (model.in_channels, model.input_size, model.input_size)
    assert data["train"].seen.shape[1:] == (3, 32, 32)


def check_training(finished: Finished) -> None:
    """Arms start at the base, train, and differ from it and from one another."""
    arms = [name for name, arm in finished.experiment.arms.items() if arm.train]
    weights = {name: finished.weights(f"arms/{name}/0") for name in arms}
    base = finished.weights("base")
    changed = {
        name: sum(not torch.equal(value, base[key]) for key, value in of.items() if key in base)
        for name, of in weights.items()
    }
    assert finished.experiment.model.family == "sd3" or min(changed.values()) > 5
    last = {name: torch.cat([value.flatten().float() for value in of.values()]) for name, of in weights.items()}
    for i, one in enumerate(arms):
        for other in arms[i + 1 :]:
            assert not torch.equal(last[one], last[other]), (one, other)
    history = Path(finished.workspace.result("arms/mixflow/1").full_uri) / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4]
    times = json.loads((history.parent / "times.json").read_text())
    assert times["num_draws"] == 4 * 16
    assert sum(times["t"]) == sum(times["m"]) == sum(times["lag"]) == 64


def check_samples(finished: Finished) -> None:
    evaluation, codec = finished.experiment.evaluation, finished.experiment.codec
    protocol = finished.summary["protocol"]
    assert protocol["rounding"] == codec.rounding != "round"
    assert protocol["codec"]["sha256"] == codec.sha256
    assert str(finished.home) not in str(protocol)
    for arm in finished.experiment.arms:
        artifact = finished.workspace.result(f"samples/{arm}/0")
        assert artifact.manifest.meta["nfe"].keys() == {sampler.name for sampler in evaluation.samplers}
    pixels, _ = read_part(Path(artifact.full_uri) / f"{results.cell_file(evaluation.samplers[0].name)}-00000.parquet")
    assert pixels.shape == (evaluation.num_samples, 3, 32, 32)
    for arm in finished.summary["arms"].values():
        assert arm["verdict"]["verdict"] in ("promote", "reject", "inconclusive")
        cell = arm["metrics"][evaluation.samplers[0].name]
        assert set(cell) == set(evaluation.metrics)
        assert all(np.isfinite(found["mean"]) for found in cell.values())
        assert cell["fd_patches"]["mean"] > 0
    assert "<svg" in finished.report or "data:image/png" in finished.report


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.startswith("sd35")])
def test_a_twin_of_the_image_families(recipe, tmp_path, monkeypatch):
    finished = Finished(recipe, tmp_path, monkeypatch)
    experiment = finished.experiment
    check_data(finished, flips=bool(experiment.data.images and experiment.data.images.flip))
    check_training(finished)
    check_samples(finished)
    # Out as the published trainers write it, and back.
    answer = export_weights(experiment, finished.place, "mixflow", 1, tmp_path / "out.pt", adapters=False)
    assert answer["stage"] == "arms/mixflow/1"
    content = torch.load(tmp_path / "out.pt", weights_only=True)["ema"]
    truth = finished.weights("arms/mixflow/1")
    assert content.keys() == truth.keys()
    assert all(torch.equal(content[name], truth[name]) for name in truth)
    build(experiment.model).load_state_dict(content, strict=True)
    base = finished.weights("base")
    assert torch.equal(content["pos_embed"], base["pos_embed"]), "the frozen table stays"
    guided = [s for s in experiment.evaluation.samplers if s.guidance_scale > 1]
    nfe = finished.workspace.result("samples/none/0").manifest.meta["nfe"]
    for sampler in guided:
        if sampler.guidance_interval == (0.0, 1.0):
            plain = sampler.num_steps * (2 if sampler.method == "heun" else 1)
            assert nfe[sampler.name] == 2 * plain
    if recipe == "sit-b-256":
        check_given_checkpoint(finished)
    if recipe == "repa-xl-256":
        check_alignment(finished)


def check_given_checkpoint(finished: Finished) -> None:
    """SiT's trainer's file: its average was taken, and its shape is found out."""
    content = torch.load(finished.home / "base.pt", weights_only=False)
    base = finished.weights("base")
    assert all(torch.equal(value, base[name]) for name, value in content["ema"].items())
    assert infer_config(content["ema"], num_classes=10, num_heads=2) == finished.experiment.model


def check_alignment(finished: Finished) -> None:
    """The alignment term trains the projectors, and can be left out."""
    data, base = finished.data["train"], finished.weights("base")
    assert data.features.shape[1:] == (4, 12)
    trained = finished.weights("arms/mixflow/0")
    names = [name for name in base if name.startswith("projectors")]
    assert len(names) == 6
    assert not any(torch.equal(trained[name], base[name]) for name in names)
    without = finished.experiment.model_copy(update={"alignment_weight": 0.0})
    workspace = Workspace(without, finished.place.storage)
    assert workspace.artifact("data"), "the data are the same"
    site = Site(workspace, 0, 1, torch.device("cpu"), finished.home / "cache", lambda *_: None)
    run_stages(site, [workspace.stages["arms/mixflow/0"]])
    left = load_weights(Path(workspace.result("arms/mixflow/0").full_uri) / "weights.safetensors")
    assert all(torch.equal(left[name], base[name]) for name in names)
    assert not torch.equal(left["blocks.0.attn.qkv.weight"], base["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_twin_of_stable_diffusion(lora_rank, tmp_path, monkeypatch):
    from diffusers import SD3Transformer2DModel

    finished = Finished("sd35-medium", tmp_path, monkeypatch, lora_rank=lora_rank)
    experiment, config = finished.experiment, finished.experiment.model
    assert isinstance(config, SD3Config)
    check_data(finished, flips=False)
    assert finished.data["train"].captions.captions[-1] == ""
    check_training(finished)
    check_samples(finished)
    export_weights(experiment, finished.place, "mixflow", 0, tmp_path / "out", adapters=False)
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "out")
    ours = build(config).initialise(0)
    ours.load_state_dict(finished.weights("base"), strict=False)
    ours.load_state_dict(finished.weights("arms/mixflow/0"), strict=False)
    truth = full_weights(config, ours.state_dict())
    found = theirs.state_dict()
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    changed = [name for name, value in finished.weights("base").items() if not torch.equal(value, truth[name])]
    assert changed
    if lora_rank:
        assert all("attn" in name for name in changed)
        assert set(finished.weights("arms/mixflow/0")) < set(ours.state_dict())
        export_weights(experiment, finished.place, "mixflow", 0, tmp_path / "adapters", adapters=True)
        assert sum(path.stat().st_size for path in (tmp_path / "adapters").iterdir()) < 50_000


@pytest.mark.ray
def test_a_twin_on_a_cluster_by_the_command_line(tmp_path):
    experiment = twin("rae-xl-256", tmp_path / "made")
    document = json.loads(experiment.model_dump_json(exclude_none=True))
    document["cluster"]["num_workers"] = 2
    file = tmp_path / "twin.yaml"
    file.write_text(yaml.safe_dump(document))
    environment = {"MIXFLOW_WORKSPACE": str(tmp_path / "ws")}
    answer = Run(["run", str(file), "--json"], tmp_path / "run", environment).answer()
    assert {stage["state"] for stage in answer["stages"]} == {"done"}
    assert {"data", "guide", "base"} <= {stage["name"] for stage in answer["stages"]}
    assert Path(answer["report"]).is_file()
    target = tmp_path / "out.safetensors"
    exported = Run(["export", str(file), "mixflow", str(target), "--json"], tmp_path / "export", environment).answer()
    assert exported["written"] == str(target)
    build(experiment.model).load_state_dict(load_weights(target), strict=True)
    again = Run(["run", str(file), "--json", "--resume"], tmp_path / "again", environment).answer()
    assert {stage["state"] for stage in again["stages"]} == {"reused"}
