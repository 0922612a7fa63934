"""S3 servers for the tests: moto in this process (fast, believes everything) and Ceph RADOS Gateway (real).

The function-scoped fixtures set in the environment just what a user sets, one endpoint and the credentials, so a test
that passes shows that the code under test does the rest. Subprocesses inherit it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SERVERS = Path(__file__).parent.parent / "servers"
BUCKET = "mixflow-tests"
ACCESS_KEY, SECRET_KEY = "TESTACCESSKEY", "the-secret-of-the-tests"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    make_bucket(endpoint)
    yield endpoint
    server.stop()


@pytest.fixture(scope="session")
def ceph_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    missing = [name for name in ("ceph-mon", "ceph-osd", "radosgw", "ceph") if not shutil.which(name)]
    if missing:
        pytest.fail(f"Ceph is not installed ({', '.join(missing)} not found); install .ci/apt-packages.txt")
    directory, port = tmp_path_factory.mktemp("ceph") / "cluster", free_port()
    env = os.environ | {"S3_ACCESS_KEY": ACCESS_KEY, "S3_SECRET_KEY": SECRET_KEY}
    command = [str(SERVERS / "ceph_up.sh"), str(directory), str(port), str(free_port())]
    started = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
    if started.returncode:
        pytest.fail(started.stderr)
    try:
        endpoint = f"http://127.0.0.1:{port}"
        make_bucket(endpoint)
        yield endpoint
    finally:
        subprocess.run([str(SERVERS / "ceph_down.sh"), str(directory)], check=True)
        shutil.rmtree(directory)


@pytest.fixture
def moto_s3(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an unused prefix on moto, with the environment set for it."""
    return use_s3(moto_endpoint, monkeypatch)


@pytest.fixture
def ceph_s3(ceph_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an unused prefix on Ceph, with the environment set for it. Its tests carry the mark `s3`."""
    return use_s3(ceph_endpoint, monkeypatch)


@pytest.fixture
def fault_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, int]]]:
    """Redirects the S3 endpoint of the environment through a proxy that injects faults.

    Call it with the fields of `Fault` (tests/servers/s3_fault_proxy.py) to set one, or with none to read the counts.
    """
    target = os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]
    with subprocess.Popen(
        [sys.executable, str(SERVERS / "s3_fault_proxy.py"), target], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        ports = json.loads(process.stdout.readline())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{ports['port']}")

        def control(**fault: object) -> dict[str, int]:
            body = json.dumps(fault).encode() if fault else None
            with urllib.request.urlopen(f"http://127.0.0.1:{ports['control']}/", body, timeout=10) as answer:
                return dict(json.load(answer))

        yield control
        process.kill()


def make_bucket(endpoint: str) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
    )
    client.create_bucket(Bucket=BUCKET)


def use_s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Points the environment at `endpoint` and nothing else, and answers with the URI of an unused prefix."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_S3_"))]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
