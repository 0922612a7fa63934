"""No room left, in one line: which file, how much it needs, how much is free."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoRoomError(OSError):
    """A disk, or an object store's quota, is full: waiting does not help, the user has to free some."""


@contextmanager
def room_for(path: Path, num_bytes: int) -> Iterator[None]:
    """Says what a write that finds no room needs and what is free, once the write's own leavings are gone.

    Args:
        path: what is written, a file or a directory.
        num_bytes: what it needs, in bytes.

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
        raise NoRoomError(
            f"the disk must have room for {path}, got {shutil.disk_usage(there).free:,} bytes free of {num_bytes:,} "
            "needed; free some and run the same command again"
        ) from error
