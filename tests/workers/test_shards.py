"""Parquet shards, their memory maps, and the order of batches."""

from __future__ import annotations

import json
import multiprocessing
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from worker_toys import latents, pixels, run_config

from mixflow_core.rng import generator
from workers.columns import as_column
from workers.data import CaptionTable, ImageSet, batch_rows, digits, join, realised_times, shard_batch, to_pixels
from workers.disk import NoRoomError
from workers.manifest import Manifest
from workers.shards import captions_path, facts_of, open_shards, read_shards, write_captions, write_shards

IMAGE = {"shape": [1, 8, 8], "dtype": "float32"}
ABOUT = {"schema_version": 3, "num_classes": 10, "codec": None, "columns": {"image": IMAGE}}
VAE = {"kind": "vae", "scale": 0.5, "shift": 0.25, "posterior": "sample", "sha256": "0" * 64}


def read(directory, split) -> tuple[ImageSet, int]:
    parts = list(read_shards(directory, split))
    columns = zip(*((part.images, part.labels, part.features, part.pixels) for part, _ in parts), strict=True)
    images, labels, features, beside = (None if c[0] is None else np.concatenate(c) for c in columns)
    return parts[0][0]._replace(images=images, labels=labels, features=features, pixels=beside), parts[0][1]


def written(directory, train=None, held_out=None, rows=16):
    splits = {"train": train or pixels(), "held_out": held_out or pixels(20, seed=1)}
    write_shards(splits, directory, num_classes=10, rows=rows)
    return splits


@pytest.mark.parametrize("make", [pixels, latents])
def test_shards_give_back_what_was_written(tmp_path, make):
    splits = written(tmp_path, make(40), make(20, seed=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "held_out-00000.parquet",
        "held_out-00001.parquet",
        "statistics.json",
        "train-00000.parquet",
        "train-00001.parquet",
        "train-00002.parquet",
    ]
    for split in ("train", "held_out"):
        found, num_classes = read(tmp_path, split)
        assert num_classes == 10
        for a, b in zip(found[:2], splits[split][:2], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        assert found.codec is found.features is found.pixels is found.captions is None


def moments(count: int, seed: int = 0) -> ImageSet:
    """What a vae's data set holds, beside its pixels and alignment features."""
    numbers = np.random.default_rng(seed)
    return ImageSet(
        numbers.standard_normal((count, 6, 4, 4)).astype(np.float32),
        numbers.integers(0, 10, count),
        VAE,
        numbers.standard_normal((count, 5, 7)).astype(np.float16),
        numbers.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8),
    )


def test_latents_come_back_with_all_that_lies_beside_them(tmp_path):
    splits = written(tmp_path / "a", moments(40), moments(20, seed=1))
    table = CaptionTable(
        np.random.default_rng(5).standard_normal((11, 4, 6)).astype(np.float16),
        np.random.default_rng(6).standard_normal((11, 3)).astype(np.float16),
        [*(f"caption {i}" for i in range(10)), ""],
    )
    for number, rows in enumerate((slice(0, 7), slice(7, 11))):
        part = CaptionTable(table.text[rows], table.pooled[rows], table.captions[rows])
        write_captions(part, captions_path(tmp_path / "a", number))
    manifest = Manifest.describe(tmp_path / "a", {})
    mapped = open_shards(tmp_path / "a", manifest, tmp_path / "cache")
    for found, truth in ((mapped["train"], splits["train"]), (read(tmp_path / "a", "held_out")[0], splits["held_out"])):
        assert found.codec == VAE
        for name in ("images", "labels", "features", "pixels"):
            np.testing.assert_array_equal(getattr(found, name), getattr(truth, name))
            assert getattr(found, name).dtype == getattr(truth, name).dtype
    for split in ("train", "held_out"):
        captions = mapped[split].captions
        np.testing.assert_array_equal(captions.text, table.text)
        np.testing.assert_array_equal(captions.pooled, table.pooled)
        assert (captions.text.dtype, captions.captions) == (np.float16, table.captions)
    assert mapped["train"].shape == (3, 4, 4)
    np.testing.assert_array_equal(mapped["train"].seen, splits["train"].pixels)


def test_a_vaes_latents_are_drawn_from_their_posterior():
    data = moments(4)
    mean, deviation = torch.from_numpy(data.images).chunk(2, 1)
    noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    drawn = data.x1(slice(None), torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, (mean + deviation * noise - 0.25) * 0.5)
    torch.testing.assert_close(data.x1(slice(None)), (mean - 0.25) * 0.5)
    at_the_mean = data._replace(codec={**VAE, "posterior": "mean"})
    torch.testing.assert_close(at_the_mean.x1(slice(None), torch.Generator().manual_seed(3)), (mean - 0.25) * 0.5)


def test_every_step_draws_a_vaes_latents_anew_and_always_the_same():
    run, data = run_config(model={"input_size": 4, "patch_size": 2, "in_channels": 3}), moments(16)
    first, second, again = (shard_batch(run, data, step, 0) for step in (0, 1, 0))
    assert torch.equal(first.x1, again.x1)
    rows = batch_rows(run.seed, 0, 2, 16)
    truth = data.x1(rows, generator(run.seed, "posterior", 0))
    assert torch.equal(first.x1, truth)
    assert not torch.equal(first.x1, second.x1)


def test_alignment_targets_come_with_the_batch_where_the_run_aligns():
    model = {"input_size": 4, "patch_size": 2, "in_channels": 3, "projector_dims": [7], "projector_depth": 1}
    data = moments(16)
    assert shard_batch(run_config(model=model), data, 0, 0).features is None
    run = run_config(model=model).model_copy(update={"alignment_weight": 0.5})
    batch = join([shard_batch(run, data, 0, shard) for shard in (0, 1)])
    np.testing.assert_array_equal(batch.features.numpy(), data.features[batch_rows(run.seed, 0, 4, 16)])


def test_pixels_that_were_not_kept_are_asked_for():
    with pytest.raises(ValueError, match="data must keep the pixels beside the latents"):
        _ = moments(4)._replace(pixels=None).seen


@pytest.mark.parametrize("what", ["text", "pooled"])
def test_captions_without_sound_embeddings_are_refused(tmp_path, what):
    written(tmp_path, moments(40), moments(20))
    arrays = {"text": np.zeros((11, 4, 6), np.float16), "pooled": np.zeros((11, 3), np.float16)}
    names = [*(f"caption {i}" for i in range(10)), ""]
    arrays[what][4] = np.nan
    path = captions_path(tmp_path, 0)
    write_captions(CaptionTable(**arrays, captions=names), path)
    with pytest.raises(ValueError, match=rf"{what} embeddings must be finite, got others for 'caption 4' in row 4"):
        facts_of(tmp_path, "train")
    write_captions(CaptionTable(np.zeros((9, 4, 6), np.float16), np.zeros((9, 3), np.float16), names[2:]), path)
    with pytest.raises(ValueError, match="must be of the 8 captions with embeddings"):
        facts_of(tmp_path, "train")
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="must hold readable files of caption embeddings"):
        facts_of(tmp_path, "train")


def test_realised_times_are_those_of_the_batches():
    run = run_config(steps=3)
    found = realised_times(run, bins=10)
    draws = [run.mixture.draw(shard_batch(run, pixels(), step, shard).u) for step in range(3) for shard in range(8)]
    t, m = (torch.cat(values).numpy() for values in zip(*draws, strict=True))
    assert found["num_draws"] == 48
    for name, values in (("t", t), ("m", m), ("lag", t - m)):
        assert found[name] == np.histogram(values, bins=10, range=(0, 1))[0].tolist()
    assert realised_times(run_config(steps=1000), most=10)["num_draws"] == 20


def test_statistics_are_those_of_the_images(tmp_path):
    splits = written(tmp_path)
    found = json.loads((tmp_path / "statistics.json").read_text())["train"]
    values = [int(v) for v in splits["train"].images.reshape(-1)]
    mean = sum(values) / len(values)
    assert found["num_images"] == 40
    assert found["mean"] == pytest.approx([mean])
    assert found["std"] == pytest.approx([(sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5])
    assert found["per_class"] == {str(k): int((splits["train"].labels == k).sum()) for k in range(10)}


def table_of(images: ImageSet, about=ABOUT, labels=None):
    table = pa.table(
        {"image": as_column(images.images), "label": pa.array(images.labels) if labels is None else labels}
    )
    return table.replace_schema_metadata({"mixflow": json.dumps(about)})


def nan_image():
    images = latents(20)
    images.images[7, 0, 3, 3] = np.nan
    return table_of(images)


def infinite_image():
    images = latents(20)
    images.images[19, 0, 0, 0] = -np.inf
    return table_of(images)


def label(value):
    images = latents(20)
    images.labels[11] = value
    return table_of(images)


def null_label():
    images = latents(20)
    return table_of(images, labels=pa.array([*images.labels[:11].tolist(), None, *images.labels[12:].tolist()]))


def null_image():
    images = pixels(20)
    values = [None if i == 7 else image.tobytes() for i, image in enumerate(images.images)]
    table = pa.table({"image": pa.array(values, pa.binary(64)), "label": pa.array(images.labels)})
    return table.replace_schema_metadata(
        {"mixflow": json.dumps({**ABOUT, "columns": {"image": {**IMAGE, "dtype": "uint8"}}})}
    )


BAD = {
    "nan": (nan_image, ["finite", "row 7"]),
    "infinity": (infinite_image, ["finite", "row 19"]),
    "label too large": (lambda: label(10), ["[0, 9]", "got 10 in row 11"]),
    "label negative": (lambda: label(-1), ["[0, 9]", "got -1 in row 11"]),
    "no label": (null_label, ["row 11"]),
    "no image": (null_image, ["row 7"]),
    "fractional labels": (lambda: table_of(latents(20), labels=pa.array([0.5] * 20)), ["schema"]),
    "version": (lambda: table_of(latents(20), {**ABOUT, "schema_version": 2}), ["schema version 3, got 2"]),
    "no metadata": (lambda: table_of(latents(20)).replace_schema_metadata(None), ["schema"]),
    "wrong shape in the metadata": (
        lambda: table_of(latents(20), {**ABOUT, "columns": {"image": {**IMAGE, "shape": [1, 8, 9]}}}),
        ["schema"],
    ),
    "two axes": (lambda: table_of(latents(20), {**ABOUT, "columns": {"image": {**IMAGE, "shape": [64]}}}), ["NCHW"]),
    "objects": (lambda: table_of(latents(20), {**ABOUT, "columns": {"image": {**IMAGE, "dtype": "O"}}}), ["numbers"]),
    "another byte order": (
        lambda: table_of(latents(20), {**ABOUT, "columns": {"image": {**IMAGE, "dtype": ">f4"}}}),
        ["image", "native"],
    ),
    "no side": (lambda: table_of(latents(20), {**ABOUT, "columns": {"image": {**IMAGE, "shape": [0]}}}), ["sides"]),
    "no columns": (lambda: table_of(latents(20), {**ABOUT, "columns": ["image"]}), ["schema"]),
    "no image column": (lambda: table_of(latents(20), {**ABOUT, "columns": {}}), ["schema", "image"]),
    "classes": (lambda: table_of(latents(20), {**ABOUT, "num_classes": 10**18}), ["num_classes", "got 1000000000"]),
    "a codec that is none": (lambda: table_of(latents(20), {**ABOUT, "codec": {"kind": 3}}), ["codec", "kind"]),
    "nested metadata": (
        lambda: table_of(latents(20)).replace_schema_metadata({"mixflow": "[" * 10**5}),
        ["nested too deeply"],
    ),
    "no label column": (lambda: table_of(latents(20)).drop_columns(["label"]), ["schema", "label"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_shard_is_named_in_one_line(tmp_path, kind):
    written(tmp_path, latents(40), latents(20))
    make, named = BAD[kind]
    pq.write_table(make(), tmp_path / "train-00001.parquet")
    with pytest.raises(ValueError, match=r"train-00001\.parquet") as caught:
        read(tmp_path, "train")
    assert "\n" not in str(caught.value)
    for word in named:
        assert word in str(caught.value)


def test_files_that_are_no_shards_are_named_in_one_line(tmp_path):
    written(tmp_path)
    content = (tmp_path / "train-00001.parquet").read_bytes()
    for spoilt in (b"not parquet", b"", content[: len(content) // 2]):
        (tmp_path / "train-00001.parquet").write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"train-00001\.parquet must be a Parquet file") as caught:
            read(tmp_path, "train")
        assert "\n" not in str(caught.value)


def test_shards_of_different_shapes_are_refused(tmp_path):
    written(tmp_path)
    other = tmp_path / "other"
    written(other, pixels(16, size=4))
    (other / "train-00000.parquet").rename(tmp_path / "train-00002.parquet")
    with pytest.raises(ValueError, match=r"one shape, codec and number of classes; train-00002\.parquet differs"):
        read(tmp_path, "train")


def test_a_missing_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold train-\*\.parquet, got none in .*; write it"):
        read(tmp_path, "train")


def _open_at_once(directory, cache, start, out):
    start.wait()
    found = open_shards(directory, Manifest.describe(directory, {}), cache)
    out.put({split: (np.array(s.images), np.array(s.labels), type(s.images).__name__) for split, s in found.items()})


def test_processes_that_race_for_the_memory_map_get_the_data(tmp_path):
    data, cache = tmp_path / "data", tmp_path / "cache"
    splits = written(data, pixels(3000))
    context = multiprocessing.get_context("fork")
    start, out = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_open_at_once, args=(data, cache, start, out)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    for answer in answers:
        for split, (images, labels, kind) in answer.items():
            np.testing.assert_array_equal(images, splits[split].images)
            np.testing.assert_array_equal(labels, splits[split].labels)
            assert kind == "memmap"
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == [
        f"{Manifest.describe(data, {}).digest[:16]}-3"
    ]
    assert not list(cache.glob(".unpacking-*"))


def test_a_full_disk_under_the_memory_maps_is_one_line_and_leaves_nothing(tmp_path, small_disk):
    """A map of a file with holes would be the end of the process, by SIGBUS."""
    data = tmp_path / "data"
    written(data, pixels(20000), rows=5000)
    with pytest.raises(NoRoomError) as caught:
        open_shards(data, Manifest.describe(data, {}), small_disk / "cache")
    size = 20000 * pixels(1).images[0].nbytes
    found = re.fullmatch(
        r"the disk must have room for \S+train-images\.npy, got ([\d,]+) bytes free of ([\d,]+) needed; free some "
        "and run the same command again",
        str(caught.value),
    )
    assert found, caught.value
    free, needed = (int(number.replace(",", "")) for number in found.groups())
    assert free < size <= needed < size + 1000
    assert not [path for path in (small_disk / "cache").iterdir() if path.is_dir()]


def test_other_data_get_another_memory_map_and_equal_data_are_not_read_again(tmp_path):
    first, second, cache = tmp_path / "a", tmp_path / "b", tmp_path / "cache"
    written(first)
    splits = written(second, pixels(40, seed=9))
    open_shards(first, Manifest.describe(first, {}), cache)
    np.testing.assert_array_equal(
        open_shards(second, Manifest.describe(second, {}), cache)["train"].images, splits["train"].images
    )
    manifest = Manifest.describe(second, {})
    for path in second.iterdir():
        path.unlink()
    np.testing.assert_array_equal(open_shards(second, manifest, cache)["train"].images, splits["train"].images)


def test_pixels_and_model_values_are_inverse(tmp_path):
    every = ImageSet(np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8), np.arange(4))
    x1 = every.x1(slice(None))
    assert x1.dtype == torch.float32
    assert (x1.min().item(), x1.max().item()) == (-1.0, 1.0)
    np.testing.assert_allclose(x1.double().numpy(), np.arange(256).reshape(4, 1, 8, 8) * 2 / 255 - 1, atol=1e-7)
    assert torch.equal(to_pixels(x1), torch.from_numpy(every.images))
    assert to_pixels(torch.tensor([-9.0, 9.0, 1 / 255 - 0.001, 1 / 255 + 0.001])).tolist() == [0, 255, 127 + 1, 128]
    floats = latents(4)
    assert torch.equal(floats.x1(np.array([2, 0])), torch.from_numpy(floats.images[[2, 0]]))


# ------------------------------------------------------------------------------------------------------ digits


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    source, splits = load_digits(), digits(8, 597)
    assert [splits[s].images.shape for s in ("train", "held_out")] == [(1200, 1, 8, 8), (597, 1, 8, 8)]
    images = np.concatenate([splits[s].images[:, 0] for s in ("train", "held_out")]).astype(float)
    labels = np.concatenate([splits[s].labels for s in ("train", "held_out")])
    shades = np.round(images * 16 / 255)
    assert np.abs(images - shades * 255 / 16).max() <= 0.5
    found = sorted((shade.tolist(), label) for shade, label in zip(shades, labels.tolist(), strict=True))
    truth = zip(source.images, source.target.tolist(), strict=True)
    assert found == sorted((image.tolist(), label) for image, label in truth)


def test_the_splits_of_digits_are_disjoint_and_balanced():
    splits = digits(8, 597)
    train, held_out = ({image.tobytes() for image in splits[s].images} for s in ("train", "held_out"))
    assert not train & held_out
    counts = np.bincount(splits["held_out"].labels, minlength=10)
    assert counts.sum() == 597
    assert counts.min() >= 40
    assert counts.max() <= 80


def test_enlarged_digits_show_the_same_images():
    small, large = digits(8, 597)["train"], digits(32, 597)["train"]
    assert large.images.shape == (1200, 1, 32, 32)
    np.testing.assert_array_equal(small.labels, large.labels)
    shrunk = large.images.reshape(1200, 8, 4, 8, 4).mean((2, 4))
    for a, b in zip(small.images[:50, 0], shrunk[:50], strict=True):
        assert np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1] > 0.95


# ------------------------------------------------------------------------------------------------------- order


def test_each_epoch_is_a_permutation_and_batches_cross_epochs():
    rows = np.concatenate([batch_rows(3, start, 16, 40) for start in range(0, 400, 16)])
    epochs = rows.reshape(10, 40)
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
    assert len({tuple(epoch) for epoch in epochs}) == 10
    assert not np.array_equal(epochs[0], np.arange(40))


@pytest.mark.parametrize(("start", "count"), [(0, 1), (39, 2), (33, 100), (250, 400)])
def test_rows_depend_on_their_position_alone(start, count):
    one_by_one = [int(batch_rows(3, position, 1, 40)[0]) for position in range(start, start + count)]
    assert batch_rows(3, start, count, 40).tolist() == one_by_one
    assert batch_rows(4, start, 40, 40).tolist() != batch_rows(3, start, 40, 40).tolist()


def test_a_shard_holds_the_rows_and_numbers_of_its_position():
    run, data = run_config(model={"class_dropout_prob": 0.5}), pixels()
    step, shard, size = 4, 5, 2
    batch = shard_batch(run, data, step, shard)
    start = step * 16 + shard * size
    rows = [int(batch_rows(run.seed, start + i, 1, 40)[0]) for i in range(size)]
    assert torch.equal(to_pixels(batch.x1), torch.from_numpy(data.images[rows]))
    position = step * 8 + shard
    dropped = torch.rand(size, generator=generator(run.seed, "dropout", position)) < 0.5
    assert batch.y.tolist() == [10 if drop else int(data.labels[row]) for row, drop in zip(rows, dropped, strict=True)]
    assert torch.equal(batch.x0, torch.randn(size, 1, 8, 8, generator=generator(run.seed, "noise", position)))
    assert torch.equal(batch.u, torch.rand(size, 2, generator=generator(run.seed, "time", position)))


def test_joined_shards_keep_their_order():
    shards = [shard_batch(run_config(), pixels(), 0, shard) for shard in (2, 3, 4)]
    joined = join(shards)
    for key in ("x1", "y", "x0", "u"):
        assert torch.equal(getattr(joined, key), torch.cat([getattr(s, key) for s in shards]))
    assert join(shards[:1]) is shards[0]


def test_no_two_positions_of_a_run_share_their_noise():
    run, data = run_config(), pixels()
    noise = torch.cat([shard_batch(run, data, step, shard).x0 for step in range(10) for shard in range(8)])
    assert len(torch.unique(noise[:, 0, 0, 0])) == 160
    assert abs(noise.mean().item()) < 0.05
    assert abs(noise.std().item() - 1) < 0.05


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_labels_of_any_integer_type_are_read_as_int64(tmp_path, dtype):
    images, labels = pixels()[:2]
    written(tmp_path, ImageSet(images, labels.astype(dtype)))
    found, _ = read(tmp_path, "train")
    assert found.labels.dtype == np.int64
    assert (found.labels == labels).all()


def test_an_unpacked_set_that_lost_a_file_is_unpacked_again(tmp_path):
    splits = written(tmp_path / "shards")
    manifest = Manifest.describe(tmp_path / "shards", {})
    open_shards(tmp_path / "shards", manifest, tmp_path / "cache")
    (unpacked,) = (tmp_path / "cache").glob("*/train-labels.npy")
    unpacked.unlink()
    again = open_shards(tmp_path / "shards", manifest, tmp_path / "cache")
    assert (again["train"].labels == splits["train"].labels).all()
