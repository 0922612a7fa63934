"""What is given by path or URI and cannot be used: `plan` names the setting, by the command line in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from s3_servers import free_port, s3_variables
from tiny_models import tiny_dinov2
from twins import twin

from orchestration.cli import main
from orchestration.storage import open_storage
from workers.extractors import FID_INCEPTION
from workers.manifest import measure

WRONG = "0" * 63 + "a"
Plan = Callable[..., str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Experiment files of twins, everything of which is there."""
    home, found = tmp_path_factory.mktemp("given"), {}
    for recipe in ("repa-xl-256", "rae-xl-256", "sd35-medium"):
        path = home / f"{recipe.split('-')[0]}.yaml"
        path.write_text(yaml.safe_dump(twin(recipe, home / recipe).model_dump(mode="json")))
        found[path.stem] = str(path)
    return found


@pytest.fixture
def refused(files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> Plan:
    monkeypatch.setenv("MIXFLOW_WORKSPACE", str(tmp_path / "ws"))

    def run(family: str, *overrides: str, code: int = 2) -> str:
        capsys.readouterr()
        argv = [part for override in overrides for part in ("--set", override)]
        assert main(["plan", files[family], *argv]) == code, capsys.readouterr().err
        err = capsys.readouterr().err
        assert err.count("\n") == (code == 2)
        return err.removeprefix(f"error: {files[family]}: ").rstrip("\n")

    return run


@pytest.mark.parametrize("family", ["repa", "rae", "sd35"])
def test_what_is_all_there_is_planned(refused, family):
    """The control of the refusals below."""
    assert refused(family, code=0) == ""


def test_alignment_is_switched_off_without_a_dinov2(refused):
    off = ("alignment_weight=0", "data.images.features=null", "data.images.features_sha256=null")
    assert refused("repa", *off, code=0) == ""


@pytest.mark.parametrize("uri", ["https://x/y", "HTTPS://x/y", "gs://bucket/y", "s3://x/y"])
@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("repa", "codec.weights"),
        ("repa", "codec.decoder"),
        ("rae", "codec.statistics"),
        ("repa", "data.images.features"),
        ("sd35", "data.images.text_encoders"),
        ("sd35", "evaluation.extractors.1.weights"),
        ("repa", "base.checkpoint"),
        ("rae", "guide.checkpoint"),
    ],
)
def test_a_uri_of_another_kind(refused, family, setting, uri):
    names = ", a bucket of 3 to 63 small letters, digits, dots and hyphens" if uri.startswith("s3") else ""
    rule = f"{setting} must be a local path, file:///path or s3://bucket/prefix{names}, got {uri!r}; correct the URI"
    assert refused(family, f"{setting}={uri}") == rule


def test_a_reference_and_shards_by_a_uri_of_another_kind(refused):
    line = refused("repa", f"evaluation.reference={{npz: 'https://x/y.npz', sha256: {WRONG}}}",
                   f"evaluation.extractors=[{{kind: inception, weights: /x, sha256: {FID_INCEPTION}}}]",
                   "evaluation.primary=fid/heun3/s1")  # fmt: skip
    assert line.startswith("evaluation.reference.npz must be a local path, file:///path or s3://bucket/prefix, got 'h")
    line = refused("repa", "data={shards: 'https://x/y'}")
    assert line.startswith("data.shards must be a local path, file:///path or s3://bucket/prefix, got 'https://x/y'")


@pytest.mark.parametrize(
    ("family", "setting", "words"),
    [
        ("repa", "codec.weights", " /nope must be a local directory with"),
        ("repa", "codec.decoder", " /nope must be a local directory with"),
        ("rae", "codec.weights", " /nope must be a local directory with"),
        ("rae", "codec.decoder", " must be a local file, got /nope"),
        ("rae", "codec.statistics", " must be a local file, got /nope"),
        ("repa", "data.images.features", " /nope must be a local directory with"),
        ("sd35", "data.images.text_encoders", " /nope must be a local directory with"),
        ("repa", "data.images.source", " must be a directory, a .tar"),
        ("rae", "evaluation.extractors.0.weights", " must be a DINOv2 in transformers' layout with the SHA-256"),
        ("sd35", "evaluation.extractors.1.weights", " must be a CLIP in transformers' layout with the SHA-256"),
        ("repa", "base.checkpoint", " must be a file, got '/nope'"),
        ("rae", "guide.checkpoint", " must be a file, got '/nope'"),
    ],
)
def test_a_path_where_nothing_is(refused, family, setting, words):
    assert refused(family, f"{setting}=/nope").startswith(f"{setting}{words}")


@pytest.mark.parametrize(
    ("family", "override", "words"),
    [
        ("repa", f"codec.sha256={WRONG}", "codec.weights /"),
        ("repa", f"data.images.features_sha256={WRONG}", "data.images.features_sha256 must be the hash"),
        ("rae", f"evaluation.extractors.0.sha256={WRONG}", "evaluation.extractors.0.weights /"),
        ("sd35", f"evaluation.extractors.1.sha256={WRONG}", "evaluation.extractors.1.weights /"),
        ("rae", "codec.decoder_heads=5", "codec.decoder_heads must divide the decoder's width 16, got 5"),
        ("repa", "codec.image_size=36", "codec.image_size must be a multiple of 8 for this vae, got 36"),
    ],
)
def test_another_hash_or_a_setting_that_does_not_fit(refused, family, override, words):
    assert refused(family, override).startswith(words)


def test_another_depth_than_the_guides_is_no_altered_file(refused):
    line = refused("rae", "guide.model.depth=[2,1]")
    assert line.endswith("; it is a ddt whose depth must be two numbers that add up to the file's 2 blocks, got [2, 1]")


def test_files_of_another_kind(refused, tmp_path, monkeypatch):
    text = tmp_path / "text.pt"
    text.write_text("hello")
    digest = measure(text).sha256
    for name in ("decoder", "statistics"):
        line = refused("rae", f"codec.{name}={text}", f"codec.{name}_sha256={digest}")
        assert line.startswith(f"codec.{name} checkpoint text.pt must hold tensors only, in torch's own format; got a")
    monkeypatch.setattr("workers.extractors.FID_INCEPTION", digest)
    inception = f"[{{kind: digits}}, {{kind: inception, weights: {text}, sha256: '{digest}'}}]"
    line = refused("repa", f"evaluation.extractors={inception}")
    assert line.startswith("evaluation.extractors.1: checkpoint text.pt must hold tensors only")


def test_a_reference_that_does_not_fit(refused, files, tmp_path):
    right = {"mu": np.zeros(2048), "sigma": np.eye(2048)}

    def reference(**arrays: np.ndarray) -> str:
        np.savez(tmp_path / "r.npz", **arrays)
        return f"evaluation.reference={{npz: {tmp_path}/r.npz, sha256: '{measure(tmp_path / 'r.npz').sha256}'}}"

    path = f"evaluation.reference {tmp_path}/r.npz"
    line = refused("rae", reference(mu=np.zeros(1024), sigma=np.eye(1024)))
    assert line == f"{path}: mu must be floats (2048,) as the FID-Inception has them, got float64 (1024,)"
    line = refused("rae", reference(**right, arr_0=np.zeros((2, 64, 64, 3), np.uint8)))
    assert line.startswith(f"{path}: arr_0 must be images of 32 pixels as the samples are, got 64; take the reference")
    line = refused("rae", f"evaluation.reference={{npz: /nope.npz, sha256: {WRONG}}}")
    assert line == "evaluation.reference.npz must be a file, got /nope.npz, which is none; correct the path"
    line = refused("rae", reference(**right))
    assert line.startswith("evaluation.extractors must have inception where evaluation.reference is an npz, whose")
    judge = yaml.safe_load(Path(files["rae"]).read_text())["evaluation"]["extractors"][0]
    both = (
        f"evaluation.extractors={json.dumps([judge, {'kind': 'inception', 'weights': '/x', 'sha256': FID_INCEPTION}])}"
    )
    for images, number in (({}, 0), ({"arr_0": np.zeros((12, 32, 32, 3), np.uint8)}, 12)):
        line = refused("rae", both, reference(**right, **images))
        rule = f"evaluation.reference must have more than the 12 features of dinov2, got {number} images in npz; "
        assert line.startswith(rule)
    line = refused("rae", both, reference(**right, arr_0=np.zeros((13, 32, 32, 3), np.uint8)))
    assert line.startswith("evaluation.extractors.1.weights must be the file of the FID-Inception")


def test_what_is_not_on_s3_is_missed_although_this_machine_has_it(refused, tmp_path, moto_s3, monkeypatch):
    monkeypatch.setattr("orchestration.given.cache_directory", lambda: tmp_path / "cache")
    digest, storage = tiny_dinov2(tmp_path / "dino"), open_storage(moto_s3)
    for file in sorted((tmp_path / "dino").iterdir()):
        storage.put_file(file, f"dino/{file.name}")
    there = (f"data.images.features={moto_s3}/dino", f"data.images.features_sha256={digest}")
    assert refused("repa", *there, code=0) == ""
    assert list((tmp_path / "cache" / "given").glob(digest))
    storage.delete("dino")
    line = refused("repa", *there)
    rule = f"data.images.features must be a file or a directory, got '{moto_s3}/dino' with nothing there; correct"
    assert line.startswith(rule)
    bucket = moto_s3.split("/")[2]
    line = refused("repa", f"codec.weights=s3://{bucket}")
    assert line.startswith("codec.weights must name a file or a directory in its bucket")
    line = refused("repa", "codec.weights=s3://no-such-bucket/x")
    assert line.startswith("codec.weights must be readable, got 's3://no-such-bucket/x' (")


@pytest.mark.parametrize("setting", ["codec.weights", "data.images.features"])
def test_a_store_that_does_not_answer_is_told_within_seconds(refused, monkeypatch, setting):
    """A run waits for a store for minutes; whoever mistyped its address should not."""
    for name in ("AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_variables(f"http://127.0.0.1:{free_port()}").items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    line = refused("repa", f"{setting}=s3://bucket/x")
    assert line.startswith(f"{setting} must be readable, got 's3://bucket/x' (")
    assert line.endswith("; correct the URI or the access")
    assert time.monotonic() - start < 30
