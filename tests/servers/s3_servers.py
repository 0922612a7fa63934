"""Starts the S3 servers that are processes of their own: Ceph RADOS Gateway and the proxy that injects faults."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
BUCKET = "mixflow-tests"
ACCESS_KEY, SECRET_KEY = "TESTACCESSKEY", "the-secret-of-the-tests"
Control = Callable[..., dict[str, int]]


@dataclass(frozen=True)
class Ceph:
    """A running Ceph RADOS Gateway: where it answers, and the directory of its cluster."""

    endpoint: str
    directory: Path

    def admin(self, *arguments: str) -> str:
        """What `radosgw-admin` prints."""
        return subprocess.run(
            ["radosgw-admin", "-n", "client.rgw.a", *arguments],
            env={**os.environ, "CEPH_CONF": str(self.directory / "ceph.conf")},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the gateway and to the store behind it."""
        for name in ("client.rgw.a", "osd.0"):
            os.kill(int((self.directory / "run" / f"{name}.pid").read_text()), number)


def ceph_is_installed() -> bool:
    return all(shutil.which(name) for name in ("ceph-mon", "ceph-osd", "radosgw", "ceph"))


@contextmanager
def ceph(directory: Path, host: str = "127.0.0.1") -> Iterator[Ceph]:
    """A cluster of its own in `directory`, which must not exist yet; it is removed at the end."""
    port = free_port()
    env = os.environ | {"S3_ACCESS_KEY": ACCESS_KEY, "S3_SECRET_KEY": SECRET_KEY, "S3_HOST": host}
    command = [str(HERE / "ceph_up.sh"), str(directory), str(port), str(free_port())]
    started = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
    if started.returncode:
        raise RuntimeError(started.stderr)
    try:
        endpoint = f"http://{host}:{port}"
        make_bucket(endpoint)
        yield Ceph(endpoint, directory)
    finally:
        subprocess.run([str(HERE / "ceph_down.sh"), str(directory)], check=True)
        shutil.rmtree(directory)


@contextmanager
def fault_proxy(endpoint: str) -> Iterator[tuple[str, Control]]:
    """A proxy before a server of this machine: its endpoint, and a function.

    Call it with the fields of `Fault` (s3_fault_proxy.py) to set one, or with none to read the counts.
    """
    command = [sys.executable, str(HERE / "s3_fault_proxy.py"), endpoint.rsplit(":", 1)[1]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        ports = json.loads(process.stdout.readline())

        def control(**fault: object) -> dict[str, int]:
            body = json.dumps(fault).encode() if fault else None
            with urllib.request.urlopen(f"http://127.0.0.1:{ports['control']}/", body, timeout=10) as answer:
                return dict(json.load(answer))

        try:
            yield f"http://127.0.0.1:{ports['port']}", control
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_bucket(endpoint: str, bucket: str = BUCKET, key: str = ACCESS_KEY, secret: str = SECRET_KEY) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
    )
    client.create_bucket(Bucket=bucket)


def s3_variables(endpoint: str) -> dict[str, str]:
    """Just what a user sets: one endpoint and the credentials; and what keeps this machine's own settings out."""
    return {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    }
