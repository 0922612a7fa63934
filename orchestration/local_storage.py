"""A storage in a directory of a local (or shared POSIX) filesystem: temporary files, fsync, rename and hard links."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.storage import Paths, Storage, changed, clean, object_path, problem_of
from workers.disk import room_for
from workers.manifest import MANIFEST, CorruptError, FileEntry, Manifest, measure

TEMP_PREFIX = ".tmp-"


class LocalStorage(Storage):
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
        target = self._at(path)
        with room_for(target, len(data)), _temporary(target) as temp:
            _write(temp, data)
            _replace(temp, target)

    def put_new(self, path: str, data: bytes) -> bool:
        target = self._at(path)
        with room_for(target, len(data)), _temporary(target) as temp:
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
        for directory, _, names in os.walk(self.root / clean(prefix), onerror=_raise_unless_gone):
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
        source = self._at(path)
        with room_for(target, source.stat().st_size):
            shutil.copyfile(source, target)

    def discard_unfinished(self, prefix: str, older_s: float = 0) -> None:
        for left in (self.root / clean(prefix)).rglob(f"{TEMP_PREFIX}*"):
            if time.time() - left.stat().st_mtime >= older_s:
                left.unlink(missing_ok=True)

    def _at(self, path: str) -> Path:
        return self.root / object_path(path)

    def _copy_in(self, source: Path, path: str, entry: FileEntry) -> None:
        target = self._at(path)
        with room_for(target, entry.size), _temporary(target) as temp:
            shutil.copyfile(source, temp)
            if measure(temp) != entry:
                raise changed(source)
            _sync(temp)
            _replace(temp, target)

    def _verified(self, path: str, manifest: Manifest, into: Path) -> Path:
        directory = self.root / clean(path)
        for name, entry in manifest.files.items():
            if problem := problem_of(directory, name, entry):
                raise CorruptError(str(directory), name, problem)
        return directory


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
