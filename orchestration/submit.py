"""`mixflow submit`: a verb as a Ray job. What is packaged, what the job is told, how it is followed and stopped.

Ray shows a job's command and variables to everybody who reaches the cluster, so no secret goes into them: the nodes
hold credentials in their own environment, and those of the submitter's are kept out by name and by value.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestration.cluster import NETWORK
from orchestration.doctor import COMPOSE_ENV, read_env
from orchestration.launch import in_thread
from orchestration.mlflow_server import without_password
from orchestration.storage import open_storage

log = logging.getLogger(__name__)
# Of the submitter's environment, what a job is told where it is set, beside NETWORK; all else is the nodes' own.
PASSED = (
    "MIXFLOW_WORKSPACE", "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
    "AWS_REGION", "AWS_DEFAULT_REGION",
)  # fmt: skip
VERBS = (
    "run", "train", "slow-flow", "sample", "evaluate", "encode", "sweep", "plan", "report", "replay", "doctor"
)  # fmt: skip
PACKAGES = ("mixflow_core", "workers", "orchestration")
LARGEST_PACKAGE = 20 * 2**20  # bytes; the sources are 1 MiB, and every node of the cluster fetches the package
SECRET = re.compile(r"(SECRET|PASSWORD|TOKEN|ACCESS_KEY)(?!.*_(PATH|FILE)$)")
RAYS_TOKEN = Path("~/.ray/auth_token")  # where it lies, Ray's clusters ask for it
PATIENCE_S = 60.0  # for a job server that does not answer, before the job is left to itself
ANSWER_S = 20.0  # for one answer, on which Ray's client sets no limit
UPLOADED_S = 300.0  # for the package to arrive
LOOPBACK = re.compile(r"://([^/@]*@)?(localhost|127\.[\d.]+|\[::1\])(?=[:/]|$)")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def submit(
    command: Sequence[str], address: str | None, *, dry_run: bool = False, as_json: bool = False
) -> dict[str, Any]:
    """Runs a verb with its arguments as a Ray job and follows it to its end.

    Args:
        command: the verb (see check_verb) and what follows it, such as ["run", "quickstart"].
        address: of the job server, http://host:8265; RAY_API_SERVER_ADDRESS or RAY_ADDRESS where it is None, and
            without these the cluster of docker/compose.yaml.
        dry_run: only make the package and say how `ray job submit` would do the same.
        as_json: the job's own JSON document is part of the answer, not of its log.

    Returns:
        `job`, `address`, `status` (Ray's), `exit_code` (the driver's, 1 for a job without one), and the document.

    Raises:
        ValueError: a wrong file, a secret that would be shown, no job server at the address.
    """
    arguments = [*command, *(["--json"] if as_json and "--json" not in command else [])]
    variables = passed(os.environ)
    if not _named(address):
        variables = _seen_inside(variables)
    with contextlib.ExitStack() as cleanup:
        package = Path(tempfile.mkdtemp(prefix="mixflow-job-"))
        cleanup.callback(shutil.rmtree, package)
        entrypoint = shlex.join(["python", "-m", "orchestration", *pack(arguments, package)])
        refuse_secrets([entrypoint, *arguments, *variables.values()], known_environment())  # quoting may hide a value
        environment: dict[str, Any] = {"working_dir": str(package)}
        if variables:
            environment["env_vars"] = variables
        where = job_server(address, look=not dry_run)
        if dry_run:
            cleanup.pop_all()  # the package is what is asked for
            if os.environ.get("RAY_AUTH_MODE") == "token":
                _say(f"it needs RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN, as in {COMPOSE_ENV}")
            line = ["ray", "job", "submit", "--address", where, "--working-dir", environment.pop("working_dir")]
            given = ["--runtime-env-json", json.dumps(environment)] if environment else []
            return {"command": f"{shlex.join([*line, *given])} -- {entrypoint}", "package": str(package)}
        client = _client(where)
        job = f"mixflow-{command[0]}-{uuid.uuid4().hex[:8]}"
        try:
            _start(client, entrypoint, environment, job)
        except KeyboardInterrupt:
            _say(f"job {job} may have been started; `ray job stop {job}` ends it")
            raise
    shown = without_password(where)
    _say(f"job {job} at {shown}; told {', '.join(variables) or 'nothing'}, all else it finds on the nodes")
    log = Log(as_json)
    info = follow(client, job, log)
    code = info.driver_exit_code if info.status == "FAILED" else 0 if info.status == "SUCCEEDED" else 1
    if code not in (0, 1, 2):  # it never began, or was killed, and cannot have said why
        _say(f"job {job} failed: {' '.join(str(info.message).split())}")
    elif info.status == "STOPPED":
        _say(f"job {job} is stopped; the same command goes on from here")
    answer = {"job": job, "address": shown, "status": str(info.status.value)}
    return {**log.document(), **answer, "exit_code": code if code in range(256) else 1}


def passed(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environ` that a job is told.

    Raises:
        ValueError: a URI with a password, or a workspace that the cluster cannot see.
    """
    names = [*PASSED, *(name for name in sorted(environ) if name.startswith(NETWORK))]
    found = {name: environ[name] for name in names if environ.get(name)}
    for name, value in found.items():
        parts = urlsplit(value)
        is_token = bool(parts.username) and parts.scheme.startswith("http")  # which may stand for a user
        if parts.password or is_token or without_password(value) != value:
            raise ValueError(
                f"{name} must hold no password or token in a job, got one, which Ray would show to everybody; leave it "
                "to the nodes' own environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, AWS_*)"
            )
    workspace = found.get("MIXFLOW_WORKSPACE", "/")
    if not workspace.startswith(("s3://", "/", "file:")):
        raise ValueError(
            "MIXFLOW_WORKSPACE must be an s3:// URI or an absolute path on a shared disk in a job, got "
            f"{workspace!r}; unset it to use the nodes' own"
        )
    try:
        open_storage(workspace)
    except ValueError as error:
        raise ValueError(f"MIXFLOW_WORKSPACE: {error}") from error
    tracking = found.get("MLFLOW_TRACKING_URI", "")
    if re.match(r"(sqlite:///|file:(//)?)(?!/)", tracking) or not re.match(r"/|[a-z0-9+]+:|databricks$|$", tracking):
        raise ValueError(
            f"MLFLOW_TRACKING_URI must be a server or an absolute path in a job, got {tracking!r}; unset it to use the "
            "nodes' own"
        )
    return found


def _seen_inside(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables without addresses of this machine, which mean another one inside the containers of compose."""
    outside = [name for name, value in variables.items() if LOOPBACK.search(value)]
    if outside:
        _say(f"not told, since it names this machine and not one of the cluster: {', '.join(outside)}")
    return {name: value for name, value in variables.items() if name not in outside}


def refuse_secrets(shown: Sequence[str], environ: Mapping[str, str]) -> None:
    """Refuses a command, variables or a file that hold the value of one of the environment's secrets, or a password.

    Raises:
        ValueError: naming the variable.
    """
    for text in shown:
        if without_password(text) != text:
            raise ValueError(
                "a URI in a job's words or files must hold no password, got one, which Ray would show to everybody; "
                "the nodes need it in their own environment (AWS_*)"
            )
    for name, value in environ.items():
        if SECRET.search(name) and len(value) >= 8 and any(value in text for text in shown):
            raise ValueError(
                f"the value of {name} must not be part of a job, whose command and variables Ray shows to everybody; "
                "the nodes need it in their own environment"
            )


def known_environment() -> dict[str, str]:
    """The environment, with what docker/.env holds."""
    return {**(read_env(COMPOSE_ENV) if COMPOSE_ENV.is_file() else {}), **os.environ}


def check_verb(command: Sequence[str]) -> None:
    """Whether it begins with the verb of a job; ValueError otherwise."""
    if not command or command[0] not in VERBS:
        close = difflib.get_close_matches(command[0], VERBS, n=1) if command else []
        got = repr(command[0]) if command else "nothing"
        is_other = got in ("'import'", "'export'")
        mend = f"did you mean {close[0]!r}?" if close and not is_other else "run others here"
        raise ValueError(f"the verb of a job must be one of {', '.join(VERBS)}, got {got}; {mend}")


def pack(arguments: Sequence[str], package: Path) -> list[str]:
    """Copies what a job needs into the directory `package`: the sources, and experiment files among the arguments.

    Returns:
        The arguments, with experiment files by their place in the package.

    Raises:
        ValueError: no such file, one that cannot be packaged, or a package over 20 MiB.
    """
    root = Path(__file__).parents[1]
    for name in PACKAGES:
        shutil.copytree(root / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    if (root / "pyproject.toml").is_file():  # absent where the project was installed
        shutil.copy(root / "pyproject.toml", package)
    packed = [_pack_experiment(argument, package) for argument in arguments]
    sizes = {path: path.stat().st_size for path in package.rglob("*") if path.is_file()}
    if sum(sizes.values()) > LARGEST_PACKAGE:
        largest = max(sizes, key=lambda path: sizes[path]).relative_to(package)
        raise ValueError(
            f"the job's package must hold at most {LARGEST_PACKAGE // 2**20} MiB, got "
            f"{sum(sizes.values()) / 2**20:.1f} MiB; remove what is no source, such as {largest}"
        )
    return packed


def _pack_experiment(argument: str, package: Path) -> str:
    """An argument as the job gets it; an experiment file, with the one it extends, is copied."""
    if not argument.endswith((".yaml", ".yml")) or argument.startswith("-") or "=" in argument:
        return argument
    from orchestration.recipe import parent_of

    place = _copy(argument, package)
    parent = parent_of(argument)
    is_file = parent is not None and parent.endswith((".yaml", ".yml"))
    if parent is not None and is_file and _copy(parent, package) != parent:
        raise ValueError(f"{argument}: extends must be a path below this directory in a job, got {parent!r}; copy it")
    return place


def _copy(file: str, package: Path) -> str:
    """Copies a file to the same relative place in the package, or to its top if it lies elsewhere."""
    source = Path(file)
    if not source.is_file():
        raise ValueError(f"experiment file must exist, got {file!r}; correct the path")
    inside = not source.is_absolute() and ".." not in source.parts
    target = package / (source if inside else source.name)
    if target.exists() and target.read_bytes() != source.read_bytes():
        raise ValueError(f"{file} and another file of this name must not both go into a job; rename one")
    refuse_secrets([source.read_text()], known_environment())
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return file if inside else source.name


def _named(address: str | None) -> str:
    """The job server that the user names; "" for the one of docker/compose.yaml."""
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""


def job_server(address: str | None, *, look: bool = True) -> str:
    """The address of the job server, after a look whether anybody listens there; sets Ray's variables for it.

    Raises:
        ValueError: nobody does, or it is none.
    """
    environ = os.environ
    where = _named(address)
    if not where:
        compose = read_env(COMPOSE_ENV) if COMPOSE_ENV.is_file() else {}
        where = f"http://127.0.0.1:{compose.get('RAY_DASHBOARD_PORT', 8265)}"
        if "RAY_AUTH_TOKEN" in compose and "RAY_AUTH_TOKEN_PATH" not in environ:
            environ.setdefault("RAY_AUTH_TOKEN", compose["RAY_AUTH_TOKEN"])
    if environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH") or RAYS_TOKEN.expanduser().is_file():
        environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's job client has it off even where there is a token
    kind = where.partition("://")[0] if "://" in where else ""
    if kind not in ("", "http", "https", "ray"):
        raise ValueError(f"--address must be Ray's job server, http://host:8265, got {without_password(where)!r}")
    if kind not in ("http", "https") or not look:
        return where  # auto, ray:// or the address of a head: Ray finds the job server itself
    parts = urlsplit(where)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--address must be Ray's job server, http://host:8265, got {without_password(where)!r} ({error}); start "
            "the cluster (docker compose -f docker/compose.yaml up -d) or correct it"
        ) from error
    environ["RAY_API_SERVER_ADDRESS"] = where  # it would go before the argument
    return where


def _client(address: str) -> Any:
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return in_thread(partial(JobSubmissionClient, address), ANSWER_S)
    except AuthenticationError as error:
        raise ValueError(
            f"RAY_AUTH_TOKEN must be the token of the cluster at {address}, got another or none; set it or "
            f"RAY_AUTH_TOKEN_PATH, or copy the head's {RAYS_TOKEN}"
        ) from error
    except (ConnectionError, RuntimeError, TimeoutError, RayError) as error:
        reason = " ".join(str(error).split()) or f"it does not answer within {ANSWER_S:g} s"
        raise ValueError(
            f"--address must be Ray's job server, got {without_password(address)!r} ({reason[:160]}); correct it"
        ) from error


def _start(client: Any, entrypoint: str, environment: dict[str, Any], name: str) -> None:
    """Starts the job; a job server that has just been started knows of no agent to start it by for a moment.

    Raises:
        OSError: the job server does not answer.
    """
    end = time.monotonic() + PATIENCE_S
    start = partial(client.submit_job, entrypoint=entrypoint, runtime_env=environment, submission_id=name)
    while True:
        try:
            in_thread(start, UPLOADED_S)
            return
        except TimeoutError as error:
            raise OSError(
                f"the job server has not answered for {UPLOADED_S:g} s; job {name} may have been started, `ray job "
                f"stop {name}` ends it"
            ) from error
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(1)


class Log:
    """A job's log on its way to stdout. Of a job with --json, the document at the end is kept back."""

    def __init__(self, has_document: bool = False):
        self.has_document = has_document
        self.length = 0  # characters taken so far, those of a log that is read again included
        self._line, self._held = "", ""

    def take(self, text: str, start: int) -> None:
        """Takes text that begins at character `start` of the log, of which a part may be known."""
        new = text[max(0, self.length - start) :]
        self.length += len(new)
        if not self.has_document:
            print(new, end="", flush=True)
            return
        *lines, self._line = (self._line + new).split("\n")
        for line in lines:
            if line == "{":  # indented by 1, only its outermost braces stand at the beginning of a line
                print(self._held, end="", flush=True)
                self._held = "{\n"
            elif self._held:
                self._held += f"{line}\n"
            else:
                print(line, flush=True)

    def document(self) -> dict[str, Any]:
        """The JSON document; empty if the job printed none."""
        held, self._held = f"{self._held}{self._line}", ""
        try:
            document, end = json.JSONDecoder().raw_decode(held)
        except ValueError:
            document, end = {}, 0
        print(held[end:].lstrip("\n"), end="", flush=True)
        return dict(document)


def follow(client: Any, job: str, log: Log) -> Any:
    """Writes the job's log until the job has ended; Ctrl-C or SIGTERM stop the job, a second time only the following.

    Returns:
        Ray's details of the ended job.

    Raises:
        OSError: the job server has not answered for a minute, and the job may go on without us; or its head was started
            anew.
        KeyboardInterrupt: at the second Ctrl-C.
    """
    to_stop = stopping = False
    failed_at: float | None = None  # since when it does not answer

    def hear(text: str, start: int) -> None:
        nonlocal failed_at
        if start + len(text) > log.length:  # and not what was read before
            failed_at = None
        log.take(text, start)

    def look() -> Any:
        nonlocal stopping, failed_at
        if to_stop and not stopping:
            in_thread(partial(client.stop_job, job), ANSWER_S)
            stopping = True
        asyncio.run(_tail(client, job, hear))
        info = in_thread(partial(client.get_job_info, job), ANSWER_S)
        failed_at = None
        return info

    while True:
        try:
            try:
                info = look()
                if info.status in ENDED:
                    return info
            except Exception as error:  # of requests, aiohttp and Ray: the head, or the way to it
                if _is_unknown(client, job):
                    raise OSError(
                        f"the job server knows no job {job} any more, since its head was started anew; the same "
                        "command goes on from what is kept"
                    ) from error
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > PATIENCE_S:
                    raise OSError(
                        f"the job server has not answered for {PATIENCE_S:g} s ({' '.join(str(error).split())}); "
                        f"`ray job logs {job}` follows the job where it goes on; else the same command does"
                    ) from error
            time.sleep(0.5)
        except KeyboardInterrupt:
            if to_stop:
                if not stopping:
                    _say(f"the job server was not reached, and job {job} may go on; `ray job stop {job}` ends it")
                raise
            to_stop = True
            _say(
                "stopping the job, so that it leaves a checkpoint, for which Ray gives it the head's "
                "RAY_JOB_STOP_WAIT_TIME_S (3 s where it is not set); once more to leave it to Ray"
            )


def _is_unknown(client: Any, job: str) -> bool:
    try:
        in_thread(partial(client.get_job_info, job), ANSWER_S)
    except RuntimeError as error:
        return "does not exist" in str(error)
    except Exception:
        log.debug("whether job %s is known cannot be asked", job, exc_info=True)
    return False


async def _tail(client: Any, job: str, hear: Callable[[str, int], None]) -> None:
    """Takes the log from its beginning until it ends, or is silent for so long that the way to it may be dead."""
    start, texts = 0, client.tail_job_logs(job)
    async with contextlib.aclosing(texts):
        with contextlib.suppress(StopAsyncIteration, TimeoutError):
            while True:
                text = await asyncio.wait_for(anext(texts), PATIENCE_S)
                hear(text, start)
                start += len(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
