"""Runs a Ray node's command so that SIGTERM, from whoever takes its machine away, leaves its workers time to finish.

    python -m orchestration.preemption [--grace 25] ray start --block --address=head:6379

At SIGTERM the node is drained: Ray places nothing new on it, and the driver of every run with workers there asks them
to stop after their step, with a checkpoint (watch.py). When they have gone, or after the grace time, the command itself
gets SIGTERM. Containers and spot machines give a node some seconds; Ray alone would spend none of them on its workers.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from typing import Any

import psutil

WORKER = "RayTrainWorker"  # in the title of the processes that Ray Train's workers are


def run(command: list[str], grace_s: float) -> int:
    """The command's exit code, as a shell tells it: 128 and the signal's number where a signal ended it."""
    child = subprocess.Popen(command)

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # said once is enough
        try:
            _drain(child.pid, grace_s)
            end = time.monotonic() + grace_s
            while _num_workers(child.pid) and time.monotonic() < end:
                time.sleep(0.2)
        except Exception as error:  # whatever it is, the node has to go
            print(f"warning: the node leaves without having been drained: {error}", file=sys.stderr, flush=True)
        child.terminate()

    signal.signal(signal.SIGTERM, leave)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _drain(pid: int, grace_s: float) -> None:
    """Tells the cluster that the node whose raylet is a descendant of `pid` goes away within `grace_s` seconds."""
    import ray._raylet
    from ray.core.generated import autoscaler_pb2

    raylet: Any = ray._raylet  # neither has types
    messages: Any = autoscaler_pb2
    arguments = next(p.cmdline() for p in psutil.Process(pid).children(recursive=True) if p.name() == "raylet")
    given = dict(a.lstrip("-").split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
    reason = messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + grace_s) * 1000)
    accepted, why = raylet.GcsClient(address=given["gcs-address"]).drain_node(
        given["node_id"], reason, "SIGTERM to its command", deadline_ms
    )
    if not accepted:
        raise RuntimeError(f"Ray does not drain it: {why}")


def _num_workers(pid: int) -> int:
    """Ray Train's workers among the descendants of `pid`."""
    found = 0
    for process in psutil.Process(pid).children(recursive=True):
        try:
            found += any(WORKER in part for part in process.cmdline()[:1])
        except psutil.NoSuchProcess:
            continue
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grace", type=float, default=25, help="seconds for the workers to leave a checkpoint")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    return run(options.command, options.grace)


if __name__ == "__main__":
    sys.exit(main())
