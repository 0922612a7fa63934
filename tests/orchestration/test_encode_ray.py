"""Encoding on Ray Data: the same bytes from any number of workers, on any storage, and after kill -9."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sources import SIZE, captioned_folder, class_folder, parquet, pictures, webdataset
from PIL import Image
from tiny_models import tiny_vae
from tiny_sd3 import tiny_text_encoders

from orchestration.encode import Task, Worker, _follow, _name, _piece, encode
from orchestration.parts import Parts
from orchestration.storage import Storage, open_storage
from workers.codecs import CodecConfig, directory_hash
from workers.data import Split
from workers.encode import Encoder, Images, Plan, plan_encoding
from workers.manifest import Manifest
from workers.shards import Statistics, captions_path, read_captions, read_shards, shard_path, write_statistics

CPU = torch.device("cpu")
CPUS = 4
PATH = "data/0123"
PIXELS = CodecConfig(kind="identity", image_size=SIZE)
DRIVER = """
import sys, ray
from orchestration.encode import encode
from orchestration.storage import open_storage
from workers.codecs import CodecConfig
from workers.encode import Images
address, uri, path, settings = sys.argv[1:]
ray.init(address=address, logging_level="ERROR", log_to_driver=False)
encode(
    open_storage(uri), path, Images.model_validate_json(settings), CodecConfig(kind="identity", image_size=32),
    num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0, tell=lambda *told: None,
)
"""


@pytest.fixture(scope="module")
def cluster(moto_endpoint: str) -> Iterator[str]:
    """The address of a cluster of four CPUs, whatever this machine has, whose workers know moto."""
    import ray

    env = {"AWS_ENDPOINT_URL": moto_endpoint, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    context = ray.init(
        address="local",
        num_cpus=CPUS,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        runtime_env={"env_vars": {**env, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}},
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


def run(storage: Storage, settings: Images, codec: CodecConfig = PIXELS, *, workers: int = 1, **more: Any) -> Manifest:
    told = more.pop("tell", lambda *told: None)
    return encode(
        storage,
        PATH,
        settings,
        codec,
        num_workers=workers,
        cpus_per_worker=1.0,
        gpus_per_worker=0,
        tell=told,
        **more,
    )


def without_ray(plan: Plan, directory: Path) -> dict[str, str]:
    """SHA-256 of what the same plan gives in this process, shard after shard."""
    encoder, statistics, unreadable = Encoder(plan.recipe, CPU), dict[Split, list[Statistics]](), []
    directory.mkdir()
    for shard in plan.shards:
        encoded = encoder.encode(shard, shard_path(directory, shard.split, shard.number))
        assert encoded.statistics
        statistics.setdefault(shard.split, []).append(encoded.statistics)
        unreadable += [{"split": shard.split, "name": name, "reason": reason} for name, reason in encoded.unreadable]
    write_statistics(statistics, directory)
    (directory / "unreadable.json").write_text(json.dumps(unreadable, indent=1))
    for number, part in enumerate(plan.caption_parts):
        encoder.encode_captions(part, captions_path(directory, number))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def hashes(manifest: Manifest) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in manifest.files.items()}


def wait_until_free() -> None:
    """Until no worker holds a CPU: those of a dead driver live on for a moment."""
    import ray

    end = time.monotonic() + 60
    while ray.available_resources().get("CPU") != CPUS:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.1)


@pytest.mark.ray
def test_any_number_of_workers_writes_the_same_bytes(
    cluster: str, tmp_path: Path, moto_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.shards.CAPTIONS_A_FILE", 5)
    texts = tmp_path / "texts"
    tiny_text_encoders(texts)
    digest = tiny_vae(tmp_path / "vae")
    codec = CodecConfig(kind="vae", image_size=SIZE, weights=str(tmp_path / "vae"), sha256=digest, scale=0.5)
    source = Path(captioned_folder(tmp_path / "source", pictures(60)))
    (source / "0007.png").write_bytes(b"no image")
    settings = Images(
        source=str(source),
        held_out=11,
        flip=True,
        batch_size=3,
        rows_per_shard=16,
        max_unreadable=1,
        text_encoders=str(texts),
        text_encoders_sha256=directory_hash(texts),
    )
    plan = plan_encoding(settings, codec)
    expected = without_ray(plan, tmp_path / "expected")
    assert len(plan.caption_parts) > 1
    assert len(expected) == 7 + 1 + 2 + len(plan.caption_parts)  # shards; statistics, unreadable images; captions
    for workers, uri in ((1, str(tmp_path / "1")), (2, moto_s3), (4, str(tmp_path / "4"))):
        storage, told = open_storage(uri), list[tuple[Any, ...]]()
        manifest = run(storage, settings, codec, workers=workers, tell=lambda *now, told=told: told.append(now))
        assert hashes(manifest) == expected, workers
        assert storage.manifest(PATH) == manifest
        assert sorted(storage.list("")) == sorted(f"{PATH}/{name}" for name in [*expected, "manifest.json"])
        assert [done for _, done, _, _ in told] == sorted(done for _, done, _, _ in told)
        assert told[-1][:3] == ("data", 60, 60)
        assert told[-1][3]["encode/unreadable"] == 1
        assert manifest.meta["codec"] == codec.description
        assert (manifest.meta["source"], manifest.meta["num_images"]) == (str(source), 60)
        assert manifest.meta["num_unreadable"] == 1
        found = storage.fetch(PATH, tmp_path / "fetched")
        assert [name for part in read_captions(found) for name in part.captions] == [*plan.captions, ""]
        rows = {
            split: sum(len(part.labels) for part, _ in read_shards(found, split)) for split in ("train", "held_out")
        }
        (bad,) = json.loads((found / "unreadable.json").read_text())
        assert rows == ({"train": 96, "held_out": 11} if bad["split"] == "train" else {"train": 98, "held_out": 10})
        assert bad["name"] == "0007.png"


def photographs(root: Path, count: int) -> str:
    """Photographs that take a tenth of a second to read."""
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("china.jpg")).resize((2560, 1708))
    for number in range(count):
        path = root / f"class{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.rotate(number).save(path, quality=90)
    return str(root)


@pytest.mark.ray
def test_kill_9_of_the_driver_loses_only_what_was_not_finished(
    cluster: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Images(source=photographs(tmp_path / "source", 40), held_out=4, rows_per_shard=2)
    plan = plan_encoding(settings, PIXELS)
    expected = without_ray(plan, tmp_path / "expected")
    storage, directory = open_storage(str(tmp_path / "ws")), tmp_path / "ws" / PATH
    command = [sys.executable, "-c", DRIVER, cluster, storage.uri, PATH, settings.model_dump_json()]
    with subprocess.Popen(command) as driver:
        while len(storage.list("parts")) < 4:
            assert driver.poll() is None
            time.sleep(0.02)
        driver.kill()
    wait_until_free()
    finished = sorted(Path(record).name.removesuffix(".json") for record in storage.list("parts"))
    assert 4 <= len(finished) < len(plan.shards)
    assert storage.manifest(PATH) is None
    altered, kept = finished[0], finished[1:]
    content = bytearray((directory / altered).read_bytes())
    content[-1] ^= 1
    (directory / altered).write_bytes(content)
    (directory / "train-00099.parquet").write_bytes(b"of a larger source")
    written = {name: (directory / name).stat().st_ino for name in kept}
    with caplog.at_level(logging.WARNING):
        manifest = run(storage, settings)
    assert hashes(manifest) == expected
    assert {name: (directory / name).stat().st_ino for name in kept} == written
    assert [record.getMessage() for record in caplog.records if record.name == "orchestration.encode"] == [
        f"{altered} is encoded again: its content is not what its record says"
    ]
    assert not (directory / "train-00099.parquet").exists()
    assert storage.list("parts") == []


@pytest.mark.ray
def test_what_goes_wrong_on_a_worker_is_one_line_and_frees_the_cluster(cluster: str, tmp_path: Path) -> None:
    source, storage = Path(class_folder(tmp_path / "source", pictures(40))), open_storage(str(tmp_path / "ws"))
    for name in ("one", "two"):
        (source / name / "a.png").write_bytes(b"no image")
    settings = Images(source=str(source), held_out=8, rows_per_shard=100, max_unreadable=1)
    rule = (
        r"data.images.max_unreadable must be at least .* got 1 and 2 of the first \d+ images: one/a.png \(is no image"
    )
    with pytest.raises(ValueError, match=rule) as caught:
        run(storage, settings)
    assert "\n" not in str(caught.value)
    wait_until_free()
    assert storage.manifest(PATH) is None
    digest = tiny_vae(tmp_path / "vae")
    codec = CodecConfig(kind="vae", image_size=SIZE, weights=str(tmp_path / "vae"), sha256="0" * 64, scale=0.5)
    with pytest.raises(ValueError, match=f"must have the SHA-256 0+, got {digest}") as caught:
        run(storage, settings, codec)
    assert "\n" not in str(caught.value)
    wait_until_free()


# ---------------------------------------------------------------------------------------------------- without a cluster


@pytest.fixture
def work(tmp_path: Path) -> tuple[Worker, dict[str, Any], Path, Path]:
    """A worker, a piece of work, and where its file and its record lie."""
    plan = plan_encoding(Images(source=class_folder(tmp_path / "source", pictures(40)), held_out=8), PIXELS)
    worker = Worker(Task(plan.recipe, Parts(open_storage(str(tmp_path / "ws")), PATH, "records"), 1, False))
    piece = json.loads(json.dumps({"name": "held_out-00000.parquet", "digest": "abc", "shard": plan.shards[-1]}))
    file = tmp_path / "ws" / PATH / piece["name"]
    return worker, piece, file, tmp_path / "ws" / "records" / f"{piece['name']}.json"


def test_a_finished_piece_is_not_done_again(work: tuple[Worker, dict[str, Any], Path, Path]) -> None:
    worker, piece, file, _ = work
    first = worker.do(piece)
    assert first["is_new"]
    written = file.stat().st_ino
    again = worker.do(piece)
    assert not again["is_new"]
    assert json.loads(json.dumps(first["record"])) == again["record"]
    assert file.stat().st_ino == written
    assert first["record"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


ALTERED = {
    "is missing": lambda piece, file, record: file.unlink(),
    "content is not what": lambda piece, file, record: file.write_bytes(file.read_bytes()[:-1]),
    "record is unreadable": lambda piece, file, record: record.write_text("{"),
    "inputs or settings have changed": lambda piece, file, record: piece.update(digest="other"),
}


@pytest.mark.parametrize("why", ALTERED)
def test_a_piece_that_is_not_what_its_record_says_is_done_again(
    work: tuple[Worker, dict[str, Any], Path, Path], why: str
) -> None:
    worker, piece, file, record = work
    first = worker.do(piece)["record"]
    ALTERED[why](piece, file, record)
    again = worker.do(piece)
    assert again["is_new"]
    assert why in again["why_again"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == first["sha256"] == again["record"]["sha256"]
    assert not worker.do(piece)["is_new"]


@pytest.mark.parametrize("make", [class_folder, webdataset, parquet])
def test_an_image_replaced_by_one_of_the_same_size_makes_its_piece_another(make: Any, tmp_path: Path) -> None:
    settings = Images(source=make(tmp_path / "source", pictures(40)), held_out=8, rows_per_shard=10)

    def digests() -> list[str]:
        plan = plan_encoding(settings, PIXELS)
        pieces = [_piece(plan.recipe.identity, _name(shard), shard=shard) for shard in plan.shards]
        return [json.loads(zlib.decompress(piece))["digest"] for piece in pieces]

    first, place = digests(), plan_encoding(settings, PIXELS).shards[1].places[0]
    assert digests() == first
    file = tmp_path / "source" / place.file
    content, about = bytearray(file.read_bytes()), file.stat()
    content[place.at + 30] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert file.stat().st_size == about.st_size
    changed = [number for number, (now, then) in enumerate(zip(digests(), first, strict=True)) if now != then]
    assert changed == [1] if make is class_folder else 1 in changed


def test_a_piece_without_a_readable_image_is_remembered_without_a_file(
    work: tuple[Worker, dict[str, Any], Path, Path],
) -> None:
    worker, piece, file, _ = work
    for _, name, _, size, _ in piece["shard"][2]:
        (worker.task.recipe.root / name).write_bytes(bytes(size))
    assert len(worker.do(piece)["record"]["unreadable"]) == 8
    assert not file.exists()
    assert not worker.do(piece)["is_new"]


def spoilt(root: Path, names: Iterable[str]) -> None:
    for name in names:
        (root / name).write_bytes(b"no image")


def follow(settings: Images, tmp_path: Path, least_held_out: int = 1) -> tuple[str, int]:
    """What was wrong, in one line, and after how many pieces it was said."""
    plan, pieces = plan_encoding(settings, PIXELS), list[str]()
    worker = Worker(Task(plan.recipe, Parts(open_storage(str(tmp_path / "ws")), PATH, "records"), 1, False))

    def answers() -> Iterator[dict[str, Any]]:
        for shard in plan.shards:
            pieces.append(_name(shard))
            yield worker.do(json.loads(zlib.decompress(_piece(plan.recipe.identity, _name(shard), shard=shard))))

    with pytest.raises(ValueError, match=r"data\.images") as caught:
        _follow(answers(), plan, least_held_out, lambda *told: None)
    assert "\n" not in str(caught.value)
    return str(caught.value), len(pieces)


def test_too_many_unreadable_images_are_named(tmp_path: Path) -> None:
    source = Path(class_folder(tmp_path / "source", pictures(40)))
    settings = Images(source=str(source), held_out=8, rows_per_shard=10, max_unreadable=3)
    first = [place.name for place in plan_encoding(settings, PIXELS).shards[0].places[:5]]
    spoilt(source, first)
    message, pieces = follow(settings, tmp_path)
    why = "(is no image of a known format)"
    assert pieces == 1
    assert message == (
        "data.images.max_unreadable must be at least the number of unreadable images, got 3 and 5 of the first 10 "
        f"images: {first[0]} {why}, {first[1]} {why}, {first[2]} {why} and 2 more; raise it, which keeps what is "
        "encoded already, or mend them"
    )


def test_too_few_held_out_images_are_found_as_soon_as_they_are_certain(tmp_path: Path) -> None:
    source = Path(class_folder(tmp_path / "source", pictures(120)))
    settings = Images(source=str(source), held_out=20, rows_per_shard=10, max_unreadable=50)
    plan = plan_encoding(settings, PIXELS)
    assert [shard.split for shard in plan.shards] == ["train"] * 10 + ["held_out"] * 2
    spoilt(source, [plan.shards[0].places[0].name, *(place.name for place in plan.shards[10].places[:4])])
    message, pieces = follow(settings, tmp_path, least_held_out=17)
    assert pieces == 11
    assert message.startswith("data.images.held_out must leave at least 17 readable images, got 20 with 4 unreadable: ")
    assert f"{plan.shards[10].places[2].name} (is no image of a known format) and 1 more; mend" in message


def test_a_class_without_a_readable_training_image_is_named_at_once(tmp_path: Path) -> None:
    source = Path(class_folder(tmp_path / "source", pictures(120)))
    settings = Images(source=str(source), held_out=8, rows_per_shard=4, max_unreadable=50)
    shards = plan_encoding(settings, PIXELS).shards
    places = [(place.name, shard.number) for shard in shards if shard.split == "train" for place in shard.places]
    fours = [(name, number) for name, number in places if name.startswith("four/")]
    spoilt(source, [name for name, _ in fours])
    message, pieces = follow(settings, tmp_path)
    assert pieces == max(number for _, number in fours) + 1 < len(shards)
    assert message == (
        "data.images.source must have a readable training image of every class, got none of class 2 (four); mend them, "
        "or add some"
    )


@pytest.mark.parametrize("kind", ["local", "moto"])
def test_a_directory_is_committed_once(kind: str, tmp_path: Path, moto_s3: str) -> None:
    storage = open_storage(moto_s3 if kind == "moto" else str(tmp_path / "ws"))
    file = tmp_path / "file"
    file.write_bytes(b"content")
    entry = storage.put_file(file, "dir/file")
    assert storage.read("dir/file") == b"content"
    assert (entry.size, entry.sha256) == (7, hashlib.sha256(b"content").hexdigest())
    manifest = Manifest({"file": entry}, {"seconds": 1})
    assert storage.manifest("dir") is None
    assert storage.commit("dir", manifest) == manifest
    assert storage.commit("dir", Manifest({"file": entry}, {"seconds": 2})) == manifest
    with pytest.raises(FileExistsError, match="other content is published"):
        storage.commit("dir", Manifest({}, {}))
