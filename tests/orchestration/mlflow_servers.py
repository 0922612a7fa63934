"""Servers for the tests of tracking: MLflow on PostgreSQL to be killed, stopped and started; proxies that lose answers.

A test module imports the fixtures it takes. Everything listens on 127.0.0.1 only.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

START_S = 180  # a busy machine needs 60 s


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = START_S) -> None:
    """Fails the test if the condition does not come true; the limit only ends a test that would hang."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {timeout_s:g} s in vain: {what}")
        time.sleep(0.1)


class MlflowServer:
    """`mlflow server` at one fixed port on one database, in a process group of its own."""

    def __init__(self, database_uri: str, directory: Path):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._log = directory / "server.log"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", database_uri, "--artifacts-destination", str(directory)),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server, or lets one that was stopped go on, and waits until it answers."""
        if self._process is not None:
            self.signal(signal.SIGCONT)
        else:
            # One process instead of six: these servers need no background jobs.
            env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=self._log.parent
                )
        wait_until(self._answers, f"MLflow starts; {self._log}")

    def kill(self) -> None:
        """kill -9 of the server with all its processes."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            pytest.fail(f"MLflow ended at its start: {self._log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow needs seconds to create its tables; the tests copy them."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("sqlite") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


class Postgresql:
    """A PostgreSQL server at one fixed port with an empty database, which `remove` ends with all that is in it."""

    def __init__(self) -> None:
        self._bindir, self._port = _postgresql_bindir(), free_port()
        self.uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{self._port}/postgres"
        user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name  # it refuses to run as root
        self._prefix = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] * (os.geteuid() == 0)
        self._directory = Path(tempfile.mkdtemp(prefix="mixflow-pg-"))  # pytest's own are closed to other users
        if self._prefix:
            shutil.chown(self._directory, user, user)
        options = ["-U", "mlflow", "-A", "trust", "-E", "UTF8", "--no-sync"]
        command = [*self._prefix, f"{self._bindir}/initdb", "-D", str(self._directory / "data"), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        options = ["-h", "127.0.0.1", "-p", str(self._port), "-c", "unix_socket_directories=", "-c", "fsync=off"]
        command = [*self._prefix, f"{self._bindir}/postgres", "-D", str(self._directory / "data"), *options]
        self._process = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL)
        ready = [f"{self._bindir}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self._port), "-U", "mlflow"]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, "PostgreSQL starts")

    def stop(self) -> None:
        """Ends it at once, with all connections; what was committed is there after `start`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._directory)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URI of a database on a PostgreSQL server of its own."""
    server = Postgresql()
    try:
        server.start()
        yield server.uri
    finally:
        server.remove()


@pytest.fixture(scope="session")
def mlflow_server(postgresql: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server that may or may not run: `start()` or `kill()` it first."""
    server = MlflowServer(postgresql, tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `target`, but holds some back until `release`; their senders get no answer at all."""

    daemon_threads = True

    def __init__(self, target: str, hold: Callable[[str], bool]):
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target, self.hold = target, hold
        self.release = threading.Event()  # let the held requests go on to the target
        self.held: list[str] = []  # the paths of the requests held back, and
        self.passed: list[str] = []  # of those among them that the target has answered
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"


class _Forward(BaseHTTPRequestHandler):
    server: Proxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {key: value for key, value in self.headers.items() if key in ("Content-Type", "Authorization")}
        request = urllib.request.Request(self.server.target + self.path, body or None, headers, method=self.command)
        hold = self.server.hold(self.path)
        if hold:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.server.held.append(self.path)
            self.server.release.wait()
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        if hold:
            self.server.passed.append(self.path)
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the test's output is for its own words."""


class Doorkeeper(ThreadingHTTPServer):
    """Answers like MLflow's basic-auth: /health to all, the API to one user, `refusal` (401 or 403) to the others."""

    daemon_threads = True

    def __init__(self, refusal: int, authorization: str):
        super().__init__(("127.0.0.1", 0), _Doorkeeper)
        self.refusal, self.authorization = refusal, authorization
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"


class _Doorkeeper(BaseHTTPRequestHandler):
    server: Doorkeeper

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        welcome = self.path == "/health" or self.headers.get("Authorization") == self.server.authorization
        content = b"{}" if welcome else b"You are not authenticated. Please see the documentation."
        self.send_response(200 if welcome else self.server.refusal)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the test's output is for its own words."""


@pytest.fixture
def serve() -> Iterator[Callable[[ThreadingHTTPServer], None]]:
    """Runs a server in a thread until the end of the test."""
    servers: list[ThreadingHTTPServer] = []

    def run(server: ThreadingHTTPServer) -> None:
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def _postgresql_bindir() -> str:
    config = shutil.which("pg_config")
    if config:
        found = subprocess.run([config, "--bindir"], check=True, capture_output=True, text=True).stdout.strip()
        if Path(found, "initdb").exists():
            return found
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not installed:
        pytest.fail("PostgreSQL is not installed (initdb not found); install .ci/apt-packages.txt")
    return str(installed[-1].parent)
