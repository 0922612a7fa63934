"""What Ray Train runs on a worker: the entry, the signs of life that it gives, and what makes it stop."""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import psutil
import ray
import ray.train
import ray.train.torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from orchestration.cluster import NAMESPACE
from orchestration.launch import Pulse, cache_directory
from workers.io import StoppedError

log = logging.getLogger(__name__)
ALIVE_EVERY_S = 1.0
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)  # of linux/prctl.h
# For a worker that measures or samples while others wait, or for a node that is still fetching data. The half hour of
# Ray's own group is for steps; whose process is gone or stopped meanwhile is found by the signs of life.
LONGEST_WAIT = timedelta(hours=6)
_terminated = threading.Event()  # this process was sent SIGTERM


class GroupConfig(TorchConfig):
    """Ray Train's process group, on workers that hear SIGTERM."""

    @property
    def backend_cls(self) -> Any:
        """See ray.train.backend.BackendConfig."""
        return _Group


class _Group(_TorchBackend):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called on the controller before the entry; only here does Ray run something in the workers' main threads."""
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(hear_sigterm)


def hear_sigterm() -> None:
    """SIGTERM makes this process stop after its step; Ray's own handler would end it at once."""
    signal.signal(signal.SIGTERM, lambda number, frame: _terminated.set())


def let_be_looked_at() -> None:
    """Lets other processes of this user read this one's stack, should it hang; Yama allows it to parents alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)  # refused where there is no Yama, and not needed


def worker_entry(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train starts on each worker: the thin layer between Ray and the stages."""
    # Here, because driver and controller load this file too, and need none of it.
    import torch

    from orchestration.experiment import Experiment
    from orchestration.site import Site
    from orchestration.stages import run_stages
    from orchestration.storage import open_storage
    from orchestration.workflow import Workspace
    from workers.disk import NoRoomError, PermanentError
    from workers.train import NonFiniteLossError

    let_be_looked_at()
    experiment = Experiment.model_validate_json(config["experiment"])
    torch.set_num_threads(max(1, int(experiment.cluster.cpus_per_worker)))
    context = ray.train.get_context()
    reporter = ray.get_actor(config["reporter"], NAMESPACE)
    why: Any = ray.get(reporter.refused.remote(config["name"]))
    if why:
        return {"wrong_input": why}

    def tell(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        reporter.tell.remote(stage, done, total, metrics, int(time.time() * 1000))

    def rung(step: int, value: float) -> None:
        ray.train.report({"step": step, "objective": value})

    workspace = Workspace(experiment, open_storage(config["workspace"]), config["trial"])
    signs = SignsOfLife(reporter, config["name"], context.get_world_rank())
    size = context.get_world_size()
    site = Site(
        workspace=workspace,
        rank=context.get_world_rank(),
        world_size=size,
        device=ray.train.torch.get_device() if experiment.cluster.gpus_per_worker else torch.device("cpu"),
        cache=cache_directory(),
        tell=tell,
        rung=rung,
        stopping=signs.stopping,
    )
    if site.rank == 0:
        reporter.gone.remote(config["name"])  # those of the group before this one, which had the same name
        if not config["trial"]:  # each trial has a group of its own
            reporter.started.remote()
    for package in ("workers", "orchestration"):
        logging.getLogger(package).addHandler(_Forward(reporter))
    try:
        signs.start()
        if size > 1:
            site.group = torch.distributed.new_group(timeout=LONGEST_WAIT, backend="gloo")
        run_stages(site, [workspace.stages[name] for name in config["stages"]])
    except NonFiniteLossError as error:
        # Raised on all ranks together, and again on every restart: returned, so that Ray makes none.
        return {"error": str(error)}
    except StoppedError as error:
        return {"stopped": str(error)}
    except (ValueError, NoRoomError, PermanentError) as error:
        if site.world_size > 1 and not torch.distributed.is_initialized():
            raise  # Ray ends the group, since another worker is lost: what this one met says nothing of its input
        # Of one rank alone, while others wait for it: Ray has to end them, and the next start ends the run.
        ray.get(reporter.refuse.remote(config["name"], " ".join(str(error).split())))
        raise
    finally:
        signs.end()
    return {}


class SignsOfLife:
    """A thread that tells the Reporter all the time that this process lives, and hears whether to stop."""

    def __init__(self, reporter: Any, group: str, rank: int) -> None:
        node = ray.get_runtime_context().get_node_id()
        me = psutil.Process()
        self.pulse = Pulse(group, rank, node, ray.util.get_node_ip_address(), me.pid, me.create_time())
        self.reporter, self.asked, self.ended = reporter, threading.Event(), threading.Event()

    def start(self) -> None:
        """Begins."""
        threading.Thread(target=self._give, daemon=True, name="signs-of-life").start()

    def stopping(self) -> bool:
        """Whether this worker is to stop: it, another of its group, or the driver was asked to."""
        return _terminated.is_set() or self.asked.is_set()

    def end(self) -> None:
        """No more signs are to be expected."""
        self.ended.set()
        self.reporter.gone.remote(self.pulse.group, self.pulse.rank)

    def _give(self) -> None:
        while not self.ended.wait(ALIVE_EVERY_S):
            if _terminated.is_set():
                self.reporter.stop.remote(self.pulse.group)
            try:
                if ray.get(self.reporter.alive.remote(self.pulse), timeout=10):
                    self.asked.set()
            except ray.exceptions.RayError as error:
                log.debug("the Reporter does not hear (%s); Ray starts it again", error)


class _Forward(logging.Handler):
    """Hands a worker's warnings (a checkpoint set aside, for instance) to the Reporter, since nobody reads its log."""

    def __init__(self, reporter: Any) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.warn.remote(" ".join(record.getMessage().split()))
