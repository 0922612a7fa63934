"""The driver's eye on its workers: signals, and the end of a process that hangs."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from orchestration.launch import Pulse, Reporter, in_thread
from orchestration.sections import Cluster
from orchestration.watch import STOPPING, _Growth, end_process, watching

HANGING = """
import time

def the_place_where_it_hangs():
    print("here", flush=True)
    time.sleep(600)

the_place_where_it_hangs()
"""


@pytest.fixture
def hanging():
    """A Python process stopped by SIGSTOP, in a function of its own."""
    with subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        yield psutil.Process(process.pid)
        process.kill()


def test_a_stopped_process_is_killed_and_its_stack_told(hanging):
    stack = end_process(hanging.pid, hanging.create_time())
    assert "the_place_where_it_hangs" in stack
    assert hanging.wait(10) is not None or not hanging.is_running()


def test_another_process_of_the_same_number_is_left_alone(hanging):
    assert end_process(hanging.pid, hanging.create_time() - 1) is None
    assert hanging.status() == psutil.STATUS_STOPPED


def test_a_process_that_is_gone_is_no_error():
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    assert end_process(process.pid, 0.0) is None


class Actor:
    """A Reporter that is called as an actor is; `ray.get` is the identity here."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def __getattr__(self, name: str):
        return SimpleNamespace(remote=getattr(self.reporter, name))


@pytest.fixture
def reporter(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestration.launch.Tracker", lambda *_: None)
    monkeypatch.setattr("ray.get", lambda value, timeout=None: value)
    monkeypatch.setattr("orchestration.watch.LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("orchestration.watch._draining_nodes", dict)
    return Reporter(str(tmp_path), "", "quickstart", "experiments/one")


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def pulse(rank: int, group: str = "one", pid: int = 1, node: str = "node") -> Pulse:
    return Pulse(group, rank, node, "10.0.0.1", pid, 0.0)


def test_one_worker_asked_to_stop_stops_its_group_and_no_other(reporter):
    assert not any(reporter.alive(pulse(rank, group)) for rank in (0, 1) for group in ("one", "two"))
    reporter.stop("one")
    assert [reporter.alive(pulse(rank, "one")) for rank in (0, 1)] == [True, True]
    assert not reporter.alive(pulse(0, "two"))
    assert not reporter.is_ending()


def test_a_node_that_is_drained_stops_the_group_that_has_a_worker_there_and_no_other(reporter, monkeypatch):
    workers = [pulse(0, "one"), pulse(1, "one", node="leaving"), pulse(0, "two")]
    for worker in workers:
        assert not reporter.alive(worker)
    with watching(Actor(reporter), Cluster(), pytest.fail):
        time.sleep(0.3)
        assert not any(map(reporter.alive, workers))
        monkeypatch.setattr("orchestration.watch._draining_nodes", lambda: {"leaving": 1, "another": 0})
        until(lambda: reporter.alive(workers[0]))
        assert list(map(reporter.alive, workers)) == [True, True, False]
    assert not reporter.is_ending()


def test_an_elastic_group_starts_again_where_there_is_room_for_more(reporter, monkeypatch):
    """With its step kept, for which Ray itself would leave no time; and not again and again for the same room."""
    monkeypatch.setattr("orchestration.watch.GROW_EVERY_S", 0.05)
    room, said = {}, []
    monkeypatch.setattr("orchestration.watch.more_room", lambda cluster, leaving: dict(room))
    workers = [pulse(rank) for rank in (0, 1)]
    assert not any(map(reporter.alive, workers))
    with watching(Actor(reporter), Cluster(num_workers=(1, 4)), said.append):
        time.sleep(0.3)
        assert not any(map(reporter.alive, workers))
        room["new"] = 5
        until(lambda: all(map(reporter.alive, workers)))
        assert said == ["the cluster has room for 2 more workers; stopping after this step, to start again with them"]
        # It started again, and did not get the room.
        reporter.gone("one")
        again = [pulse(rank, "again") for rank in (0, 1)]
        assert not any(map(reporter.alive, again))
        time.sleep(0.5)
        assert not any(map(reporter.alive, again))
        room["another"] = 1
        until(lambda: reporter.alive(again[0]))
    assert len(said) == 2


def test_a_group_that_has_lost_a_worker_is_not_asked_to_grow(monkeypatch):
    """Its room is the lost one's: Ray starts the group again by itself."""
    monkeypatch.setattr("orchestration.watch.GROW_EVERY_S", 0)
    monkeypatch.setattr("orchestration.watch.more_room", lambda cluster, leaving: {"new": 1})
    growth, workers = _Growth(Cluster(num_workers=(1, 3))), [pulse(0), pulse(1)]
    assert growth.room_beside(workers, ()) == 0, "they have just begun"
    assert growth.room_beside([workers[0], replace(workers[1], silent_s=6)], ()) == 0
    assert growth.room_beside([workers[0]], ()) == 0
    assert growth.room_beside([workers[0], pulse(1, pid=2)], ()) == 0, "started again"
    assert growth.room_beside([workers[0], pulse(1, pid=2)], ()) == 1


@pytest.mark.parametrize("size", [2, (1, 2)])
def test_a_group_that_has_all_it_asks_for_goes_on(reporter, monkeypatch, size):
    monkeypatch.setattr("orchestration.watch.GROW_EVERY_S", 0.05)
    monkeypatch.setattr("orchestration.watch.more_room", lambda cluster, leaving: {"new": 5})
    workers = [pulse(rank) for rank in (0, 1)]
    assert not any(map(reporter.alive, workers))
    with watching(Actor(reporter), Cluster(num_workers=size), pytest.fail):
        time.sleep(0.4)
        assert not any(map(reporter.alive, workers))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_driver_stops_all_groups_and_a_second_ends_at_once(reporter, number):
    said, before = [], signal.getsignal(number)
    with watching(Actor(reporter), Cluster(), said.append):
        os.kill(os.getpid(), number)
        until(lambda: reporter.is_ending())
        assert all(reporter.alive(pulse(0, group)) for group in ("one", "two"))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert said == [STOPPING]
    assert signal.getsignal(number) is before


def test_a_silent_worker_alone_is_ended_and_once(reporter, monkeypatch):
    ended = []
    monkeypatch.setattr("orchestration.watch._end", lambda pulse, say: not ended.append(pulse.rank))
    now = [1000.0]
    monkeypatch.setattr("orchestration.launch.time", SimpleNamespace(monotonic=lambda: now[0]))
    reporter.alive(pulse(0))
    reporter.alive(pulse(1))
    with watching(Actor(reporter), Cluster(hang_timeout_s=5), pytest.fail):
        now[0] += 4.9
        reporter.alive(pulse(0))
        time.sleep(0.3)
        assert ended == []
        now[0] += 0.2
        until(lambda: ended)
        time.sleep(0.3)
    assert ended == [1]


def test_a_silent_worker_whose_node_does_not_answer_is_asked_for_again(reporter, monkeypatch):
    answers, asked = [False, False, True], []

    def end(pulse, say):
        asked.append(pulse.rank)
        return answers.pop(0)

    monkeypatch.setattr("orchestration.watch._end", end)
    now = [1000.0]
    monkeypatch.setattr("orchestration.launch.time", SimpleNamespace(monotonic=lambda: now[0]))
    reporter.alive(pulse(1))
    now[0] += 6
    with watching(Actor(reporter), Cluster(hang_timeout_s=5), pytest.fail):
        until(lambda: not reporter.pulses())
        time.sleep(0.3)
    assert asked == [1, 1, 1]


def test_workers_that_do_not_come_are_spoken_of_again_and_again(reporter, monkeypatch):
    monkeypatch.setattr("orchestration.watch.PATIENCE_S", 0.1)
    monkeypatch.setattr("orchestration.watch.REMIND_S", 0.1)
    room, free, said = [4], {"a": 1}, []
    monkeypatch.setattr("orchestration.watch.room_for", lambda cluster: room[0])
    monkeypatch.setattr("orchestration.watch.more_room", lambda cluster: free)
    with watching(Actor(reporter), Cluster(num_workers=2), said.append):
        until(lambda: len(said) >= 2)
        why = "of the cluster's room for 4, 1 is free: others hold it, or they are about to begin"
        assert set(said) == {f"warning: waiting for 2 workers; {why}"}
        free["b"] = 1
        until(lambda: "the cluster has room for them, and they do not begin" in said[-1])
        room[0] = 1
        until(lambda: said[-1] == "warning: waiting for 2 workers; the cluster has room for 1")
        reporter.alive(pulse(0))
        time.sleep(0.2)
        count = len(said)
        time.sleep(0.3)
        assert len(said) == count


def test_a_worker_that_is_done_is_not_taken_for_hung(reporter):
    for rank in (0, 1):
        reporter.alive(pulse(rank))
    reporter.gone("one", 1)
    assert [found.rank for found in reporter.pulses()] == [0]
    reporter.gone("one")
    assert reporter.pulses() == []


def test_what_a_thread_raises_is_raised_here():
    assert in_thread(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 / 0)


def test_a_warning_of_the_reporters_own_process_is_one_for_the_user(reporter):
    """Such as what MLflow refuses; nobody reads the log of an actor."""
    logging.getLogger("orchestration.spool").warning("MLflow refused %d\nevents", 3)
    assert reporter.progress()["warnings"] == ["MLflow refused 3 events"]
