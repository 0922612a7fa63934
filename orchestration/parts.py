"""Directories that many workers write: each file with a record once it is whole, the manifest when all are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from orchestration.storage import Storage
from workers.manifest import FileEntry, Manifest


class Parts(NamedTuple):
    """A directory under way: content goes where it will be published, records beside it until then.

    Attributes:
        storage: where both lie.
        path: of the directory that is to be published.
        records: directory of the records, which `commit` removes.
    """

    storage: Storage
    path: str
    records: str

    def finished(self, name: str, digest: str, *, may_be_empty: bool = False) -> tuple[dict[str, Any] | None, str]:
        """The record of a part that is done; otherwise None and, where there is a record, why it does not count.

        Args:
            name: of the part's file.
            digest: of what decides its content.
            may_be_empty: whether there may be a record without content.
        """
        try:
            record = json.loads(self.storage.read(f"{self.records}/{name}.json"))
            if record["digest"] != digest:
                return None, "its inputs or settings have changed"
            expected = FileEntry(record["size"], record["sha256"])
        except FileNotFoundError:
            return None, ""
        except (ValueError, KeyError, TypeError):
            return None, "its record is unreadable"
        if not expected.sha256:
            return (record, "") if may_be_empty else (None, "its record is of no content")
        try:
            content = self.storage.read(f"{self.path}/{name}")
        except FileNotFoundError:
            return None, "it is missing"
        if hashlib.sha256(content).hexdigest() != expected.sha256:
            return None, "its content is not what its record says"
        return record, ""

    def keep(self, name: str, digest: str, file: Path, about: Mapping[str, Any]) -> dict[str, Any]:
        """Puts a part in its place (content first, its record last) and returns the record; `file` may be absent.

        Raises:
            FileExistsError: the directory is published already, by another that was at it.
        """
        if self.storage.manifest(self.path):
            raise FileExistsError(f"{self.storage.uri}/{self.path} was published by another process; run again")
        entry = self.storage.put_file(file, f"{self.path}/{name}") if file.exists() else FileEntry(0, "")
        record = {"digest": digest, **asdict(entry), **about}
        self.storage.put(f"{self.records}/{name}.json", json.dumps(record).encode())
        return record

    def commit(self, found: Mapping[str, Mapping[str, Any]], directory: Path, meta: Mapping[str, Any]) -> Manifest:
        """Publishes the parts of these records (by name) together with the files of a local directory.

        What another process has published meanwhile is left as it is, and returned.
        """
        if there := self.storage.manifest(self.path):
            return there
        files = {
            name: FileEntry(record["size"], record["sha256"]) for name, record in found.items() if record["sha256"]
        }
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = file.relative_to(directory).as_posix()
            files[name] = self.storage.put_file(file, f"{self.path}/{name}")
        # Parts are found by their names when they are read: what another attempt left would be read too.
        for left in set(self.storage.list(self.path)) - {f"{self.path}/{name}" for name in files}:
            self.storage.delete(left)
        manifest = self.storage.commit(self.path, Manifest(files, meta))
        self.storage.delete(self.records)
        return manifest


def parts_of(storage: Storage, path: str) -> Parts:
    """The parts of a directory that is to be published at `path`."""
    return Parts(storage, path, f"parts/{path.replace('/', '-')}")
