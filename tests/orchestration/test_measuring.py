"""Samples and metrics: the same bytes from any number of workers, and nothing that was done is done again."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_group import SMALL, run_group, run_stopped

from orchestration import measuring, stages
from orchestration.cli import _checkpoint, main
from orchestration.convert import export_samples
from orchestration.parts import Parts
from orchestration.progress import Progress
from orchestration.recipe import load
from orchestration.run import Place, _driver_stages
from orchestration.site import Site
from orchestration.stages import run_stages
from orchestration.storage import open_storage
from orchestration.workflow import Workspace
from workers.data import digits
from workers.manifest import measure
from workers.sample import read_part

BEFORE = ("base", "features", "reference", "slow-flow", "arms")
CELLS = ("euler3-s1", "sde3-s1", "euler3-s1.5")


def workspace_of(directory: Path) -> Workspace:
    return Workspace(load("quickstart", SMALL), open_storage(str(directory / "ws")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that comes before sampling."""
    directory = tmp_path_factory.mktemp("trained")
    workspace = workspace_of(directory)
    progress = Progress(list(workspace.stages), 0)
    _driver_stages(workspace, list(workspace.stages.values()), progress, ExitStack())
    progress.close()
    run_group(1, directory, BEFORE)
    return directory


def test_slow_flow_of_an_arm_is_shown_where_it_was_measured(trained, capsys, monkeypatch):
    """All that it needs is done, so that nothing is started; numbers and figure are the arm's own."""
    monkeypatch.setenv("MIXFLOW_WORKSPACE", str(trained / "ws"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained}/mlflow.db")
    settings = [word for override in SMALL for word in ("--set", override)]
    assert main(["slow-flow", "quickstart", "mixflow", *settings, "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert {stage["state"] for stage in found["stages"]} == {"reused"}
    needed = ["data", "base", "features", "arms/mixflow/0", "slow-flow/mixflow"]
    assert [stage["name"] for stage in found["stages"]] == needed
    shown, workspace = found["slow_flow"], workspace_of(trained)
    assert shown["of"] == "mixflow"
    read = json.loads(workspace.result("slow-flow/mixflow").read("slow_flow.json"))
    assert shown["samplers"] == read["samplers"]
    assert read != json.loads(workspace.result("slow-flow/base").read("slow_flow.json"))
    assert json.loads(Path(shown["measured"]).read_text()) == read
    assert shown["plot"].endswith("slow_flow_mixflow.png")
    assert Path(shown["plot"]).read_bytes().startswith(b"\x89PNG")


def test_an_arms_weights_measured_as_a_checkpoint_say_the_same(trained, tmp_path):
    weights = workspace_of(trained).result("arms/mixflow/0").fetch(tmp_path) / "weights.safetensors"
    path = str(shutil.copy(weights, tmp_path / "another.safetensors"))
    arguments = argparse.Namespace(checkpoint=path, sha256=measure(Path(path)).sha256, arm=None)
    experiment = load("quickstart", [*SMALL, *_checkpoint(arguments)])
    workspace = Workspace(experiment, open_storage(str(copy_of(trained, tmp_path / "copy") / "ws")))
    needed = [workspace.stages[name] for name in ("data", "base", "features", "slow-flow/base")]
    progress = Progress([stage.name for stage in needed], 0)
    _driver_stages(workspace, needed, progress, ExitStack())
    progress.close()
    site = Site(workspace, 0, 1, torch.device("cpu"), tmp_path / "cache", lambda *told: None)
    run_stages(site, needed[2:])
    found = json.loads(workspace.result("slow-flow/base").read("slow_flow.json"))
    assert found == json.loads(workspace_of(trained).result("slow-flow/mixflow").read("slow_flow.json"))


def copy_of(trained: Path, target: Path) -> Path:
    shutil.copytree(trained, target)
    return target


def digests(directory: Path, kind: str) -> dict[str, str]:
    workspace = workspace_of(directory)
    return {name: workspace.result(name).manifest.digest for name, s in workspace.stages.items() if s.kind == kind}


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy_of(trained, tmp_path_factory.mktemp("alone") / "1")
    run_group(1, directory, ("samples", "metrics"))
    return directory


def test_any_number_of_workers_writes_the_same_bytes(trained, alone, tmp_path):
    for workers in (2, 3):
        directory = copy_of(trained, tmp_path / str(workers))
        run_group(workers, directory, ("samples", "metrics"))
        for kind in ("samples", "metrics"):
            assert digests(directory, kind) == digests(alone, kind), (workers, kind)
        assert not list((directory / "ws" / "parts").rglob("*.json")), "records go when the manifest is there"


def test_samples_lie_in_parts_with_their_labels(alone):
    artifact = workspace_of(alone).result("samples/mixflow/0")
    assert set(artifact.manifest.files) == {
        *(f"{cell}-{number:05d}.parquet" for cell in CELLS for number in range(3)), *(f"{cell}.png" for cell in CELLS)
    }  # fmt: skip
    parts = [read_part(Path(artifact.full_uri) / f"sde3-s1-{number:05d}.parquet") for number in range(3)]
    assert [tuple(pixels.shape) for pixels, _ in parts] == [(60, 1, 8, 8)] * 3
    labels = torch.cat([labels for _, labels in parts])
    assert len(labels.unique()) == 10
    assert labels.tolist() != [i % 10 for i in range(180)], "the law is random"
    assert artifact.manifest.meta["nfe"] == {"euler3/s1": 3, "sde3/s1": 3, "euler3/s1.5": 6}


def test_what_a_killed_run_had_finished_is_kept(trained, alone, tmp_path, monkeypatch, caplog):
    directory = copy_of(trained, tmp_path / "killed")

    class Killed(BaseException):
        pass

    count, write = 0, stages.write_part

    def write_five(path: Path, *content: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count > 5:
            raise Killed
        write(path, *content)

    monkeypatch.setattr(stages, "write_part", write_five)
    monkeypatch.setattr("workers.sample.PART_IMAGES", 60)
    with pytest.raises(Killed):
        run_group(1, directory, ("samples",))
    done = sorted((directory / "ws" / "samples").rglob("*.parquet"))
    assert len(done) == 5
    assert not list((directory / "ws" / "samples").rglob("manifest.json"))
    spoilt, without_sheet = done[0], next(path for path in done if path.name == "sde3-s1-00000.parquet")
    without_sheet.with_name("sde3-s1.png").unlink()
    kept = [path for path in done if path not in (spoilt, without_sheet)]
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 2] ^= 1
    spoilt.write_bytes(content)
    written = {path: path.stat().st_ino for path in kept}
    monkeypatch.setattr(stages, "write_part", write)
    with caplog.at_level(logging.WARNING):
        run_group(1, directory, ("samples",))
    assert {path: path.stat().st_ino for path in kept} == written
    assert f"{spoilt.name} of samples/none/0 is sampled again: its content is not what its record says" in caplog.text
    assert digests(directory, "samples") == digests(alone, "samples")


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_work_is_dealt_by_its_cost(world_size):
    """Cells of a few-step table: each piece to one worker, and none loaded with more than 4/3 of the least possible."""
    costs = [
        evaluations * images for evaluations in (5, 10, 20, 50, 250, 10, 20, 40, 100) for images in (1000, 1000, 500)
    ]
    sites = [Site(None, rank, world_size, torch.device("cpu"), Path(), lambda *_: None) for rank in range(world_size)]
    dealt = [site.share(costs) for site in sites]
    assert sorted(place for mine in dealt for place in mine) == list(range(len(costs)))
    least = max(sum(costs) / world_size, max(costs))
    assert max(sum(costs[place] for place in mine) for mine in dealt) <= 4 / 3 * least
    assert world_size != 2 or max(sum(costs[place] for place in mine) for mine in dealt) <= 1.01 * least


def test_a_worker_that_is_to_stop_takes_along_those_that_are_through_with_their_parts(trained, alone, tmp_path):
    directory = copy_of(trained, tmp_path / "stopped")
    run_stopped(directory)
    for rank in (0, 1):
        why = (directory / f"stopped-{rank}").read_text()
        assert why == "stopped in samples/none/0, whose finished parts are kept"
    (home,) = (directory / "ws" / "samples").iterdir()
    assert len(list(home.glob("*.parquet"))) == 8
    run_group(1, directory, ("samples",))
    assert digests(directory, "samples") == digests(alone, "samples")


class Stopped(BaseException):
    """Stands for a kill."""


def test_parts_that_took_unlike_evaluations_give_no_number(trained, tmp_path, monkeypatch):
    directory, write = copy_of(trained, tmp_path / "altered"), stages.write_part
    written: list[Path] = []

    def write_three(path: Path, *content: torch.Tensor) -> None:
        if len(written) == 3:
            raise Stopped
        written.append(path)
        write(path, *content)

    monkeypatch.setattr(stages, "write_part", write_three)
    with pytest.raises(Stopped):
        run_group(1, directory, ("samples",))
    monkeypatch.setattr(stages, "write_part", write)
    (path,) = (directory / "ws" / "parts").rglob("euler3-s1-00001.parquet.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "evaluations": 240}))
    with pytest.raises(ValueError, match=r"parts of euler3-s1 must take equally many .* an image, got 3 and 4; remove"):
        run_group(1, directory, ("samples",))


def test_metrics_of_fewer_images_than_asked_for_are_refused(alone, tmp_path):
    directory = copy_of(alone, tmp_path / "fewer")
    path = Path(workspace_of(directory).result("samples/none/0").full_uri) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["euler3-s1-00002.parquet"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="samples/none/0 must hold 180 images of euler3/s1, got 120; --force samples"):
        run_group(1, directory, ("metrics",))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"sha256": None}, "its record is unreadable"),
        ({"size": None}, "its record is unreadable"),
        ({"sha256": ""}, "its record is of no content"),
    ],
)
def test_a_record_is_believed_only_with_its_content(tmp_path, change, why):
    parts = Parts(open_storage(str(tmp_path / "ws")), "samples/1", "parts/1")
    (tmp_path / "it").write_text("content")
    record = {**parts.keep("it", "1", tmp_path / "it", {}), **change}
    parts.storage.put(
        "parts/1/it.json", json.dumps({key: value for key, value in record.items() if value is not None}).encode()
    )
    assert parts.finished("it", "1") == ((None, why) if why else (record, ""))


def test_what_another_process_has_published_stays(tmp_path):
    storage, late = open_storage(str(tmp_path / "ws")), tmp_path / "late"
    late.mkdir()
    first, second = Parts(storage, "samples/1", "parts/1"), Parts(storage, "samples/1", "parts/1")
    (tmp_path / "it").write_text("first")
    record = first.keep("it", "1", tmp_path / "it", {})
    made = first.commit({"it": record}, tmp_path / "absent", {"by": "first"})
    (tmp_path / "it").write_text("second")
    with pytest.raises(FileExistsError, match="samples/1 was published by another process; run again"):
        second.keep("it", "1", tmp_path / "it", {})
    (late / "more").write_text("second")
    assert second.commit({"it": {**record, "sha256": "0" * 64}}, late, {"by": "second"}) == made
    assert (storage.fetch("samples/1", tmp_path / "copy") / "it").read_text() == "first"
    assert not storage.exists("samples/1/more")


def test_a_part_may_be_empty_where_that_is_said(tmp_path):
    parts = Parts(open_storage(str(tmp_path / "ws")), "data/1", "parts/1")
    record = parts.keep("it", "1", tmp_path / "absent", {})
    assert parts.finished("it", "1", may_be_empty=True) == (record, "")


def test_the_metrics_are_those_of_the_samples(alone):
    """Patches of an 8 x 8 image are the image: their distance is the textbook's, by NumPy and SciPy."""
    from scipy import linalg

    workspace = workspace_of(alone)
    artifact = workspace.result("samples/standard/1")
    parts = [read_part(Path(artifact.full_uri) / f"euler3-s1-{number:05d}.parquet")[0] for number in range(3)]
    a, b = (
        images.reshape(len(images), -1) / 127.5 - 1
        for images in (torch.cat(parts).numpy(), digits(8, 597)["held_out"].images)
    )
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b + 1e-12 * np.eye(64)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    found = json.loads(workspace.result("metrics/standard/1").read("metrics.json"))
    assert found["euler3/s1"]["fd_patches"] == pytest.approx(expected, abs=1e-4)
    assert set(found) == {"euler3/s1", "sde3/s1", "euler3/s1.5"}
    cell = found["euler3/s1"]
    assert set(cell) == {
        "fd_digits", "kid_digits", "precision_digits", "recall_digits", "fd_patches", "within", "by_count", "step"
    }  # fmt: skip
    assert set(cell["by_count"]["fd_digits"]) == {"90", "180"}, "45 images have no covariance of 64 features"
    assert 0 < cell["within"]["fd_digits"] < cell["fd_digits"]


@pytest.mark.parametrize(("law", "expected"), [("equal", [i % 10 for i in range(100)]), ("random", None)])
def test_the_label_law_says_how_images_are_resampled(law, expected, trained, tmp_path, monkeypatch):
    directory, seen, score = copy_of(trained, tmp_path / law), [], measuring.score

    def watched(*arguments: Any) -> dict[str, Any]:
        seen.append(arguments[4])
        return score(*arguments)

    monkeypatch.setattr(measuring, "score", watched)
    few = ("evaluation.samplers=[{method: euler, num_steps: 3}]", "evaluation.num_samples=100")
    run_group(1, directory, ("samples", "metrics"), (*SMALL, *few, f"evaluation.label_law={law}"))
    assert [labels if labels is None else labels.tolist() for labels in seen] == [expected] * 8


def test_grey_samples_are_not_exported_for_adm(alone, tmp_path):
    place = Place(open_storage(str(alone / "ws")), "", [])
    with pytest.raises(ValueError, match="samples must have 3 colours for ADM's evaluator, got 1"):
        export_samples(load("quickstart", SMALL), place, "mixflow", 0, None, tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"the cell to export must be one of euler3/s1, .*, got 'euler9/s1'"):
        export_samples(load("quickstart", SMALL), place, "mixflow", 0, "euler9/s1", tmp_path / "x.npz")
