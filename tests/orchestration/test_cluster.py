"""What a cluster must offer, and what a machine of it keeps."""

import contextlib
import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from orchestration import cluster
from orchestration.launch import cache_directory
from orchestration.sections import Cluster
from workers.disk import NoRoomError


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


class Ray:
    """Ray of which each start ends as `starts` says; its children's processes are sleepers."""

    def __init__(self, *starts: BaseException | None) -> None:
        self.starts, self.children = list(starts), list[subprocess.Popen[bytes]]()

    def init(self, **_: object) -> None:
        self.children.append(subprocess.Popen(["sleep", "100"]))
        if error := self.starts.pop(0):
            raise error


SLOW = Exception("The current node timed out during startup. This could happen because ...")


@pytest.mark.parametrize(
    ("starts", "raised"),
    [
        ((SLOW, None), None),
        ((SLOW, SLOW, SLOW), (OSError, "Ray did not start on this machine within 30 s, 3 times")),
        ((RuntimeError("no such option"),), (RuntimeError, "no such option")),
        ((SystemExit(15),), (KeyboardInterrupt, "^$")),
        ((SystemExit(1),), (SystemExit, "1")),
    ],
)
def test_ray_is_started_again_where_it_was_slow_and_sigterm_is_no_exit(
    starts: tuple[BaseException | None, ...],
    raised: tuple[type[BaseException], str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, addresses = Ray(*starts), dict[str, str]()
    monkeypatch.setattr("ray.init", made.init)
    monkeypatch.setenv("RAY_GCS_SERVER_PORT", "1")
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(raised[0], match=raised[1]) if raised else contextlib.nullcontext():
            cluster._start_here(addresses)
        assert made.starts == []
        slow = starts.count(SLOW)
        assert [child.wait(5) for child in made.children[:slow]] == [-signal.SIGKILL] * slow
        assert all(child.poll() is None for child in made.children[slow:])
        assert (os.environ["RAY_GCS_SERVER_PORT"] == "1") == (slow == 0)
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in made.children:
            child.kill()
            child.wait()


def test_a_full_disk_is_told_before_ray_starts(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    (small_disk / "filling").write_bytes(bytes(2**19))
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("it was started"))
    with pytest.raises(NoRoomError, match=r"bytes free of 1,048,576 needed"):
        cluster._start_here({})


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
