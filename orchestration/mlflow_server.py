"""MLflow's address: whether it is one, whether something answers there, and how it may be shown."""

from __future__ import annotations

import base64
import http.client
import os
import re
import shlex
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from orchestration.s3_client import s3_environment
from orchestration.storage import Storage

DRIVER = "postgresql+psycopg2"
ANSWER_S = 5.0


def check_tracking(tracking_uri: str) -> str | None:
    """Preflight of the tracking URI: None if all is well, one line of warning if MLflow does not answer within 5 s.

    Raises:
        ValueError: one line, for a URI that is none of http, https, sqlite and postgresql, credentials that are refused
            (401, 403), another server than MLflow's (404), or a sqlite directory that cannot be written.
    """
    scheme = _parts(_with_driver(tracking_uri)).scheme
    checks = {"http": _check_http, "https": _check_http, "sqlite": _check_sqlite, DRIVER: _check_postgresql}
    if scheme not in checks:
        file_store = scheme in ("", "file")
        hint = "MLflow's file store is gone, use sqlite:////path/mlflow.db" if file_store else "correct it"
        rule = "MLFLOW_TRACKING_URI must start with http, https, sqlite or postgresql"
        raise ValueError(f"{rule}, got {without_password(tracking_uri)!r}; {hint}")
    return checks[scheme](tracking_uri)


def _parts(uri: str) -> SplitResult:
    """A URI taken apart; ValueError where host or port are none."""
    try:
        parts = urlsplit(uri)
        if parts.scheme in ("http", "https") and (not parts.hostname or re.search(r"\s", parts.netloc)):
            raise ValueError("no host")
        _ = parts.port  # read here, where it is refused if it is none
        return parts
    except ValueError as error:
        shown = without_password(uri)
        rule = "MLFLOW_TRACKING_URI must be an address such as http://host:5000"
        raise ValueError(f"{rule}, got {shown!r} ({error}); correct it") from error


def default_tracking_uri(workspace: Storage) -> str:
    """MLFLOW_TRACKING_URI if it is set, else a sqlite file in a local workspace.

    Raises:
        ValueError: the workspace is on s3 and MLFLOW_TRACKING_URI is not set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and uri.startswith("sqlite:"):
        return f"sqlite:///{sqlite_file(uri)}"  # absolute, because the process that uses it has another directory
    if uri:
        return uri
    if not workspace.is_local:
        raise ValueError(
            f"MLFLOW_TRACKING_URI must be set when the workspace is on s3, got nothing for {workspace.uri}; "
            "set it to an MLflow server, http://host:5000"
        )
    return f"sqlite:///{workspace.uri}/mlflow.db"


def ui_command(tracking_uri: str) -> str:
    """The shell command that opens MLflow's UI, or the URL of a server."""
    if is_http(tracking_uri):
        return without_password(tracking_uri)
    if urlsplit(tracking_uri).password:
        return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --backend-store-uri {shlex.quote(_with_driver(tracking_uri))}"


def _check_http(uri: str) -> str | None:
    shown = without_password(uri)
    try:
        status = ask(uri, "/api/2.0/mlflow/experiments/search?max_results=1")
        if status in (0, 401, 403):
            # Only MLflow's client knows all the ways to give credentials and certificates; it has the last word.
            status = _client_status(uri)
    except OSError as error:
        return f"MLflow at {shown} does not answer ({error}); the run goes on and its events wait in the workspace"
    if status in (401, 403):
        raise ValueError(
            f"MLFLOW_TRACKING_URI must accept the credentials, got {status} from {shown}; correct "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
        )
    if status == 404:
        rule = "MLFLOW_TRACKING_URI must be the address of an MLflow server"
        raise ValueError(f"{rule}, got 404 (no such page) from {shown}; correct host, port or path")
    if status != 200:
        return f"MLflow at {shown} answers {status}; the run goes on and its events wait in the workspace"
    return None


def _check_sqlite(uri: str) -> None:
    file = sqlite_file(uri)
    there = next(parent for parent in (file, *file.parents) if parent.exists())
    usable = there.is_file() if there == file else there.is_dir()
    if not usable or not os.access(there, os.W_OK):
        raise ValueError(f"MLFLOW_TRACKING_URI must name a writable sqlite file, got {uri}; name another directory")


def _check_postgresql(uri: str) -> str | None:
    import psycopg2

    shown = without_password(uri)
    try:
        psycopg2.connect(_with_driver(uri).replace(DRIVER, "postgresql", 1), connect_timeout=int(ANSWER_S)).close()
    except psycopg2.OperationalError as error:
        reason = " ".join(str(error).split())
        if re.search("authentication failed|no pg_hba.conf entry|does not exist|no password supplied", reason):
            rule = "MLFLOW_TRACKING_URI must be accepted by PostgreSQL"
            raise ValueError(f"{rule}, got {shown} ({reason}); correct user, password or database") from error
        return f"PostgreSQL at {shown} does not answer ({reason}); the run goes on and its events wait in the workspace"
    return None


def ask(uri: str, path: str) -> int:
    """The HTTP status of a GET; 0 if only the certificate is not to our liking; OSError if there is no answer.

    Raises:
        ValueError: the server answers requests to other host names only.
    """
    parts = urlsplit(uri)
    user = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    headers = {}
    if user and password:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    request = urllib.request.Request(address + path, headers=headers)
    try:
        with urllib.request.build_opener(_SameHost).open(request, timeout=ANSWER_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        if error.code == 403 and b"Invalid Host header" in error.read(1000):
            host = parts.netloc.rpartition("@")[2]
            raise ValueError(
                f"MLFLOW_TRACKING_URI must name a host that the server allows, got 403 for {host!r}; add it to the "
                f"server's --allowed-hosts ({parts.hostname},{parts.hostname}:*)"
            ) from error
        return error.code
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return 0
        raise OSError(str(error.reason)) from error
    except http.client.HTTPException as error:
        rule = "MLFLOW_TRACKING_URI must be the address of an MLflow server"
        raise ValueError(
            f"{rule}, got an answer that is no HTTP from {without_password(uri)}; correct host or port"
        ) from error


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows no redirect to another host, or from TLS to none: it would be given the credentials."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """None, which makes the redirect the answer, or the request that follows it."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if old.hostname != new.hostname or (old.scheme, new.scheme) == ("https", "http"):
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _client_status(uri: str) -> int:
    """The HTTP status that MLflow's own client gets; OSError if it gets none."""
    client = mlflow_client(uri)
    from mlflow.exceptions import ERROR_CODE_TO_HTTP_STATUS, MlflowException

    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        if isinstance(error.__context__, OSError):  # of requests: no answer at all
            raise OSError(" ".join(str(error).split())) from error
        return int(ERROR_CODE_TO_HTTP_STATUS.get(error.error_code, 500))
    return 200


def mlflow_client(uri: str) -> Any:
    """An MLflow client that gives up within seconds; repeating is our own work."""
    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        # Where the server offers it, it would fetch from the server's store, at an address that is perhaps not ours.
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # "View run ..." for each run that ends
        "MLFLOW_LOGGING_LEVEL": "WARNING",  # it tells of every table that it makes in a new database
        **s3_environment(os.environ),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=_with_driver(uri))


def sqlite_file(uri: str) -> Path:
    """The file of a sqlite URI."""
    return Path(os.path.abspath(uri.removeprefix("sqlite:///").split("?")[0]))


def _with_driver(uri: str) -> str:
    """SQLAlchemy 2.1 takes `postgresql:` for psycopg 3; what we depend on is psycopg2."""
    return re.sub("^postgresql:", f"{DRIVER}:", uri)


def is_http(uri: str) -> bool:
    """Whether a tracking URI is that of a server, with a UI."""
    return uri.startswith(("http://", "https://"))


def without_password(text: str) -> str:
    """A URI, or a text with URIs in it, as it may be shown: what stands for passwords in them is starred out."""
    starred = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)  # to the last @, as a password may hold one unquoted
    return re.sub(r"([?&;](?:\w*password|token)=)[^&;\s]+", r"\1***", starred)
