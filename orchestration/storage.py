"""URI <-> filesystem; atomic checksummed publish.

A `Storage` is a tree of objects under one URI, a local directory or an S3 bucket with a prefix, with the few promises
that the rest of the project is built on: a reader never sees half an object, `put_new` has one winner, and a published
directory is there exactly when its manifest is. Here is what all storages have in common; `local_storage.py` and
`s3_storage.py` are the two there are.
"""

from __future__ import annotations

import abc
import json
import logging
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from orchestration.retry import PATIENT, Patience
from workers.manifest import MANIFEST, CorruptError, FileEntry, Manifest, measure

log = logging.getLogger(__name__)
_told: set[str] = set()

SET_ASIDE = "set-aside.json"
WORKSPACE_ID = "workspace-id"

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
        """The whole object; FileNotFoundError if there is none, CorruptError if it is not as it was stored."""

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
    def discard_unfinished(self, prefix: str, older_s: float = 0) -> None:
        """Removes temporary files and multipart uploads below the directory `prefix` that nobody will finish.

        Args:
            prefix: a directory that no other process is writing to, unless `older_s` is longer than a write takes.
            older_s: how long ago they were begun at least, in seconds.
        """

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
        try:
            self._committed(path)
        except (FileNotFoundError, CorruptError) as error:
            if isinstance(error, CorruptError) and error.file == MANIFEST:
                self.delete(join(path, MANIFEST))  # unreadable: as if nothing were here
            for name, entry in manifest.files.items():
                self._copy_in(Path(directory) / name, join(path, name), entry)
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
        if self.put_new(join(path, MANIFEST), manifest.to_json().encode()):
            return manifest
        found = self.manifest(path)
        if found is None or found.digest != manifest.digest:
            raise FileExistsError(
                f"{join(self.uri, path)}: other content is published here; use another path or delete it"
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
        self.put(join(path, SET_ASIDE), json.dumps({"reason": reason}).encode())
        log.warning("%s is set aside: %s", join(self.uri, path), reason)

    def _committed(self, path: str) -> Manifest:
        """The manifest at `path`, or FileNotFoundError or CorruptError."""
        uri = join(self.uri, path)
        try:
            text = self.read(join(path, MANIFEST))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{uri}: nothing is published here, there is no {MANIFEST}") from error
        if self.exists(join(path, SET_ASIDE)):
            raise CorruptError(uri, SET_ASIDE, "says that this directory is not to be used")
        try:
            manifest = Manifest.from_json(text)
            for name in manifest.files:
                object_path(name)
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


def open_storage(uri: str, patience: Patience = PATIENT) -> Storage:
    """The storage at a URI: `./dir`, `/abs/dir`, `file:///abs/dir` or `s3://bucket/prefix`. Touches nothing yet.

    Args:
        uri: where it lies.
        patience: how long faults of an S3 server are waited for.

    Raises:
        ValueError: the URI is none of these.
    """
    from orchestration.local_storage import LocalStorage  # both import this module
    from orchestration.s3_storage import S3Storage

    rule = "storage must be a local path, file:///path or s3://bucket/prefix"
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri) and uri.strip():
        return LocalStorage(Path(os.path.abspath(Path(uri).expanduser())))
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise ValueError(f"{rule}, got credentials in the URI; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if parts.query or parts.fragment:
        got = re.split("[?#]", uri)[0]  # what stands behind it may be a secret
        raise ValueError(f"{rule} without ? and #, got them behind {got!r}; set such options as variables")
    if parts.scheme == "s3" and re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", parts.netloc):
        return S3Storage(parts.netloc, clean(parts.path.strip("/")), patience)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return LocalStorage(Path(os.path.abspath(unquote(parts.path))))
    if parts.scheme == "s3":
        rule += ", a bucket of 3 to 63 small letters, digits, dots and hyphens"
    raise ValueError(f"{rule}, got {uri!r}; correct the URI")


def workspace_id(storage: Storage) -> str:
    """A workspace's own name, by which its runs in MLflow are told from those of others; made when first asked for."""
    if not storage.exists(WORKSPACE_ID):
        storage.put_new(WORKSPACE_ID, uuid.uuid4().hex.encode())
    return storage.read(WORKSPACE_ID).decode()


def clean(path: str) -> str:
    """A relative POSIX path ("" is the root), or ValueError."""
    if path.startswith("/") or "\\" in path or ".." in PurePosixPath(path).parts:
        raise ValueError(f"path must be relative and POSIX without '..', got {path!r}; name it from the storage's root")
    return "" if path in ("", ".") else PurePosixPath(path).as_posix()


def object_path(path: str) -> str:
    """A path that names something below the root."""
    if not clean(path):
        raise ValueError(f"path must name an object or directory below the root, got {path!r}; give its name")
    return clean(path)


def changed(source: Path) -> OSError:
    """The error of a file that became another while it was copied."""
    return OSError(f"{source} must not change while it is published, got other content; publish it when it is complete")


def problem_of(directory: Path, name: str, entry: FileEntry) -> str:
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


def join(*parts: str) -> str:
    """Parts of a path or URI, empty ones left out."""
    return "/".join(part for part in parts if part)
