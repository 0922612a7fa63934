"""Plants secrets where users keep theirs, runs the command line for real, and looks for them in all that was left.

    pip install -e .[server] && python tests/benchmarks/secrets_campaign.py --work /tmp/secrets

The secrets are AWS keys, MLflow's password (in the URI and as a variable) and token, passwords of a database, of an S3
endpoint's and of a bucket's URL, and Ray's token. Each command of `SCENARIOS` runs as a process with them in its
environment, against MLflow with basic authentication and S3 (moto), on a Ray cluster of its own with token
authentication. Looked through are: what the commands print, the workspace and every object on S3, Ray's session
directory, MLflow's database, artifacts and log, the home directory, and, five times a second, the command line of every
process on the machine. A secret counts in any of its forms: as it is, quoted for a URL, in base64, and in base64 as
basic authentication has it. Each command is one JSON line in the result file; those that are there are not run again.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from campaigns import append_result, read_results

RESULTS = Path(__file__).parent / "results" / "secrets_campaign.jsonl"
sys.path.append(str(Path(__file__).parents[2]))
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("orchestration", "servers")]

SECRETS = {
    "AWS secret key": "plantedAwsSecret/0a+1",
    "AWS session token": "plantedAwsSession0b",
    "MLflow password": "plantedMlflow@pass/0c",
    "MLflow variable": "plantedMlflowVariable0d",
    "MLflow token": "plantedMlflowToken0e",
    "database password": "plantedDatabase0f",
    "endpoint password": "plantedEndpoint10",
    "bucket password": "plantedBucket11",
    "Ray token": "plantedRayToken12345678901234567890123456789012",
}
SMALL = ["replicates=2", "training.steps=20", "training.log_every=10", "training.checkpoint_every=20",
         "training.global_batch_size=16", "base.train.steps=20", "base.train.log_every=10",
         "base.train.checkpoint_every=20", "base.train.global_batch_size=16", "evaluation.num_samples=100",
         "evaluation.slow_flow_samples=20", "cluster.num_workers=1"]  # fmt: skip
RUN = [f"--set={override}" for override in SMALL]
EXPECTED = {"the whole of it": 0, "again, MLflow gone": 0}  # exit codes; 1 or 2 of the others


def forms(secret: str) -> set[bytes]:
    """How a secret may be written down."""
    texts = {secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1]}
    encoded = {base64.b64encode(f"{user}{secret}".encode()).rstrip(b"=") for user in ("", "admin:")}
    return {text.encode() for text in texts} | encoded


FORMS = {name: forms(secret) for name, secret in SECRETS.items()}


def found_in(content: bytes) -> list[str]:
    """Names of the secrets in some bytes."""
    return [name for name, texts in FORMS.items() if any(text in content for text in texts)]


class ProcessWatch:
    """Looks at the command lines of all processes, as `ps` shows them to everybody."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> ProcessWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:  # it has ended
                    continue


class Place:
    """Servers, directories and the environment of the commands."""

    def __init__(self, work: Path) -> None:
        from moto.server import ThreadedMotoServer
        from s3_servers import BUCKET, free_port

        self.work, self.ray = work, Path(f"/tmp/secrets-{os.getpid()}")  # short: Ray's sockets lie in it
        self.hidden = work / "planted"  # the administrator's own password lies here, and is not looked for
        for directory in (self.hidden, work / "home", work / "mlflow", self.ray):
            directory.mkdir(parents=True)
        self.s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.s3.start()
        self.endpoint = "http://{}:{}".format(*self.s3.get_host_and_port())
        self.bucket, self.port, self.closed = BUCKET, free_port(), free_port()
        self.client().create_bucket(Bucket=BUCKET)
        self.mlflow: subprocess.Popen[bytes] | None = None

    def client(self) -> Any:
        """Of S3."""
        import boto3

        keys = {"aws_access_key_id": "K", "aws_secret_access_key": "any", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)

    def start_mlflow(self) -> None:
        """MLflow with basic authentication, whose administrator has the planted password."""
        from mlflow_servers import wait_until

        (self.hidden / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = READ\nadmin_username = admin\nadmin_password = "
            f"{SECRETS['MLflow password']}\ndatabase_uri = sqlite:///{self.hidden}/auth.db\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\nauth_cache_ttl_seconds = 60\n"
        )
        variables = {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.hidden / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "any",
            "MLFLOW_AUTH_ADMIN_PASSWORD": SECRETS["MLflow password"],
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        data = self.work / "mlflow"
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1",
                   "--port", str(self.port), "--workers", "1", "--backend-store-uri", f"sqlite:///{data}/mlflow.db",
                   "--artifacts-destination", f"{data}/artifacts"]  # fmt: skip
        with (data / "server.log").open("ab") as log:
            self.mlflow = subprocess.Popen(
                command, env=os.environ | variables, stdout=log, stderr=log, start_new_session=True, cwd=data
            )
        wait_until(self._answers, "MLflow starts", 300)

    def _answers(self) -> bool:
        import urllib.request

        assert self.mlflow
        if self.mlflow.poll() is not None:
            raise RuntimeError((self.work / "mlflow" / "server.log").read_text()[-3000:])
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop_mlflow(self) -> None:
        """Ends the server with all its processes."""
        if self.mlflow:
            os.killpg(self.mlflow.pid, 9)
            self.mlflow.wait()
            self.mlflow = None

    def uri(self, password: str, port: int | None = None) -> str:
        """MLflow's, with a password in it."""
        return f"http://admin:{quote(password, safe='')}@127.0.0.1:{port or self.port}"

    def environment(self, **more: str | None) -> dict[str, str]:
        """All secrets, at the places that users have for them."""
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
        planted: Mapping[str, str | None] = {
            "HOME": str(self.work / "home"),
            "TMPDIR": str(self.work / "home"),
            "RAY_TMPDIR": str(self.ray),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": SECRETS["Ray token"],
            "RAY_raylet_start_wait_time_s": "120",
            "AWS_ACCESS_KEY_ID": "K",
            "AWS_SECRET_ACCESS_KEY": SECRETS["AWS secret key"],
            "AWS_SESSION_TOKEN": SECRETS["AWS session token"],
            "AWS_ENDPOINT_URL": self.endpoint,
            "MIXFLOW_WORKSPACE": f"s3://{self.bucket}/workspace",
            "MLFLOW_TRACKING_URI": self.uri(SECRETS["MLflow password"]),
            "MLFLOW_TRACKING_PASSWORD": SECRETS["MLflow variable"],
            "MLFLOW_TRACKING_TOKEN": SECRETS["MLflow token"],
            **more,
        }
        return kept | {name: value for name, value in planted.items() if value is not None}

    def left(self) -> dict[str, bytes]:
        """All that was written, by its name."""
        found: dict[str, bytes] = {}
        for root in (self.work, self.ray):
            for path in root.rglob("*"):
                if path.is_file() and not path.is_symlink() and self.hidden not in path.parents:
                    found[str(path)] = path.read_bytes()
        client = self.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket):
            for entry in page.get("Contents", ()):
                answer = client.get_object(Bucket=self.bucket, Key=entry["Key"])
                found[f"s3://{entry['Key']}"] = answer["Body"].read() + json.dumps(answer["Metadata"]).encode()
        return found

    def close(self) -> None:
        """Ends the servers and removes what was written."""
        self.stop_mlflow()
        self.s3.stop()
        shutil.rmtree(self.ray, ignore_errors=True)


Scenario = tuple[list[str], Callable[[Place], dict[str, str]]]
SCENARIOS: dict[str, Scenario] = {
    "a plan": (["plan", "quickstart", "--json", *RUN], lambda p: p.environment()),
    "a doctor": (["doctor"], lambda p: p.environment()),
    "MLflow's password is wrong": (
        ["plan", "quickstart"],
        lambda p: p.environment(MLFLOW_TRACKING_URI=p.uri(SECRETS["database password"])),
    ),
    "MLflow's token is wrong": (  # MLflow's basic authentication answers 500: the run goes on without it
        ["run", "quickstart", *RUN],
        lambda p: p.environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{p.port}", MLFLOW_TRACKING_PASSWORD=None),
    ),
    "nobody at MLflow's address": (
        ["plan", "quickstart", "--json", *RUN],
        lambda p: p.environment(MLFLOW_TRACKING_URI=p.uri(SECRETS["database password"], p.closed)),
    ),
    "a password with odd signs": (
        ["plan", "quickstart", "--json", *RUN],
        lambda p: p.environment(MLFLOW_TRACKING_URI=f"http://admin:{SECRETS['MLflow password']}@127.0.0.1:{p.closed}"),
    ),
    "nobody at the database's address": (
        ["plan", "quickstart", *RUN],
        lambda p: p.environment(
            MLFLOW_TRACKING_URI=f"postgresql://u:{SECRETS['database password']}@127.0.0.1:{p.closed}/x"
        ),
    ),
    "a database's password behind ?": (
        ["plan", "quickstart", "--json", *RUN],
        lambda p: p.environment(
            MLFLOW_TRACKING_URI=f"postgresql://u@127.0.0.1:{p.closed}/x?password={SECRETS['database password']}"
        ),
    ),
    "a database of an unknown kind": (
        ["plan", "quickstart"],
        lambda p: p.environment(MLFLOW_TRACKING_URI=f"oracle://u:{SECRETS['database password']}@127.0.0.1/x"),
    ),
    "nobody at the endpoint": (
        ["plan", "quickstart"],
        lambda p: p.environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{p.closed}"),
    ),
    "the same, with a traceback": (
        ["plan", "quickstart", "--debug"],
        lambda p: p.environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{p.closed}"),
    ),
    "an endpoint with a password": (
        ["plan", "quickstart"],
        lambda p: p.environment(AWS_ENDPOINT_URL=f"http://k:{SECRETS['endpoint password']}@127.0.0.1:{p.closed}"),
    ),
    "two endpoints, one with a password": (
        ["plan", "quickstart"],
        lambda p: p.environment(MLFLOW_S3_ENDPOINT_URL=f"http://k:{SECRETS['endpoint password']}@127.0.0.1:1"),
    ),
    "a bucket with a password": (
        ["run", "quickstart"],
        lambda p: p.environment(MIXFLOW_WORKSPACE=f"s3://k:{SECRETS['bucket password']}@{p.bucket}/x"),
    ),
    "data with a password": (
        ["run", "quickstart", f"--set=data={{shards: 's3://k:{SECRETS['bucket password']}@b/x'}}"],
        lambda p: p.environment(),
    ),
    "a bucket that is not there": (
        ["plan", "quickstart"],
        lambda p: p.environment(MIXFLOW_WORKSPACE="s3://no-such-bucket/x"),
    ),
    "the whole of it": (["run", "quickstart", "--json", *RUN], lambda p: p.environment()),
    "again, MLflow gone": (
        ["train", "quickstart", "--json", *RUN, "--set=name=gone"],
        lambda p: p.environment(MLFLOW_TRACKING_URI=p.uri(SECRETS["MLflow password"], p.closed)),
    ),
    "a replay that fails": (
        ["replay", "--json"],
        lambda p: p.environment(MLFLOW_TRACKING_URI=p.uri(SECRETS["MLflow password"], p.closed)),
    ),
}
PLANTED_IN_ARGUMENTS = {"data with a password"}  # whose own command line is the user's doing


def play(name: str, place: Place) -> dict[str, Any]:
    """One command, and where secrets were found."""
    arguments, environment = SCENARIOS[name]
    before, start = set(place.left()), time.monotonic()
    directory = place.work / "runs" / name.replace(" ", "-").replace("'", "").replace(",", "").replace("?", "")
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "orchestration", *arguments]
    with ProcessWatch() as watch, (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        done = subprocess.run(
            command, env=environment(place), stdout=out, stderr=err, cwd=directory, timeout=1500, check=False
        )
    left = place.left()
    leaks = {
        where: names for where, content in left.items() if (names := found_in(content) or found_in(where.encode()))
    }
    mine = b"\0".join(argument.encode() for argument in command) + b"\0"
    lines = watch.seen - ({mine} if name in PLANTED_IN_ARGUMENTS else set())
    leaks |= {line.decode(errors="replace"): names for line in lines if (names := found_in(line))}
    said = (directory / "err").read_text().splitlines()
    return {
        "scenario": name,
        "exit_code": done.returncode,
        "said": said[-1][:300] if said else "",
        "files": len(set(left) - before),
        "processes": len(watch.seen),
        "seconds": round(time.monotonic() - start, 1),
        "leaks": leaks,
    }


def main() -> int:
    """Command line; 1 if a secret was found anywhere, or a command ended otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty or new directory, which is kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    options = parser.parse_args()
    place, bad = Place(options.work.absolute()), 0
    try:
        place.start_mlflow()
        done = {entry["scenario"] for entry in read_results(options.results)}
        for name in [name for name in options.only if name not in done]:
            entry = play(name, place)
            bad += bool(entry["leaks"]) or (name in EXPECTED and entry["exit_code"] != EXPECTED[name])
            append_result(options.results, entry)
            print(json.dumps(entry, indent=1), flush=True)
    finally:
        place.close()
    print(f"{len(options.only)} commands, {bad} with a secret left behind or another end than expected")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
