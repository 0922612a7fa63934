"""Tries an operation again while its fault may pass: exponential waits with full jitter, one deadline, few words."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


class TransientError(OSError):
    """A fault that may pass by itself: the same operation may succeed when it is tried again."""


class AlteredError(TransientError):
    """What came is not what the server holds: it was altered on its way, or where it lies."""


class GaveUpError(OSError):
    """A fault that may pass did not until the deadline; `last` is how the last attempt failed."""

    last: TransientError


@dataclass(frozen=True)
class Patience:
    """How long to wait, all in seconds.

    Attributes:
        deadline_s: no attempt begins later than this after the operation first failed.
        connect_s: for a connection, and for each 16 KiB of an upload to be taken up.
        read_s: for the next bytes of an answer; one that is merely slow may take as long as it takes.
        first_wait_s: the first wait is uniform between 0 and this, so that many clients do not come back at once.
        longest_wait_s: the upper end doubles from wait to wait up to this.
    """

    deadline_s: float
    connect_s: float
    read_s: float
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0


# What a run does, and its preflight, which must end within about 10 s at an endpoint that swallows packets (boto3
# spends 1 s of each upload on waiting for "100 Continue").
PATIENT = Patience(deadline_s=300, connect_s=20, read_s=60)
PREFLIGHT = Patience(deadline_s=3, connect_s=3, read_s=3)


class Retries:
    """Tries operations again, from any number of threads, and tells once of each time in which any had to wait."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._random = random.Random()  # of its own: the global one belongs to whoever seeds it
        self._lock = threading.Lock()
        self._num_waiting, self._since = 0, 0.0

    def call(self, attempt: Callable[[], T]) -> T:
        """What `attempt` answers.

        Raises:
            GaveUpError: it still failed at the deadline; says how often and how long it was tried.
            Exception: any other error of `attempt`, at once.
        """
        try:
            return attempt()
        except TransientError as error:
            failed = error
        self._wait_begins(failed)
        try:
            answer = self._again(attempt, failed)
        except BaseException:
            self._wait_ends(well=False)
            raise
        self._wait_ends(well=True)
        return answer

    def _again(self, attempt: Callable[[], T], failed: TransientError) -> T:
        start, attempts, longest = time.monotonic(), 1, self.patience.first_wait_s
        while True:
            time.sleep(self._random.uniform(0, longest))
            waited = time.monotonic() - start
            if waited > self.patience.deadline_s:
                gave_up = GaveUpError(f"{failed}; tried {attempts} times in {waited:.0f} s")
                gave_up.last = failed
                raise gave_up from failed.__cause__
            attempts, longest = attempts + 1, min(2 * longest, self.patience.longest_wait_s)
            try:
                return attempt()
            except TransientError as error:
                failed = error

    def _wait_begins(self, error: TransientError) -> None:
        with self._lock:
            self._num_waiting += 1
            if self._num_waiting == 1:
                self._since = time.monotonic()
                log.warning("%s; trying again for up to %g s", error, self.patience.deadline_s)

    def _wait_ends(self, well: bool) -> None:
        with self._lock:
            self._num_waiting -= 1
            if well and not self._num_waiting:
                log.warning("storage answers again after %.1f s", time.monotonic() - self._since)
