"""What makes a directory of files complete: a manifest, written last, that names each file with size and SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a directory by relative POSIX path, and whatever its writer says about them (`meta`, plain JSON)."""

    files: Mapping[str, FileEntry]
    meta: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the file list: the identity of the content, whatever the meta says."""
        return canonical_hash({name: asdict(entry) for name, entry in self.files.items()})

    @classmethod
    def describe(cls, directory: Path, meta: Mapping[str, Any]) -> Manifest:
        """Measures every file under `directory` (the manifest itself excepted)."""
        paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
        return cls({path.relative_to(directory).as_posix(): measure(path) for path in paths}, dict(meta))

    def problems(self, directory: Path) -> list[str]:
        """One line for each file of the manifest that is missing, of another size or of another content."""
        found = []
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != entry.size:
                found.append(f"{name} has {path.stat().st_size} bytes instead of {entry.size}")
            elif measure(path).sha256 != entry.sha256:
                found.append(f"{name} has another SHA-256 than its manifest says")
        return found

    def to_json(self) -> str:
        """The manifest as it is stored."""
        files = {name: asdict(entry) for name, entry in sorted(self.files.items())}
        return json.dumps({"schema": SCHEMA_VERSION, "files": files, "meta": self.meta}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Reads a stored manifest.

        Raises:
            ValueError: the text is not a manifest of this schema version.
        """
        try:
            raw = json.loads(text)
            if raw["schema"] != SCHEMA_VERSION:
                raise ValueError(f"manifest schema must be {SCHEMA_VERSION}, got {raw['schema']}")
            files = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            if not all(type(entry.size) is int and type(entry.sha256) is str for entry in files.values()):
                raise TypeError("a file must have a whole number as size and a text as sha256")
            return cls(files, raw["meta"])
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not a manifest: {error}") from error


class CorruptError(Exception):
    """A published directory is not what its manifest says; the message names the URI, the file and what is wrong."""

    def __init__(self, uri: str, file: str, problem: str) -> None:
        super().__init__(uri, file, problem)  # the arguments are what pickle carries
        self.uri, self.file, self.problem = uri, file, problem

    def __str__(self) -> str:
        return f"{self.uri}: {self.file} {self.problem}; restore it or remove the directory"


def measure(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, digest)


def canonical_hash(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
