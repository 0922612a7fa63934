"""Faults between a storage and its server, and of the server: what may pass is waited for, the rest fails at once."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import urllib3
from raw_storage import Raw
from s3_servers import Ceph, Control, make_bucket

from orchestration import retry, s3_storage
from orchestration.retry import PATIENT, PREFLIGHT, GaveUpError, Patience, Retries, TransientError
from orchestration.s3_storage import S3Storage
from orchestration.storage import CorruptError, open_storage
from workers.checkpoint import CheckpointStore, TrainState
from workers.disk import NoRoomError, PermanentError, room_for

LARGE = 9 * 2**20  # bytes: two parts
CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "storage_campaign.py"


def s3(uri: str, deadline_s: float = 60, read_s: float = 30) -> S3Storage:
    """The storage at a URI with another patience than a run's."""
    bucket, prefix = uri.removeprefix("s3://").split("/", 1)
    return S3Storage(bucket, prefix, Patience(deadline_s, connect_s=5, read_s=read_s, longest_wait_s=0.5))


@pytest.mark.parametrize(
    "error",
    [
        urllib3.exceptions.SSLError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred"),
        urllib3.exceptions.ProtocolError("Connection broken: ConnectionResetError(104, 'Connection reset by peer')"),
        ValueError("invalid literal for int() with base 10: '1x'"),
        KeyError("ContentLength"),
    ],
)
def test_what_botocore_lets_through_of_a_broken_or_altered_answer_is_asked_for_again(error):
    """The body of an error's answer, or one under TLS, that breaks off; a number of a listing that is none."""
    storage, asked = S3Storage("bucket", "prefix", Patience(60, 5, 5, first_wait_s=0.01)), list[object]()

    def request(client: object) -> str:
        asked.append(client)
        if len(asked) == 1:
            raise error
        return "whole"

    assert storage.client.call("GET", "it", request) == "whole"
    assert len(asked) == 2


def test_at_the_root_of_a_bucket_no_upload_of_others_is_ended(monkeypatch):
    discarded = []
    monkeypatch.setattr(S3Storage, "_probe", lambda self: None)
    monkeypatch.setattr(S3Storage, "discard_unfinished", lambda self, *_: discarded.append(self.uri))
    S3Storage("bucket", "prefix", PATIENT).check()
    assert discarded == ["s3://bucket/prefix"]
    S3Storage("bucket", "", PATIENT).check()
    assert len(discarded) == 1


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory to publish: a small file, and a large one below."""
    (tmp_path / "source/sub").mkdir(parents=True)
    (tmp_path / "source/small.txt").write_bytes(b"some text")
    (tmp_path / "source/sub/large.bin").write_bytes(os.urandom(LARGE))
    return tmp_path / "source"


@pytest.fixture
def key_file(ceph: Ceph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A function that gives Ceph's user a new key, writes it where boto3 looks for credentials, and returns its id."""
    file, keys = tmp_path / "credentials", []

    def renew() -> str:
        keys.append(f"KEY{uuid.uuid4().hex[:10].upper()}")
        ceph.admin("key", "create", "--uid=test", f"--access-key={keys[-1]}", "--secret-key=a-secret")
        file.write_text(f"[default]\naws_access_key_id = {keys[-1]}\naws_secret_access_key = a-secret\n")
        return keys[-1]

    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    renew()
    return renew


# --- the policy ---


class Clock:
    """Time that passes only while one sleeps, and waits that are as long as they may be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, retries: Retries) -> None:
        self.now, self.waits = 1000.0, []
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry.time, "sleep", self.sleep)
        monkeypatch.setattr(retries, "_random", self)

    def uniform(self, low: float, high: float) -> float:
        assert low == 0
        return high

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def failing(error: Exception, times: int | None = None) -> Callable[[], str]:
    left = iter(range(times) if times is not None else iter(int, 1))

    def attempt() -> str:
        if next(left, None) is None:
            return "answer"
        raise error

    return attempt


def test_waits_double_up_to_the_longest_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    retries = Retries(PATIENT)
    clock = Clock(monkeypatch, retries)
    with pytest.raises(GaveUpError, match=r"^PUT x: busy; tried 35 times in 30\d s$"):
        retries.call(failing(TransientError("PUT x: busy")))
    assert clock.waits[:8] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert 300 < sum(clock.waits) <= 310


def test_waits_have_full_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    for _ in range(200):
        assert Retries(PATIENT).call(failing(TransientError("x"), 3)) == "answer"
    for number, longest in enumerate([0.2, 0.4, 0.8]):
        of_it = waits[number::3]
        assert 0 <= min(of_it) < 0.1 * longest
        assert 0.9 * longest < max(of_it) <= longest


def test_other_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    retries = Retries(PATIENT)
    clock = Clock(monkeypatch, retries)
    with pytest.raises(PermissionError):
        retries.call(failing(PermissionError("no"), 1))
    assert clock.waits == []


def test_an_outage_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    retries, barrier = Retries(Patience(60, 1, 1, longest_wait_s=0.5)), threading.Barrier(4)

    def call(_: int) -> str:
        attempt, first = failing(TransientError("PUT x: busy"), 3), threading.Event()

        def together() -> str:
            if first.is_set():
                return attempt()
            first.set()
            barrier.wait()  # none is over before all have begun
            raise TransientError("PUT x: busy")

        return retries.call(together)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == ["answer"] * 4
    told = [record.getMessage() for record in caplog.records if record.name == "orchestration.retry"]
    assert told[0] == "PUT x: busy; trying again for up to 60 s"
    assert re.fullmatch(r"storage answers again after \d+\.\d s", told[1])
    assert len(told) == 2


# --- transient faults ---


@pytest.mark.parametrize("mode", ["http429", "http500", "http503", "timeout400", "conflict409", "reset"])
def test_what_may_pass_is_tried_again(mode: str, moto_s3: str, fault_proxy: Control) -> None:
    storage = s3(moto_s3)
    for method, call in (
        ("PUT", lambda: storage.put("object", b"content")),
        ("PUT", lambda: storage.put_new("claim", b"content")),
        ("GET", lambda: storage.read("object")),
        ("GET", lambda: storage.list("")),
        ("DELETE", lambda: storage.delete("claim")),
    ):
        fault_proxy(mode=mode, methods=[method], count=2)
        call()
        assert fault_proxy()["injected"] == 2, (mode, method)
    if mode != "timeout400":  # the answer to a HEAD has no body to name it
        fault_proxy(mode=mode, methods=["HEAD"], count=2)
        assert storage.exists("object")
    assert Raw(moto_s3).paths() == {"object"}


def test_the_deadline_ends_it_in_one_line(moto_s3: str, fault_proxy: Control, caplog: pytest.LogCaptureFixture) -> None:
    fault_proxy(mode="http503")
    with pytest.raises(OSError, match=rf"^PUT {moto_s3}/object: SlowDown injected; tried \d+ times in [1-9]\d* s$"):
        s3(moto_s3, deadline_s=0.9).put("object", b"content")
    assert fault_proxy()["injected"] > 2
    told = [record.getMessage() for record in caplog.records if record.name == "orchestration.retry"]
    assert told == [f"PUT {moto_s3}/object: SlowDown injected; trying again for up to 0.9 s"]


@pytest.mark.s3
def test_a_wrong_key_an_absent_bucket_and_a_bad_request_fail_at_once(
    ceph_s3: str, fault_proxy: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(uri: str, path: str, match: str) -> None:
        fault_proxy(mode="ok")
        with pytest.raises(OSError, match=match) as caught:
            s3(uri).put(path, b"content")
        assert "\n" not in str(caught.value)
        assert fault_proxy()["requests"] == 1

    fails("s3://no-such-bucket/x", "object", "NoSuchBucket")
    fails(ceph_s3, "o" * 1100, "InvalidObjectName")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    fails(ceph_s3, "object", "SignatureDoesNotMatch")


@pytest.mark.s3
@pytest.mark.parametrize("mode", ["truncate", "reset"])
def test_an_answer_that_breaks_off_is_read_again(
    mode: str, ceph_s3: str, directory: Path, tmp_path: Path, fault_proxy: Control
) -> None:
    storage, content = open_storage(ceph_s3), os.urandom(2**20)
    storage.put("object", content)
    storage.publish(directory, "run/1")
    fault_proxy(mode=mode, methods=["GET"], count=2, after=300_000)
    assert storage.read("object") == content
    assert fault_proxy()["injected"] == 2
    fault_proxy(mode=mode, methods=["GET"], count=1, after=300_000)
    storage.manifest("run/1")  # passes whole, being shorter than that
    fault_proxy(mode=mode, methods=["GET"], count=4, after=300_000)
    fetched = storage.fetch("run/1", tmp_path / "copy")
    assert fault_proxy()["injected"] == 4
    assert (fetched / "sub/large.bin").read_bytes() == (directory / "sub/large.bin").read_bytes()


@pytest.mark.s3
def test_put_new_knows_its_own_object_after_a_lost_answer(ceph_s3: str, fault_proxy: Control) -> None:
    storage = open_storage(ceph_s3)
    fault_proxy(mode="lost", methods=["PUT"], count=1)
    assert storage.put_new("claim", b"mine") is True
    assert fault_proxy()["injected"] == 1
    fault_proxy(mode="lost", methods=["PUT"], count=1)
    assert storage.put_new("claim", b"mine") is False
    assert Raw(ceph_s3).read("claim") == b"mine"


@pytest.mark.s3
@pytest.mark.parametrize("file", ["small.txt", "sub/large.bin"])
def test_an_upload_altered_on_the_way_is_not_stored(
    file: str, ceph_s3: str, directory: Path, fault_proxy: Control
) -> None:
    for other in ("small.txt", "sub/large.bin"):
        if other != file:
            (directory / other).unlink()
    fault_proxy(mode="corrupt", methods=["PUT"], after=5)
    with pytest.raises(OSError, match=rf"^PUT {ceph_s3}/run/1/{file}: ") as caught:
        s3(ceph_s3, deadline_s=1).publish(directory, "run/1")
    assert "\n" not in str(caught.value)
    assert fault_proxy()["injected"] > 0
    assert Raw(ceph_s3).paths() == set()
    fault_proxy(mode="corrupt", methods=["PUT"], after=5, count=2)
    s3(ceph_s3).publish(directory, "run/1")
    assert Raw(ceph_s3).read(f"run/1/{file}") == (directory / file).read_bytes()


@pytest.mark.s3
def test_a_download_altered_on_the_way_is_fetched_again(
    ceph_s3: str, directory: Path, tmp_path: Path, fault_proxy: Control
) -> None:
    storage = open_storage(ceph_s3)
    (directory / "small.txt").write_bytes(os.urandom(100_000))
    storage.publish(directory, "run/1")
    fault_proxy(mode="corrupt", methods=["GET"], count=3, after=50_000)  # the manifest is shorter: it passes
    fetched = storage.fetch("run/1", tmp_path / "copy")
    assert (fetched / "small.txt").read_bytes() == (directory / "small.txt").read_bytes()


@pytest.mark.s3
def test_a_manifest_altered_on_the_way_is_read_again(
    ceph_s3: str, directory: Path, tmp_path: Path, fault_proxy: Control
) -> None:
    storage = s3(ceph_s3)
    published = storage.publish(directory, "run/1")
    at = len(published.to_json()) // 2 + 400  # beyond the head of the answer
    fault_proxy(mode="corrupt", methods=["GET"], count=3, after=at)
    assert storage.manifest("run/1") == published
    assert fault_proxy()["injected"] == 3


def test_an_object_that_rots_where_it_lies_is_corrupt_in_the_end(moto_s3: str, directory: Path, tmp_path: Path) -> None:
    storage, raw = s3(moto_s3, deadline_s=1), Raw(moto_s3)
    storage.publish(directory, "run/1")
    for name in ("run/1/small.txt", "run/1/manifest.json"):  # the content changes, the SHA-256 beside it stays
        content = raw.read(name)
        key = {"Bucket": raw.bucket, "Key": f"{raw.prefix}/{name}"}
        metadata = {"sha256": hashlib.sha256(content).hexdigest()}
        raw.client.put_object(**key, Body=content.replace(b"e", b"E"), Metadata=metadata)
        with pytest.raises(CorruptError, match=rf"^{moto_s3}/run/1: {name[6:]} .*tried \d+ times in [1-9]\d* s"):
            storage.fetch("run/1", tmp_path / "copy")
    assert storage.manifest("run/1") is None


# --- uploads in parts ---


def uploads(uri: str) -> list[str]:
    raw = Raw(uri)
    found = raw.client.list_multipart_uploads(Bucket=raw.bucket, Prefix=raw.prefix).get("Uploads", [])
    return [upload["Key"].removeprefix(f"{raw.prefix}/") for upload in found]


def begin_upload(uri: str, path: str) -> None:
    raw = Raw(uri)
    raw.client.create_multipart_upload(Bucket=raw.bucket, Key=f"{raw.prefix}/{path}")


@pytest.mark.s3
@pytest.mark.parametrize(("skip", "left"), [(0, ["run/1/sub/large.bin"]), (1, [])], ids=["create", "complete"])
def test_an_upload_survives_lost_answers(
    skip: int, left: list[str], ceph_s3: str, directory: Path, tmp_path: Path, fault_proxy: Control
) -> None:
    storage = s3(ceph_s3)
    fault_proxy(mode="lost", methods=["POST"], skip=skip, count=1)
    storage.publish(directory, "run/1")
    assert fault_proxy()["injected"] == 1
    fetched = storage.fetch("run/1", tmp_path / "copy")
    assert (fetched / "sub/large.bin").read_bytes() == (directory / "sub/large.bin").read_bytes()
    assert uploads(ceph_s3) == left  # whose name nobody ever learnt
    storage.discard_unfinished("run/1")
    assert uploads(ceph_s3) == []


@pytest.mark.parametrize("kind", ["moto", pytest.param("ceph", marks=pytest.mark.s3)])
def test_parts_make_the_file_and_an_upload_that_fails_is_removed(
    kind: str, request: pytest.FixtureRequest, directory: Path
) -> None:
    uri = request.getfixturevalue(f"{kind}_s3")
    fault_proxy = request.getfixturevalue("fault_proxy")
    fault_proxy(mode="http503", methods=["PUT"])
    (directory / "small.txt").unlink()
    with pytest.raises(OSError, match=r"/large\.bin: SlowDown"):
        s3(uri, deadline_s=0.5).publish(directory, "run/1")
    assert (uploads(uri), Raw(uri).paths()) == ([], set())
    fault_proxy(mode="http503", methods=["PUT"], count=3)
    s3(uri).publish(directory, "run/1")
    assert Raw(uri).read("run/1/sub/large.bin") == (directory / "sub/large.bin").read_bytes()


def test_a_large_file_that_changes_while_it_is_uploaded_is_not_stored(moto_s3: str, directory: Path) -> None:
    storage, file = s3(moto_s3), directory / "sub/large.bin"
    call = storage.client.call

    def change_first(operation: str, *rest: object, **again: bool) -> object:
        if operation == "POST":
            file.write_bytes(os.urandom(LARGE))
        return call(operation, *rest, **again)  # type: ignore[arg-type]  # passed on as it is

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.client, "call", change_first)
        with pytest.raises(OSError, match="must not change while it is published"):
            storage.publish(directory, "run/1")
    assert (uploads(moto_s3), Raw(moto_s3).paths()) == ([], {"run/1/small.txt"})


@pytest.mark.s3
def test_uploads_of_dead_writers_are_removed(ceph_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = ceph_s3  # moto says of every upload that it was begun in 2010
    for path in ("runs/r1/step-1/model", "runs/r10/step-1/model", "samples/part"):
        begin_upload(uri, path)
    store = CheckpointStore(s3(uri), "runs/r1", keep=2, about={})
    assert store.restore() is None
    assert uploads(uri) == ["runs/r10/step-1/model", "samples/part"], "the run's own alone"
    s3(uri).check()
    assert uploads(uri) == ["runs/r10/step-1/model", "samples/part"], "others are young, their writers may live"
    monkeypatch.setattr(s3_storage, "ABANDONED_S", 0)
    s3(uri).check()
    assert uploads(uri) == []


def test_temporary_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    for path in ("runs/r1/step-1/.tmp-1", "runs/r10/.tmp-2", "runs/r1/step-1/model"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    storage = open_storage(str(tmp_path))
    storage.discard_unfinished("runs/r1", older_s=3600)
    assert (tmp_path / "runs/r1/step-1/.tmp-1").exists()
    storage.discard_unfinished("runs/r1")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"runs/r10/.tmp-2", "runs/r1/step-1/model"}


# --- credentials ---


@pytest.mark.s3
def test_credentials_that_were_replaced_are_read_anew(ceph: Ceph, ceph_s3: str, key_file: Callable[[], str]) -> None:
    first = re.search(r"KEY\w+", Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).read_text())
    assert first
    storage = s3(ceph_s3)
    storage.put("object", b"1")
    ceph.admin("key", "rm", "--uid=test", f"--access-key={first[0]}")
    later = threading.Timer(2, key_file)  # the new key comes after requests have failed
    later.start()
    storage.put("object", b"2")
    later.join()
    assert storage.read("object") == b"2"


def test_expired_credentials_of_a_file_are_waited_for_and_of_the_environment_not(
    moto_s3: str, fault_proxy: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault_proxy(mode="expired", count=2)
    with pytest.raises(OSError, match=rf"^PUT {moto_s3}/object: ExpiredToken injected$"):
        s3(moto_s3).put("object", b"content")
    assert fault_proxy()["requests"] == 1
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fault_proxy(mode="expired", count=2)
    storage = s3(moto_s3)
    before = storage.client.boto
    storage.put("object", b"content")
    assert fault_proxy()["injected"] == 2
    assert storage.client.boto is not before


def test_credentials_that_are_not_there_yet_are_waited_for_after_the_preflight(
    moto_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's first request may meet a file that is being written, or a service that is away for a moment."""
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    bucket, prefix = moto_s3.removeprefix("s3://").split("/", 1)
    hasty = S3Storage(bucket, prefix, PREFLIGHT)
    with pytest.raises(PermanentError):
        hasty.put("object", b"content")
    storage = s3(moto_s3)
    whole = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
    later = [threading.Timer(0.5, file.write_text, [""]), threading.Timer(1.5, file.write_text, [whole])]
    for timer in later:
        timer.start()
    storage.put("object", b"content")
    for timer in later:
        timer.join()
    assert storage.read("object") == b"content"


# --- the store itself ---


@pytest.mark.s3
def test_a_store_that_stands_still_is_waited_for(ceph: Ceph, ceph_s3: str) -> None:
    storage = s3(ceph_s3, read_s=1)
    storage.put("object", b"1")
    ceph.signal(signal.SIGSTOP)
    later = threading.Timer(3, ceph.signal, [signal.SIGCONT])
    later.start()
    try:
        storage.put("object", b"2")
    finally:
        later.join()
    assert Raw(ceph_s3).read("object") == b"2"


def state(step: int, size: int = 1000) -> TrainState:
    numbers = {"a": torch.full((size,), float(step))}
    return TrainState(step, numbers, numbers, numbers, [{"step": step}])


@pytest.mark.s3
def test_a_full_quota_fails_at_once_and_keeps_the_older_checkpoint(
    ceph: Ceph, ceph_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = "QUOTAACCESSKEY", "the-secret-of-the-quota"
    keys = [f"--access-key={key}", f"--secret-key={secret}"]
    ceph.admin("user", "create", "--uid=quota", "--display-name=quota", *keys)
    ceph.admin("quota", "set", "--quota-scope=user", "--uid=quota", "--max-objects=15")
    ceph.admin("quota", "enable", "--quota-scope=user", "--uid=quota")
    make_bucket(ceph.endpoint, "quota", key, secret)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    storage = s3("s3://quota/x")
    store = CheckpointStore(storage, "runs/r1", keep=9, about={})
    for step in (10, 20):
        store.save(state(step), 1.0)
    store.save(state(30), 1.0)
    with pytest.raises(
        NoRoomError, match=r"^PUT s3://quota/x/runs/r1/step-000000030-\S+: QuotaExceeded[^\n]*quota is full"
    ):
        store.wait()
    assert {path.split("/")[2][:14] for path in storage.list("runs/r1")} == {"step-000000010", "step-000000020"}
    restored = store.restore()
    assert restored
    assert restored.step == 20


# --- a full disk ---


def room_error(error: BaseException) -> tuple[str, int, int]:
    """Path, free and needed bytes of the line."""
    found = re.fullmatch(
        r"the disk must have room for (\S+), got ([\d,]+) bytes free of ([\d,]+) needed; "
        r"free some and run the same command again",
        str(error),
    )
    assert found, error
    return found[1], *(int(number.replace(",", "")) for number in found.groups()[1:])  # type: ignore[return-value]


def test_a_full_disk_is_a_line_and_the_older_checkpoint_stays(small_disk: Path) -> None:
    store = CheckpointStore(open_storage(str(small_disk)), "runs/r1", keep=9, about={})
    store.save(state(10, 40_000), 1.0)  # three times 160 kB
    store.wait()
    free = shutil.disk_usage(small_disk).free
    store.save(state(20, 60_000), 1.0)  # three times 240 kB: the third does not fit
    with pytest.raises(NoRoomError) as caught:
        store.wait()
    path, told_free, needed = room_error(caught.value)
    assert re.fullmatch(rf"{small_disk}/runs/r1/step-000000020-\w+/optimizer\.safetensors", path)
    assert 240_000 < needed < 241_000
    assert told_free < needed
    assert shutil.disk_usage(small_disk).free == free, "what did not fit fills nothing"
    restored = store.restore()
    assert restored
    assert restored.step == 10
    del restored  # it maps the file
    store.save(state(30, 20_000), 1.0)
    store.wait()
    assert store.newest()


def test_a_full_scratch_disk_is_a_line(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    store = CheckpointStore(open_storage(str(tmp_path / "store")), "runs/r1", keep=9, about={})
    store.save(state(10, 100_000), 1.0)  # three times 400 kB
    with pytest.raises(NoRoomError) as caught:
        store.wait()
    path, _, needed = room_error(caught.value)
    assert (path, needed) == (str(small_disk), 1_200_000)


@pytest.mark.parametrize("kind", ["local", "moto"])
def test_a_file_that_does_not_fit_where_it_is_brought_to_is_a_line(
    kind: str, request: pytest.FixtureRequest, small_disk: Path, tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path / "store") if kind == "local" else request.getfixturevalue("moto_s3"))
    storage.put("object", b"x" * 2_000_000)
    with pytest.raises(NoRoomError) as caught:
        storage.copy_out("object", small_disk / "object")
    assert room_error(caught.value)[::2] == (f"{small_disk}/object", 2_000_000)


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output") as caught, room_for(tmp_path, 1):
        raise OSError(errno.EIO, "Input/output error")
    assert not isinstance(caught.value, NoRoomError)


# --- the campaign, in small ---


def campaign(results: Path, *options: str) -> list[dict[str, object]]:
    command = [sys.executable, str(CAMPAIGN), "--rounds", "1", "--results", str(results), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_every_write_of_a_save_may_fail(tmp_path: Path) -> None:
    cases = campaign(tmp_path / "results", "--without-s3", "--only", "writes")
    assert len(cases) == 21
    chosen = [case["chosen"] for case in cases]
    assert (chosen.count(20), chosen.count(30)) == (17, 4), "30 where its manifest was written: by hand, 4"


@pytest.mark.s3
def test_faults_of_a_store_under_saves_and_restores(tmp_path: Path) -> None:
    only = r"writes/s3/08|faults/(altered|credentials|quota)"
    cases = campaign(tmp_path / "results", "--seconds", "2", "--only", only)
    assert len(cases) == 3 + 5
    assert all(case.get("hit", True) for case in cases)
