"""`mixflow submit`: what is packaged and told, and what becomes of the job on a real Ray head with a token."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from clusters import Run, ray_head, ray_node, small

from orchestration import submit
from orchestration.cli import main
from orchestration.doctor import init_env, read_env

PLANTED = "planted-3f9c1d77a0b24e"
TOKEN = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own, and none of the variables that jobs are told."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "MIXFLOW_", "RAY_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_package_holds_the_sources_and_the_experiment_and_nothing_else(directory: Path) -> None:
    (directory / "mine").mkdir()
    (directory / "mine" / "a.yaml").write_text("extends: mine/b.yaml\n")
    (directory / "mine" / "b.yaml").write_text("name: b\n")
    (directory / "package").mkdir()
    arguments = ["run", "mine/a.yaml", "--set", "data.shards=x.yaml"]
    assert submit.pack(arguments, directory / "package") == arguments
    files = {path.relative_to(directory / "package").as_posix() for path in (directory / "package").rglob("*.*")}
    root = Path(submit.__file__).parents[1]
    sources = {
        path.relative_to(root).as_posix()
        for package in ("mixflow_core", "workers", "orchestration")
        for path in (root / package).rglob("*.*")
        if "__pycache__" not in path.parts
    }
    assert files == sources | {"pyproject.toml", "mine/a.yaml", "mine/b.yaml"}


def test_an_experiment_from_elsewhere_comes_to_the_top(directory: Path) -> None:
    (directory / "here").mkdir()
    (directory / "e.yaml").write_text("name: e\n")
    os.chdir(directory / "here")
    (directory / "package").mkdir()
    assert submit.pack(["plan", str(directory / "e.yaml")], directory / "package") == ["plan", "e.yaml"]
    assert (directory / "package" / "e.yaml").read_text() == "name: e\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ([], {}, "the verb of a job must be one of"),
        (["export", "x", "a", "b"], {}, "got 'export'"),
        (["rum", "quickstart"], {}, "did you mean 'run'?"),
        (["run", "absent.yaml"], {}, "experiment file must exist, got 'absent.yaml'"),
        (["plan", "quickstart"], {"MIXFLOW_WORKSPACE": "./here"}, "got './here'; unset it"),
        (
            ["plan", "quickstart"],
            {"MLFLOW_TRACKING_URI": f"http://u:{PLANTED}@h"},
            "MLFLOW_TRACKING_URI must hold no pass",
        ),
        (
            ["plan", "quickstart"],
            {"MLFLOW_TRACKING_URI": f"https://{PLANTED}@h"},
            "MLFLOW_TRACKING_URI must hold no password or token",
        ),
        (
            ["plan", "quickstart"],
            {"MLFLOW_TRACKING_URI": f"postgresql://h/db?user=u&password={PLANTED}"},
            "MLFLOW_TRACKING_URI must hold no password or token",
        ),
        (
            ["run", "quickstart", "--set", f"name={PLANTED}"],
            {"AWS_SECRET_ACCESS_KEY": PLANTED},
            "the value of AWS_SECRET",
        ),
        (
            ["run", "quickstart", "--set", f"name='{PLANTED} it'"],
            {"AWS_SECRET_ACCESS_KEY": f"'{PLANTED} it'"},
            "the value of AWS_SECRET",
        ),
        (["plan", "quickstart"], {}, "--address must be Ray's job server"),
        (
            ["run", "quickstart", "--set", "mixture.gamma=1.5"],
            {},
            "quickstart: mixture.gamma must lie in [0, 1], got 1.5",
        ),
        (["sweep", "quickstart", "--space", "a=b"], {}, "space must have keys of"),
        (
            ["run", "quickstart", "--set", "data={shards: ./mine}"],
            {},
            "data.shards must be an s3:// URI or an absolute path on a disk that all nodes see in a job, got './mine'",
        ),
        (["plan", "quickstart"], {"MIXFLOW_WORKSPACE": "s3://"}, "MIXFLOW_WORKSPACE: storage must be a local path"),
        (["plan", "quickstart"], {"MIXFLOW_WORKSPACE": "file:rel"}, "MIXFLOW_WORKSPACE: storage must be a local path"),
        (["plan", "quickstart"], {"MLFLOW_TRACKING_URI": "sqlite:///rel.db"}, "a server or an absolute path in a job"),
        (["plan", "quickstart"], {"MLFLOW_TRACKING_URI": "file:mlruns"}, "a server or an absolute path in a job"),
        (["plan", "quickstart"], {"MLFLOW_TRACKING_URI": "mlruns"}, "MLFLOW_TRACKING_URI must be a server"),
        (["import", "a", "b"], {}, "got 'import'; run others here"),
        (
            ["run", "quickstart", "--set", f"data={{shards: 's3://key:{PLANTED}@bucket/x'}}"],
            {},
            "a URI in a job's words or files must hold no password",
        ),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    environment: dict[str, str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # nobody listens there
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["submit", "--", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: submit: ")
    assert says in err
    assert err.count("\n") == 1
    assert PLANTED not in err


def test_an_address_is_shown_without_its_password(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://admin:{PLANTED}@127.0.0.1:9"
    assert main(["submit", "--address", address, "--", "plan", "quickstart"]) == 2
    err = capsys.readouterr().err
    assert PLANTED not in err
    assert "--address must be Ray's job server, http://host:8265, got 'http://admin:***@127.0.0.1:9'" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "quickstart", "--nonsense"], "mixflow train: no such options: --nonsense; see mixflow train --help"),
        (
            ["submit", "train", "quickstart", "--dry-run"],
            "mixflow train: no such options: --dry-run (submit's own go before its verb); see mixflow train --help",
        ),
    ],
)
def test_options_that_a_verb_does_not_have(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err == f"error: {says}\n"


class Server:
    """A job server as `follow` sees it: what `steps` says happens at each look at the log, in turn."""

    def __init__(self, *steps: object) -> None:
        self.steps, self.stops = list(steps), 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        step = self.steps.pop(0)
        yield str(step)
        if self.steps and self.steps[0] is signal.SIGINT:
            signal.raise_signal(self.steps.pop(0))
            await asyncio.sleep(60)  # asyncio cancels this
        if self.steps and isinstance(self.steps[0], Exception):
            raise self.steps.pop(0)

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status="RUNNING" if self.steps else "SUCCEEDED")

    def stop_job(self, job: str) -> None:
        self.stops += 1
        if self.stops == 1:
            raise ConnectionError("the head is busy")


def test_a_broken_connection_after_hours_of_log_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only silence counts, not the time since the job began; here an hour passes while the first text is read."""
    now = [0.0]
    monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None))
    server = Server("begun\n", RuntimeError("code 1006"), "begun\ngoes on\n")
    heard = []

    class Hours(submit.Log):
        def take(self, text: str, start: int) -> None:
            heard.append(text)
            now[0] += 3600

    assert submit.follow(server, "job", Hours(False)).status == "SUCCEEDED"
    assert heard == ["begun\n", "begun\ngoes on\n"]


def test_two_files_of_one_name_are_not_mixed_up(directory: Path) -> None:
    (directory / "here").mkdir()
    (directory / "base.yaml").write_text("extends: base.yaml\n")
    (directory / "here/base.yaml").write_text("extends: quickstart\nname: parent\n")
    os.chdir(directory / "here")
    with pytest.raises(ValueError, match="another file of this name must not both go into a job; rename one"):
        submit.pack(["run", "../base.yaml"], directory / "package")


def test_a_password_in_a_file_stays_here(directory: Path) -> None:
    (directory / "e.yaml").write_text(f"extends: quickstart\ndata: {{shards: 's3://key:{PLANTED}@bucket/x'}}\n")
    with pytest.raises(ValueError, match="must hold no password") as caught:
        submit.pack(["run", "e.yaml"], directory / "package")
    assert PLANTED not in str(caught.value)


def test_addresses_of_this_machine_are_not_told_to_containers(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost.example:8333")
    assert main(["submit", "--dry-run", "--", "plan", "quickstart"]) == 0
    out, err = capsys.readouterr()
    assert "127.0.0.1:5000" not in out
    assert "localhost.example" in out
    assert "names this machine and not one of the cluster: MLFLOW_TRACKING_URI" in err
    assert main(["submit", "--dry-run", "--address", "http://127.0.0.1:8265", "--", "plan", "quickstart"]) == 0
    assert "127.0.0.1:5000" in capsys.readouterr().out


def test_a_server_that_takes_connections_and_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "ANSWER_S", 0.05)
    monkeypatch.setattr(submit, "PATIENCE_S", 0.3)
    end = threading.Event()

    class Silent(Server):
        def get_job_info(self, job: str) -> SimpleNamespace:
            end.wait(60)
            return super().get_job_info(job)

    server = Silent("begun\n", *["begun\n"] * 99)
    with pytest.raises(OSError, match="the job server has not answered") as caught:
        submit.follow(server, "job", submit.Log(False))
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert len(server.steps) > 90
    end.set()


def test_a_job_that_a_new_head_does_not_know_is_not_waited_for() -> None:
    class Anew(Server):
        def get_job_info(self, job: str) -> SimpleNamespace:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")

    with pytest.raises(OSError, match="knows no job one any more, since its head was started anew"):
        submit.follow(Anew("begun\n", ConnectionError("code 1006"), "never\n"), "one", submit.Log(False))


def test_a_stop_while_the_server_is_away_is_sent_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sleeps = iter([KeyboardInterrupt])

    def sleep(seconds: float) -> None:
        if error := next(sleeps, None):
            raise error

    monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep))
    server = Server("begun\n", ConnectionError("refused"), "ended\n")
    server.stops = 1  # the next is taken
    assert submit.follow(server, "job", submit.Log(False)).status == "SUCCEEDED"
    assert server.stops == 2
    assert "stopping the job" in capsys.readouterr().err


def test_a_stop_that_the_server_does_not_take_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None))
    server = Server("begun\n", signal.SIGINT, "ended\n")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert submit.follow(server, "job", submit.Log(False)).status == "SUCCEEDED"
    finally:
        signal.signal(signal.SIGINT, before)
    assert server.stops == 2
    assert "RAY_JOB_STOP_WAIT_TIME_S" in capsys.readouterr().err


def test_a_package_that_is_too_large_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "LARGEST_PACKAGE", 2**18)
    assert main(["submit", "--", "plan", "quickstart"]) == 2
    assert "the job's package must hold at most 0 MiB, got" in capsys.readouterr().err


def test_a_job_is_told_places_and_no_secrets() -> None:
    environ = {
        "MIXFLOW_WORKSPACE": "s3://bucket/prefix",
        "AWS_ENDPOINT_URL": "http://store:8333",
        "NCCL_SOCKET_IFNAME": "eth0",
        "AWS_SECRET_ACCESS_KEY": PLANTED,
        "MLFLOW_TRACKING_PASSWORD": PLANTED,
        "RAY_AUTH_TOKEN": PLANTED,
        "HOME": "/root",
    }
    told = {name: environ[name] for name in ("MIXFLOW_WORKSPACE", "AWS_ENDPOINT_URL", "NCCL_SOCKET_IFNAME")}
    assert submit.passed(environ) == told


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_document_at_the_end_of_a_log(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'said\n{\nnot a document\n{\n "a": {\n  "b": 1\n }\n}\nlast words\n'
    log = submit.Log(has_document=True)
    for start in range(0, len(text), size):
        log.take(text[start : start + size], start)
        log.take(text[: start + size], 0)  # read again from the beginning, as after a broken connection
    assert log.document() == {"a": {"b": 1}}
    assert capsys.readouterr().out == "said\n{\nnot a document\nlast words\n"


def test_the_passwords_of_compose_are_secrets_too(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "docker").mkdir()
    (directory / "docker" / "compose.yaml").write_text("")
    init_env()
    password = read_env(directory / "docker" / ".env")["MLFLOW_ADMIN_PASSWORD"]
    assert main(["submit", "--dry-run", "--", "run", "quickstart", "--set", f"name={password}"]) == 2
    assert "the value of MLFLOW_ADMIN_PASSWORD must not be part of a job" in capsys.readouterr().err


def test_a_full_disk_leaves_no_empty_file_of_passwords(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_disk)
    (small_disk / "docker").mkdir()
    (small_disk / "docker" / "compose.yaml").write_text("")
    with (small_disk / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert main(["doctor", "--init-env"]) == 1
    assert "the disk must have room for docker/.env, got" in capsys.readouterr().err
    assert not (small_disk / "docker" / ".env").exists()


def test_init_env_writes_passwords_once(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--init-env"]) == 2
    assert "--init-env must be used where docker/compose.yaml is" in capsys.readouterr().err
    (directory / "docker").mkdir()
    (directory / "docker" / "compose.yaml").write_text("")
    before = os.umask(0)
    try:
        assert main(["doctor", "--init-env"]) == 0
    finally:
        os.umask(before)
    file = directory / "docker" / ".env"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    written = file.read_bytes()
    passwords = [value for name, value in read_env(file).items() if name not in ("MIXFLOW_CLUSTER", "S3_ACCESS_KEY")]
    assert len(set(passwords)) == len(passwords) == 5
    assert all(len(value) == 64 for value in passwords)
    assert all(value not in capsys.readouterr().out for value in passwords)
    assert main(["doctor", "--init-env"]) == 2
    assert capsys.readouterr().err.startswith("error: doctor: docker/.env must not be there yet, got one")
    assert file.read_bytes() == written
    file.unlink()
    init_env()
    assert file.read_bytes() != written


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head that asks for a token, with a workspace and a secret in its nodes' environment."""
    home = tmp_path_factory.mktemp("token")
    own = {"MIXFLOW_WORKSPACE": str(home / "ws"), "MLFLOW_TRACKING_PASSWORD": PLANTED, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    with ray_head("token", home / "log", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, **own) as environment:
        yield environment | {"WORKSPACE": own["MIXFLOW_WORKSPACE"]}


def _user(head: dict[str, str], **more: str) -> dict[str, str]:
    """What a user of the cluster has in the environment: some of it for the job, whose workers are told it too."""
    told = {"GLOO_SOCKET_IFNAME": "lo", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    return {"RAY_API_SERVER_ADDRESS": head["RAY_API_SERVER_ADDRESS"], "RAY_AUTH_TOKEN": TOKEN, **told, **more}


@pytest.mark.ray
def test_a_job_answers_with_its_document_and_nowhere_are_secrets(head: dict[str, str], tmp_path: Path) -> None:
    secret = "of-the-submitter-81c2e5"
    run = Run(["submit", "--json", "--", "doctor"], tmp_path, _user(head, AWS_SECRET_ACCESS_KEY=secret))
    answer = run.answer()
    assert answer["status"] == "SUCCEEDED"
    findings = {finding["what"]: finding for finding in answer["findings"]}
    assert all(finding["ok"] for finding in findings.values()), findings
    assert head["WORKSPACE"] in findings["storage"]["says"]
    for what in ("versions", "clocks", "storage nodes", "mlflow nodes", "gpu nodes", "collectives"):
        assert "1 nodes" in findings[what]["says"], findings[what]
    assert "gloo all-reduce over 1 processes" in findings["collectives"]["says"]
    assert "Running entrypoint for job" in run.said()
    kept = [path for path in Path(head["SESSION"]).rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(answer["job"] in path.name for path in kept)
    for word in (secret, PLANTED, TOKEN):
        assert [path for path in kept if word.encode() in path.read_bytes()] == []


@pytest.mark.ray
@pytest.mark.slow
def test_doctor_looks_at_every_node(head: dict[str, str], tmp_path: Path) -> None:
    with ray_node(head, tmp_path / "node.log"):
        answer = Run(["submit", "--json", "--", "doctor"], tmp_path / "two", _user(head)).answer()
    findings = {finding["what"]: finding for finding in answer["findings"]}
    assert all(finding["ok"] for finding in findings.values()), findings
    for what in ("versions", "clocks", "storage nodes", "mlflow nodes", "gpu nodes", "collectives"):
        assert "2 nodes" in findings[what]["says"], findings[what]
    assert "gloo all-reduce over 2 processes" in findings["collectives"]["says"]


@pytest.mark.ray
def test_the_exit_code_is_the_drivers(head: dict[str, str], tmp_path: Path) -> None:
    absent = ["base.train=", "base.checkpoint=/nope.pt", f"base.sha256={'0' * 64}"]
    overrides = [word for override in absent for word in ("--set", override)]
    wrong = Run(["submit", "--json", "--", "run", "quickstart", *overrides], tmp_path / "wrong", _user(head))
    assert wrong.wait() == 2, wrong.said()
    assert "base.checkpoint must be a file, got '/nope.pt'" in wrong.said()
    assert json.loads(wrong.out.read_text())["status"] == "FAILED"
    failing = Run(["submit", "--", "doctor"], tmp_path / "f", _user(head, MLFLOW_TRACKING_URI="http://127.0.0.1:9"))
    assert failing.wait() == 1, failing.said()
    assert "FAIL  mlflow " in failing.out.read_text()
    stranger = Run(["submit", "--", "doctor"], tmp_path / "s", _user(head) | {"RAY_AUTH_TOKEN": "f" * 64})
    assert stranger.wait() == 2, stranger.said()
    assert "error: submit: RAY_AUTH_TOKEN must be the token of the cluster" in stranger.said()


@pytest.mark.ray
def test_the_line_of_a_dry_run_does_the_same(head: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("extends: quickstart\nname: from-a-file\n")
    run = Run(["submit", "--dry-run", "--", "plan", "e.yaml", "--json"], tmp_path / "dry", _user(head))
    line = run.answer()["command"]
    assert shlex.split(line)[:3] == ["ray", "job", "submit"]
    environment = head | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"name": "from-a-file"' in done.stdout


@pytest.mark.ray
def test_sigterm_stops_the_job_and_keeps_its_checkpoint(head: dict[str, str], tmp_path: Path) -> None:
    steps = small(
        name="stopped", base__train__steps=100000, base__train__checkpoint_every=100000, base__train__log_every=20
    )
    run = Run(["submit", "--json", "--", "run", "quickstart", *steps], tmp_path, _user(head))
    run.until(lambda: re.search(r" step \d+/100000", run.said()), "training of the base")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 1, run.said()
    answer = json.loads(run.out.read_text())
    assert answer["status"] == "STOPPED"
    assert "stopping the job, so that it leaves a checkpoint" in run.said()
    (kept,) = (Path(head["WORKSPACE"]) / "checkpoints").glob("base-*/step-*/manifest.json")
    step = re.search(r"stopped after step (\d+)", run.said())
    assert step, run.said()
    assert kept.parent.name.startswith(f"step-{int(step[1]):09d}-")
