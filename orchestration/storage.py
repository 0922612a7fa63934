"""URI <-> filesystem; atomic checksummed publish.

A `Storage` is a tree of objects under one URI, a local directory or an S3 bucket with a prefix, with the few promises
that the rest of the project is built on: a reader never sees half an object, `put_new` has one winner, and a published
directory is there exactly when its manifest is. Only this file speaks to boto3, imported where it is used (0.4 s).
"""

from __future__ import annotations

import abc
import base64
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from workers.manifest import MANIFEST, CorruptError, FileEntry, Manifest, measure

log = logging.getLogger(__name__)
_told: set[str] = set()

SET_ASIDE = "set-aside.json"
TEMP_PREFIX = ".tmp-"
LARGE_FILE = 8 * 2**20  # bytes; from here on a file travels in parts
BODY_ATTEMPTS = 5  # boto3 retries requests, but not the body of an answer that breaks off
# Seconds and attempts. The preflight of an endpoint that swallows packets must end within about 10 s, of which boto3
# spends 1 s of each attempt on waiting for "100 Continue".
PATIENT = {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard", "total_max_attempts": 5}}
PREFLIGHT = {"connect_timeout": 3, "read_timeout": 3, "retries": {"mode": "standard", "total_max_attempts": 2}}

_found_sound: dict[Path, tuple[tuple[int, int, int] | None, str]] = {}

Paths = list[str]  # inside the class, `list` is its method


class Storage(abc.ABC):
    """A tree of immutable-by-convention objects under one URI.

    Paths are relative and POSIX; `..` and absolute paths are refused with ValueError. Failures of the storage itself
    are one-line OSErrors. Pickles as its URI alone: each process has credentials and endpoint from its own environment.
    """

    is_local: ClassVar[bool]

    def __init__(self, uri: str):
        self.uri = uri

    def __reduce__(self) -> tuple[Any, ...]:
        return open_storage, (self.uri,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @abc.abstractmethod
    def read(self, path: str) -> bytes:
        """The whole object; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Creates or replaces the object at once: a reader sees the old content or the new, never a part."""

    @abc.abstractmethod
    def put_new(self, path: str, data: bytes) -> bool:
        """Creates the object at once. True if this call created it, False if it was there; of racing calls one wins."""

    @abc.abstractmethod
    def exists(self, path: str) -> bool:
        """Whether there is an object (not a directory) at `path`."""

    @abc.abstractmethod
    def list(self, prefix: str) -> Paths:
        """Sorted paths, relative to the URI, of the objects under the directory `prefix` ("" is the whole tree)."""

    @abc.abstractmethod
    def delete(self, prefix: str) -> None:
        """Removes the object or the whole directory, manifests first, so that nothing half removed stays visible."""

    @abc.abstractmethod
    def check(self) -> None:
        """Preflight: writes, reads and deletes a probe object for real; answers within about 10 s.

        Raises:
            ValueError: one line that says why this storage cannot be used and what to do.
        """

    @abc.abstractmethod
    def copy_out(self, path: str, target: Path) -> None:
        """Copies the object `path` to a local file, in parts where it is large; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def _copy_in(self, source: Path, path: str, entry: FileEntry) -> None:
        """Copies a local file to the object `path`; OSError if it no longer is what `entry` says."""

    @abc.abstractmethod
    def _verified(self, path: str, manifest: Manifest, into: Path) -> Path:
        """A local directory with the files of `manifest`, all of them verified."""

    def publish(self, directory: Path, path: str, meta: Mapping[str, Any] | None = None) -> Manifest:
        """Copies the files of a local directory to `path`, content first, the manifest last as the commit point.

        Publishing the same content again returns the manifest that is there. Give each attempt a path of its own:
        two writers of different content at one path spoil it for both (which `fetch` then finds).

        Raises:
            FileExistsError: something else is published at `path`, or it was set aside.
            OSError: a file of the directory changed meanwhile, or the storage failed.
            ValueError: the directory holds no files.
        """
        manifest = Manifest.describe(Path(directory), meta or {})
        if not manifest.files:
            raise ValueError(f"directory must hold files to publish, got {directory} with none; check its path")
        if not self.exists(_join(path, MANIFEST)):
            for name, entry in manifest.files.items():
                self._copy_in(Path(directory) / name, _join(path, name), entry)
        return self.commit(path, manifest)

    def put_file(self, source: Path, path: str) -> FileEntry:
        """Copies a local file to the object `path`, creating or replacing it at once; returns its size and SHA-256."""
        entry = measure(source)
        self._copy_in(source, path, entry)
        return entry

    def commit(self, path: str, manifest: Manifest) -> Manifest:
        """Makes `path` a published directory, whose files lie there already; see `publish`.

        Raises:
            FileExistsError: something else is published at `path`, or it was set aside.
        """
        if self.put_new(_join(path, MANIFEST), manifest.to_json().encode()):
            return manifest
        found = self.manifest(path)
        if found is None or found.digest != manifest.digest:
            raise FileExistsError(
                f"{_join(self.uri, path)}: other content is published here; use another path or delete it"
            )
        return found

    def manifest(self, path: str) -> Manifest | None:
        """The manifest of the directory published at `path`; None if there is none, it is set aside, or unreadable.

        One that is unreadable is a warning: what lies there will be made again.
        """
        try:
            return self._committed(path)
        except FileNotFoundError:
            return None
        except CorruptError as error:
            if error.file == MANIFEST and str(error) not in _told:  # asked for again and again while a run begins
                _told.add(str(error))
                log.warning("%s", error)
            return None

    def fetch(self, path: str, into: Path) -> Path:
        """A verified local copy of the directory published at `path`.

        A local storage verifies sizes and SHA-256 in place and returns the directory itself. S3 downloads to `into`, a
        directory of its own for this path, where files that already have the right content are kept.

        Raises:
            FileNotFoundError: nothing is published at `path`.
            CorruptError: a file is missing or altered, the manifest is unreadable, or the directory was set aside.
        """
        return self._verified(path, self._committed(path), Path(into))

    def set_aside(self, path: str, reason: str) -> None:
        """Marks a published directory as not to be used: `manifest` is None from now on, its files stay."""
        self.put(_join(path, SET_ASIDE), json.dumps({"reason": reason}).encode())
        log.warning("%s is set aside: %s", _join(self.uri, path), reason)

    def _committed(self, path: str) -> Manifest:
        """The manifest at `path`, or FileNotFoundError or CorruptError."""
        uri = _join(self.uri, path)
        try:
            text = self.read(_join(path, MANIFEST))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{uri}: nothing is published here, there is no {MANIFEST}") from error
        if self.exists(_join(path, SET_ASIDE)):
            raise CorruptError(uri, SET_ASIDE, "says that this directory is not to be used")
        try:
            manifest = Manifest.from_json(text)
            for name in manifest.files:
                _object(name)
        except ValueError as error:
            raise CorruptError(uri, MANIFEST, f"is unreadable ({error})") from error
        return manifest

    def _probe(self) -> None:
        """Exercises every promise once, on an object of its own."""
        name = f".probe-{uuid.uuid4().hex}"
        self.put_new(name, b"1")
        try:
            if self.put_new(name, b"2"):
                raise OSError("it does not honour conditional creation (If-None-Match), which commits rely on")
            self.put(name, b"3")
            if self.read(name) != b"3":
                raise OSError("it does not give back what was written")
        finally:
            self.delete(name)


class _Local(Storage):
    """A directory of a local (or shared POSIX) filesystem with hard links."""

    is_local = True

    def __init__(self, root: Path):
        super().__init__(str(root))
        self.root = root

    def read(self, path: str) -> bytes:
        try:
            return self._at(path).read_bytes()
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(error.errno, "no such object", str(self._at(path))) from error

    def put(self, path: str, data: bytes) -> None:
        with _temporary(self._at(path)) as temp:
            _write(temp, data)
            _replace(temp, self._at(path))

    def put_new(self, path: str, data: bytes) -> bool:
        target = self._at(path)
        with _temporary(target) as temp:
            _write(temp, data)
            try:
                os.link(temp, target)  # unlike a rename, a link fails when the name is taken
            except FileExistsError:
                return False
            _sync(target.parent)
        return True

    def exists(self, path: str) -> bool:
        return self._at(path).is_file()

    def list(self, prefix: str) -> Paths:
        found = []
        for directory, _, names in os.walk(self.root / _clean(prefix), onerror=_raise_unless_gone):
            below = Path(directory).relative_to(self.root)
            found += [(below / name).as_posix() for name in names if not name.startswith(TEMP_PREFIX)]
        return sorted(found)

    def delete(self, prefix: str) -> None:
        target = self._at(prefix)
        if not target.is_dir():
            if target.exists():  # False below a file, where unlinking is an error
                target.unlink(missing_ok=True)
            return
        for manifest in target.rglob(MANIFEST):
            manifest.unlink(missing_ok=True)
            _sync(manifest.parent)
        shutil.rmtree(target)

    def check(self) -> None:
        try:
            if self.root.is_file():
                raise OSError("it is a file")
            self._probe()
        except OSError as error:
            got = f"{self.uri} ({error.strerror or error})"
            raise ValueError(f"storage must be a writable directory, got {got}; name another directory") from error

    def copy_out(self, path: str, target: Path) -> None:
        shutil.copyfile(self._at(path), target)

    def _at(self, path: str) -> Path:
        return self.root / _object(path)

    def _copy_in(self, source: Path, path: str, entry: FileEntry) -> None:
        target = self._at(path)
        with _temporary(target) as temp:
            shutil.copyfile(source, temp)
            if measure(temp) != entry:
                raise _changed(source)
            _sync(temp)
            _replace(temp, target)

    def _verified(self, path: str, manifest: Manifest, into: Path) -> Path:
        directory = self.root / _clean(path)
        for name, entry in manifest.files.items():
            if problem := _problem(directory, name, entry):
                raise CorruptError(str(directory), name, problem)
        return directory


class _S3(Storage):
    """A prefix of a bucket of any S3 server that honours If-None-Match on PutObject."""

    is_local = False

    def __init__(self, bucket: str, prefix: str, timing: Mapping[str, Any] = PATIENT):
        super().__init__(_join(f"s3://{bucket}", prefix))
        self.bucket, self.prefix = bucket, prefix
        self._timing = timing
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None

    @property
    def _client(self) -> Any:
        """The client of this process: made on first use, and made anew after a fork."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = os.getpid(), _s3_client(self._timing)
            return self._made[1]

    def read(self, path: str) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        with self._one_line("GET", path):
            for attempt in range(1, BODY_ATTEMPTS + 1):
                body = self._client.get_object(**self._at(path))["Body"]
                try:
                    return bytes(body.read())
                except (HTTPClientError, IncompleteReadError):
                    if attempt == BODY_ATTEMPTS:
                        raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def put(self, path: str, data: bytes) -> None:
        with self._one_line("PUT", path):
            self._client.put_object(**self._at(path), Body=data, ContentMD5=_md5(data))

    def put_new(self, path: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        # A retried request can meet the object that its own first attempt made; the token tells whose it is.
        token = uuid.uuid4().hex
        request = {**self._at(path), "Body": data, "ContentMD5": _md5(data), "Metadata": {"writer": token}}
        with self._one_line("PUT", path):
            for attempt in range(1, BODY_ATTEMPTS + 1):
                try:
                    self._client.put_object(**request, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                    if status == 412:
                        return self._writer(path) == token
                    if status != 409 or attempt == BODY_ATTEMPTS:  # 409: another conditional write is under way
                        raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def exists(self, path: str) -> bool:
        try:
            self._head(path)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Paths:
        start = len(_join(self.prefix, "x")) - 1
        folder = _join(self.prefix, _clean(prefix), "x")[:-1]
        with self._one_line("LIST", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
            return sorted(found["Key"][start:] for page in pages for found in page.get("Contents", ()))

    def delete(self, prefix: str) -> None:
        paths = [_object(prefix), *self.list(prefix)]
        with self._one_line("DELETE", prefix):
            for path in sorted(paths, key=lambda path: PurePosixPath(path).name != MANIFEST):
                self._client.delete_object(**self._at(path))

    def check(self) -> None:
        try:
            _S3(self.bucket, self.prefix, PREFLIGHT)._probe()
        except OSError as error:
            raise ValueError(_diagnosis(self, error)) from error

    def copy_out(self, path: str, target: Path) -> None:
        with self._one_line("GET", path):
            self._client.download_file(**self._at(path), Filename=str(target), Config=_transfer())

    def _at(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": _join(self.prefix, _object(path))}

    def _head(self, path: str) -> Any:
        with self._one_line("HEAD", path):
            return self._client.head_object(**self._at(path))

    def _writer(self, path: str) -> str | None:
        try:
            metadata: dict[str, str] = self._head(path)["Metadata"]
        except FileNotFoundError:
            return None
        return metadata.get("writer")

    def _copy_in(self, source: Path, path: str, entry: FileEntry) -> None:
        if entry.size < LARGE_FILE:
            data = source.read_bytes()
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise _changed(source)
            self.put(path, data)
            return
        with self._one_line("PUT", path):  # the parts' SHA-256 is part of their signatures, so the server checks them
            self._client.upload_file(**self._at(path), Filename=str(source), Config=_transfer())

    def _verified(self, path: str, manifest: Manifest, into: Path) -> Path:
        for name, entry in manifest.files.items():
            # A second try, because bytes spoilt on the way are no fault of the stored object.
            problem = self._download(path, name, entry, into) and self._download(path, name, entry, into)
            if problem:
                raise CorruptError(_join(self.uri, path), name, problem)
        (into / MANIFEST).write_text(manifest.to_json())
        return into

    def _download(self, path: str, name: str, entry: FileEntry, into: Path) -> str:
        """Brings one file; what is wrong with it, or nothing."""
        target, path = into / name, _join(path, name)
        if not _problem(into, name, entry):
            return ""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.copy_out(path, target)
        except FileNotFoundError:
            return "is missing"
        return _problem(into, name, entry)

    @contextmanager
    def _one_line(self, operation: str, path: str) -> Iterator[None]:
        """Turns what boto3 raises into an OSError of one line (FileNotFoundError for an absent object)."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{operation} {_join(self.uri, path)}"
        try:
            yield
        except ClientError as error:
            detail = error.response.get("Error", {})
            if detail.get("Code") in ("NoSuchKey", "404"):
                raise FileNotFoundError(f"{where}: there is no such object") from error
            raise OSError(f"{where}: {detail.get('Code')} {_flat(detail.get('Message'))}".rstrip()) from error
        except (BotoCoreError, Boto3Error) as error:
            raise OSError(f"{where}: {_flat(error)}") from error


def open_storage(uri: str) -> Storage:
    """The storage at a URI: `./dir`, `/abs/dir`, `file:///abs/dir` or `s3://bucket/prefix`. Touches nothing yet.

    Raises:
        ValueError: the URI is none of these.
    """
    rule = "storage must be a local path, file:///path or s3://bucket/prefix"
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri) and uri.strip():
        return _Local(Path(os.path.abspath(Path(uri).expanduser())))
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise ValueError(f"{rule}, got credentials in the URI; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if parts.query or parts.fragment:
        got = re.split("[?#]", uri)[0]  # what stands behind it may be a secret
        raise ValueError(f"{rule} without ? and #, got them behind {got!r}; set such options as variables")
    if parts.scheme == "s3" and re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", parts.netloc):
        return _S3(parts.netloc, _clean(parts.path.strip("/")))
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return _Local(Path(os.path.abspath(unquote(parts.path))))
    raise ValueError(f"{rule}, got {uri!r}; correct the URI")


def s3_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to set in every process so that boto3, pyarrow and MLflow speak to the same S3 server.

    The endpoint is the first of AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL and MLFLOW_S3_ENDPOINT_URL that is set. With none
    the store is AWS itself and nothing needs setting. What the user set is kept; no secret is ever in the answer.

    Raises:
        ValueError: the endpoint is not a URL, or MLFLOW_S3_ENDPOINT_URL names another server than the AWS variables.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    given = {name: environ[name] for name in names if environ.get(name)}
    if not given:
        return {}
    source, endpoint = next(iter(given.items()))
    if not re.fullmatch(r"https?://[^/@\s]+(/\S*)?", endpoint):
        got = endpoint.rpartition("@")[2]  # what stands before it may be a secret
        raise ValueError(f"{source} must be a URL such as http://127.0.0.1:9000, got {got!r}; correct it")
    mlflow = given.get("MLFLOW_S3_ENDPOINT_URL", endpoint)
    if mlflow.rstrip("/") != endpoint.rstrip("/"):
        got = mlflow.rpartition("@")[2]
        raise ValueError(
            f"MLFLOW_S3_ENDPOINT_URL must equal {source} ({endpoint}), got {got}; unset it, it is set from {source}"
        )
    wanted = dict.fromkeys(names, endpoint) | {
        # Servers other than AWS's refuse or ignore the checksums that the SDKs add by default.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        # Outside AWS nobody answers there, and looking for credentials would only wait.
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return {name: environ.get(name) or value for name, value in wanted.items()}


def _s3_client(timing: Mapping[str, Any]) -> Any:
    import boto3
    from botocore.config import Config

    settings = s3_environment(os.environ)
    config = Config(
        request_checksum_calculation=settings.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported"),
        response_checksum_validation=settings.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_supported"),
        **timing,
    )
    # A session of its own: boto3's default session is not made for several threads.
    return boto3.session.Session().client("s3", endpoint_url=settings.get("AWS_ENDPOINT_URL_S3"), config=config)


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=LARGE_FILE, multipart_chunksize=LARGE_FILE, max_concurrency=4)


def _diagnosis(storage: _S3, error: OSError) -> str:
    """Why the preflight failed and what to do, in one line."""
    from botocore.exceptions import ConnectionError as NoConnectionError
    from botocore.exceptions import HTTPClientError, NoCredentialsError, PartialCredentialsError

    cause = error.__cause__
    endpoint = s3_environment(os.environ).get("AWS_ENDPOINT_URL_S3", "AWS")
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    answer = getattr(cause, "response", None) or {}
    code = answer.get("Error", {}).get("Code", "")
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(cause, NoCredentialsError | PartialCredentialsError):
        rule, got, do = "have credentials", f"none or only a part for {storage.uri}", f"set {keys}"
    elif isinstance(cause, HTTPClientError | NoConnectionError):
        rule, got = "be reachable", f"no answer from {endpoint} for {storage.uri} ({_flat(cause)})"
        do = "start the server or correct AWS_ENDPOINT_URL_S3"
    elif code == "NoSuchBucket":
        rule, got = "lie in a bucket that exists", f"no bucket {storage.bucket} at {endpoint}"
        do = "create the bucket or correct the URI"
    elif status in (401, 403):
        rule, got = "be writable with the given credentials", f"{code} from {endpoint} for {storage.uri}"
        do = f"correct {keys} or the bucket's policy"
    else:
        rule, got, do = "work", f"{_flat(error)} at {endpoint}", "mend the server or name another storage"
    return f"storage must {rule}, got {got}; {do}"


def _clean(path: str) -> str:
    """A relative POSIX path ("" is the root), or ValueError."""
    if path.startswith("/") or "\\" in path or ".." in PurePosixPath(path).parts:
        raise ValueError(f"path must be relative and POSIX without '..', got {path!r}; name it from the storage's root")
    return "" if path in ("", ".") else PurePosixPath(path).as_posix()


def _object(path: str) -> str:
    """A path that names something below the root."""
    if not _clean(path):
        raise ValueError(f"path must name an object or directory below the root, got {path!r}; give its name")
    return _clean(path)


def _changed(source: Path) -> OSError:
    return OSError(f"{source} must not change while it is published, got other content; publish it when it is complete")


def _problem(directory: Path, name: str, entry: FileEntry) -> str:
    """What is wrong with one file, without its name; empty if nothing is.

    A file that this process found sound is not read again while its size, inode and time of change are the same: every
    stage asks for the data anew, and a published set is hundreds of gigabytes.
    """
    path = directory / name
    before = _state_of(path)
    if before is not None and _found_sound.get(path) == (before, entry.sha256):
        return ""
    problem = "".join(Manifest({name: entry}, {}).problems(directory)).removeprefix(f"{name} ")
    if not problem and before == _state_of(path):
        _found_sound[path] = (before, entry.sha256)
    return problem


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_size, found.st_ino, found.st_ctime_ns)  # ctime, because mtime can be set


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _flat(message: object) -> str:
    return " ".join(str(message or "").split())


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """The name of a temporary file beside `target`, whose directory is made durable if it is new."""
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for parent in reversed(missing):
        _sync(parent.parent)
    temp = target.parent / f"{TEMP_PREFIX}{uuid.uuid4().hex}"
    try:
        yield temp
    finally:
        temp.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _replace(temp: Path, target: Path) -> None:
    os.replace(temp, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Makes a file's content, or a directory's names, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
