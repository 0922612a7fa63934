"""Leases: one runner at an experiment, a sweep or a stage.

A lease is an object in the workspace that says who holds it, renewed while its holder lives. One whose holder is gone
is taken over: on the same machine at once, from another one when it was not renewed for as long as it lasts by the
clock of who looks, since clocks differ. A holder may be taken for dead and live, as after its storage was away for
longer than that: it finds out when it renews, stops, and looks once more before it publishes.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from orchestration.retry import PREFLIGHT
from orchestration.storage import Storage, open_storage
from workers.manifest import CorruptError

log = logging.getLogger(__name__)
LEASE_S = 60.0
CLOCKS_S = 900.0  # by which no two clocks differ: S3 refuses requests from further away
SAME_S = 5.0  # by which the time at which a process was started may seem to differ, since clocks are set
WAIT_S = 2.0  # between two looks at a stage that another process is at


_seen: dict[str, tuple[Any, float]] = {}  # by place: the lease last found there, and since when by this clock


class HeldError(ValueError):
    """Somebody else holds the lease."""


class Lease:
    """A lease that this process took.

    Attributes:
        lost: it was seen to be another's since.
    """

    def __init__(self, storage: Storage, path: str, what: str) -> None:
        self.storage, self.path, self.what = storage, path, what
        self.token, self.lost = uuid.uuid4().hex, False

    def is_ours(self) -> bool:
        """Whether it still is, by looking."""
        self.lost = self.lost or (_holder(self.storage, self.path) or {}).get("token") != self.token
        return not self.lost

    def content(self) -> bytes:
        """Whose it is: a machine and a process for people, the token for its holder, who may be taken for dead."""
        holder = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
        born = psutil.Process().create_time()
        return json.dumps({**holder, "born": born, "time": time.time(), "token": self.token}).encode()


@contextmanager
def hold(storage: Storage, path: str, what: str, wait: bool = False) -> Iterator[Lease]:
    """Holds a lease while the block runs.

    Args:
        storage: of the workspace.
        path: of the lease.
        what: it is for, in an error message.
        wait: for a sign of life of a holder on another machine: its lease is renewed, or runs out.

    Raises:
        HeldError: another process is at it.
    """
    lease, stop = Lease(storage, path, what), threading.Event()
    _take(lease, wait)
    thread = threading.Thread(target=_renew, args=(lease, stop), daemon=True, name="lease")
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        _give_back(lease)


def _give_back(lease: Lease) -> None:
    lease.storage = open_storage(lease.storage.uri, PREFLIGHT)
    try:
        if lease.is_ours():
            lease.storage.delete(lease.path)
    except OSError as error:  # what the block raised matters more, and who comes next waits for a minute
        log.warning("the lease of %s was not given back: %s", lease.what, error)


def _take(lease: Lease, wait: bool) -> None:
    first = None
    while not lease.storage.put_new(lease.path, lease.content()):
        holder = _holder(lease.storage, lease.path)
        if holder is None:  # given back just now
            continue
        if _is_alive(f"{lease.storage.uri}/{lease.path}", holder):
            if wait and not _is_here(holder) and holder == (first or holder):
                if first is None:
                    log.warning("looking whether process %s on %s, which holds %s, lives", *_who(holder), lease.what)
                first = holder
                time.sleep(1)
                continue
            pid, host = _who(holder)
            raise HeldError(
                f"{lease.what} must have one runner, but process {pid} on {host} is at it; wait for it or stop it"
            )
        # Of two that find a dead holder, the second to delete may take the first one's lease away, which then stops.
        lease.storage.delete(lease.path)


def _renew(lease: Lease, stop: threading.Event) -> None:
    # An attempt that waited for a storage to come back might overwrite what another took meanwhile.
    storage, told = open_storage(lease.storage.uri, PREFLIGHT), False
    while not stop.wait(LEASE_S / 4):
        try:
            if not lease.is_ours():
                log.warning("the lease of %s is another's, who took this process for dead", lease.what)
                return
            storage.put(lease.path, lease.content())
            told = False
        except Exception as error:  # a storage that is away for longer than the lease lets another take it
            if not told:
                log.warning("the lease of %s was not renewed: %s", lease.what, error)
            told = True


def _holder(storage: Storage, path: str) -> dict[str, Any] | None:
    """What a lease says; None where there is none."""
    try:
        found: dict[str, Any] = json.loads(storage.read(path))
        return found
    except FileNotFoundError:
        return None
    except (ValueError, CorruptError):
        log.warning("%s/%s is unreadable and taken for nobody's", storage.uri, path)
        return {"time": 0.0}


def _who(holder: Mapping[str, Any]) -> tuple[int, str]:
    return holder["pid"], holder["host"]


def _is_alive(where: str, holder: Mapping[str, Any]) -> bool:
    """A lease is renewed while its holder lives; on this machine a dead holder is seen at once."""
    age = time.time() - holder["time"]
    if not _is_here(holder):
        mark, now = (holder.get("token"), holder["time"]), time.monotonic()
        if _seen.get(where, (None,))[0] != mark:
            _seen[where] = mark, now
        return age <= LEASE_S + CLOCKS_S and now - _seen[where][1] <= LEASE_S
    if age > LEASE_S or holder["pid"] == os.getpid():
        return False
    try:
        process = psutil.Process(holder["pid"])
        return abs(process.create_time() - holder.get("born", process.create_time())) < SAME_S
    except psutil.NoSuchProcess:
        return False


def _is_here(holder: Mapping[str, Any]) -> bool:
    """Whether the holder's process would be found by its number."""
    return holder.get("host") == socket.gethostname() and holder.get("machine", _machine()) == _machine()


@functools.cache
def _machine() -> str:
    """What tells machines and containers of one host name apart: numbers of processes mean nothing elsewhere."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # not Linux
