"""The driver's eye on its workers: it passes on that it, or their node, is to end, and ends a worker that hangs."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from orchestration.cluster import NODE_ANSWERS_S, more_room, room_for
from orchestration.launch import Pulse
from orchestration.lease import Lease
from orchestration.sections import Cluster

log = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0
GROW_EVERY_S = 30.0  # how often an elastic group looks for room for more workers
FRESH_S = 5.0  # since the last sign of life of a worker of which nothing is feared
ASK_AGAIN_S = 600.0  # where a group that started again for room did not get it
PATIENCE_S = 60.0  # for workers that do not come, until the user hears of it
REMIND_S = 600.0  # until the user hears of it again
STOPPING = "stopping after this step, with a checkpoint; once more to stop at once"


@contextmanager
def watching(reporter: Any, cluster: Cluster, say: Callable[[str], None], lease: Lease | None = None) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGINT stop the workers after their step, and a worker that hangs is ended.

    A group with a worker on a node that is being drained, because it will be taken away, is asked to stop as well; so
    is an elastic one, if it is the only one, where there is room for more workers; and all are once another process has
    taken the lease.

    Args:
        reporter: the Reporter actor.
        cluster: what was asked of Ray.
        say: tells the user a line.
        lease: of what the workers are at.

    Raises:
        KeyboardInterrupt: at a second signal.
    """
    asked, done = threading.Event(), threading.Event()

    def hear(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    missing_since, reminders, told, growth = time.monotonic(), 0, False, _Growth(cluster)
    ends: dict[tuple[str, int], threading.Thread] = {}

    def look() -> None:
        nonlocal missing_since, reminders, told
        if asked.is_set() or (lease and lease.lost):
            reporter.end.remote()  # again and again: a Reporter that was started again knows nothing of it
            if not told:
                told = True
                say(STOPPING)
        pulses = _pulses(reporter)
        if pulses or pulses is None:
            missing_since, reminders = time.monotonic(), 0
        elif time.monotonic() - missing_since > PATIENCE_S + REMIND_S * reminders:
            reminders += 1
            say(f"warning: waiting for {cluster.least_workers} workers; {_room(cluster)}")
        leaving = _draining_nodes() if pulses else {}
        stopping = {pulse.group for pulse in pulses or [] if pulse.node in leaving}
        if more := growth.room_beside(pulses or [], leaving):
            say(f"the cluster has room for {more} more workers; stopping after this step, to start again with them")
            stopping |= {pulse.group for pulse in pulses or []}
        for group in stopping:
            reporter.stop.remote(group)
        for pulse in pulses or []:
            which = pulse.node, pulse.pid
            if pulse.silent_s > cluster.hang_timeout_s and not (which in ends and ends[which].is_alive()):
                ends[which] = threading.Thread(target=end, args=(pulse,), daemon=True, name="end")
                ends[which].start()

    def end(pulse: Pulse) -> None:
        if _end(pulse, say):  # else again, until Ray takes the node for lost
            reporter.gone.remote(pulse.group, pulse.rank)

    def keep_looking() -> None:
        while not done.wait(LOOK_EVERY_S):
            try:
                look()
            except Exception as error:  # or nobody would hear signals, nor see a worker that hangs, any more
                log.warning("a look at the workers failed: %s", error)

    thread = threading.Thread(target=keep_looking, daemon=True, name="watch")
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT) if is_main}
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=NODE_ANSWERS_S)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Growth:
    """Whether an elastic group that is well is to start again because there is room for more workers.

    Where it did start again and there still is room on the same nodes, that is somebody else's: it is not asked at once
    anew. Groups beside one another, the trials of a sweep, leave the room to each other.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.workers, self.looked_at = frozenset[tuple[str, int, int]](), time.monotonic()
        self.asked, self.asked_at = frozenset[str](), -math.inf  # for the room of which nodes

    def room_beside(self, pulses: Sequence[Pulse], leaving: Container[str]) -> int:
        """Further workers to start again with; 0 for going on as it is."""
        import ray

        at, now = len(pulses), time.monotonic()
        if self.cluster.least_workers == self.cluster.most_workers or now - self.looked_at < GROW_EVERY_S:
            return 0
        before, self.workers, self.looked_at = self.workers, frozenset((p.node, p.pid, p.rank) for p in pulses), now
        if self.workers != before or any(pulse.silent_s > FRESH_S for pulse in pulses):
            return 0  # one of them is lost, or they have just begun: Ray is at it
        if len({pulse.group for pulse in pulses}) != 1:
            return 0
        try:
            room = more_room(self.cluster, leaving)
        except ray.exceptions.RayError:
            return 0  # the head does not answer
        more = min(sum(room.values()), self.cluster.most_workers - at)
        if more <= 0 or (self.asked.issuperset(room) and now - self.asked_at < ASK_AGAIN_S):
            return 0
        self.asked, self.asked_at = frozenset(room), now
        return more


def _room(cluster: Cluster) -> str:
    """Why workers may not come."""
    import ray

    try:
        room, free = room_for(cluster), sum(more_room(cluster).values())
    except ray.exceptions.RayError:
        return "the head does not answer"
    if room < cluster.least_workers:
        return f"the cluster has room for {room}"
    if free < cluster.least_workers:
        return f"of the cluster's room for {room}, {free} is free: others hold it, or they are about to begin"
    return "the cluster has room for them, and they do not begin; its logs say why (ray logs)"


def _pulses(reporter: Any) -> list[Pulse] | None:
    """Of all workers; None while the Reporter does not answer."""
    import ray

    try:
        found: Any = ray.get(reporter.pulses.remote(), timeout=10)
        return list(found)
    except ray.exceptions.RayError:
        return None


def _draining_nodes() -> dict[str, int]:
    """Ray's ids of the nodes that will be taken away, with the time of it; as Ray Train itself asks for them."""
    import ray
    from ray._private.state import state

    try:
        return dict(state.get_draining_nodes())
    except (ray.exceptions.RayError, RuntimeError):
        return {}  # the head does not answer; asked again in a second


def _end(pulse: Pulse, say: Callable[[str], None]) -> bool:
    """Logs the stack of a worker that hangs and kills it: Ray Train then starts the group again.

    Returns:
        Whether it is gone, or its whole node; False if the node did not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(pulse.node, soft=False)
    end: Any = ray.remote(end_process)
    who = f"worker {pulse.rank} on {pulse.address}, pid {pulse.pid}"
    try:
        stack: Any = ray.get(
            end.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(pulse.pid, pulse.born),
            timeout=NODE_ANSWERS_S,
        )
    except ray.exceptions.TaskUnschedulableError:
        say(f"warning: {who} has been silent for {pulse.silent_s:.0f} s, and its node is lost")
        return True
    except ray.exceptions.RayError as error:
        say(f"warning: {who} has been silent for {pulse.silent_s:.0f} s, and its node does not answer ({error})")
        return False
    if stack is not None:
        say(f"warning: {who} has been silent for {pulse.silent_s:.0f} s and was killed; it was at\n{stack}")
    return True


def end_process(pid: int, born: float) -> str | None:
    """Kills a process of this machine; the stacks that its threads had, None if it is not there any more."""
    import psutil

    try:
        if psutil.Process(pid).create_time() != born:
            return None
        stack = _stack(pid)
        os.kill(pid, signal.SIGKILL)
        return stack
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def _stack(pid: int) -> str:
    # Without pausing the process, which may be stopped already.
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=NODE_ANSWERS_S / 2)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(its stack cannot be read: {error})"
    return answer.stdout.strip() or f"(its stack cannot be read: {' '.join(answer.stderr.split())})"
