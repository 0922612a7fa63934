"""Parquet shards, their memory maps, and the order of batches."""

from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from worker_toys import latents, pixels, run_config

from mixflow_core.rng import generator
from workers.data import (
    ImageSet,
    batch_rows,
    digits,
    join,
    open_shards,
    read_shards,
    shard_batch,
    to_pixels,
    write_shards,
)
from workers.manifest import Manifest

ABOUT = {"schema_version": 1, "shape": [1, 8, 8], "dtype": "float32", "num_classes": 10}


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
        found, num_classes = read_shards(tmp_path, split)
        assert num_classes == 10
        for a, b in zip(found, splits[split], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_statistics_are_those_of_the_images(tmp_path):
    splits = written(tmp_path)
    found = json.loads((tmp_path / "statistics.json").read_text())["train"]
    values = [int(v) for v in splits["train"].images.reshape(-1)]
    mean = sum(values) / len(values)
    assert found["num_images"] == 40
    assert found["mean"] == pytest.approx([mean])
    assert found["std"] == pytest.approx([(sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5])
    assert found["per_class"] == [int((splits["train"].labels == k).sum()) for k in range(10)]


def table_of(images: ImageSet, about=ABOUT, labels=None):
    flat = pa.FixedSizeListArray.from_arrays(pa.array(images.images.reshape(-1)), images.images[0].size)
    table = pa.table({"image": flat, "label": pa.array(images.labels) if labels is None else labels})
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


def null_pixel():
    images = pixels(20)
    values = pa.array(
        [None if i == 7 * 64 + 5 else int(v) for i, v in enumerate(images.images.reshape(-1))], pa.uint8()
    )
    flat = pa.FixedSizeListArray.from_arrays(values, 64)
    table = pa.table({"image": flat, "label": pa.array(images.labels)})
    return table.replace_schema_metadata({"mixflow": json.dumps({**ABOUT, "dtype": "uint8"})})


BAD = {
    "nan": (nan_image, ["finite", "row 7"]),
    "infinity": (infinite_image, ["finite", "row 19"]),
    "label too large": (lambda: label(10), ["[0, 9]", "got 10 in row 11"]),
    "label negative": (lambda: label(-1), ["[0, 9]", "got -1 in row 11"]),
    "no label": (null_label, ["row 11"]),
    "no pixel": (null_pixel, ["row 7"]),
    "fractional labels": (lambda: table_of(latents(20), labels=pa.array([0.5] * 20)), ["schema"]),
    "version": (lambda: table_of(latents(20), {**ABOUT, "schema_version": 2}), ["schema version 1, got 2"]),
    "no metadata": (lambda: table_of(latents(20)).replace_schema_metadata(None), ["schema"]),
    "wrong shape in the metadata": (lambda: table_of(latents(20), {**ABOUT, "shape": [1, 8, 9]}), ["schema"]),
    "no label column": (lambda: table_of(latents(20)).drop_columns(["label"]), ["schema", "label"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_shard_is_named_in_one_line(tmp_path, kind):
    written(tmp_path, latents(40), latents(20))
    make, named = BAD[kind]
    pq.write_table(make(), tmp_path / "train-00001.parquet")
    with pytest.raises(ValueError, match=r"train-00001\.parquet") as caught:
        read_shards(tmp_path, "train")
    assert "\n" not in str(caught.value)
    for word in named:
        assert word in str(caught.value)


def test_files_that_are_no_shards_are_named_in_one_line(tmp_path):
    written(tmp_path)
    content = (tmp_path / "train-00001.parquet").read_bytes()
    for spoilt in (b"not parquet", b"", content[: len(content) // 2]):
        (tmp_path / "train-00001.parquet").write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"train-00001\.parquet must be a Parquet file") as caught:
            read_shards(tmp_path, "train")
        assert "\n" not in str(caught.value)


def test_shards_of_different_shapes_are_refused(tmp_path):
    written(tmp_path)
    other = tmp_path / "other"
    written(other, pixels(16, size=4))
    (other / "train-00000.parquet").rename(tmp_path / "train-00002.parquet")
    with pytest.raises(ValueError, match=r"one shape and number of classes; train-00002\.parquet differs"):
        read_shards(tmp_path, "train")


def test_a_missing_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold train-\*\.parquet, got none in .*; write it"):
        read_shards(tmp_path, "train")


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
        Manifest.describe(data, {}).digest[:16]
    ]
    assert not list(cache.glob(".unpacking-*"))


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
    images, labels = pixels()
    written(tmp_path, ImageSet(images, labels.astype(dtype)))
    read, _ = read_shards(tmp_path, "train")
    assert read.labels.dtype == np.int64
    assert (read.labels == labels).all()


def test_an_unpacked_set_that_lost_a_file_is_unpacked_again(tmp_path):
    splits = written(tmp_path / "shards")
    manifest = Manifest.describe(tmp_path / "shards", {})
    open_shards(tmp_path / "shards", manifest, tmp_path / "cache")
    (unpacked,) = (tmp_path / "cache").glob("*/train-labels.npy")
    unpacked.unlink()
    again = open_shards(tmp_path / "shards", manifest, tmp_path / "cache")
    assert (again["train"].labels == splits["train"].labels).all()
