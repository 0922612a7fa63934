"""The tracker against MLflow itself: what was handed over is compared with what MlflowClient reads back."""

import base64
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow_servers import Doorkeeper, MlflowServer, Proxy, free_port, wait_until

from orchestration import tracking
from orchestration.launch import Reporter
from orchestration.mlflow_server import ask, check_tracking, default_tracking_uri, ui_command
from orchestration.spool import list_spools
from orchestration.storage import Storage, open_storage
from orchestration.tracking import Metric, Tracker, replay

SPOOL = "tracking/experiment"


def curve(key: str, steps: Sequence[int], start_ms: int = 1_700_000_000_000) -> list[Metric]:
    """A metric whose values name their step, measured one a millisecond."""
    return [Metric(key, step, step + 0.5, start_ms + step) for step in steps]


class Reader:
    """What MLflow holds of one experiment."""

    def __init__(self, uri: str, experiment: str):
        from mlflow import MlflowClient

        self.client = MlflowClient(uri)
        self.experiment_id = self.client.get_experiment_by_name(experiment).experiment_id

    def runs(self, name: str) -> list[Any]:
        return self.client.search_runs([self.experiment_id], f"attributes.run_name = '{name}'")

    def run(self, name: str) -> Any:
        (run,) = self.runs(name)
        return run

    def history(self, name: str, key: str) -> list[Metric]:
        rows = self.client.get_metric_history(self.run(name).info.run_id, key)
        return sorted((Metric(row.key, row.step, row.value, row.timestamp) for row in rows), key=lambda row: row.step)


@pytest.fixture
def workspace(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "workspace"))


@pytest.fixture
def sqlite(empty_database: Path, tmp_path: Path) -> str:
    file = tmp_path / "workspace" / "mlflow.db"
    file.parent.mkdir()
    shutil.copy(empty_database, file)
    return f"sqlite:///{file}"


@pytest.fixture
def track(workspace: Storage) -> Iterator[Callable[..., Tracker]]:
    """Opens trackers on one spool and closes them."""
    opened: list[Tracker] = []

    def open_tracker(uri: str, experiment: str = "experiment") -> Tracker:
        opened.append(Tracker(workspace, uri, experiment, SPOOL))
        return opened[-1]

    yield open_tracker
    for tracker in opened:
        tracker.close()


def deliver(tracker: Tracker) -> None:
    """Waits for everything, and fails with the reason if it does not arrive."""
    assert tracker.drain(120) == 0, tracker.status()


def test_runs_carry_params_tags_artifacts_and_nest(workspace, sqlite, track, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri(workspace) == sqlite
    workspace.put("grids/first.txt", b"a grid")
    tracker = track(sqlite)
    tracker.start_run("all", "the experiment")
    tracker.start_run(
        "arm", "an arm", parent="all", params={"seed": 3, "mixture": {"gamma": 0.4}}, tags={"kind": "arm"}
    )
    tracker.tags("arm", {"verdict": "promote"})
    tracker.artifact("arm", "grids/first.txt", "grids")
    tracker.end_run("arm", "FAILED")
    deliver(tracker)

    read = Reader(sqlite, "experiment")
    arm, parent = read.run("an arm"), read.run("the experiment")
    assert arm.info.run_id == tracker.run_id("arm")
    assert tracker.run_id("unknown") is None
    assert arm.data.params == {"seed": "3", "mixture.gamma": "0.4"}
    assert arm.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {"kind": "arm", "verdict": "promote"}.items() <= arm.data.tags.items()
    assert (arm.info.status, parent.info.status) == ("FAILED", "RUNNING")
    copied = list((Path(workspace.uri) / "mlartifacts").rglob("grids/first.txt"))
    assert [file.read_bytes() for file in copied] == [b"a grid"]
    assert workspace.list(SPOOL) == [f"{SPOOL}/spool.json"]


def test_an_unreadable_segment_is_set_aside_and_named(workspace, sqlite, track, caplog):
    torn = b'{"kind": "metrics", "run": "a", "metr'
    workspace.put(f"{SPOOL}/000000000000-3-torn.jsonl", torn)
    tracker = track(sqlite)
    tracker.start_run("later", "later")
    deliver(tracker)
    assert Reader(sqlite, "experiment").run("later").info.status == "RUNNING"
    assert workspace.read(f"{SPOOL}/unreadable/000000000000-3-torn.jsonl") == torn
    assert "000000000000-3-torn.jsonl is unreadable" in caplog.text


def test_values_arrive_exactly_in_any_number(sqlite, track):
    loss, fd = curve("train/loss", range(2500)), curve("eval/fd_digits/euler20/s1", [0, 100, 200])
    tracker = track(sqlite)
    tracker.start_run("a", "a")
    tracker.log("a", [])
    tracker.log("a", [*fd[:1], *loss])
    tracker.log("a", fd[1:])
    tracker.log("a", [Metric("odd", 0, math.nan, 5), Metric("odd", 1, math.inf, 5), Metric("odd", 2, -math.inf, 5)])
    deliver(tracker)
    read = Reader(sqlite, "experiment")
    assert read.history("a", "train/loss") == loss
    assert read.history("a", "eval/fd_digits/euler20/s1") == fd
    odd = [metric.value for metric in read.history("a", "odd")]
    assert math.isnan(odd[0])
    assert odd[1:] == [sys.float_info.max, -sys.float_info.max]  # how MLflow keeps infinities
    assert tracker.status() == {
        "connected": True,
        "pending": 0,
        "delivered": 2507,
        "rejected": 0,
        "last_error": None,
    }


def test_recomputed_steps_are_not_appended(sqlite, track):
    first, again = curve("train/loss", range(50)), curve("train/loss", range(20, 80), start_ms=1_800_000_000_000)
    tracker = track(sqlite)
    tracker.start_run("a", "a")
    tracker.log("a", first[:40])
    deliver(tracker)
    tracker.log("a", [*first[30:], *curve("train/loss", range(35), start_ms=1_750_000_000_000)])
    deliver(tracker)
    tracker.close()

    resumed = track(sqlite)
    resumed.start_run("a", "a")
    resumed.log("a", again)
    resumed.log("a", curve("train/lr", range(3)))
    deliver(resumed)
    read = Reader(sqlite, "experiment")
    assert read.history("a", "train/loss") == first + again[30:]
    assert read.history("a", "train/lr") == curve("train/lr", range(3))


def test_a_continued_run_is_the_same_run_and_keeps_its_params(sqlite, track, caplog):
    tracker = track(sqlite)
    tracker.start_run("a", "a", params={"gamma": 0.4, "seed": 1})
    tracker.end_run("a", "KILLED")
    deliver(tracker)
    before = Reader(sqlite, "experiment").run("a")
    tracker.close()

    resumed = track(sqlite)
    resumed.start_run("a", "a", params={"gamma": 0.8, "seed": 1, "workers": 2})
    deliver(resumed)
    after = Reader(sqlite, "experiment").run("a")
    assert (before.info.status, after.info.status) == ("KILLED", "RUNNING")
    assert after.info.run_id == before.info.run_id
    assert after.data.params == {"gamma": "0.4", "seed": "1", "workers": "2"}
    assert after.data.tags["mixflow.param_conflicts"] == "gamma"
    assert resumed.status()["rejected"] == 0
    assert "gamma" in caplog.text
    resumed.end_run("a", "FINISHED")
    deliver(resumed)
    assert Reader(sqlite, "experiment").run("a").info.status == "FINISHED"


def test_a_run_that_is_told_again_ended_when_it_did(sqlite, track):
    """Until something new is measured: then it ended later."""
    ends = []
    for steps in (3, 3, 5):
        tracker = track(sqlite)
        tracker.start_run("a", "a")
        tracker.log("a", curve("train/loss", range(steps)))
        tracker.end_run("a", "FINISHED")
        deliver(tracker)
        tracker.close()
        ends.append(Reader(sqlite, "experiment").run("a").info.end_time)
    assert ends[0] == ends[1] < ends[2]


def test_an_experiment_that_was_deleted_is_restored(sqlite, track, caplog):
    from mlflow import MlflowClient

    client = MlflowClient(sqlite)
    client.delete_experiment(client.create_experiment("experiment"))
    tracker = track(sqlite)
    tracker.start_run("a", "a")
    deliver(tracker)
    assert Reader(sqlite, "experiment").run("a").info.status == "RUNNING"
    assert "restored" in caplog.text


def test_long_params_are_cut_and_lists_are_json(sqlite, track):
    tracker = track(sqlite)
    tracker.start_run("a", "a", params={"long": "x" * 7000, "grid": [1, 2.5, "a"], **{f"p{i}": i for i in range(150)}})
    deliver(tracker)
    params = Reader(sqlite, "experiment").run("a").data.params
    assert params["long"] == "x" * 5996 + "..."
    assert json.loads(params["grid"]) == [1, 2.5, "a"]
    assert {params[f"p{i}"] for i in range(150)} == {str(i) for i in range(150)}


def test_what_mlflow_refuses_is_set_aside_and_named(workspace, sqlite, track, caplog):
    good = curve("train/loss", range(20))
    tracker = track(sqlite)
    tracker.start_run("a", "a", params={"good": 1, "bad@param": 2})
    tracker.log("a", [*good[:7], Metric("bad,key", 7, 1.0, 7), *good[7:]])
    tracker.artifact("a", "grids/late.txt", "")
    tracker.log("never started", curve("loss", range(3)))
    tracker.end_run("a", "FINISHED")
    deliver(tracker)
    read = Reader(sqlite, "experiment")
    assert read.history("a", "train/loss") == good
    assert (read.run("a").info.status, read.run("a").data.params) == ("FINISHED", {"good": "1"})
    assert tracker.status()["rejected"] == 6

    (path,) = workspace.list(f"{SPOOL}/rejected")
    assert path in caplog.text
    aside = {(event["kind"], event["run"]): event for event in map(json.loads, workspace.read(path).splitlines())}
    assert set(aside) == {("params", "a"), ("metrics", "a"), ("artifact", "a"), ("metrics", "never started")}
    assert aside["metrics", "a"]["metrics"] == [["bad,key", 7, 1.0, 7]]
    assert "bad,key" in aside["metrics", "a"]["reason"]
    assert "not started" in aside["metrics", "never started"]["reason"]
    tracker.close()

    workspace.put("grids/late.txt", b"here it is")
    done = replay(workspace, sqlite, SPOOL)
    assert (done.sent, done.pending, done.rejected) == (6, 0, 5)
    run_id = read.run("a").info.run_id
    assert [file.path for file in read.client.list_artifacts(run_id)] == ["late.txt"]


def test_a_run_deleted_by_hand_does_not_stop_the_others(workspace, sqlite, track):
    tracker = track(sqlite)
    tracker.start_run("a", "a")
    tracker.start_run("b", "b")
    deliver(tracker)
    read = Reader(sqlite, "experiment")
    read.client.delete_run(read.run("a").info.run_id)
    tracker.log("a", curve("loss", range(300)))
    tracker.log("b", curve("loss", range(300)))
    deliver(tracker)
    assert read.history("b", "loss") == curve("loss", range(300))
    (path,) = workspace.list(f"{SPOOL}/rejected")
    (event,) = map(json.loads, workspace.read(path).splitlines())
    assert (event["run"], len(event["metrics"])) == ("a", 300)
    assert "active" in event["reason"]


def test_a_broken_artifact_store_does_not_hold_up_metrics_for_ever(workspace, sqlite, track, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "HOPELESS_S", 4.0)
    monkeypatch.setattr(tracking, "STALLED_S", 3.0)
    (tmp_path / "file").write_text("where artifacts should have a directory")
    MlflowClient(sqlite).create_experiment("experiment", artifact_location=str(tmp_path / "file" / "artifacts"))
    workspace.put("grid.txt", b"a grid")
    tracker = track(sqlite)
    tracker.start_run("a", "a")
    tracker.artifact("a", "grid.txt", "")
    tracker.log("a", curve("loss", range(5)))
    deliver(tracker)
    assert Reader(sqlite, "experiment").history("a", "loss") == curve("loss", range(5))
    (path,) = workspace.list(f"{SPOOL}/rejected")
    assert b"grid.txt" in workspace.read(path)


def test_without_mlflow_a_run_ends_and_replay_delivers_it(workspace, sqlite, caplog):
    nobody = f"http://user:secret@127.0.0.1:{free_port()}"
    tracker = Tracker(workspace, nobody, "experiment", SPOOL)
    tracker.start_run("a", "a", params={"seed": 1})
    tracker.log("a", curve("loss", range(100)))
    tracker.flush()
    assert sum(path.endswith(".jsonl") for path in workspace.list(SPOOL)) > 0
    tracker.end_run("a", "FINISHED")
    assert tracker.drain(600) == 102  # pytest's limit for a hung test is as long
    status = tracker.status()
    assert (status["connected"], status["pending"], status["delivered"]) == (False, 102, 0)
    assert "refused" in status["last_error"]
    tracker.close()
    assert caplog.text.count("events are kept in tracking/experiment") == 1
    assert "secret" not in caplog.text + str(status)

    assert list_spools(workspace) == [SPOOL]
    done = replay(workspace, sqlite, SPOOL)
    assert (done.sent, done.pending, done.rejected) == (102, 0, 0)
    read = Reader(sqlite, "experiment")
    assert read.history("a", "loss") == curve("loss", range(100))
    assert read.run("a").info.status == "FINISHED"
    assert replay(workspace, sqlite, SPOOL).sent == 0


def test_replay_names_the_spools_there_are(workspace):
    workspace.put("tracking/real/spool.json", b'{"experiment": "e"}')
    with pytest.raises(ValueError, match="got 'tracking/typo'; there are: tracking/real"):
        replay(workspace, "sqlite:////nowhere.db", "tracking/typo")


def test_a_workspace_that_fails_loses_and_doubles_nothing(workspace, track, monkeypatch):
    monkeypatch.setattr(tracking, "SPOOL_EVERY_S", 3600.0)
    tracker = track(f"http://127.0.0.1:{free_port()}")
    failures = ["before", "after"]
    put_new = workspace.put_new

    def flaky(path: str, data: bytes) -> bool:
        failure = failures.pop(0) if failures else ""
        if failure == "before":
            raise OSError("the workspace is away")
        created = put_new(path, data)
        if failure == "after":
            raise OSError("the answer was lost")
        return created

    monkeypatch.setattr(workspace, "put_new", flaky)
    tracker.start_run("a", "a")
    for step, problem in enumerate(["workspace is away", "answer was lost"]):
        tracker.log("a", curve("loss", [step]))
        with pytest.raises(OSError, match=problem):
            tracker.flush()
        assert tracker.status()["pending"] == 2 + step
    tracker.flush()
    assert tracker.status()["pending"] == 3
    tracker.close()
    segments = [path for path in workspace.list(SPOOL) if path.endswith(".jsonl")]
    lines = [json.loads(line) for path in segments for line in workspace.read(path).splitlines()]
    assert [(line["kind"], [row[1] for row in line.get("metrics", ())]) for line in lines] == [
        ("start", []),
        ("metrics", [0]),
        ("metrics", [1]),
    ]


def test_wrong_calls_are_refused_at_once(workspace, sqlite, track):
    tracker = track(sqlite)
    with pytest.raises(ValueError, match="status must be one of"):
        tracker.end_run("a", "DONE")
    with pytest.raises(ValueError, match="run key must be"):
        tracker.start_run("it's", "a")
    with pytest.raises(ValueError, match="spool must be a directory below tracking/"):
        Tracker(workspace, sqlite, "experiment", "elsewhere/spool")
    tracker.close()
    with pytest.raises(RuntimeError, match="closed"):
        tracker.log("a", curve("loss", [1]))


@pytest.mark.mlflow
def test_a_server_that_comes_late_gets_everything_once(mlflow_server: MlflowServer, track):
    mlflow_server.kill()
    experiment = f"late-{uuid.uuid4().hex}"
    tracker = track(mlflow_server.uri, experiment)
    tracker.start_run("all", "all")
    tracker.start_run("a", "a", parent="all", params={"seed": 1})
    tracker.log("a", curve("loss", range(1500)))
    tracker.flush()
    wait_until(lambda: tracker.status()["last_error"], "the tracker notices that nobody is there")
    tracker.log("a", curve("loss", range(1500, 1600)))
    mlflow_server.start()
    tracker.end_run("a", "FINISHED")
    wait_until(lambda: tracker.drain(60) == 0, "everything is delivered")
    read = Reader(mlflow_server.uri, experiment)
    assert read.history("a", "loss") == curve("loss", range(1600))
    run = read.run("a")
    assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "1"})
    assert run.data.tags["mlflow.parentRunId"] == read.run("all").info.run_id


@pytest.mark.mlflow
def test_a_server_that_hangs_blocks_nothing_and_gets_everything_once(mlflow_server: MlflowServer, workspace, track):
    mlflow_server.start()
    experiment = f"hung-{uuid.uuid4().hex}"
    workspace.put("grid.txt", b"a grid")
    tracker = track(mlflow_server.uri, experiment)
    tracker.start_run("a", "a")
    tracker.log("a", curve("loss", range(100)))
    deliver(tracker)
    mlflow_server.signal(signal.SIGSTOP)
    try:
        for step in range(100, 400):  # that this ends at all, while the server is stopped, is the point
            tracker.log("a", curve("loss", [step]))
        tracker.artifact("a", "grid.txt", "")
        assert tracker.drain(600) == 301
        assert tracker.status()["last_error"]
    finally:
        mlflow_server.signal(signal.SIGCONT)
    tracker.log("a", curve("loss", range(50, 450), start_ms=1_800_000_000_000))
    wait_until(lambda: tracker.drain(60) == 0, "everything is delivered")
    read = Reader(mlflow_server.uri, experiment)
    expected = curve("loss", range(400)) + curve("loss", range(400, 450), start_ms=1_800_000_000_000)
    assert read.history("a", "loss") == expected
    assert [file.path for file in read.client.list_artifacts(read.run("a").info.run_id)] == ["grid.txt"]


@pytest.mark.mlflow
def test_a_server_killed_amid_a_stream_gets_everything_once(mlflow_server: MlflowServer, track):
    mlflow_server.start()
    experiment = f"killed-{uuid.uuid4().hex}"
    tracker = track(mlflow_server.uri, experiment)
    tracker.start_run("a", "a")
    tracker.log("a", curve("loss", range(20_000)))
    wait_until(lambda: tracker.run_id("a"), "the stream has begun")
    mlflow_server.kill()
    tracker.log("a", curve("loss", range(20_000, 21_000)))
    wait_until(lambda: tracker.status()["last_error"], "the tracker notices the kill")
    assert tracker.drain(600) > 0
    mlflow_server.start()
    wait_until(lambda: tracker.drain(60) == 0, "everything is delivered")
    read = Reader(mlflow_server.uri, experiment)
    assert read.history("a", "loss") == curve("loss", range(21_000))
    assert read.run("a").info.status == "RUNNING"


WRITER = """
import sys, time
from orchestration.storage import open_storage
from orchestration.tracking import Metric, Tracker
workspace, uri, experiment, start_ms = sys.argv[1:]
tracker = Tracker(open_storage(workspace), uri, experiment, "tracking/experiment")
tracker.start_run("a", "a", params={"seed": 1})
for step in range(3000):
    if step % 100 == 0:
        tracker.flush()
        time.sleep(0.1)
    tracker.log("a", [Metric(key, step, step + 0.5, int(start_ms) + step) for key in ("loss", "norm")])
tracker.end_run("a", "FINISHED")
while tracker.drain(60):
    print("waiting", tracker.status(), flush=True)
tracker.close()
"""


@pytest.mark.mlflow
def test_a_tracker_killed_amid_a_stream_sends_everything_once(mlflow_server: MlflowServer, workspace):
    mlflow_server.start()
    experiment = f"writer-{uuid.uuid4().hex}"

    def start(start_ms: int) -> subprocess.Popen[bytes]:
        arguments = [workspace.uri, mlflow_server.uri, experiment, str(start_ms)]
        return subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments], env=os.environ | {"PYTHONPATH": os.getcwd()}
        )

    def stored() -> int:
        runs = mlflow_experiment(mlflow_server.uri, experiment)
        return int(max((run.data.metrics.get("loss", -1) for run in runs), default=-1))

    steps_at_kill = []
    for life in range(3):  # it dies before its run is there, soon after, and in the middle
        writer = start(1_000_000_000_000 * (life + 1))
        if life:
            known = stored()
            wait_until(lambda known=known: stored() > known, "the writer has sent something more")
        else:
            wait_until(lambda: any(path.endswith(".jsonl") for path in workspace.list(SPOOL)), "the spool holds events")
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        steps_at_kill.append(stored())
    assert steps_at_kill[1] < steps_at_kill[2]
    assert start(4_000_000_000_000).wait() == 0

    read = Reader(mlflow_server.uri, experiment)
    for key in ("loss", "norm"):
        history = read.history("a", key)
        assert [(metric.step, metric.value) for metric in history] == [(step, step + 0.5) for step in range(3000)]
    run = read.run("a")
    assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "1"})
    assert workspace.list(SPOOL) == [f"{SPOOL}/spool.json"]


def mlflow_experiment(uri: str, name: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(name)
    return list(client.search_runs([found.experiment_id])) if found else []


@pytest.mark.mlflow
@pytest.mark.parametrize("arrives", ["at once", "late"])
def test_a_lost_answer_to_the_creation_of_a_run_makes_no_second_run(mlflow_server: MlflowServer, track, serve, arrives):
    mlflow_server.start()
    proxy = Proxy(mlflow_server.uri, lambda path: path.endswith("runs/create") and not proxy.held)
    serve(proxy)
    if arrives == "at once":
        proxy.release.set()
    experiment = f"lost-{uuid.uuid4().hex}"
    tracker = track(proxy.uri, experiment)
    tracker.start_run("a", "a")
    tracker.log("a", curve("loss", range(10)))
    wait_until(lambda: tracker.drain(60) == 0, "everything is delivered")
    proxy.release.set()
    wait_until(lambda: proxy.passed, "the held request arrives")
    tracker.end_run("a", "FINISHED")
    wait_until(lambda: tracker.drain(60) == 0, "everything is delivered")
    read = Reader(mlflow_server.uri, experiment)
    assert read.history("a", "loss") == curve("loss", range(10))
    assert read.run("a").info.status == "FINISHED"


@pytest.mark.mlflow
def test_requests_that_arrive_late_store_nothing_twice(mlflow_server: MlflowServer, workspace, track, serve):
    mlflow_server.start()
    batches: list[str] = []

    def hold_all_from_the_metrics_on(path: str) -> bool:
        batches.extend([path] * path.endswith("runs/log-batch"))  # the first one carries the tags of the run
        return len(batches) > 1 and path != "/health"

    proxy = Proxy(mlflow_server.uri, hold_all_from_the_metrics_on)
    serve(proxy)
    experiment = f"delayed-{uuid.uuid4().hex}"
    tracker = track(proxy.uri, experiment)
    tracker.start_run("a", "a")
    tracker.log("a", curve("loss", range(100)))
    assert tracker.drain(600) == 101
    tracker.close()
    done = replay(workspace, mlflow_server.uri, SPOOL)
    assert (done.sent, done.pending, done.rejected) == (101, 0, 0)
    proxy.release.set()
    wait_until(lambda: len(proxy.passed) == len(proxy.held) > 0, "the held requests arrive")
    read = Reader(mlflow_server.uri, experiment)
    assert read.history("a", "loss") == curve("loss", range(100))


@pytest.mark.mlflow
def test_the_campaign_in_small(tmp_path):
    """The database is restarted, MLflow answers 500: see tests/benchmarks/mlflow_campaign.py."""
    script = Path(__file__).parents[1] / "benchmarks" / "mlflow_campaign.py"
    options = ["--rounds", "1", "--seconds", "5", "--only", "database restarted|500", "--results", tmp_path / "results"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert [(case["case"], case["problems"]) for case in cases] == [("database restarted", []), ("500", [])]
    assert all(case["values"] for case in cases)


@pytest.mark.parametrize("refusal", [401, 403])
def test_refused_credentials_are_wrong_input(refusal, serve, monkeypatch):
    welcome = "Basic " + base64.b64encode(b"ada:right").decode()
    keeper = Doorkeeper(refusal, welcome)
    serve(keeper)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(
        ValueError, match=f"must accept the credentials, got {refusal}.*MLFLOW_TRACKING_USERNAME"
    ) as error:
        check_tracking(keeper.uri)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
    assert check_tracking(keeper.uri) is None
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    assert check_tracking(keeper.uri.replace("//", "//ada:right@")) is None
    keeper.authorization = "Bearer token"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    assert check_tracking(keeper.uri) is None


def test_credentials_refused_amid_a_run_keep_its_events(serve, track, caplog):
    keeper = Doorkeeper(401, "nobody has this")
    serve(keeper)
    tracker = track(keeper.uri)
    tracker.start_run("a", "a")
    assert tracker.drain(600) == 1
    assert "401" in tracker.status()["last_error"]
    assert "401" in caplog.text


def test_no_error_of_the_client_shows_the_password(serve, track, caplog):
    keeper = Doorkeeper(401, "nobody has this")
    proxy = Proxy(keeper.uri, hold=lambda path: path != "/health")
    for server in (keeper, proxy):
        serve(server)
    tracker = track(proxy.uri.replace("//", "//user:secret@"))
    tracker.start_run("a", "a")
    assert tracker.drain(600) == 1
    assert "API request to http://user:***@" in tracker.status()["last_error"]
    assert "secret" not in caplog.text
    proxy.release.set()


def test_a_server_that_does_not_answer_is_a_warning(serve):
    nobody = f"http://user:secret@127.0.0.1:{free_port()}"
    warning = check_tracking(nobody)
    assert warning is not None
    assert f"{nobody.replace('secret', '***')} does not answer" in warning
    assert "\n" not in warning
    ill = Doorkeeper(503, "nobody has this")
    serve(ill)
    assert "answers 503" in str(check_tracking(ill.uri))
    assert "does not answer" in str(check_tracking(f"postgresql://u:secret@127.0.0.1:{free_port()}/mlflow"))


@pytest.mark.mlflow
def test_real_servers_pass_the_check(mlflow_server: MlflowServer, postgresql: str, workspace, track):
    mlflow_server.start()
    assert check_tracking(mlflow_server.uri) is None
    assert check_tracking(postgresql) is None
    direct = postgresql.replace("+psycopg2", "")
    assert check_tracking(direct) is None
    experiment = f"direct-{uuid.uuid4().hex}"
    tracker = track(direct, experiment)
    tracker.start_run("a", "a")
    tracker.log("a", curve("loss", range(10)))
    deliver(tracker)
    read = Reader(mlflow_server.uri, experiment)
    assert read.history("a", "loss") == curve("loss", range(10))
    assert read.run("a").info.artifact_uri.startswith(f"{workspace.uri}/mlartifacts")
    with pytest.raises(ValueError, match="must be accepted by PostgreSQL"):
        check_tracking(postgresql.replace("mlflow@", "stranger@"))


@pytest.mark.mlflow
def test_a_host_that_mlflow_does_not_serve_is_named(mlflow_server: MlflowServer, monkeypatch):
    """As a worker meets it that knows the server by another name; only the name's address is made up."""
    mlflow_server.start()
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **options: look_up("127.0.0.1", *more, **options))
    uri = f"http://tracking.example.org:{mlflow_server.port}"
    with pytest.raises(ValueError, match="must name a host that the server allows") as error:
        check_tracking(uri)
    assert str(error.value).endswith("--allowed-hosts (tracking.example.org,tracking.example.org:*)")


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("file:///tmp/mlruns", "file store is gone, use sqlite:///"),
        ("./mlruns", "file store is gone, use sqlite:///"),
        ("postgresql+asyncpg://db/mlflow", "must start with http, https, sqlite or postgresql"),
        ("databricks://profile", "must start with http, https, sqlite or postgresql, got 'databricks://profile'"),
        ("sqlite:////dev/null/mlflow.db", "must name a writable sqlite file"),
        ("sqlite:////tmp", "must name a writable sqlite file"),
        ("http://h:abc", r"must be an address such as http://host:5000, got 'http://h:abc' \(Port could not"),
        ("http://a b:5000", r"must be an address such as http://host:5000, got 'http://a b:5000' \(no host\)"),
        ("http://[::1", r"must be an address such as http://host:5000, got 'http://\[::1' \(Invalid IPv6"),
        ("http://", r"must be an address such as http://host:5000, got 'http://' \(no host\)"),
    ],
)
def test_uris_that_mlflow_cannot_use_are_wrong_input(uri, problem):
    with pytest.raises(ValueError, match=problem):
        check_tracking(uri)


class _Odd(BaseHTTPRequestHandler):
    """Answers with no HTTP, or with a redirect; notes what credentials it was given."""

    def do_GET(self) -> None:
        self.server.given.append(self.headers.get("Authorization"))
        if self.server.target is None:
            self.wfile.write(b"220 smtp ready\r\n")
            return
        self.send_response(302)
        self.send_header("Location", self.server.target)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


def odd_server(serve, target: str | None = None) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    server.target, server.given = target, []
    serve(server)
    return server


def test_a_port_that_speaks_no_http_is_wrong_input(serve):
    port = odd_server(serve).server_address[1]
    with pytest.raises(ValueError, match=f"must be the address of an MLflow server, got .* http://127.0.0.1:{port};"):
        check_tracking(f"http://127.0.0.1:{port}")


def test_a_redirect_to_another_host_is_not_given_the_credentials(serve):
    other = odd_server(serve)
    for host, status in (("localhost", 302), ("127.0.0.1", None)):
        first = odd_server(serve, f"http://{host}:{other.server_address[1]}/")
        uri = f"http://ada:right@127.0.0.1:{first.server_address[1]}"
        if status:
            assert ask(uri, "/health") == status
            assert other.given == []
        else:
            with pytest.raises(ValueError, match="no HTTP"):
                ask(uri, "/health")
            assert len(other.given) == 1, "the same host may name another place"


def test_a_workspace_that_is_away_is_waited_for_no_longer_than_was_asked(workspace, track, monkeypatch, caplog):
    tracker, back = track("http://127.0.0.1:9"), threading.Event()
    put_new = type(workspace).put_new

    def away(storage: Storage, path: str, data: bytes) -> bool:
        back.wait(60)
        return put_new(storage, path, data)

    monkeypatch.setattr(type(workspace), "put_new", away)
    tracker.start_run("a", "a")
    assert tracker.drain(0.5) == 1
    assert not back.is_set(), "it came back although nothing was kept yet"
    back.set()
    tracker.flush()
    assert [path for path in workspace.list(SPOOL) if path.endswith(".jsonl")]


def test_the_start_of_a_run_outlives_the_process_that_was_told_of_it(workspace):
    """Its other events would be refused for ever, had it been lost."""
    reporter = Reporter(workspace.uri, "http://127.0.0.1:9", "experiment", "experiments/it")
    reporter.start_run("", "it", {}, {})
    (segment,) = [path for path in workspace.list("tracking/it") if path.endswith(".jsonl")]
    assert b'"kind": "start"' in workspace.read(segment)
    reporter.tracker.close()


def test_the_runs_of_two_workspaces_are_not_taken_for_one_another(tmp_path):
    """Both may hold the same experiment, and be told of to the same MLflow."""
    one, another = (
        Reporter(str(tmp_path / name), "http://127.0.0.1:9", "experiment", "experiments/it") for name in ("a", "b")
    )
    again = Reporter(str(tmp_path / "a"), "http://127.0.0.1:9", "experiment", "experiments/it")
    assert one.key("arms/x/0") == again.key("arms/x/0") != another.key("arms/x/0")
    assert one.key("arms/x/0").endswith("/experiments/it/arms/x/0")
    for reporter in (one, another, again):
        reporter.tracker.close()


def test_the_default_is_sqlite_in_a_local_workspace(tmp_path, monkeypatch):
    local, remote = open_storage(str(tmp_path / "new")), open_storage("s3://bucket/prefix")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri(local) == f"sqlite:///{tmp_path}/new/mlflow.db"
    assert check_tracking(default_tracking_uri(local)) is None
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI must be set when the workspace is on s3"):
        default_tracking_uri(remote)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert default_tracking_uri(local) == default_tracking_uri(remote) == "http://mlflow:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri(remote) == f"sqlite:///{tmp_path}/here.db"


def test_the_ui_command_shows_no_password():
    assert ui_command("sqlite:////a dir/mlflow.db") == "mlflow ui --backend-store-uri 'sqlite:////a dir/mlflow.db'"
    assert ui_command("http://user:secret@mlflow:5000") == "http://user:***@mlflow:5000"
    assert "secret" not in ui_command("postgresql://user:secret@db/mlflow")
