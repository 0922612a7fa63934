"""What a cluster must offer, and what a machine of it keeps."""

import os
import stat
from pathlib import Path

import pytest

from orchestration import cluster
from orchestration.launch import cache_directory
from orchestration.sections import Cluster


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Workers that the cluster has room for, by look; the last one stays."""
    found = [0, 1, 2]
    monkeypatch.setattr(cluster, "room_for", lambda _: found.pop(0) if len(found) > 1 else found[0])
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    return found


def test_nodes_of_a_running_cluster_are_waited_for(rooms: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    said = list[str]()
    cluster.check_resources(Cluster(num_workers=2), said.append)
    assert said == ["0 of 2 workers have room; waiting up to 60 s for nodes to join"]
    rooms[:] = [1]
    monkeypatch.setattr(cluster, "JOINING_S", 0.1)
    with pytest.raises(ValueError, match=r"have room for 1 workers of 1 CPUs and 0 GPUs, got 2; lower it"):
        cluster.check_resources(Cluster(num_workers=2), said.append)


def test_nothing_is_waited_for_on_a_cluster_started_here(rooms: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="have room for 0 workers"):
        cluster.check_resources(Cluster(num_workers=2), pytest.fail)


def test_a_cache_that_another_user_could_change_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0)
    try:
        cache = cache_directory()
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    cache.chmod(0o777)
    assert cache_directory() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    cache.rmdir()
    (tmp_path / "elsewhere").mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"-\d+ must be this user's own directory, got another's or a link"):
        cache_directory()
    cache.unlink()
    cache.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: int(cache.name.rpartition("-")[2]))
    if os.geteuid() == 0:  # who is not root can give nothing away
        os.chown(cache, 12345, 12345)
        with pytest.raises(ValueError, match="must be this user's own directory"):
            cache_directory()
