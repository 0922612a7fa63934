"""What an experiment names by path or URI: brought to this machine, and refused where its SHA-256 is another."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from orchestration.experiment import Experiment
from orchestration.launch import cache_directory
from orchestration.retry import PATIENT, GaveUpError, Patience
from orchestration.storage import Storage, open_storage
from workers.codecs import CodecConfig, directory_hash
from workers.disk import NoRoomError, scratch_directory
from workers.encode import Images
from workers.extractors import ExtractorConfig
from workers.manifest import measure
from workers.models.family import ModelConfig


@dataclass(frozen=True)
class Given:
    """A checkpoint that the experiment names, in `section`, the result of `stage`."""

    section: str
    stage: str
    uri: str
    sha256: str
    model: ModelConfig


def given_base(experiment: Experiment) -> Given | None:
    """The base's checkpoint; None where the base is trained here."""
    base = experiment.base
    return (
        Given("base", experiment.base_stage(), base.checkpoint, base.sha256 or "", experiment.model)
        if base.checkpoint
        else None
    )


def given_guide(experiment: Experiment) -> Given | None:
    """The guide's checkpoint; None without a guide."""
    guide = experiment.guide
    return Given("guide", "guide", guide.checkpoint, guide.sha256, guide.model) if guide else None


@contextmanager
def given_weights(given: Given) -> Any:
    """A local, verified, strictly fitting copy of given weights as a state dict.

    Raises:
        ValueError: there is none.
    """
    from workers.models.checkpoints import load_weights
    from workers.models.mismatch import check_architecture

    where = f"{given.section}.checkpoint"
    folder, _, name = given.uri.rpartition("/")
    with scratch_directory() as scratch:
        storage = open_storage(folder or ("/" if given.uri.startswith("/") else "."))
        path = Path(storage.uri) / name if storage.is_local else scratch / name
        if not storage.is_local:
            with readable(where, given.uri):
                storage.copy_out(name, path)
        if path.is_dir():
            raise ValueError(
                f"{where} must be a file, got the directory {given.uri!r}; "
                "mixflow import makes a file of a diffusers directory"
            )
        if not path.is_file():
            raise ValueError(f"{where} must be a file, got {given.uri!r}, which does not exist")
        found = measure(path).sha256
        if found != given.sha256:
            raise ValueError(
                f"{given.section}.sha256 must be the checkpoint's {found}, got {given.sha256}; the file is another one"
            )
        with of_section(given.section, "checkpoint"):
            weights = load_weights(path)
            check_architecture(weights, given.model, given.uri)
        yield weights


def local_codec(config: CodecConfig) -> CodecConfig:
    """The codec with local paths: what lies on S3 is brought to this machine's cache, once.

    Raises:
        ValueError: something cannot be brought.
    """
    return replace(
        config,
        weights=local_copy("weights", config.weights, config.sha256),
        decoder=local_copy("decoder", config.decoder, config.decoder_sha256),
        statistics=local_copy("statistics", config.statistics, config.statistics_sha256),
    )


def local_encoders(settings: Images) -> Images:
    """The same for the encoders of alignment features and of captions."""
    return settings.model_copy(
        update={
            name: local_copy(name, path, getattr(settings, f"{name}_sha256") or "")
            for name in ("features", "text_encoders")
            if (path := getattr(settings, name))
        }
    )


def local_extractor(config: ExtractorConfig) -> ExtractorConfig:
    """The extractor with a local path, see local_copy."""
    return replace(config, weights=local_copy("weights", config.weights, config.sha256))


def local_copy(name: str, uri: str, sha256: str) -> str:
    """A local path of the file or directory at `uri`, which is that path itself where it is one.

    What lies elsewhere is copied to the cache under its hash, once a machine.

    Args:
        name: of the setting, for messages.
        uri: a local path or an s3:// URI; "" stays "".
        sha256: its hash, of a file or a directory_hash.

    Raises:
        ValueError: nothing can be read there, or what lies there has another hash.
    """
    if not uri.startswith("s3://"):
        return uri.removeprefix("file://")
    home = cache_directory() / "given"
    home.mkdir(parents=True, exist_ok=True)
    target = home / f"{sha256}{Path(uri).suffix}"
    with (home / f".{sha256}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and _hash_of(target) != sha256:  # what lay there under this hash was something else
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        if not target.exists():
            with readable(name, uri), tempfile.TemporaryDirectory(dir=home, prefix=".coming-") as scratch:
                _bring(name, uri, Path(scratch) / "it")
                found = _hash_of(Path(scratch) / "it")
                if found != sha256:
                    raise ValueError(
                        f"{name} {uri} must have the SHA-256 {sha256}, got {found}; get the right files or state it"
                    )
                os.replace(Path(scratch) / "it", target)
    return str(target)


def _bring(name: str, uri: str, target: Path) -> None:
    storage, last, files = files_at(name, uri)
    if files == [last]:
        storage.copy_out(last, target)
        return
    for file in files:
        below = file.removeprefix(f"{last}/")
        if PurePosixPath(below).is_absolute() or {"", ".", ".."} & set(below.split("/")):
            raise ValueError(f"{name} must hold files with names that stay below it, got {file!r}; rename it")
        path = target / below
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.copy_out(file, path)


def files_at(name: str, uri: str, patience: Patience = PATIENT) -> tuple[Storage, str, list[str]]:
    """The storage around a URI, its last part, and the file of that name or the files below it."""
    folder, _, last = uri.rstrip("/").rpartition("/")
    if folder == "s3:/":
        raise ValueError(f"{name} must name a file or a directory in its bucket, got {uri!r}; add its name")
    storage = open_storage(folder, patience)
    files = [last] if storage.exists(last) else storage.list(last)
    if not files:
        raise ValueError(f"{name} must be a file or a directory, got {uri!r} with nothing there; correct the URI")
    return storage, last, files


def _hash_of(path: Path) -> str:
    return directory_hash(path) if path.is_dir() else measure(path).sha256


@contextmanager
def readable(name: str, uri: str) -> Iterator[None]:
    """What was given may lie in another storage than the workspace, which nobody has tried yet.

    What waiting or more room would mend is nobody's wrong input.
    """
    try:
        yield
    except (GaveUpError, NoRoomError):
        raise
    except OSError as error:
        raise unreadable(name, uri, error) from error


def unreadable(name: str, uri: str, error: OSError) -> ValueError:
    """The error of a setting `name` whose URI cannot be read."""
    return ValueError(f"{name} must be readable, got {uri!r} ({error}); correct the URI or the access")


@contextmanager
def of_section(name: str, *settings: str) -> Iterator[None]:
    """Says to which section of the file a worker's complaint belongs, and to which of its settings if it names one."""
    try:
        yield
    except ValueError as error:
        text, first = str(error), re.split(r"[ .]", str(error), maxsplit=1)[0]
        if first in settings:
            raise ValueError(f"{name}.{text}") from error
        if name.endswith(f".{first}"):
            raise ValueError(f"{name}{text.removeprefix(first)}") from error
        raise ValueError(f"{name}: {text}") from error
