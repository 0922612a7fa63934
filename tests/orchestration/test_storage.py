"""One suite for the local directory, moto and Ceph; what lies in a storage is looked at and altered past `Storage`."""

import hashlib
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from raw_storage import Raw

from orchestration.s3_client import s3_environment
from orchestration.storage import CorruptError, Storage, open_storage

LARGE = 9 * 2**20  # bytes; above the size from which S3 files travel in parts
KILL_AT_COMMIT = """
import os, signal, sys
from pathlib import Path
from orchestration.storage import open_storage
storage = open_storage(sys.argv[1])
type(storage).put_new = lambda self, path, data: os.kill(os.getpid(), signal.SIGKILL)
storage.publish(Path(sys.argv[2]), "run/1")
"""
KILL_AT_RENAME = """
import os, signal, sys
from orchestration.storage import open_storage
os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
open_storage(sys.argv[1]).put("run/object", b"content")
"""
PYARROW_COPIES = """
import sys
from pyarrow.fs import FileSystem
files, path = FileSystem.from_uri(sys.argv[1])
with files.open_input_stream(path + "/object") as source, files.open_output_stream(path + "/copy") as target:
    target.write(source.read())
"""


@pytest.fixture(params=["local", "moto", pytest.param("ceph", marks=pytest.mark.s3)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue(f"{request.param}_s3")


@pytest.fixture
def storage(uri: str) -> Storage:
    return open_storage(uri)


@pytest.fixture
def raw(uri: str) -> Raw:
    return Raw(uri)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory to publish: a small file, an empty one, and a large one below."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "small.txt").write_bytes(b"some text")
    (source / "empty").write_bytes(b"")
    (source / "sub/large.bin").write_bytes(os.urandom(LARGE))
    return source


def test_put_replaces_and_read_gives_the_bytes(storage: Storage, raw: Raw) -> None:
    storage.put("a/b.bin", b"first")
    storage.put("a/b.bin", b"second \x00\xff")
    assert storage.read("a/b.bin") == b"second \x00\xff" == raw.read("a/b.bin")


def test_a_put_carries_its_md5(moto_s3: str) -> None:
    storage, sent = open_storage(moto_s3), []
    client = storage.client.boto  # type: ignore[attr-defined]  # the S3 one has it
    client.meta.events.register(
        "before-send.s3.PutObject", lambda request, **_: sent.append(request.headers["Content-MD5"])
    )
    storage.put("object", b"content")
    storage.put_new("claim", b"content")
    assert sent == [b"mgNkuembtIDdJeHwKEyFVQ=="] * 2  # echo -n content | openssl md5 -binary | base64


def test_an_absent_object_is_file_not_found(storage: Storage) -> None:
    storage.put("a/b", b"1")
    for path in ("a/c", "a", "a/b/c"):
        with pytest.raises(FileNotFoundError):
            storage.read(path)


def test_exists_is_about_objects_not_directories(storage: Storage, raw: Raw) -> None:
    raw.write("a/b", b"1")
    assert (storage.exists("a/b"), storage.exists("a"), storage.exists("a/c")) == (True, False, False)


def test_list_is_sorted_and_keeps_to_the_directory(storage: Storage, raw: Raw) -> None:
    for path in ("run/b", "run/a/z", "run/a.txt", "run2/x", "top"):
        raw.write(path, b"1")
    assert storage.list("run") == ["run/a.txt", "run/a/z", "run/b"]
    assert storage.list("") == ["run/a.txt", "run/a/z", "run/b", "run2/x", "top"]
    assert storage.list("nothing") == storage.list("top") == []


def test_list_goes_beyond_one_page_of_s3(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    raw = Raw(moto_s3)
    for number in range(7):
        raw.write(f"many/{number}", b"")
    assert len(raw.client.list_objects_v2(Bucket=raw.bucket, Prefix=raw.prefix)["Contents"]) == 3
    assert open_storage(moto_s3).list("many") == [f"many/{number}" for number in range(7)]


def test_delete_removes_an_object_or_a_directory_and_nothing_else(storage: Storage, raw: Raw) -> None:
    for path in ("run/a", "run/b/c", "run2/x", "top"):
        raw.write(path, b"1")
    storage.delete("run")
    storage.delete("top")
    storage.delete("nothing")
    storage.delete("run2/x/below")
    assert raw.paths() == {"run2/x"}


def test_delete_takes_the_manifest_first(storage: Storage, raw: Raw, directory: Path) -> None:
    storage.publish(directory, "run/1")
    with pytest.MonkeyPatch.context() as patch:
        stop_after_first_removal(patch, storage)
        with pytest.raises(InterruptedError):
            storage.delete("run")
    assert raw.paths() == {"run/1/small.txt", "run/1/empty", "run/1/sub/large.bin"}


def stop_after_first_removal(patch: pytest.MonkeyPatch, storage: Storage) -> None:
    """Interrupts after one file or object is gone, whichever the code chose."""
    if storage.is_local:
        removals = [(os, "unlink"), (os, "remove"), (Path, "unlink")]
    else:
        removals = [(storage.client.boto, "delete_object")]  # type: ignore[attr-defined]  # the S3 one has it
    for owner, name in removals:
        original = getattr(owner, name)

        def remove_and_stop(*args: object, original: Callable[..., object] = original, **kwargs: object) -> None:
            existed = storage.is_local or not kwargs["Key"].endswith("run")  # type: ignore[attr-defined]
            original(*args, **kwargs)
            if existed:
                raise InterruptedError

        patch.setattr(owner, name, remove_and_stop)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\\b"])
def test_paths_outside_are_refused(path: str, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    calls: list[Callable[[], object]] = [
        lambda: storage.put(path, b""),
        lambda: storage.read(path),
        lambda: storage.list(path),
        lambda: storage.delete(path),
        lambda: storage.fetch(path, tmp_path),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="path must be relative and POSIX"):
            call()


def test_the_root_itself_cannot_be_deleted(storage: Storage, raw: Raw) -> None:
    raw.write("a", b"1")
    with pytest.raises(ValueError, match="below the root"):
        storage.delete("")
    assert raw.paths() == {"a"}


def test_put_new_creates_once(storage: Storage, raw: Raw) -> None:
    assert storage.put_new("claim", b"first") is True
    assert storage.put_new("claim", b"second") is False
    assert raw.read("claim") == b"first"
    assert raw.paths() == {"claim"}


@pytest.mark.parametrize("kind", ["local", pytest.param("ceph", marks=pytest.mark.s3)])  # moto's test is not atomic
def test_put_new_has_one_winner_of_sixteen(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    uri = str(tmp_path / "store") if kind == "local" else request.getfixturevalue("ceph_s3")
    storage, barrier = open_storage(uri), threading.Barrier(16)

    def claim(round_: int, number: int) -> bool:
        barrier.wait()
        return storage.put_new(f"claim{round_}", b"%d" % number * 1000)

    with ThreadPoolExecutor(16) as pool:
        for round_ in range(10):
            won = list(pool.map(claim, [round_] * 16, range(16)))
            assert won.count(True) == 1
            assert Raw(uri).read(f"claim{round_}") == b"%d" % won.index(True) * 1000


def test_a_reader_never_sees_half_an_object(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    contents = {letter * 2**20 for letter in (b"a", b"b")}
    storage.put("object", next(iter(contents)))
    done = threading.Event()

    def write() -> None:
        for _ in range(20):
            for content in contents:
                storage.put("object", content)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not done.is_set():
            assert (tmp_path / "object").read_bytes() in contents
        writing.result()


def test_publish_then_fetch_gives_the_directory(storage: Storage, directory: Path, tmp_path: Path) -> None:
    published = storage.publish(directory, "run/1", {"step": 7})
    fetched = storage.fetch("run/1", tmp_path / "copy")
    assert storage.manifest("run/1") == published
    assert published.meta == {"step": 7}
    for path in ("small.txt", "empty", "sub/large.bin"):
        content = (directory / path).read_bytes()
        assert (fetched / path).read_bytes() == content
        assert published.files[path].sha256 == hashlib.sha256(content).hexdigest()
    assert fetched == (Path(storage.uri, "run/1") if storage.is_local else tmp_path / "copy")


def test_publish_again_is_the_same_or_refused(storage: Storage, raw: Raw, directory: Path) -> None:
    first = storage.publish(directory, "run/1", {"attempt": 1})
    assert storage.publish(directory, "run/1", {"attempt": 2}) == first
    (directory / "small.txt").write_bytes(b"other")
    with pytest.raises(FileExistsError, match="run/1: other content is published here"):
        storage.publish(directory, "run/1")
    assert raw.read("run/1/small.txt") == b"some text"


def test_an_empty_directory_is_not_published(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold files"):
        storage.publish(tmp_path / "missing", "run/1")


def test_a_publish_killed_before_its_manifest_is_invisible(
    storage: Storage, raw: Raw, directory: Path, tmp_path: Path
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILL_AT_COMMIT, storage.uri, str(directory)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert raw.paths() == {"run/1/small.txt", "run/1/empty", "run/1/sub/large.bin"}
    assert storage.manifest("run/1") is None
    with pytest.raises(FileNotFoundError, match="nothing is published here"):
        storage.fetch("run/1", tmp_path / "copy")
    storage.publish(directory, "run/1")
    assert (storage.fetch("run/1", tmp_path / "copy") / "small.txt").read_bytes() == b"some text"


def test_a_killed_put_leaves_nothing_to_see(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILL_AT_RENAME, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    storage = open_storage(str(tmp_path))
    assert Raw(str(tmp_path)).paths()  # the temporary file is there, and not shown
    assert storage.list("") == []
    assert not storage.exists("run/object")


def test_a_file_that_changes_while_published_is_not_committed(directory: Path, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    with pytest.MonkeyPatch.context() as patch:
        copy = storage._copy_in

        def change_and_copy(source: Path, path: str, entry: object) -> None:
            source.write_bytes(b"changed")
            copy(source, path, entry)  # type: ignore[arg-type]  # passed on as it is

        patch.setattr(storage, "_copy_in", change_and_copy)
        with pytest.raises(OSError, match="must not change while it is published"):
            storage.publish(directory, "run/1")
    assert storage.manifest("run/1") is None


@pytest.mark.parametrize(
    ("file", "spoil", "problem"),
    [
        ("small.txt", lambda data: b"S" + data[1:], "has another SHA-256 than its manifest says"),
        ("small.txt", lambda data: data[:-1], "has 8 bytes instead of 9"),
        ("sub/large.bin", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "has another SHA-256 than its manifest says"),
        ("sub/large.bin", None, "is missing"),
    ],
    ids=["altered", "truncated", "large-altered", "missing"],
)
def test_a_spoilt_file_is_named(
    file: str,
    spoil: Callable[[bytes], bytes] | None,
    problem: str,
    storage: Storage,
    raw: Raw,
    directory: Path,
    tmp_path: Path,
) -> None:
    storage.publish(directory, "run/1")
    if spoil:
        raw.write(f"run/1/{file}", spoil(raw.read(f"run/1/{file}")))
    else:
        raw.delete(f"run/1/{file}")
    with pytest.raises(CorruptError) as caught:
        storage.fetch("run/1", tmp_path / "copy")
    assert str(caught.value).startswith(f"{storage.uri}/run/1: {file} {problem}")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.file) == (CorruptError, str(caught.value), file)


@pytest.mark.parametrize("spoil", [lambda text: text[: len(text) // 2], lambda text: text.replace(b"small", b"../..")])
def test_a_torn_or_hostile_manifest_is_none(
    spoil: Callable[[bytes], bytes],
    storage: Storage,
    raw: Raw,
    directory: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage.publish(directory, "run/1")
    raw.write("run/1/manifest.json", spoil(raw.read("run/1/manifest.json").replace(b"small.txt", b"small/txt")))
    assert storage.manifest("run/1") is None
    assert storage.manifest("run/1") is None
    assert storage.manifest("run/2") is None, "never published, which is no warning"
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "orchestration.storage"]
    assert warning.startswith(f"{storage.uri}/run/1: manifest.json is unreadable")
    with pytest.raises(CorruptError, match=r"run/1: manifest\.json is unreadable"):
        storage.fetch("run/1", tmp_path / "copy")
    (directory / "small.txt").write_text("made again")
    made = storage.publish(directory, "run/1")
    assert storage.manifest("run/1") == made
    assert (storage.fetch("run/1", tmp_path / "copy") / "small.txt").read_text() == "made again"


def test_fetch_keeps_what_is_right_and_mends_the_rest(moto_s3: str, directory: Path, tmp_path: Path) -> None:
    storage, copy = open_storage(moto_s3), tmp_path / "copy"
    storage.publish(directory, "run/1")
    storage.fetch("run/1", copy)
    kept = (copy / "sub/large.bin").stat().st_ino
    (copy / "small.txt").write_bytes(b"SOME TEXT")
    storage.fetch("run/1", copy)
    assert (copy / "small.txt").read_bytes() == b"some text"
    assert (copy / "sub/large.bin").stat().st_ino == kept


def test_what_is_set_aside_is_not_used(
    storage: Storage, raw: Raw, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage.publish(directory, "run/1")
    with caplog.at_level(logging.WARNING):
        storage.set_aside("run/1", "loss is not finite")
    assert storage.manifest("run/1") is None
    with pytest.raises(CorruptError, match="not to be used"):
        storage.fetch("run/1", tmp_path / "copy")
    with pytest.raises(FileExistsError):
        storage.publish(directory, "run/1")
    messages = [record.getMessage() for record in caplog.records if record.name == "orchestration.storage"]
    assert messages == [f"{storage.uri}/run/1 is set aside: loss is not finite"]
    assert json.loads(raw.read("run/1/set-aside.json")) == {"reason": "loss is not finite"}
    assert raw.read("run/1/small.txt") == b"some text"


def test_a_pickle_is_the_uri_alone_and_works_elsewhere(storage: Storage) -> None:
    storage.put("object", b"content")  # makes the client, which knows the secret
    pickled = pickle.dumps(storage)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL"):
        assert os.environ.get(name, "not set").encode() not in pickled
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).read('object').decode())"
    run = subprocess.run([sys.executable, "-c", code, pickled.hex()], capture_output=True, text=True, check=True)
    assert run.stdout == "content\n"


def test_a_client_is_made_anew_after_a_fork(moto_s3: str) -> None:
    storage = open_storage(moto_s3)
    storage.put("object", b"content")
    before = storage.client.boto  # type: ignore[attr-defined]  # the S3 one has it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        assert storage.client.boto is not before  # type: ignore[attr-defined]  # as above
        assert storage.read("object") == b"content"


def test_boto3_is_not_imported_before_it_is_needed(tmp_path: Path) -> None:
    code = "import sys; from orchestration.storage import open_storage as o; o(sys.argv[1]).check(); o('s3://bucket'); "
    code += "print('boto3' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


# --- the preflight ---


def test_check_passes_and_leaves_nothing(storage: Storage, raw: Raw) -> None:
    storage.check()
    assert raw.paths() == set()


def refusal(uri: str) -> str:
    """The one line that `check` refuses a storage with."""
    with pytest.raises(ValueError, match=r"^storage must ") as caught:
        open_storage(uri).check()
    assert "\n" not in str(caught.value)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "not set") not in str(caught.value)
    return str(caught.value)


def test_check_refuses_a_file_and_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal(str(tmp_path / "file")).startswith(
        f"storage must be a writable directory, got {tmp_path}/file (it is a file)"
    )
    assert "Not a directory" in refusal(str(tmp_path / "file/below"))
    assert "must be a writable directory, got /proc/mixflow" in refusal("/proc/mixflow")  # root may not either


@pytest.mark.parametrize("kind", ["moto", pytest.param("ceph", marks=pytest.mark.s3)])
def test_check_refuses_a_missing_bucket(kind: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(f"{kind}_s3")
    expected = (
        f"storage must lie in a bucket that exists, got no bucket no-such-bucket at {os.environ['AWS_ENDPOINT_URL']}"
    )
    assert refusal("s3://no-such-bucket/prefix").startswith(expected)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("variable", "code"),
    [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")],
)
def test_check_refuses_wrong_credentials(
    variable: str, code: str, ceph_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong")
    line = refusal(ceph_s3)
    assert line.startswith(f"storage must be writable with the given credentials, got {code} from http://127.0.0.1:")
    assert line.endswith("correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or the bucket's policy")


@pytest.mark.parametrize("missing", [["AWS_SECRET_ACCESS_KEY"], ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]])
def test_check_refuses_absent_credentials(missing: list[str], moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in missing:
        monkeypatch.delenv(name)
    assert refusal(moto_s3) == (
        f"storage must have credentials, got none or only a part for {moto_s3}; "
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )


def test_check_refuses_an_endpoint_nobody_listens_on(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:  # bound without listening: the port stays ours, and connections are refused
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert refusal(moto_s3).startswith(f"storage must be reachable, got no answer from {endpoint} for {moto_s3} (")


@pytest.mark.timeout(60)  # the ordinary client would wait for five minutes
def test_check_refuses_a_black_hole(moto_s3: str, fault_proxy: Callable[..., dict[str, int]]) -> None:
    fault_proxy(mode="blackhole")
    assert "must be reachable, got no answer from" in refusal(moto_s3)
    assert fault_proxy()["injected"] > 0


def test_check_refuses_a_store_without_conditional_creation(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(open_storage(moto_s3))
    monkeypatch.setattr(kind, "put_new", lambda self, path, data: self.put(path, data) or True)
    assert "does not honour conditional creation" in refusal(moto_s3)


def test_an_s3_failure_is_one_line_naming_operation_and_uri(moto_s3: str) -> None:
    with pytest.raises(OSError, match=r"^PUT s3://no-such-bucket/x/object: NoSuchBucket [^\n]*$"):
        open_storage("s3://no-such-bucket/x").put("object", b"")


# --- URIs and the environment ---


def test_uris_name_storages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    for uri in ("./dir", "dir", f"{tmp_path}/dir", f"file://{tmp_path}/dir/", "other/../dir"):
        assert (open_storage(uri).uri, open_storage(uri).is_local) == (f"{tmp_path}/dir", True)
    assert open_storage("~/dir").uri == "/home/somebody/dir"
    assert open_storage("file:///a%20b").uri == "/a b"
    for uri in ("s3://bucket/a/b", "s3://bucket/a/b/"):
        assert (open_storage(uri).uri, open_storage(uri).is_local) == ("s3://bucket/a/b", False)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        " ",
        "gs://bucket/x",
        "s3:bucket",
        "s3://",
        "s3://B/x",
        "s3://bucket/../x",
        "s3://bucket/x?a=y",
        "file://host/x",
        "file:x",
        "http://a/x",
    ],
)
def test_other_uris_are_refused_in_one_line(uri: str) -> None:
    with pytest.raises(ValueError, match=r"^(storage|path) must [^\n]+, got [^\n]+; [^\n]+$"):
        open_storage(uri)


def test_a_secret_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="got credentials in the URI") as caught:
        open_storage("s3://key:hush@bucket/x")
    assert "hush" not in str(caught.value)


def test_one_endpoint_variable_becomes_all_of_them() -> None:
    secrets = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hush"}
    expected = {
        "AWS_ENDPOINT_URL": "http://s3:8333",
        "AWS_ENDPOINT_URL_S3": "http://s3:8333",
        "MLFLOW_S3_ENDPOINT_URL": "http://s3:8333",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
        assert s3_environment({**secrets, name: "http://s3:8333"}) == expected
    assert s3_environment(expected) == expected
    assert s3_environment(secrets) == {}


def test_what_the_user_set_wins_and_the_s3_endpoint_leads() -> None:
    given = {
        "AWS_ENDPOINT_URL": "http://general",
        "AWS_ENDPOINT_URL_S3": "http://s3",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported",
    }
    answer = s3_environment(given)
    assert {name: answer[name] for name in given} == given
    assert answer["MLFLOW_S3_ENDPOINT_URL"] == "http://s3"


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "s3://bucket", "http://", "http://key:hush@s3:9000"])
def test_an_endpoint_is_a_url_without_secrets(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"^AWS_ENDPOINT_URL must be a URL such as [^\n]+, got [^\n]+$") as caught:
        s3_environment({"AWS_ENDPOINT_URL": endpoint})
    assert "hush" not in str(caught.value)


def test_two_s3_servers_at_once_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^MLFLOW_S3_ENDPOINT_URL must equal AWS_ENDPOINT_URL_S3 \(http://a\), got http://b; [^\n]+$"
    ):
        s3_environment({"AWS_ENDPOINT_URL_S3": "http://a", "MLFLOW_S3_ENDPOINT_URL": "http://b"})


@pytest.mark.parametrize("kind", ["moto", pytest.param("ceph", marks=pytest.mark.s3)])
def test_one_endpoint_setting_serves_storage_and_pyarrow(kind: str, request: pytest.FixtureRequest) -> None:
    uri = request.getfixturevalue(f"{kind}_s3")  # sets AWS_ENDPOINT_URL and no other endpoint
    storage = open_storage(uri)
    storage.put("object", b"content")
    env = os.environ | s3_environment(os.environ)
    subprocess.run([sys.executable, "-c", PYARROW_COPIES, uri], env=env, check=True)
    assert storage.read("copy") == b"content"
