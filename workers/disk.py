"""Room on this machine's disk: what to say where there is none, and temporary files that outlive no killed process."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SCRATCH, _OWNER = "mixflow-scratch-", "owner.lock"


class NoRoomError(OSError):
    """A disk, or an object store's quota, is full: waiting does not help, the user has to free some."""


def is_the_disks(error: BaseException) -> bool:
    """Whether a read failed for the disk's or a mount's sake and not the file's: it may do better another time."""
    return getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


class PermanentError(OSError):
    """A fault that the same operation would meet again: credentials, a bucket that is not there, a wrong request."""


@contextmanager
def room_for(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Says what a write that finds no room needs and what is free, once the write's own leavings are gone.

    Args:
        path: what is written, a file or a directory.
        num_bytes: what it needs, in bytes; 0 if that is not known.

    Raises:
        NoRoomError: the disk, or the user's quota on it, is full.
    """
    try:
        yield
    except NoRoomError:
        raise  # a write inside this one has said it
    except Exception as error:
        told_in_words = "No space left on device" in str(error)  # so does safetensors, which raises no OSError
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and not told_in_words:
            raise
        there = next(place for place in (path, *path.parents) if place.exists())
        needed = f" of {num_bytes:,} needed" if num_bytes else ""
        raise NoRoomError(
            f"the disk must have room for {path}, got {shutil.disk_usage(there).free:,} bytes free{needed}; free some "
            "and run the same command again"
        ) from error


@contextmanager
def scratch_directory(num_bytes: int = 0) -> Iterator[Path]:
    """An empty temporary directory, removed at the end; those whose processes were killed are removed at the start.

    An flock tells whose process still lives, also where containers with process numbers of their own share the disk.

    Args:
        num_bytes: what it has to hold, in bytes; 0 if that is not known.

    Raises:
        NoRoomError: the disk is full.
    """
    with room_for(Path(tempfile.gettempdir()), num_bytes), _scratch_directory() as files:
        yield files


@contextmanager
def _scratch_directory() -> Iterator[Path]:
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        _remove_if_left(left)
    home = _take()
    while home is None:
        home = _take()
    directory, lock = home
    try:
        files = directory / "files"
        files.mkdir()
        yield files
    finally:
        _remove(directory)
        os.close(lock)


def _take() -> tuple[Path, int] | None:
    """A new directory and its lock; None if another process took it for a left one before it was locked."""
    directory = Path(tempfile.mkdtemp(prefix=_SCRATCH))
    try:
        lock = os.open(directory / _OWNER, os.O_CREAT | os.O_RDWR, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (directory / _OWNER).exists():
            return directory, lock
    except BlockingIOError:
        pass  # being removed at this moment
    os.close(lock)
    return None


def _remove_if_left(directory: Path) -> None:
    try:
        lock = os.open(directory / _OWNER, os.O_RDWR)
    except OSError:
        return  # gone, about to be locked, or another user's
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(directory)
    except OSError:
        pass  # its process lives, or nothing can be said of it
    finally:
        os.close(lock)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory / "files", ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)  # the lock last: who is killed amid this leaves it to the next
