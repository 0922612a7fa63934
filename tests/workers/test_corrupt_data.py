"""Shards that are cut, altered or replaced while they are in use are refused by name, and never read as others."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from orchestration.inputs import odd_scales
from orchestration.storage import open_storage
from workers import shards
from workers.data import ImageSet
from workers.manifest import CorruptError, Manifest
from workers.shards import facts_of, open_shards, read_shards, write_shards


def written(directory: Path, seed: int = 0) -> Path:
    numbers = np.random.default_rng(seed)
    images = numbers.integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    part = ImageSet(images, np.arange(40, dtype=np.int64) % 10)
    write_shards({"train": part, "held_out": part}, directory, num_classes=10, rows=16)
    return directory


def test_a_shard_cut_anywhere_is_refused_by_name(tmp_path):
    shard = written(tmp_path) / "train-00001.parquet"
    whole = shard.read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 40):
        shard.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"train-00001\.parquet must be a Parquet file") as caught:
            list(read_shards(tmp_path, "train"))
        assert "\n" not in str(caught.value)


def test_one_altered_byte_anywhere_is_found(tmp_path):
    storage = open_storage(str(tmp_path / "store"))
    storage.publish(written(tmp_path / "data"), "set")
    shard = tmp_path / "store" / "set" / "train-00001.parquet"
    whole, numbers = shard.read_bytes(), random.Random(1)
    for place in numbers.sample(range(len(whole)), 40):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << numbers.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(CorruptError, match=r"train-00001\.parquet has another SHA-256"):
            storage.fetch("set", tmp_path / "unused")
    shard.write_bytes(whole)
    storage.fetch("set", tmp_path / "unused")


def test_a_shard_replaced_while_it_is_unpacked_is_refused(tmp_path, monkeypatch):
    """The other shard is as good as the first, of the same size: only its content tells."""
    mine, other, cache = written(tmp_path / "mine"), written(tmp_path / "other", seed=1), tmp_path / "cache"
    manifest, before = Manifest.describe(mine, {}), (mine / "train-00001.parquet").read_bytes()

    def replaced_first(directory, split):
        (directory / "train-00001.parquet").write_bytes((other / "train-00001.parquet").read_bytes())
        return read_shards(directory, split)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_shards", replaced_first)
        with pytest.raises(CorruptError, match=r"train-00001\.parquet has another SHA-256"):
            open_shards(mine, manifest, cache)
    assert not [path for path in cache.iterdir() if path.is_dir()], "what was unpacked is not used"
    (mine / "train-00001.parquet").write_bytes(before)
    assert len(open_shards(mine, manifest, cache)["train"].labels) == 40


def test_a_shard_replaced_between_restarts_is_refused(tmp_path):
    """Also with its old size and time, in a process that found it sound before."""
    storage = open_storage(str(tmp_path / "store"))
    storage.publish(written(tmp_path / "data"), "set")
    storage.fetch("set", tmp_path / "unused")
    shard = tmp_path / "store" / "set" / "train-00001.parquet"
    then, other = shard.stat(), written(tmp_path / "other", seed=1) / "train-00001.parquet"
    shard.write_bytes(other.read_bytes()[: then.st_size].ljust(then.st_size))
    os.utime(shard, ns=(then.st_atime_ns, then.st_mtime_ns))
    with pytest.raises(CorruptError, match=r"train-00001\.parquet has another SHA-256"):
        storage.fetch("set", tmp_path / "unused")


@pytest.mark.parametrize(("scale", "is_odd"), [(1, False), (0.01, True), (100, True)])
def test_values_of_another_scale_are_told(tmp_path, scale, is_odd):
    values = np.random.default_rng(0).standard_normal((40, 4, 8, 8)).astype(np.float32) * scale
    write_shards({"train": ImageSet(values, np.arange(40) % 10)}, tmp_path, num_classes=10)
    facts = facts_of(tmp_path, "train")
    assert facts["rms"] == pytest.approx(float(np.sqrt((values.astype(np.float64) ** 2).mean())), rel=1e-5)
    warnings = odd_scales({"train": facts})
    assert len(warnings) == is_odd
    assert not is_odd or "compare the codec's scale" in warnings[0]
