"""Stages: what they are identified by, what is redone, and who may run."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train.torch
import torch

from orchestration import lease as leases
from orchestration import run, stages, workflow
from orchestration.launch import Reporter, RunFailedError, launch
from orchestration.lease import LEASE_S, HeldError
from orchestration.progress import Progress
from orchestration.recipe import load
from orchestration.run import _driver_stages, _forced
from orchestration.site import Site
from orchestration.storage import Storage, open_storage
from orchestration.worker import worker_entry
from orchestration.workflow import Workspace, needed_for, stages_of
from workers.io import StoppedError


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "workspace"))


def workspace_of(storage: Storage, *overrides: str) -> Workspace:
    return Workspace(load("quickstart", overrides), storage)


def publish(workspace: Workspace, name: str, tmp_path: Path, content: str = "content") -> str:
    """Publishes a stage with one file and answers with its identity."""
    directory = tmp_path / f"made-{time.monotonic_ns()}"
    directory.mkdir()
    (directory / "file").write_text(content)
    workspace.publish(name, directory, seconds=1.0)
    return str(workspace.identity(name))


def publish_all(workspace: Workspace, tmp_path: Path) -> None:
    for name in workspace.stages:
        publish(workspace, name, tmp_path, f"{name} {workspace.identity(name)}")


def to_do(workspace: Workspace) -> set[str]:
    return {name for name in workspace.stages if workspace.state(name) == "to do"}


def of_kinds(workspace: Workspace, *kinds: str) -> set[str]:
    return {name for name, stage in workspace.stages.items() if stage.kind in kinds}


# ----------------------------------------------------------------------------------------------------- identity


def test_an_order_that_respects_the_inputs():
    seen: set[str] = set()
    for stage in stages_of(load("quickstart")):
        assert set(stage.inputs) <= seen, stage.name
        assert stage.name not in seen
        seen.add(stage.name)


def test_what_is_needed_and_nothing_else():
    every = stages_of(load("quickstart"))
    names = [stage.name for stage in every]

    def needed(target: str) -> list[str]:
        return [stage.name for stage in needed_for(every, lambda stage: stage.name == target)]

    assert needed("data") == ["data"]
    assert needed("arms/mixflow/1") == ["data", "base", "arms/mixflow/1"]
    assert needed("slow-flow/base") == ["data", "base", "features", "slow-flow/base"]
    assert needed("samples/none/2") == ["data", "base", "samples/none/2"]
    assert needed("metrics/matched/0") == [
        *("data", "base", "features", "reference", "arms/matched/0", "samples/matched/0", "metrics/matched/0")
    ]
    assert needed("report") == names
    assert needed_for(every, lambda stage: False) == []


def test_metrics_are_told_apart_by_the_label_law_that_their_variation_within_a_seed_depends_on():
    for law in ("equal", "random"):
        stages = stages_of(load("quickstart", [f"evaluation.label_law={law}"]))
        assert {stage.settings["label_law"] for stage in stages if stage.kind == "metrics"} == {law}


def test_no_identity_before_the_inputs_are_there(storage, tmp_path):
    workspace = workspace_of(storage)
    assert workspace.identity("data")
    assert workspace.identity("base") is None
    assert workspace.artifact("arms/mixflow/0") is None
    publish(workspace, "data", tmp_path)
    assert workspace.identity("base")
    assert workspace.identity("samples/none/0") is None


@pytest.mark.parametrize(
    ("override", "redone"),
    [
        ("mixture.gamma=0.7", {"mixflow", "matched"}),
        ("arms.mixflow.mixture.shift=2", None),  # its control must follow
        ("evaluation.num_samples=100", {"none", "standard", "mixflow", "matched"}),
    ],
)
def test_a_setting_redoes_what_follows_it_and_nothing_else(storage, tmp_path, override, redone):
    overrides = [override] if redone else [override, "arms.matched.mixture.shift=2"]
    publish_all(workspace_of(storage), tmp_path)
    changed = workspace_of(storage, *overrides)
    redone = redone or {"mixflow", "matched"}
    # What is on top of a stage that is to do has no identity yet, so it is to do as well.
    kinds = ["samples", "metrics"] if override.startswith("evaluation") else ["arms", "samples", "metrics", "slow-flow"]
    expected = {name for name in of_kinds(changed, *kinds) if name.split("/")[1] in redone}
    assert to_do(changed) == expected | {"report"}


def test_what_slow_flow_depends_on(storage, tmp_path):
    publish_all(workspace_of(storage), tmp_path)
    every = of_kinds(workspace_of(storage), "slow-flow") | {"report"}
    assert to_do(workspace_of(storage, "evaluation.slow_flow_samplers=[{method: heun, num_steps: 4}]")) == every
    assert to_do(workspace_of(storage, "evaluation.slow_flow_samples=20")) == every
    same = "{method: euler, num_steps: 20}, {method: sde, num_steps: 8, end: 0.96, last_step: none}"
    assert to_do(workspace_of(storage, f"evaluation.slow_flow_samplers=[{same}]")) == {"report"}, (
        "as they are where none are given"
    )


def test_names_cluster_and_replicates_redo_no_training(storage, tmp_path):
    publish_all(workspace_of(storage), tmp_path)
    assert to_do(workspace_of(storage, "cluster.num_workers=4", "cluster.max_failures=0")) == set()
    assert to_do(workspace_of(storage, "name=another", "evaluation.recall_margin=0.1")) == {"report"}
    more = to_do(workspace_of(storage, "replicates=4"))
    assert more == {"report"} | {
        f"{kind}/{arm}/3" for kind in ("samples", "metrics") for arm in ("none", "standard", "mixflow", "matched")
    } | {f"arms/{arm}/3" for arm in ("standard", "mixflow", "matched")}


def test_the_content_of_an_input_counts_and_not_its_history(storage, tmp_path):
    workspace = workspace_of(storage)
    publish(workspace, "data", tmp_path, "one")
    first = workspace.identity("base")
    other = workspace_of(open_storage(str(tmp_path / "other")))
    directory = tmp_path / "slowly"
    directory.mkdir()
    (directory / "file").write_text("one")
    other.publish("data", directory, seconds=99.0, num_workers=7)
    assert other.identity("base") == first
    workspace.forget(["data"])
    publish(workspace, "data", tmp_path, "two")
    assert workspace.identity("base") != first


def test_arms_and_replicates_have_identities_of_their_own(storage, tmp_path):
    workspace = workspace_of(storage)
    publish_all(workspace, tmp_path)
    identities = {name: workspace.path(name) for name in of_kinds(workspace, "arms", "samples", "metrics")}
    assert len(set(identities.values())) == len(identities)


def test_equal_arms_share_their_work(storage, tmp_path):
    workspace = workspace_of(storage, "arms.again={}")
    for name in ("data", "base", "arms/mixflow/0"):
        publish(workspace, name, tmp_path)
    assert workspace.state("arms/again/0") == "done"
    assert workspace.state("arms/again/1") == "to do"


# ---------------------------------------------------------------------------------------------- redone and stale


def test_forget_redoes_a_stage_and_its_checkpoints(storage, tmp_path):
    workspace = workspace_of(storage)
    publish_all(workspace, tmp_path)
    name = "arms/mixflow/1"
    storage.put(f"{workspace.checkpoints(name)}/step-5/weights", b"half way")
    workspace.forget([name])
    assert workspace.state(name) == "to do"
    assert storage.list(f"checkpoints/{name}") == []
    assert not [path for path in storage.list("checkpoints") if path.endswith("weights")]
    assert "arms/mixflow/0" not in to_do(workspace)
    publish(workspace, name, tmp_path, f"{name} {workspace.identity(name)}")
    assert to_do(workspace) == set(), "the same content leads to what is there already"


def test_force_of_a_kind_and_of_several_stages_that_follow_each_other(storage, tmp_path):
    publish_all(workspace_of(storage), tmp_path)
    workspace = workspace_of(storage)
    contents = {name: f"{name} {workspace.identity(name)}" for name in ("data", "base", *of_kinds(workspace, "arms"))}
    workspace.forget(_forced(list(workspace.stages.values()), ("data", "arms", "base")))
    for name in ("data", "base"):
        assert workspace.state(name) == "to do"
        publish(workspace, name, tmp_path, contents[name])
    assert to_do(workspace) >= of_kinds(workspace, "arms"), "what follows was forgotten too, not found again"
    workspace = workspace_of(storage)
    with pytest.raises(ValueError, match=r"--force must name a stage or a kind of stages .*, got 'arms/mix'"):
        _forced(list(workspace.stages.values()), ("arms/mix",))


def test_given_data_is_never_forgotten(storage, tmp_path):
    given = open_storage(str(tmp_path / "given"))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("precious")
    given.publish(tmp_path / "made", "set")
    workspace = workspace_of(storage, f"data={{shards: {given.uri}/set}}")
    assert workspace.state("data") == "done"
    workspace.forget(["data"])
    assert given.exists("set/file")
    assert workspace.state("data") == "done"


def test_what_other_code_made_is_stale_and_kept(storage, tmp_path, monkeypatch):
    publish(workspace_of(storage), "data", tmp_path)
    assert workspace_of(storage).state("data") == "done"
    monkeypatch.setattr(workflow, "code_version", lambda: "another")
    workspace = workspace_of(storage)
    assert workspace.state("data") == "stale"
    assert workspace.pending([workspace.stages["data"]]) == []
    assert workspace.identity("base"), "what is stale is still an input"


def test_the_code_version_is_that_of_the_sources(monkeypatch, tmp_path):
    """A copy of the tree has the same version, one changed byte another, and orchestration does not count."""
    for folder in ("mixflow_core", "workers", "workers/models", "orchestration"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "some.py").write_text("x = 1\n")
    monkeypatch.setattr(workflow, "__file__", str(tmp_path / "orchestration" / "workflow.py"))
    version = workflow.code_version.__wrapped__
    first = version()
    (tmp_path / "orchestration" / "some.py").write_text("x = 2\n")
    assert version() == first
    (tmp_path / "workers" / "models" / "some.py").write_text("x = 2\n")
    second = version()
    assert second != first
    (tmp_path / "mixflow_core" / "some.py").write_text("x = 2\n")
    assert version() not in (first, second)


def test_of_two_publishers_one_wins_and_both_go_on(storage, tmp_path):
    one, two = workspace_of(storage), workspace_of(storage)
    assert one.artifact("data") is None
    assert two.artifact("data") is None
    first = publish(one, "data", tmp_path, "the first")
    publish(two, "data", tmp_path, "the second")
    assert storage.read(f"data/{first}/file") == b"the first"
    assert two.artifact("data").manifest.digest == one.artifact("data").manifest.digest
    assert one.identity("base") == two.identity("base")
    storage.fetch(f"data/{first}", tmp_path / "cache")  # and it is whole


def test_racing_publishers(storage, tmp_path):
    workspaces = [workspace_of(storage) for _ in range(6)]
    directories = []
    for i in range(6):
        directories.append(tmp_path / f"racer-{i}")
        directories[i].mkdir()
        (directories[i] / "file").write_text("the same")
        (directories[i] / "other").write_text("bytes")
    gate, failures = threading.Barrier(6), []

    def race(workspace: Workspace, directory: Path) -> None:
        gate.wait()
        try:
            workspace.publish("data", directory, seconds=1.0)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=race, args=pair) for pair in zip(workspaces, directories, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({workspace.artifact("data").manifest.digest for workspace in workspaces}) == 1


# -------------------------------------------------------------------------------------------------------- lease


def lease_of(workspace: Workspace) -> str:
    return f"{workspace.home}/lease.json"


def hold(workspace: Workspace, **changes: object) -> None:
    holder = {"host": socket.gethostname(), "pid": 1, "time": time.time(), **changes}
    workspace.storage.put(lease_of(workspace), json.dumps(holder).encode())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lease_lasts_as_long_as_its_block(storage):
    workspace = workspace_of(storage)
    with workspace.lease():
        holder = json.loads(storage.read(lease_of(workspace)))
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        assert abs(time.time() - holder["time"]) < LEASE_S
    assert not storage.exists(lease_of(workspace))
    with pytest.raises(RuntimeError, match="inside"), workspace.lease():
        raise RuntimeError("inside")
    assert not storage.exists(lease_of(workspace))


def test_a_living_runner_keeps_others_away(storage):
    workspace = workspace_of(storage)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        hold(workspace, pid=process.pid)
        before = storage.read(lease_of(workspace))
        with pytest.raises(ValueError, match="must have one runner") as raised, workspace.lease():
            pass
        assert str(process.pid) in str(raised.value)
        assert socket.gethostname() in str(raised.value)
        assert "\n" not in str(raised.value)
        assert storage.read(lease_of(workspace)) == before, "a refused runner leaves the lease alone"
        process.communicate(b"\n")
    with workspace.lease():  # its process is gone now
        assert json.loads(storage.read(lease_of(workspace)))["pid"] == os.getpid()


def test_another_experiment_has_another_lease(storage):
    workspace = workspace_of(storage)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        hold(workspace, pid=process.pid)
        with workspace_of(storage, "seed=1").lease():
            assert storage.exists(lease_of(workspace))
        process.communicate(b"\n")


def test_a_dead_runner_is_taken_over(storage):
    workspace = workspace_of(storage)
    hold(workspace, pid=dead_pid())
    with workspace.lease():
        assert json.loads(storage.read(lease_of(workspace)))["pid"] == os.getpid()


def test_another_host_that_renews_its_lease_keeps_others_away(storage):
    workspace = workspace_of(storage)
    # Containers number their processes alike: the same number elsewhere is somebody else.
    for pid in (1, os.getpid(), dead_pid()):
        hold(workspace, host="elsewhere", pid=pid)
        renewing = threading.Timer(0.5, hold, (workspace,), {"host": "elsewhere", "pid": pid})
        renewing.start()
        with pytest.raises(ValueError, match=f"process {pid} on elsewhere is at it"), workspace.lease():
            pass
        renewing.join()
    hold(workspace, host="elsewhere", time=time.time() - LEASE_S - leases.CLOCKS_S - 1)
    with workspace.lease():
        assert json.loads(storage.read(lease_of(workspace)))["host"] == socket.gethostname()


@pytest.mark.parametrize("differs_s", [-300.0, 300.0])
def test_clocks_may_differ(storage, monkeypatch, differs_s):
    """Who looks goes by its own clock: a holder whose clock is behind lives, one whose clock is ahead may be dead."""
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    workspace = workspace_of(storage)
    there = {"host": "elsewhere", "pid": 1}
    hold(workspace, **there, time=time.time() + differs_s)
    renewing = threading.Timer(1, hold, (workspace,), {**there, "time": time.time() + differs_s + 1})
    renewing.start()
    with pytest.raises(ValueError, match="process 1 on elsewhere is at it"), workspace.lease():
        pass
    renewing.join()
    begun = time.monotonic()
    with workspace.lease():  # it renews no more
        assert 1 < time.monotonic() - begun < 10


def test_a_number_of_a_process_means_nothing_on_another_machine_of_the_same_name(storage):
    workspace = workspace_of(storage)
    for pid in (os.getpid(), dead_pid()):
        there = {"machine": "another", "pid": pid}
        hold(workspace, **there)
        renewing = threading.Timer(0.5, hold, (workspace,), there)
        renewing.start()
        with pytest.raises(ValueError, match=f"process {pid} on .* is at it"), workspace.lease():
            pass
        renewing.join()


def test_another_process_that_was_given_the_number_of_a_dead_holder_is_not_taken_for_it(storage):
    workspace = workspace_of(storage)
    with workspace.lease():
        own = json.loads(storage.read(lease_of(workspace)))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        hold(workspace, machine=own["machine"], pid=process.pid, born=own["born"] - 100)
        with workspace.lease():
            pass
        process.communicate(b"\n")


def test_the_same_command_after_its_head_was_lost_waits_until_the_lease_has_run_out(storage, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    workspace = workspace_of(storage)
    hold(workspace, host="lost")
    begun = time.monotonic()
    with workspace.lease():
        assert json.loads(storage.read(lease_of(workspace)))["host"] == socket.gethostname()
        assert time.monotonic() - begun > 1
    hold(workspace, host="lost")
    with pytest.raises(ValueError, match="process 1 on lost"), leases.hold(storage, lease_of(workspace), "a stage"):
        pass  # of a stage the others ask again by themselves


def test_who_was_taken_for_dead_leaves_the_lease_of_the_other(storage, monkeypatch, caplog):
    monkeypatch.setattr(leases, "LEASE_S", 0.2)
    workspace = workspace_of(storage)
    with workspace.lease() as held:
        assert held.is_ours()
        hold(workspace, host="elsewhere", pid=7, token="another")
        waited = time.monotonic() + 30
        while "is another's" not in caplog.text:
            assert time.monotonic() < waited
            time.sleep(0.02)
        assert held.lost
    assert json.loads(storage.read(lease_of(workspace)))["pid"] == 7


def test_a_container_that_was_started_again_takes_its_own_lease_over(storage):
    workspace = workspace_of(storage)
    hold(workspace, pid=os.getpid())
    with workspace.lease():
        pass
    assert not storage.exists(lease_of(workspace))


def test_an_unreadable_lease_holds_nobody_off(storage):
    workspace = workspace_of(storage)
    storage.put(lease_of(workspace), b"{torn")
    with workspace.lease():
        assert json.loads(storage.read(lease_of(workspace)))["pid"] == os.getpid()


def test_a_lease_is_renewed_even_after_a_failure(storage, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_S", 0.2)
    workspace = workspace_of(storage)
    put, renewed, attempts = type(storage).put, threading.Event(), []

    def unreliable(storage: Storage, path: str, data: bytes) -> None:
        attempts.append(path)
        if len(attempts) == 1:
            raise OSError("PUT s3://bucket/lease.json: SlowDown")
        put(storage, path, data)
        renewed.set()

    monkeypatch.setattr(type(storage), "put", unreliable)
    with workspace.lease():
        first = json.loads(storage.read(lease_of(workspace)))["time"]
        assert renewed.wait(60)
        assert json.loads(storage.read(lease_of(workspace)))["time"] > first


@pytest.mark.parametrize("published", [True, False])
def test_a_stage_that_another_experiment_is_at_is_waited_for(storage, monkeypatch, tmp_path, published):
    """Its result is taken if it comes; if its runner dies, the stage is done here."""
    monkeypatch.setattr(stages, "WAIT_S", 0.05)
    worked: list[str] = []

    def work(site, stage, inputs, directory):
        worked.append(stage.name)
        (directory / "result").write_text("mine")
        return {}

    monkeypatch.setitem(stages.WORK, "base", work)
    workspace, other = workspace_of(storage), workspace_of(storage, "replicates=4")
    assert workspace.home != other.home
    publish(other, "data", tmp_path)
    site = Site(workspace, 0, 1, torch.device("cpu"), tmp_path, lambda *_: None)
    lease = f"leases/{other.path('base').replace('/', '-')}.json"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        holder = {"host": socket.gethostname(), "pid": process.pid, "time": time.time()}
        storage.put(lease, json.dumps(holder).encode())
        waiting = threading.Thread(target=stages.run_stages, args=(site, [workspace.stages["base"]]))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        assert not worked
        if published:
            publish(other, "base", tmp_path)
            waiting.join(30)
        process.communicate(b"\n")
    waiting.join(30)
    assert not waiting.is_alive()
    assert worked == ([] if published else ["base"])
    assert storage.exists(lease) == published, "what was taken is given back"


@pytest.mark.parametrize("heard", [True, False])
def test_a_stage_that_was_taken_over_is_not_published(storage, monkeypatch, tmp_path, heard):
    """Whether its runner has heard of it while it worked, or only when it looks before it publishes."""
    monkeypatch.setattr(leases, "LEASE_S", 0.2 if heard else 60)

    def work(site, stage, inputs, directory):
        storage.put(taken, json.dumps({"host": "elsewhere", "pid": 7, "time": time.time(), "token": "b"}).encode())
        waited = time.monotonic() + 30
        while heard and not site.is_to_stop():
            assert time.monotonic() < waited
            time.sleep(0.02)
        assert site.is_to_stop() == heard
        (directory / "result").write_text("mine")
        return {}

    monkeypatch.setitem(stages.WORK, "base", work)
    workspace = workspace_of(storage)
    publish(workspace, "data", tmp_path)
    taken = f"leases/{workspace.path('base').replace('/', '-')}.json"
    site = Site(workspace, 0, 1, torch.device("cpu"), tmp_path, lambda *_: None)
    with pytest.raises(StoppedError, match="stopped in base, which is another process's by now"):
        stages.run_stages(site, [workspace.stages["base"]])
    assert workspace.state("base") == "to do"
    assert json.loads(storage.read(taken))["pid"] == 7


def test_nothing_is_forgotten_while_another_is_at_it(storage, tmp_path):
    publish_all(workspace_of(storage), tmp_path)
    workspace = workspace_of(storage)
    holder = {"host": "elsewhere", "pid": 7, "time": time.time(), "token": "b"}
    path = f"leases/{workspace.path('base').replace('/', '-')}.json"
    storage.put(path, json.dumps(holder).encode())
    forced = _forced(list(workspace.stages.values()), ("base", "arms"))
    before = storage.list("")
    with pytest.raises(HeldError, match="stage base must have one runner, but process 7 on elsewhere is at it"):
        workspace.forget(forced)
    assert storage.list("") == before
    storage.delete(path)
    workspace.forget(forced)
    assert to_do(workspace_of(storage)) >= {"base", "arms/mixflow/0"}
    assert storage.list("leases") == []


def test_data_that_another_process_writes_are_waited_for(storage, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "WAIT_S", 0.05)
    monkeypatch.setattr(run, "_write_digits", lambda workspace: publish(workspace, "data", tmp_path, "mine"))
    workspace, said = workspace_of(storage), list[str]()
    progress = Progress(["data"], 0)
    monkeypatch.setattr(progress, "say", said.append)
    path = f"leases/{workspace.path('data').replace('/', '-')}.json"
    with leases.hold(storage, path, "stage data"):
        # To a process, a lease of its own number is that of one before it: as if it were on another machine.
        monkeypatch.setattr(leases.socket, "gethostname", lambda: "here")
        waiting = threading.Thread(
            target=_driver_stages, args=(workspace, list(workspace.stages.values()), progress, ExitStack())
        )
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        publish(workspace_of(storage), "data", tmp_path, "another's")
    waiting.join(30)
    progress.close()
    assert not waiting.is_alive()
    assert workspace.result("data").read("file") == b"another's"
    assert len(said) == 1
    assert said[0].startswith("warning: stage data must have one runner")
    assert said[0].endswith("its result is waited for")


# ------------------------------------------------------------------------------------------------- a worker's entry


class Told:
    """Stands for the Reporter actor: every method is called at once by `remote`, and what it says is kept."""

    def __init__(self) -> None:
        self.why, self.warnings = dict[str, str](), list[str]()

    def __getattr__(self, name: str) -> Any:
        calls = {
            "refused": lambda launched: self.why.get(launched, ""),
            "refuse": self.why.__setitem__,
            "warn": self.warnings.append,
        }
        return SimpleNamespace(remote=calls.get(name, lambda *_: None))


@pytest.fixture
def enter(storage, monkeypatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Calls worker_entry on a rank, with something else in place of the stages; nothing of Ray is started."""
    told, signs = Told(), SimpleNamespace(start=lambda: None, end=lambda: None, stopping=lambda: False)
    monkeypatch.setattr("ray.get_actor", lambda *_: told)
    monkeypatch.setattr("ray.get", lambda value: value)
    about = {"experiment": load("quickstart").model_dump_json(), "workspace": storage.uri, "stages": [], "trial": ""}
    before = {name: list(logging.getLogger(name).handlers) for name in ("workers", "orchestration")}

    def call(
        rank: int, work: Callable[..., None], launched: str = "first", group_is_there: bool = True
    ) -> dict[str, Any]:
        context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: 2)
        monkeypatch.setattr("ray.train.get_context", lambda: context)
        monkeypatch.setattr(stages, "run_stages", work)
        monkeypatch.setattr("orchestration.worker.SignsOfLife", lambda *_: signs)
        monkeypatch.setattr("torch.distributed.new_group", lambda **_: None)
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: group_is_there)
        return worker_entry({**about, "reporter": "one", "name": launched})

    call.told = told  # type: ignore[attr-defined]
    yield call
    for name, handlers in before.items():
        logging.getLogger(name).handlers = handlers


def test_a_wrong_input_that_a_worker_finds_is_not_tried_again(enter):
    """One rank finds it while the other waits: Ray ends both, and the next start says why and does nothing."""

    def wrong(*_: object) -> None:
        raise ValueError("features must number more than 192,\n got 150")

    with pytest.raises(ValueError, match="features must"):
        enter(1, wrong)
    for rank in (0, 1):
        assert enter(rank, lambda *_: pytest.fail("tried again")) == {
            "wrong_input": "features must number more than 192, got 150"
        }
    assert enter(0, lambda *_: None, "second") == {}, "another launch, of a sweep's next trial, is not concerned"


def test_what_a_worker_meets_whose_group_was_ended_is_no_wrong_input(enter):
    """Ray takes the process group away from those that are left when one is lost; torch says ValueError."""

    def meets(*_: object) -> None:
        raise ValueError("Default process group has not been initialized")

    with pytest.raises(ValueError, match="has not been initialized"):
        enter(1, meets, group_is_there=False)
    assert enter(0, lambda *_: None) == {}


def test_what_another_start_may_mend_is_tried_again(enter):
    def lost(*_: object) -> None:
        raise OSError("no route to the storage")

    with pytest.raises(OSError, match="no route"):
        enter(1, lost)
    assert enter(1, lambda *_: None) == {}


@pytest.mark.parametrize(("max_failures", "groups"), [(2, 4), (0, 1)])
def test_restarts_are_counted_anew_where_something_was_kept(storage, monkeypatch, tmp_path, max_failures, groups):
    """Ray's restarts are used up each time; before that a checkpoint, a part and a stage were kept, then nothing."""
    workspace, told, started = workspace_of(storage), Told(), []
    for name in ("data", "base"):
        publish(workspace, name, tmp_path)
    pending = workspace.pending(list(workspace.stages.values()))
    (tmp_path / "part").write_text("content")
    parts = workspace.parts(pending[0].name)
    keeps = [
        lambda: storage.publish(tmp_path / f"made-{len(started)}", f"{workspace.checkpoints(pending[0].name)}/step-1"),
        lambda: parts.keep("a", "digest", tmp_path / "part", {}),
        lambda: Workspace(workspace.experiment, storage).publish(
            pending[0].name, tmp_path / f"made-{len(started)}", seconds=1
        ),
        lambda: storage.put(f"{workspace.home}/lease.json", b"nothing of a stage's"),
    ]

    def fails(*_: object) -> dict[str, Any]:
        (tmp_path / f"made-{len(started)}").mkdir()
        (tmp_path / f"made-{len(started)}" / "file").write_text("content")
        keeps[min(len(started), 3)]()
        started.append(None)
        raise RunFailedError("a node was lost")

    monkeypatch.setattr("ray.get_actor", lambda *_: told)
    monkeypatch.setattr("orchestration.launch._fit", fails)
    with pytest.raises(RunFailedError, match="a node was lost"):
        launch(workspace, pending, "reporter", max_failures)
    assert len(started) == groups
    assert len(told.warnings) == len(started) - 1
    assert all(line.startswith("a node was lost; ") for line in told.warnings)


@pytest.mark.parametrize("why", ["", "the disk must have room"])
def test_a_failure_while_the_driver_ends_is_not_told_as_a_stop(storage, monkeypatch, why):
    class Ended:
        def __init__(self, *_: object, **__: object) -> None: ...

        def fit(self) -> None:
            raise ray.train.TrainingFailedError

    class Ending(Told):
        def __getattr__(self, name: str) -> Any:
            known = {"is_ending": lambda: True, "refused": lambda launched: why}
            return SimpleNamespace(remote=known[name]) if name in known else super().__getattr__(name)

    workspace = workspace_of(storage)
    monkeypatch.setattr("ray.get_actor", lambda *_: Ending())
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("ray.train.torch.TorchTrainer", Ended)
    with pytest.raises(RunFailedError if why else StoppedError, match=why or "what was finished is kept"):
        launch(workspace, [], "reporter", 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_of_every_rank_are_heard(enter, rank):
    assert enter(rank, lambda *_: logging.getLogger("orchestration.stages").warning("a part is %s", "spoilt")) == {}
    assert enter.told.warnings == ["a part is spoilt"]


def test_a_warning_that_many_workers_give_is_said_once(storage, monkeypatch):
    monkeypatch.setattr("orchestration.launch.Tracker", lambda *_: None)
    reporter = Reporter(storage.uri, "", "quickstart", "experiments/one")
    for text in ("spoilt", "other", "spoilt"):
        reporter.warn(text)
    assert reporter.progress()["warnings"] == ["spoilt", "other"]
