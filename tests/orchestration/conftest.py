"""S3 servers for the tests: moto in this process (fast, believes everything) and Ceph RADOS Gateway (real).

The function-scoped fixtures set in the environment just what a user sets, one endpoint and the credentials, so a test
that passes shows that the code under test does the rest. Subprocesses inherit it.
"""

import os
import uuid
from collections.abc import Iterator

import pytest
import s3_servers
from s3_servers import BUCKET, Ceph, Control, make_bucket, s3_variables


@pytest.fixture(autouse=True)
def s3_variables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command run in this process sets its S3 variables for all of it; the next test starts without them."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


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
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    if not s3_servers.ceph_is_installed():
        pytest.fail("Ceph is not installed; install .ci/apt-packages.txt")
    with s3_servers.ceph(tmp_path_factory.mktemp("ceph") / "cluster") as server:
        yield server


@pytest.fixture(scope="session")
def ceph_endpoint(ceph: Ceph) -> str:
    return ceph.endpoint


@pytest.fixture
def moto_s3(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an unused prefix on moto, with the environment set for it."""
    return use_s3(moto_endpoint, monkeypatch)


@pytest.fixture
def ceph_s3(ceph_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an unused prefix on Ceph, with the environment set for it. Its tests carry the mark `s3`."""
    return use_s3(ceph_endpoint, monkeypatch)


@pytest.fixture
def fault_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """Redirects the S3 endpoint of the environment through a proxy that injects faults."""
    with s3_servers.fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as (endpoint, control):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield control


def use_s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Points the environment at `endpoint` and nothing else, and answers with the URI of an unused prefix."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_S3_"))]:
        monkeypatch.delenv(name)
    for name, value in s3_variables(endpoint).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
