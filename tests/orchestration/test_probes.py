"""What `mixflow doctor` refuses of a cluster's nodes: each fault on one node of two, by probes in this process."""

from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.nodes import Probe, Probes
from orchestration.storage import Storage, open_storage


class Local(Probes):
    """Two nodes, whose probes are plain objects that are called as actors are; `ray.get` is the identity here."""

    def __init__(self, first: Probe, second: Probe, gpus: int = 0) -> None:
        there = {"Resources": {"CPU": 1.0, "GPU": float(gpus)}, "NodeManagerAddress": "127.0.0.1"}
        self.probes: dict[str, Any] = {"first": Called(first), "second": Called(second)}
        self.nodes = dict.fromkeys(self.probes, there)

    def _start(self, node: str, num_gpus: int = 0) -> Any:
        return self.probes[node]


class Called:
    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.probe, name))


@pytest.fixture(autouse=True)
def ray_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.wait", lambda calls, **_: (calls, []))
    monkeypatch.setattr("ray.get", lambda call: call)


def look(probes: Probes, what: str, storage: Storage | None = None, uri: str = "") -> str:
    return probes.checks(lambda: storage or open_storage("/nowhere"), lambda: uri)[what]()


def test_versions_that_differ() -> None:
    class Older(Probe):
        def versions(self) -> dict[str, str]:
            return {**super().versions(), "torch": "2.0.0"}

    assert "on 2 nodes" in look(Local(Probe(), Probe()), "versions")
    with pytest.raises(ValueError, match=r"torch must be the same on all nodes, got \S+ on first and 2.0.0 on second"):
        look(Local(Probe(), Older()), "versions")


@pytest.mark.parametrize("offset", [-7, 7])
def test_clocks_that_differ(offset: float) -> None:
    class Off(Probe):
        def time_s(self) -> float:
            return super().time_s() + offset

    assert "on 2 nodes" in look(Local(Probe(), Probe()), "clocks")
    with pytest.raises(ValueError, match=r"clocks must agree within 1 s, got [67]\.\d s on second; run NTP"):
        look(Local(Probe(), Off()), "clocks")


def test_a_server_that_one_node_does_not_reach(tmp_path, monkeypatch) -> None:
    class Away(Probe):
        def storage(self, storage: Storage) -> str:
            return f"{storage.uri} cannot be used"

        def mlflow(self, uri: str) -> str:
            return super().mlflow("http://127.0.0.1:9")

    monkeypatch.setattr("orchestration.cluster.check_shared", lambda storage: None)
    storage, uri = open_storage(str(tmp_path / "ws")), f"sqlite:///{tmp_path}/mlflow.db"
    assert look(Local(Probe(), Probe()), "storage nodes", storage) == "reached from 2 nodes"
    with pytest.raises(ValueError, match=r"second: \S+/ws cannot be used"):
        look(Local(Probe(), Away()), "storage nodes", storage)
    assert look(Local(Probe(), Probe()), "mlflow nodes", uri=uri) == "reached from 2 nodes"
    with pytest.raises(ValueError, match=r"^second: .*http://127\.0\.0\.1:9"):
        look(Local(Probe(), Away()), "mlflow nodes", uri=uri)


def test_a_gpu_that_torch_does_not_see() -> None:
    class Seeing(Probe):
        def gpus(self) -> str:
            return "H100, NCCL 2.27"

    assert look(Local(Probe(), Probe()), "gpu nodes") == "none on 2 nodes"
    assert "second: 1 GPUs, H100, NCCL 2.27" in look(Local(Seeing(), Seeing(), gpus=1), "gpu nodes")
    with pytest.raises(ValueError, match="torch must see the GPUs of second, got none"):
        look(Local(Seeing(), Probe(), gpus=1), "gpu nodes")


def test_an_all_reduce_that_reaches_not_all() -> None:
    class Alone(Probe):
        def all_reduce(self, rank: int, world_size: int, host: str, port: int) -> float:
            return 1.0 if rank else float(world_size)

    with pytest.raises(ValueError, match=r"ones over 2 processes must be 2, got another on rank 1 on second"):
        look(Local(Alone(), Alone()), "collectives")
