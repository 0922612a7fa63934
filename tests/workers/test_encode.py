"""Images of every kind of source to shards: which rows they become, what is refused, and whose bytes are the same."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from image_sources import (
    SIZE,
    add_member,
    captioned_folder,
    class_folder,
    parquet,
    pictures,
    webdataset,
)
from PIL import Image
from pydantic import ValidationError
from tiny_models import tiny_dinov2, tiny_rae_decoder, tiny_rae_statistics, tiny_vae
from tiny_sd3 import tiny_text_encoders

import workers.encode
from mixflow_core.rng import generator
from workers.codecs import CodecConfig, directory_hash, open_dinov2
from workers.data import CaptionTable, ImageSet, Split
from workers.encode import Encoder, Images, Plan, Unreadable, plan_encoding
from workers.pretrained import TextEncoders
from workers.shards import Statistics, captions_path, read_captions, read_shards, shard_path
from workers.sources import list_source

CPU = torch.device("cpu")
PIXELS = CodecConfig(kind="identity", image_size=SIZE)
ZEROS = "0" * 64


def settings(source: str, **changes) -> Images:
    return Images(**{"source": source, "held_out": 8, "batch_size": 3, "rows_per_shard": 10, **changes})


def encode_all(plan: Plan, directory: Path, threads: int = 1) -> list[Unreadable]:
    directory.mkdir()
    encoder = Encoder(plan.recipe, CPU, threads)
    found = []
    for shard in plan.shards:
        found += encoder.encode(shard, shard_path(directory, shard.split, shard.number)).unreadable
    return found


def encoded(source: str, directory: Path, codec: CodecConfig = PIXELS, **changes) -> dict[Split, ImageSet]:
    """Both splits of a source without unreadable images, as their readers see them."""
    assert not encode_all(plan_encoding(settings(source, **changes), codec), directory)
    return read_back(directory)


def read_back(directory: Path) -> dict[Split, ImageSet]:
    found: dict[Split, ImageSet] = {}
    for split in ("train", "held_out"):
        parts = [part for part, _ in read_shards(directory, split)]
        joined = {
            name: None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])
            for name in ("images", "labels", "features", "pixels")
        }
        found[split] = ImageSet(codec=parts[0].codec, captions=parts[0].captions, **joined)
    return found


def vae(path: Path, **changes) -> CodecConfig:
    values = {"kind": "vae", "image_size": SIZE, "weights": str(path), "sha256": tiny_vae(path), "scale": 0.5}
    return CodecConfig(**{**values, "shift": 0.1, **changes})


def theirs(codec: CodecConfig, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation by diffusers itself."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(codec.weights).eval()
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels).float() / 127.5 - 1).latent_dist
    return posterior.mean.numpy(), posterior.std.numpy()


# ----------------------------------------------------------------------------------------------------------- sources


SOURCES = {
    "class folders": class_folder,
    "tar files": webdataset,
    "a pattern of tar files": lambda root, images: webdataset(root / "x", images) + "/part-*.tar",
    "parquet": parquet,
    "parquet with structs": lambda root, images: parquet(root, images, struct=True),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_image_is_there_once_with_its_label(tmp_path, kind):
    images = pictures(40)
    source = SOURCES[kind](tmp_path / "source", images)
    found = encoded(source, tmp_path / "out")
    # Class folders are numbered by the alphabet: eight, five, four, ...
    alphabet = (8, 5, 4, 9, 1, 7, 6, 3, 2, 0) if kind == "class folders" else range(10)
    label_of = {label: new for new, label in enumerate(alphabet)}
    truth = sorted((image.pixels.tobytes(), label_of[image.label]) for image in images)
    both = [(i.tobytes(), label) for s in found.values() for i, label in zip(s.images, s.labels.tolist(), strict=True)]
    assert sorted(both) == truth
    assert [len(found[split].labels) for split in ("train", "held_out")] == [32, 8]
    assert found["train"].images.dtype == np.uint8
    assert found["train"].codec is None
    assert found["train"].pixels is None  # they are the images themselves
    assert found["held_out"].pixels is None


def test_rows_are_a_matter_of_names_and_the_shuffle_alone(tmp_path, monkeypatch):
    images = pictures(40)
    source = class_folder(tmp_path / "source", images)
    first = plan_encoding(settings(source), PIXELS)
    walk = os.walk

    def backwards(*arguments, **options):
        for directory, folders, names in walk(*arguments, **options):
            folders.reverse()
            yield directory, folders, names[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert plan_encoding(settings(source), PIXELS) == first
    listed = sorted(path.relative_to(source).as_posix() for path in Path(source).rglob("*.png"))
    order = torch.randperm(40, generator=generator(0, "order", 0)).tolist()
    names = {
        split: [place.name for shard in first.shards if shard.split == split for place in shard.places]
        for split in ("train", "held_out")
    }
    assert names["held_out"] == [listed[row] for row in order[32:]]
    assert names["train"] == [listed[row] for row in sorted(order[:32])]
    assert [len(shard.places) for shard in first.shards] == [10, 10, 10, 2, 8]
    assert first.classes == sorted(path.name for path in Path(source).iterdir())


def test_flipping_adds_a_mirrored_copy_of_each_training_image(tmp_path):
    source = class_folder(tmp_path / "source", pictures(40))
    plain = encoded(source, tmp_path / "plain")
    found = encoded(source, tmp_path / "flipped", flip=True)
    both = np.concatenate([plain["train"].images, plain["train"].images[..., ::-1]])
    labels = np.concatenate([plain["train"].labels] * 2).tolist()
    rows = zip(found["train"].images, found["train"].labels.tolist(), strict=True)
    assert sorted((image.tobytes(), label) for image, label in rows) == sorted(
        (image.tobytes(), label) for image, label in zip(both, labels, strict=True)
    )
    assert plan_of(Path(source), flip=True).num_rows == {"train": 64, "held_out": 8}
    assert max(pq.read_metadata(path).num_rows for path in (tmp_path / "flipped").iterdir()) == 10
    np.testing.assert_array_equal(found["held_out"].images, plain["held_out"].images)


def test_images_of_other_sizes_and_modes_are_cropped_and_made_rgb(tmp_path):
    numbers = np.random.default_rng(0)
    grey = Image.fromarray(numbers.integers(0, 256, (SIZE, SIZE), dtype=np.uint8))
    wide = Image.fromarray(numbers.integers(0, 256, (SIZE, 50, 3), dtype=np.uint8))
    clear = Image.fromarray(numbers.integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8))
    for name, image in {"0grey": grey, "1wide": wide, "2clear": clear, "3": wide}.items():
        (tmp_path / "source" / "a").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "source" / "a" / f"{name}.png")
    found = encoded(str(tmp_path / "source"), tmp_path / "out", held_out=1)
    rows = {image.tobytes() for split in found.values() for image in split.images}
    assert rows == {
        np.stack([np.array(grey)] * 3).tobytes(),
        np.array(wide)[:, 9:41].transpose(2, 0, 1).tobytes(),
        np.array(clear)[..., :3].transpose(2, 0, 1).tobytes(),
    }


def test_images_of_every_suffix_are_read_and_of_several_frames_the_first(tmp_path):
    numbers, truth = np.random.default_rng(0), set()
    (tmp_path / "a").mkdir()
    for suffix in ("png", "bmp", "gif", "ppm", "tif", "TIFF", "webp"):
        palette = Image.fromarray(numbers.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).convert("P")
        palette.putpalette(numbers.integers(0, 256, 768, dtype=np.uint8).tobytes())
        image = palette if suffix == "gif" else palette.convert("RGB")
        frames = {"save_all": True, "append_images": [palette.rotate(90)]} if suffix == "gif" else {}
        image.save(tmp_path / "a" / f"{suffix}.{suffix}", **frames, **({"lossless": True} if suffix == "webp" else {}))
        truth.add(np.array(palette.convert("RGB")).transpose(2, 0, 1).tobytes())
    with Image.open(tmp_path / "a" / "gif.gif") as gif:
        assert gif.n_frames == 2
    found = encoded(str(tmp_path), tmp_path.parent / "out", held_out=1)
    assert {image.tobytes() for split in found.values() for image in split.images} == truth
    assert len(truth) == 7


def test_files_that_are_no_images_and_no_companions_are_listed(tmp_path):
    source = Path(class_folder(tmp_path / "source", pictures(30)))
    for name in ("zero/a.heic", "zero/0000.json", "one/notes.txt", "one/b.cls", "a.py", ".hidden.xyz", "zero/c"):
        (source / name).write_bytes(b"x")
    assert plan_of(source).left_out == ["a.py", "zero/a.heic", "zero/c"]
    tars = Path(webdataset(tmp_path / "tars", pictures(30)))
    (tars / "part-2.tar.gz").write_bytes(b"x")
    assert plan_of(tars).left_out == ["part-2.tar.gz"]
    assert plan_of(tars / "part-1.tar", held_out=1).left_out == []


def test_captions_without_an_image_are_listed(tmp_path):
    source = Path(captioned_folder(tmp_path / "source", pictures(30)))
    for name in ("lonely.txt", "0001.json"):
        (source / name).write_text("x")
    assert list_source(str(source), captions=True).left_out == ["lonely.txt"]


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_an_empty_caption_is_refused_by_name(tmp_path, kind):
    images = [*pictures(4), pictures(5)[4]._replace(caption=" ")]
    if kind == "folder":
        captioned_folder(tmp_path, images)
    elif kind == "tar":
        webdataset(tmp_path, images, captions=True)
    else:
        parquet(tmp_path, images)
    name = {"folder": "0004.png", "tar": r"part-1.tar:1/0003", "parquet": "part-1.parquet[3]"}[kind]
    with pytest.raises(ValueError, match=re.escape(f"must have words in every caption, got none for {name}")):
        list_source(str(tmp_path), captions=True)


def test_a_mark_of_byte_order_is_no_part_of_a_caption(tmp_path):
    images = [image._replace(caption=f"\ufeff{image.caption}") for image in pictures(4)]
    source = list_source(captioned_folder(tmp_path / "source", images), captions=True)
    assert sorted(source.captions) == sorted(image.caption for image in pictures(4))


def test_what_cannot_be_read_as_an_image_file_is_refused_by_name(tmp_path):
    source = Path(class_folder(tmp_path / "source", pictures(30)))
    (source / "one" / "link.png").symlink_to(tmp_path / "nowhere.png")
    assert f"source must have readable files, got {source}/one/link.png (No such file" in refused(source)
    (source / "one" / "link.png").unlink()
    os.mkfifo(source / "one" / "pipe.png")
    assert f"source must have regular files, got a pipe or device {source}/one/pipe.png" in refused(source)


@pytest.mark.parametrize("loop", ["itself", "above", "each other"])
def test_a_directory_below_itself_is_refused(tmp_path, loop):
    source = Path(class_folder(tmp_path / "source", pictures(30)))
    (source / "also").symlink_to(source / "zero")  # a class that is another's images is no loop
    assert len(list_source(str(source), captions=False).places) > 30
    if loop == "each other":
        (source / "one" / "x").symlink_to(source / "two")
        (source / "two" / "y").symlink_to(source / "one")
    else:
        (source / "one" / "x").symlink_to(source if loop == "itself" else tmp_path)
    assert "source must have no directory below itself, got the link " in refused(source)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_a_tar_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "x.png", pictures(1)[0].png)
        add_member(tar, "x.cls", b"0")
        link = tarfile.TarInfo("y.png")
        link.type, link.linkname = kind, "x.png"
        tar.addfile(link)
    assert "got the link or device y.png in a.tar; pack it " in refused(tmp_path / "a.tar")


@pytest.mark.parametrize("label", ["--5", "1" * 5000, "1.0", ""])
def test_a_label_that_is_no_number_is_refused(tmp_path, label):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "x.png", pictures(1)[0].png)
        add_member(tar, "x.cls", label.encode())
    assert "must have whole numbers as .cls labels, got " in refused(tmp_path / "a.tar")


def test_tars_that_were_joined_byte_by_byte_are_refused(tmp_path):
    webdataset(tmp_path, pictures(30))
    parts = [tmp_path / f"part-{part}.tar" for part in (0, 1)]
    (tmp_path / "joined.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert "joined.tar (it goes on after its end; join tars by tar --conc" in refused(tmp_path / "joined.tar")


# ------------------------------------------------------------------------------------------------------------ codecs


def test_a_vae_leaves_its_moments_and_the_pixels_that_are_asked_for(tmp_path):
    source, codec = class_folder(tmp_path / "source", pictures(30)), vae(tmp_path / "vae")
    found = encoded(source, tmp_path / "out", codec)
    everything = encoded(source, tmp_path / "all", codec, keep_pixels="all")
    pixels = encoded(source, tmp_path / "pixels")
    for split in ("train", "held_out"):
        moments = np.concatenate(theirs(codec, pixels[split].images), axis=1)
        np.testing.assert_allclose(found[split].images, moments, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(everything[split].pixels, pixels[split].images)
        np.testing.assert_array_equal(found[split].labels, pixels[split].labels)
        assert found[split].codec == codec.description
        assert found[split].shape == (4, 4, 4)
    assert found["train"].pixels is None
    np.testing.assert_array_equal(found["held_out"].pixels, pixels["held_out"].images)


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_a_network_sees_the_latents_of_the_moments(tmp_path, posterior):
    source, codec = class_folder(tmp_path / "source", pictures(30)), vae(tmp_path / "vae", posterior=posterior)
    found = encoded(source, tmp_path / "out", codec, keep_pixels="all")["train"]
    mean, deviation = theirs(codec, found.pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3)).numpy()
    expected = (mean + (deviation * noise if posterior == "sample" else 0) - 0.1) * 0.5
    seen = found.x1(slice(None), torch.Generator().manual_seed(3))
    np.testing.assert_allclose(seen.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_representation_autoencoder_leaves_latents(tmp_path):
    codec = CodecConfig(
        kind="rae",
        image_size=SIZE,
        weights=str(tmp_path / "dinov2"),
        sha256=tiny_dinov2(tmp_path / "dinov2"),
        decoder=str(tmp_path / "decoder.pt"),
        decoder_sha256=tiny_rae_decoder(tmp_path / "decoder.pt"),
        decoder_heads=2,
        statistics=str(tmp_path / "stat.pt"),
        statistics_sha256=tiny_rae_statistics(tmp_path / "stat.pt"),
    )
    found = encoded(class_folder(tmp_path / "source", pictures(30)), tmp_path / "out", codec, keep_pixels="all")
    for split in found.values():
        assert split.images.dtype == np.float32
        assert split.shape == (12, 2, 2)
        expected = Encoder(plan_of(tmp_path / "source", codec).recipe, CPU).codec.encode(torch.from_numpy(split.pixels))
        np.testing.assert_allclose(split.images, expected.numpy(), rtol=1e-4, atol=1e-5)


def plan_of(source: Path, codec: CodecConfig = PIXELS, **changes) -> Plan:
    return plan_encoding(settings(str(source), **changes), codec)


def test_features_are_those_of_the_image_in_their_row(tmp_path):
    digest = tiny_dinov2(tmp_path / "dinov2", registers=False)
    source = class_folder(tmp_path / "source", pictures(30))
    more = {"features": str(tmp_path / "dinov2"), "features_sha256": digest, "flip": True, "keep_pixels": "all"}
    found = encoded(source, tmp_path / "out", vae(tmp_path / "vae"), **more)["train"]
    assert found.features.shape == (44, 4, 12)
    assert found.features.dtype == np.float16
    model = open_dinov2(str(tmp_path / "dinov2"), digest, SIZE, CPU)
    images = torch.nn.functional.interpolate(
        (torch.from_numpy(found.pixels).float() / 255 - torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1))
        / torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1),
        (28, 28),
        mode="bicubic",
    )
    with torch.no_grad():
        expected = model(images).last_hidden_state[:, 1:]
    np.testing.assert_allclose(found.features.astype(np.float32), expected.numpy(), rtol=2e-3, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------- captions


CAPTIONED = {
    "folder": captioned_folder,
    "tar files": lambda root, images: webdataset(root, images, labels=False, captions=True),
    "tar files with labels": lambda root, images: webdataset(root, images, captions=True),
    "parquet": parquet,
}


@pytest.fixture(scope="module")
def text_encoders(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    tiny_text_encoders(directory)
    return {"text_encoders": str(directory), "text_encoders_sha256": directory_hash(directory)}


@pytest.mark.parametrize("kind", CAPTIONED)
def test_captions_become_labels_the_held_out_ones_first(tmp_path, text_encoders, kind):
    images = pictures(30)
    plan = plan_of(Path(CAPTIONED[kind](tmp_path / "source", images)), held_out=4, **text_encoders)
    encode_all(plan, tmp_path / "out")
    found = {split: list(read_shards(tmp_path / "out", split)) for split in ("train", "held_out")}
    caption_of = {image.pixels.tobytes(): image.caption for image in images}
    captions: dict[str, list[str]] = {}
    for split, parts in found.items():
        rows = [(image, label) for part, _ in parts for image, label in zip(part.images, part.labels, strict=True)]
        captions[split] = [caption_of[image.tobytes()] for image, _ in rows]
        assert [plan.captions[label] for _, label in rows] == captions[split]
        assert {num_classes for _, num_classes in parts} == {10}
    held_out = list(dict.fromkeys(captions["held_out"]))
    assert plan.captions[: len(held_out)] == held_out
    assert plan.captions[len(held_out) :] == [c for c in dict.fromkeys(captions["train"]) if c not in held_out]


def test_embeddings_are_those_of_their_captions(tmp_path, text_encoders, monkeypatch):
    monkeypatch.setattr("workers.shards.CAPTIONS_A_FILE", 8)
    plan = plan_of(Path(captioned_folder(tmp_path / "source", pictures(30))), **text_encoders)
    for number, part in enumerate(plan.caption_parts):
        Encoder(plan.recipe, CPU).encode_captions(part, captions_path(tmp_path, number))
    tables = list(read_captions(tmp_path))
    assert [len(table.captions) for table in tables[:-1]] == [8] * (len(tables) - 1)
    table = CaptionTable(*(np.concatenate(column) for column in zip(*tables, strict=True)))
    assert table.captions.tolist() == [*plan.captions, ""]
    encoders = TextEncoders(Path(text_encoders["text_encoders"]))
    for row, caption in enumerate(table.captions):
        text, pooled = encoders.encode([caption], CPU)
        np.testing.assert_allclose(table.text[row], text[0].numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(table.pooled[row], pooled[0].numpy(), rtol=2e-3, atol=2e-3)
    assert table.text.dtype == table.pooled.dtype == np.float16
    assert not np.allclose(table.text[0], table.text[-1])


# -------------------------------------------------------------------------------------------------------- unreadable


def spoilt_folder(root: Path) -> dict[str, str]:
    """Four images that nobody can read; what is wrong with each."""
    class_folder(root, pictures(40))
    png = pictures(1)[0].png
    (root / "zero" / "cut.png").write_bytes(png[: len(png) // 2])
    (root / "zero" / "empty.jpg").write_bytes(b"")
    (root / "one" / "text.webp").write_bytes(b"this is no image")
    flipped = bytearray(png)
    flipped[40:60] = bytes(20)
    (root / "one" / "spoilt.png").write_bytes(bytes(flipped))
    return {"zero/cut.png": "OSError", "zero/empty.jpg": "no image", "one/text.webp": "no image", "one/spoilt.png": ""}


def test_unreadable_images_are_listed_and_the_others_encoded(tmp_path):
    expected = spoilt_folder(tmp_path / "source")
    plan = plan_of(tmp_path / "source")
    unreadable = encode_all(plan, tmp_path / "out")
    assert {name for name, _ in unreadable} == expected.keys()
    for name, reason in unreadable:
        assert expected[name] in reason
        assert "0x" not in reason
        assert "\n" not in reason
    found = read_back(tmp_path / "out")
    rows = {image.tobytes() for split in found.values() for image in split.images}
    assert rows == {image.pixels.tobytes() for image in pictures(40)}
    assert sum(len(split.labels) for split in found.values()) == 40
    again = encode_all(plan, tmp_path / "again")
    assert again == unreadable


def test_a_reason_is_the_same_in_every_process(tmp_path, monkeypatch):
    def broken(image: Image.Image, size: int) -> np.ndarray:
        raise TypeError(f"cannot read\n{object()!r} and {object()!r}")

    plan = plan_of(Path(class_folder(tmp_path / "source", pictures(40))))
    monkeypatch.setattr(workers.encode, "centre_crop", broken)
    reasons = {reason for _, reason in Encoder(plan.recipe, CPU).encode(plan.shards[0], tmp_path / "x").unreadable}
    assert reasons == {"TypeError: cannot read <object object> and <object object>"}


def test_a_missing_value_in_parquet_is_unreadable(tmp_path):
    images = pictures(30)
    source = parquet(tmp_path / "source", images, image=[None, *(image.png for image in images[1:])])
    unreadable = encode_all(plan_encoding(settings(source, held_out=1), PIXELS), tmp_path / "out")
    assert unreadable == [Unreadable("part-0.parquet[0]", "has no bytes")]


@pytest.mark.parametrize("struct", [False, True])
def test_a_row_group_larger_than_memory_is_refused(tmp_path, monkeypatch, struct):
    """Seven rows a group: seven images of 10,000 bytes are beyond a limit of 65,000 and within one of 80,000."""
    contents = [bytes([number]) * 10_000 for number in range(20)]
    image = [{"bytes": content} for content in contents] if struct else contents
    source = parquet(tmp_path / "source", pictures(20), image=image)
    monkeypatch.setattr("workers.sources.MOST_GROUP", 80_000)
    assert len(list_source(source, captions=False).places) == 20
    monkeypatch.setattr("workers.sources.MOST_GROUP", 65_000)
    with pytest.raises(ValueError, match=r"at most 65000 bytes of images in a row group .*/part-1.parquet; write it"):
        list_source(source, captions=False)


def test_a_shard_without_a_readable_image_leaves_no_file(tmp_path):
    plan = plan_of(Path(class_folder(tmp_path / "source", pictures(40))))
    shard = plan.shards[0]
    for place in shard.places:
        (tmp_path / "source" / place.file).write_bytes(bytes(place.size))
    result = Encoder(plan.recipe, CPU).encode(shard, tmp_path / "shard.parquet")
    assert result.statistics is None
    assert [name for name, _ in result.unreadable] == [place.name for place in shard.places]
    assert not (tmp_path / "shard.parquet").exists()


# ------------------------------------------------------------------------------------------------------------- bytes


def test_the_bytes_depend_on_neither_the_threads_nor_the_time(tmp_path):
    codec = vae(tmp_path / "vae")
    plan = plan_of(Path(class_folder(tmp_path / "source", pictures(30))), codec, batch_size=5)
    encode_all(plan, tmp_path / "one")
    torch.set_num_threads(2)
    encode_all(plan, tmp_path / "two", threads=3)
    assert torch.get_num_threads() == 2
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_torch_computes_with_one_thread_while_a_shard_is_encoded(tmp_path):
    plan = plan_of(Path(class_folder(tmp_path / "source", pictures(30))))
    encoder, seen = Encoder(plan.recipe, CPU), []
    encode = encoder.codec.encode
    encoder.codec.encode = lambda pixels: seen.append((torch.get_num_threads(), len(pixels))) or encode(pixels)
    torch.set_num_threads(2)
    encoder.encode(plan.shards[0], tmp_path / "shard.parquet")
    assert seen == [(1, 3), (1, 3), (1, 3), (1, 1)]


def test_statistics_are_those_of_the_file(tmp_path):
    codec = vae(tmp_path / "vae")
    plan = plan_of(Path(class_folder(tmp_path / "source", pictures(30))), codec)
    found = Encoder(plan.recipe, CPU).encode(plan.shards[-1], shard_path(tmp_path, "held_out", 0)).statistics
    ((part, _),) = read_shards(tmp_path, "held_out")
    assert found == Statistics.of(part)
    assert found.num_images == 8
    assert found.sums == pytest.approx(part.images.astype(np.float64).sum((0, 2, 3)))


def test_latents_that_are_not_finite_are_refused_by_name(tmp_path):
    plan = plan_of(Path(class_folder(tmp_path / "source", pictures(30))), vae(tmp_path / "vae"))
    encoder, shard = Encoder(plan.recipe, CPU), plan.shards[0]
    bad = torch.zeros(3, 8, 4, 4)
    bad[1, 0, 0, 0] = torch.nan
    encoder.codec.encode = lambda pixels: bad
    with pytest.raises(FloatingPointError, match="images must be finite") as caught:
        encoder.encode(shard, tmp_path / "shard.parquet")
    assert shard.places[1].name in str(caught.value)


def test_what_decides_the_bytes_is_in_the_identity_and_nothing_else(tmp_path):
    source, codec = class_folder(tmp_path / "source", pictures(30)), vae(tmp_path / "vae")
    first = plan_encoding(settings(source), codec).recipe
    tiny_vae(tmp_path / "moved")
    moved = first._replace(codec=vae(tmp_path / "moved"), settings=settings(source + "/.", max_unreadable=7))
    assert moved.identity == first.identity
    for changes in ({"flip": True}, {"batch_size": 4}, {"keep_pixels": "all"}, {"rows_per_shard": 4}, {"held_out": 9}):
        assert first._replace(settings=settings(source, **changes)).identity != first.identity
    for codec in (PIXELS, vae(tmp_path / "vae", scale=0.6), vae(tmp_path / "vae", image_size=64)):
        assert first._replace(codec=codec).identity != first.identity


# ---------------------------------------------------------------------------------------------------------- refusals


def refused(source: str | Path, codec: CodecConfig = PIXELS, **changes) -> str:
    with pytest.raises(ValueError, match="must") as caught:
        plan_encoding(settings(str(source), **changes), codec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def one_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add_member(tar, name, content)
    return path


def folder_with(root: Path, *names: str) -> Path:
    class_folder(root, pictures(30))
    for name in names:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(pictures(1)[0].png)
    return root


PNG = b"not looked at"
REFUSED = {
    "nothing there": (lambda p: p / "nowhere", "nowhere"),
    "braces": (lambda p: webdataset(p, pictures(9)) + "/part-{0..1}.tar", "braces"),
    "an empty folder": (lambda p: p.mkdir() or p, "got none in"),
    "an image": (lambda p: folder_with(p, "x/one.png") / "x" / "one.png", "directly in"),
    "a pattern of images": (lambda p: f"{folder_with(p)}/*/*.png", "pattern"),
    "several kinds": (lambda p: folder_with(p) and webdataset(p, pictures(9)), "one kind of them, got folder (zero/"),
    "images beside the classes": (lambda p: folder_with(p, "here.png"), "got here.png directly"),
    "a class without images": (lambda p: (folder_with(p) / "ten").mkdir() or p, "none in"),
    "captions in a folder": (lambda p: captioned_folder(p, pictures(20)), "text_encoders must be given"),
    "captions in tar files": (
        lambda p: webdataset(p, pictures(20), labels=False, captions=True),
        "text_encoders must be given for captioned images, got none for part-0.tar:0/0000",
    ),
    "captions in parquet": (lambda p: parquet(p, pictures(20), label=None), "text_encoders must be given"),
    "no labels in tar files": (lambda p: webdataset(p, pictures(20), labels=False), ".cls label for every image"),
    "no labels in parquet": (lambda p: parquet(p, pictures(20), label=None, caption=None), "column label"),
    "no image in parquet": (lambda p: parquet(p, pictures(20), image=None), "column image of bytes"),
    "images as text": (lambda p: parquet(p, pictures(20), image=["x"] * 20), "got string"),
    "fractional labels": (lambda p: parquet(p, pictures(20), label=[0.5] * 20), "integers in the column label"),
    "a null label": (lambda p: parquet(p, pictures(20), label=[None, *[0] * 19]), "none for part-0.parquet[0]"),
    "a negative label": (lambda p: parquet(p, pictures(20), label=[-1, *[0] * 19]), "0 to 1 for its 2 classes, got -1"),
    "a gap in the labels": (lambda p: parquet(p, pictures(20), label=[0, 2] * 10), "0 to 1 for its 2 classes, got 2"),
    "a label in words": (lambda p: one_tar(p / "a.tar", {"x.png": PNG, "x.cls": b"cat"}), "numbers as .cls labels"),
    "a label in bytes": (lambda p: one_tar(p / "a.tar", {"x.png": PNG, "x.cls": b"\xff"}), "UTF-8"),
    "a key without an image": (lambda p: one_tar(p / "a.tar", {"x.cls": b"0"}), "one image a key, got 0 for a.tar:x"),
    "a key with two images": (lambda p: one_tar(p / "a.tar", {"x.png": PNG, "x.jpg": PNG}), "one image a key, got 2"),
    "an empty tar": (lambda p: one_tar(p / "a.tar", {}), "got none"),
    "too few images": (lambda p: class_folder(p, pictures(8)), "held_out must be less than the source's 8 images"),
    "a class held out": (lambda p: class_folder(p, pictures(11)), "training images of every class"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_encoded_is_refused_in_one_line(tmp_path, kind):
    make, message = REFUSED[kind]
    found = refused(make(tmp_path / "source"))
    assert message in found
    assert "text_encoders" not in found or found.endswith("; give them for sd3, or class labels for another model")


def test_broken_files_are_refused_by_name(tmp_path):
    for name, write in (("part-1.tar", webdataset), ("part-1.parquet", parquet)):
        root = tmp_path / write.__name__
        write(root, pictures(30))
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2 // 512 * 512 - 100])
        assert name in refused(root)


def test_a_tar_that_was_cut_off_between_two_members_is_refused(tmp_path):
    webdataset(tmp_path, pictures(30))
    path = tmp_path / "part-1.tar"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-2].offset
    path.write_bytes(path.read_bytes()[:end])
    assert "whole, uncompressed tar files" in (line := refused(tmp_path))
    assert "part-1.tar (it was cut off)" in line


def test_a_name_twice_in_a_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            add_member(tar, "x.png", b"")
    assert "got x.png twice" in refused(tmp_path / "a.tar")


LACKING = {
    "class folders": (class_folder, ".txt caption beside every image"),
    "tar files": (webdataset, ".txt caption for every image"),
    "parquet": (lambda p, images: parquet(p, images, caption=None), "a column caption"),
}


@pytest.mark.parametrize("kind", LACKING)
def test_text_encoders_without_captions_are_refused(tmp_path, text_encoders, kind):
    make, message = LACKING[kind]
    found = refused(make(tmp_path / "source", pictures(30)), **text_encoders)
    assert message in found
    assert found.endswith("; add it for sd3, which needs captions; for a model of class labels leave text_encoders out")


@pytest.mark.parametrize("name", ["features", "text_encoders"])
def test_another_model_than_stated_is_refused(tmp_path, name):
    source, found = class_folder(tmp_path / "source", pictures(30)), tiny_dinov2(tmp_path / "model")
    message = refused(source, **{name: str(tmp_path / "model"), f"{name}_sha256": ZEROS})
    assert f"{name}_sha256 must be the hash {found}" in message
    assert "nowhere" in refused(source, **{name: str(tmp_path / "nowhere"), f"{name}_sha256": ZEROS})


def test_a_codec_that_does_not_fit_is_refused(tmp_path):
    source = class_folder(tmp_path / "source", pictures(30))
    assert "channels must be 3" in refused(source, CodecConfig(kind="identity", image_size=SIZE, channels=1))
    more = {"features": str(tmp_path), "features_sha256": ZEROS}
    assert "multiple of 16" in refused(source, CodecConfig(kind="identity", image_size=24), **more)


@pytest.mark.parametrize(
    "changes",
    [{"features": "x"}, {"text_encoders_sha256": ZEROS}, {"held_out": 0}, {"batch_size": 0}, {"rows_per_shard": 1},
     {"keep_pixels": "train"}, {"features": "x", "features_sha256": "0"}, {"max_unreadable": -1}, {"source": ""}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValidationError):
        settings(**{"source": "x", **changes})


def test_a_source_that_changes_meanwhile_is_refused(tmp_path):
    for make in (class_folder, webdataset, parquet):
        root = tmp_path / make.__name__
        plan = plan_of(Path(make(root, pictures(30))))
        first = root / plan.shards[0].places[0].file
        content = first.read_bytes()
        for changed, message in ((content[: len(content) // 3], "must not change"), (None, "readable by every worker")):
            if changed is None:
                first.unlink()
            else:
                first.write_bytes(changed)
            with pytest.raises(ValueError, match=message) as caught:
                encode_all(plan, tmp_path / f"{make.__name__}-{message}")
            assert str(first) in str(caught.value)
