"""What an experiment is given by URI, and what is remembered of its data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_clip, tiny_dinov2, tiny_rae_decoder, tiny_rae_statistics, tiny_vae
from twins import HELD_OUT, IMAGES, one_by_one, twin

from orchestration import cli, encode, given, inputs, run, workflow
from orchestration.experiment import Experiment
from orchestration.given import local_codec, local_copy
from orchestration.inputs import check_data, check_inputs, odd_scales, source_changes
from orchestration.plan import make_plan
from orchestration.progress import Progress
from orchestration.recipe import load, read, validated
from orchestration.run import Place
from orchestration.storage import Storage, open_storage
from orchestration.workflow import Workspace
from workers import shards
from workers.codecs import CodecConfig, open_codec
from workers.data import digits
from workers.extractors import FID_INCEPTION
from workers.manifest import measure
from workers.shards import write_shards

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setattr(given, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def upload(directory: Path, storage: Storage, name: str) -> None:
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        storage.put_file(file, f"{name}/{file.relative_to(directory).as_posix()}")


def test_codecs_come_from_s3(tmp_path, moto_s3, monkeypatch):
    storage, home = open_storage(moto_s3), tmp_path / "there"
    vae = CodecConfig(kind="vae", image_size=32, weights=str(home / "vae"), sha256=tiny_vae(home / "vae"), scale=0.5)
    rae = CodecConfig(
        kind="rae",
        image_size=32,
        weights=str(home / "dino"),
        sha256=tiny_dinov2(home / "dino"),
        decoder=str(home / "decoder.pt"),
        decoder_sha256=tiny_rae_decoder(home / "decoder.pt"),
        decoder_heads=2,
        statistics=str(home / "stat.pt"),
        statistics_sha256=tiny_rae_statistics(home / "stat.pt"),
    )
    upload(home, storage, "models")
    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).to(torch.uint8)
    for codec in (vae, rae):
        paths = {name: getattr(codec, name).replace(str(home), f"{moto_s3}/models") for name in workflow.PATHS_OF_CODEC}
        there = CodecConfig(**{**vars(codec), **paths})
        here = local_codec(there)
        assert torch.equal(open_codec(here, CPU).encode(images), open_codec(codec, CPU).encode(images))
        # Once a machine: the second time nothing is asked of the server.
        with monkeypatch.context() as patch:
            patch.setattr(given, "open_storage", lambda uri: pytest.fail(f"{uri} was asked for again"))
            assert local_codec(there) == here


def test_what_is_brought_has_the_stated_hash_and_stays_sound(tmp_path, moto_s3, cache):
    digest = tiny_vae(tmp_path / "vae")
    upload(tmp_path / "vae", open_storage(moto_s3), "vae")
    with pytest.raises(ValueError, match=f"weights {moto_s3}/vae must have the SHA-256 0+, got {digest}"):
        local_copy("weights", f"{moto_s3}/vae", "0" * 64)
    assert [path.name for path in (cache / "given").iterdir() if not path.name.startswith(".")] == []
    copy = Path(local_copy("weights", f"{moto_s3}/vae", digest))
    (copy / "config.json").unlink()  # as a cleaner of temporary directories does
    again = Path(local_copy("weights", f"{moto_s3}/vae", digest))
    assert again == copy
    assert (copy / "config.json").exists()
    with pytest.raises(ValueError, match=f"decoder must be a file or a directory, got '{moto_s3}/absent' with nothing"):
        local_copy("decoder", f"{moto_s3}/absent", "1" * 64)
    assert local_copy("decoder", "/a/path", digest) == "/a/path"


def test_data_are_read_once_and_their_facts_kept(tmp_path, monkeypatch):
    images = digits(8, 597)
    write_shards(images, tmp_path / "shards", num_classes=10)
    storage = open_storage(str(tmp_path / "mine"))
    storage.publish(tmp_path / "shards", "v1")
    experiment = load("quickstart", ["data={shards: " + f"{storage.uri}/v1" + "}"])
    workspace = Workspace(experiment, open_storage(str(tmp_path / "ws")))
    check_data(workspace)
    facts = shards.facts_of(tmp_path / "shards", "train")
    assert facts == {
        "num_images": 1200,
        "shape": [1, 8, 8],
        "dtype": "uint8",
        "codec": None,
        "num_classes": 10,
        "absent_class": None,
        "features": None,
        "image_size": 8,
        "has_captions": False,
        "rms": pytest.approx(np.sqrt(np.mean((images["train"].images / 127.5 - 1.0) ** 2)), rel=1e-6),
    }
    monkeypatch.setattr(shards, "facts_of", lambda *_: pytest.fail("read again"))
    check_data(workspace)
    other = Workspace(load("digits32", ["data={shards: " + f"{storage.uri}/v1" + "}"]), workspace.storage)
    with pytest.raises(ValueError, match=r"must fit the data's shape \(1, 8, 8\), got 32 and 1"):
        check_data(other)


def test_an_absent_class_is_a_fact(tmp_path):
    images = digits(8, 597)
    kept = images["train"].labels != 3
    images["train"] = images["train"]._replace(images=images["train"].images[kept], labels=images["train"].labels[kept])
    write_shards(images, tmp_path / "shards", num_classes=10, rows=200)
    assert shards.facts_of(tmp_path / "shards", "train")["absent_class"] == 3
    assert shards.facts_of(tmp_path / "shards", "train")["num_images"] == int(kept.sum())


# ------------------------------------------------------------------------------------------------------ evaluation


def write_npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return measure(path).sha256


@pytest.fixture
def evaluated(tmp_path: Path):
    """Checks the evaluation section of a coloured experiment whose extractors are tiny."""
    digest = tiny_dinov2(tmp_path / "judge", registers=False)
    dino = {"kind": "dinov2", "weights": str(tmp_path / "judge"), "sha256": digest}
    pixels = {"input_size": 32, "patch_size": 8, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2}

    def check(judged: bool = True, side: int = 32, held_out: int = 60, **evaluation: Any) -> None:
        settings = read("quickstart", ["data={shards: /nowhere}"])
        settings["model"] |= pixels | {"input_size": side}
        settings["arms"] = {name: {**(arm or {}), "judged": judged} for name, arm in settings["arms"].items()}
        settings["evaluation"] |= {"extractors": [dino], "primary": "fd_dinov2/euler20/s1", "num_samples": 100}
        settings["evaluation"] |= evaluation
        facts = {split: {"num_images": held_out} for split in ("train", "held_out")}
        inputs._check_evaluation(validated("quickstart", settings), facts)

    return check


def test_an_evaluation_that_fits_is_taken(evaluated):
    """The control of the refusals below."""
    evaluated()


MU = np.zeros(2048)
SIGMA = np.eye(2048)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"mu": MU, "sigma": SIGMA},
            "evaluation.extractors must have inception where evaluation.reference is an npz",
        ),
        ({"mu": np.zeros(768), "sigma": np.eye(768)}, "2048"),
        ({"mu": MU, "sigma": SIGMA, "arr_0": np.zeros((4, 64, 64, 3), np.uint8)}, "64"),
        ({"mu": MU}, "sigma"),
    ],
)
def test_a_reference_that_cannot_serve_is_refused_in_one_line(evaluated, tmp_path, arrays, words):
    path = tmp_path / "reference.npz"
    with pytest.raises(ValueError, match=r"^evaluation\.[^\n]*$") as caught:
        evaluated(reference={"npz": str(path), "sha256": write_npz(path, **arrays)})
    assert words in str(caught.value)


def test_another_file_than_stated_is_refused(evaluated, tmp_path):
    path = tmp_path / "reference.npz"
    found = write_npz(path, mu=MU, sigma=SIGMA, arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=rf"sha256 must be that of npz, {found}, got a{{64}}; correct it"):
        evaluated(reference={"npz": str(path), "sha256": "a" * 64})
    with pytest.raises(ValueError, match=r"must have inception where evaluation\.reference is an npz, .* got dinov2"):
        evaluated(reference={"npz": str(path), "sha256": found})


@pytest.mark.parametrize(
    ("side", "num_samples", "held_out", "refused"),
    [
        (8, 192, 193, "num_samples must have more than 192 images, .* got 192; take more"),  # 3 x 8 x 8 numbers
        (8, 193, 192, "reference must have more than 192 images, .* got 192; take more"),
        (8, 193, 193, None),
        (16, 100, 48, "reference must have more than 48 images, .* got 48; take more"),  # four patches an image
        (16, 100, 49, None),
    ],
)
def test_too_few_patches_are_refused_before_anything_runs(evaluated, monkeypatch, side, num_samples, held_out, refused):
    monkeypatch.setattr(inputs, "dimension_of", lambda config: None)
    settings = {"side": side, "held_out": held_out, "num_samples": num_samples}
    if refused is None:
        evaluated(**settings)
    else:
        with pytest.raises(ValueError, match=rf"^evaluation\.{refused}"):
            evaluated(**settings)


@pytest.mark.parametrize(
    ("kind", "primary", "images", "beside"),
    [
        ("inception", "fid", False, r"recall beside it, got fid beside \[\]; measure that too"),
        ("inception", "inception_score", False, r"recall beside it, got inception_score beside \[\]; measure that too"),
        ("inception", "fid", True, None),
        ("clip", "clip_score", None, r"recall beside it, got clip_score beside \[\]; measure that too"),
        ("clip", "fd_patches", None, r"recall beside it, got fd_patches beside \[\]; measure that too"),
    ],
)
def test_a_verdict_without_a_recall_is_refused_before_anything_runs(
    evaluated, tmp_path, monkeypatch, kind, primary, images, beside
):
    """Of statistics alone no recall is known, and CLIP has none."""
    monkeypatch.setattr(inputs, "dimension_of", lambda config: None)
    monkeypatch.setattr("orchestration.experiment.is_captioned", lambda model: True)
    digest = FID_INCEPTION if kind == "inception" else "a" * 64
    settings = {"extractors": [{"kind": kind, "weights": "x", "sha256": digest}], "primary": f"{primary}/euler20/s1"}
    if images is not None:
        path = tmp_path / "reference.npz"
        arrays = {"arr_0": np.zeros((100, 32, 32, 3), np.uint8)} if images else {}
        settings["reference"] = {"npz": str(path), "sha256": write_npz(path, mu=MU, sigma=SIGMA, **arrays)}
    if beside is None:
        evaluated(**settings)
    else:
        with pytest.raises(ValueError, match=r"^evaluation\.primary must be of a metric with " + beside):
            evaluated(**settings)
        evaluated(judged=False, **settings)


def test_absent_weights_are_named_with_where_people_get_them(evaluated, tmp_path):
    inception = {"kind": "inception", "weights": str(tmp_path / "absent.pth"), "sha256": FID_INCEPTION}
    with pytest.raises(ValueError, match=r"evaluation\.extractors.*absent\.pth.*pytorch-fid"):
        evaluated(extractors=[inception], primary="fid/euler20/s1")


def test_too_few_images_for_a_covariance_are_refused_before_anything_runs(evaluated, monkeypatch):
    monkeypatch.setattr(inputs, "dimension_of", lambda config: 100)
    with pytest.raises(
        ValueError, match=r"num_samples must be more than the 100 features of dinov2, .* got 100; raise it"
    ):
        evaluated()
    monkeypatch.setattr(inputs, "dimension_of", lambda config: 60)
    with pytest.raises(
        ValueError, match="more than the 60 features of dinov2, got 60 images in held_out; hold out more"
    ):
        evaluated()


# ------------------------------------------------------------------------------------------- before data are encoded


def with_images(experiment: Experiment, **changes: Any) -> Experiment:
    """The experiment with other settings of its images, validated anew."""
    raw = experiment.model_dump(mode="json", exclude_none=True)
    raw["data"]["images"] |= changes
    return validated("twin", raw)


def refused(experiment: Experiment, home: Path) -> str:
    with pytest.raises(ValueError, match="must") as caught:
        check_inputs(Workspace(experiment, open_storage(str(home / "ws"))))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_alignment_features_must_fit_the_model(tmp_path):
    experiment = twin("repa-xl-256", tmp_path)
    check_inputs(Workspace(experiment, open_storage(str(tmp_path / "ws"))))
    wide = twin("repa-xl-256", tmp_path, projector_dims=[16])
    assert refused(wide, tmp_path) == (
        "data.images.features must make the 4 tokens of the model, of the width model.projector_dims 16, got 4 of "
        "width 12; give the DINOv2 that fits"
    )
    fine = twin("repa-xl-256", tmp_path, patch_size=1)
    assert "must make the 16 tokens of the model" in refused(fine, tmp_path)
    clip = tmp_path / "clip"
    other = with_images(experiment, features=str(clip), features_sha256=tiny_clip(clip))
    assert refused(other, tmp_path) == (
        f"data.images.features: {clip} must hold a model of dinov2 or dinov2_with_registers, got 'clip'"
    )


def test_files_that_are_left_out_are_a_warning(tmp_path):
    workspace = Workspace(twin("sit-b-256", tmp_path), open_storage(str(tmp_path / "ws")))
    (of_bias,) = check_inputs(workspace).warnings
    assert of_bias.startswith("evaluation.num_samples 100 is less than 10 times the 64 features of digits: with so few")
    for name in ("zero/b.heic", "zero/a.heic"):
        (tmp_path / "images" / name).write_bytes(b"x")
    line, _ = make_plan(workspace.experiment, Place(workspace.storage, "", []))["warnings"]
    assert line == (
        f"data.images.source {tmp_path}/images has files that are left out, neither images that are read nor beside "
        "one: 2, the first zero/a.heic"
    )


def test_a_reference_that_will_be_too_small_is_refused_before_it_is_encoded(tmp_path, monkeypatch):
    raw = twin("rae-xl-256", tmp_path).model_dump(mode="json", exclude_none=True)
    raw["evaluation"] |= {"num_samples": 150}
    monkeypatch.setattr(inputs, "dimension_of", lambda config: HELD_OUT)
    assert refused(validated("twin", raw), tmp_path) == (
        "evaluation.reference must have more than the 110 features of dinov2, got 110 "
        "images in held_out; hold out more, or compare with train"
    )
    monkeypatch.setattr(inputs, "dimension_of", lambda config: HELD_OUT - 1)
    check_inputs(Workspace(validated("twin", raw), open_storage(str(tmp_path / "ws"))))


def test_text_encoders_must_fit_the_model(tmp_path):
    experiment = twin("sd35-medium", tmp_path / "home")
    check_inputs(Workspace(experiment, open_storage(str(tmp_path / "ws"))))
    for name, widths in (("joint_attention_dim", (48, 20)), ("pooled_projection_dim", (40, 28))):
        other = twin("sd35-medium", tmp_path / name, **{name: max(set(widths) - {40, 20})})
        assert refused(other, tmp_path) == (
            f"data.images.text_encoders must make the widths model.joint_attention_dim {widths[0]} and "
            f"pooled_projection_dim {widths[1]}, got 40 and 20; give the model's own"
        )
    dino = tmp_path / "dino"
    other = with_images(experiment, text_encoders=str(dino), text_encoders_sha256=tiny_dinov2(dino))
    assert refused(other, tmp_path) == (
        f"data.images.text_encoders: {dino}/text_encoder must be a directory with a config.json in the layout of its "
        "library, got none"
    )


# ---------------------------------------------------------------------------------------- after data were encoded


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose images were encoded."""
    home = tmp_path_factory.mktemp("encoded")
    experiment, storage = twin("sit-b-256", home), open_storage(str(home / "ws"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_run", one_by_one)
        patch.setattr(run, "join_cluster", lambda *_: None)
        progress = Progress(["data"], 0)
        run._encode(Workspace(experiment, storage), ExitStack(), progress)
        progress.close()
    (home / "experiment.json").write_text(experiment.model_dump_json())
    return home


@pytest.fixture
def home(once: Path) -> Iterator[tuple[Experiment, Workspace, Path]]:
    """The experiment, its workspace, and its images, which are put back afterwards."""
    experiment = Experiment.model_validate_json((once / "experiment.json").read_text())
    shutil.copytree(once / "images", once / "kept")
    yield experiment, Workspace(experiment, open_storage(str(once / "ws"))), once / "images"
    shutil.rmtree(once / "images", ignore_errors=True)
    (once / "kept").rename(once / "images")


Home = tuple[Experiment, Workspace, Path]


def test_a_source_that_is_the_same_or_gone_says_nothing(home: Home) -> None:
    _, workspace, images = home
    assert source_changes(workspace) == []
    for file in images.rglob("*.png"):
        os.utime(file, (0, 0))
    assert source_changes(workspace) == []
    for file in images.rglob("*.png"):
        file.unlink()
    shutil.rmtree(images)
    assert source_changes(workspace) == []
    images.mkdir()  # where another disk would be mounted
    assert source_changes(workspace) == []


def test_images_mirrored_copies_and_unreadable_ones_are_told_apart(home: Home, capsys) -> None:
    experiment, workspace, _ = home
    assert experiment.data.images
    assert experiment.data.images.flip
    data = run._data(workspace)
    assert (data["num_images"], data["num_in_source"]) == (2 * (IMAGES - HELD_OUT) + HELD_OUT, IMAGES)
    bad = [{"split": "train", "name": f"{name}.png", "reason": "is cut"} for name in "abc"]
    shown = {
        "410 images with mirrored copies, of 260 in the source": {},
        "404 images with mirrored copies, of 260 in the source, 3 of them unreadable": {
            "num_images": 404,
            "unreadable": bad,
        },
        "257 images, of 260 in the source, 3 of them unreadable": {"num_images": 257, "unreadable": bad},
        "260 images": {"num_images": 260},
        "1,797 images": {"num_images": 1797, "num_in_source": None},
    }
    for text, changes in shown.items():
        cli._say_data({**data, **changes})
        assert capsys.readouterr().out.splitlines()[0] == f"data:    {data['uri']} ({text})"


CHANGES = {
    "removed": (lambda images: (images / "zero" / "0000.png").unlink(), "holds 259 images, and held 260 when"),
    "renamed": (
        lambda images: (images / "zero" / "0000.png").rename(images / "zero" / "0.png"),
        "holds 260 images, and held 260 when it was encoded, of other names, sizes or labels; the",
    ),
    "of another size": (
        lambda images: (images / "zero" / "0000.png").write_bytes(b"x"),
        "holds 260 images, and held 260 when it was encoded, of other names, sizes or labels; the",
    ),
    "of another name of a class": (
        lambda images: (images / "zero").rename(images / "zerp"),
        "holds 260 images, and held 260 when it was encoded, of other names, sizes or labels; the",
    ),
    "no class folders": (
        lambda images: (images / "zero" / "0000.png").rename(images / "0.png"),
        "cannot be listed any more (source must be a folder of class directories",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changed_after_it_was_encoded_is_a_warning(home: Home, change: str) -> None:
    experiment, workspace, images = home
    make, says = CHANGES[change]
    make(images)
    (line,) = source_changes(workspace)
    assert line.startswith(f"data.images.source {images} {says}")
    assert line.endswith("; the encoded data are kept, --force data redoes them")
    assert "\n" not in line
    plan = make_plan(experiment, Place(workspace.storage, "", ["other"]))
    *warnings, of_bias = plan["warnings"]
    assert warnings == ["other", line, *odd_scales(check_data(workspace))]
    assert of_bias.startswith("evaluation.num_samples 100 is less than")
    assert plan["stages"][0] == {"name": "data", "state": "done"}


def test_pixels_that_the_metrics_need_are_asked_for_before_encoding(home: Home, tmp_path: Path) -> None:
    experiment, _, _ = home
    assert experiment.data.images
    kept = experiment.data.images.model_copy(update={"keep_pixels": "held_out"})
    data = experiment.data.model_copy(update={"images": kept})
    empty = Workspace(experiment.model_copy(update={"data": data}), open_storage(str(tmp_path / "empty")))
    with pytest.raises(ValueError, match=r"must keep the pixels of train, .*; set data.images.keep_pixels: all"):
        check_inputs(empty)


def test_a_run_warns_of_a_changed_source_and_force_checks_it_first(home: Home, monkeypatch, capfd) -> None:
    experiment, workspace, images = home
    place = Place(workspace.storage, f"sqlite:///{images.parent}/mlflow.db", [])
    (images / "zero" / "0000.png").unlink()
    outcome = run.run_experiment(experiment, place, targets=lambda stage: stage.name == "data")
    assert outcome["stages"][0]["state"] == "reused"
    assert "warning: data.images.source" in (said := capfd.readouterr().err)
    assert "holds 259 images, and held 260 when" in said
    # What cannot be encoded is refused before anything is removed.
    shutil.rmtree(images / "one")
    force = {"targets": lambda stage: stage.name == "data", "force": ("data",)}
    with pytest.raises(ValueError, match="num_classes must be the 9 of"):
        run.run_experiment(experiment, place, **force)
    assert Workspace(experiment, place.storage).artifact("data")
