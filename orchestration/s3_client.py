"""A client of an S3 server whose faults are sorted: what may pass is tried again, all else fails at once in one line.

Only this file speaks to boto3, imported where it is used (0.4 s).
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from orchestration.retry import PREFLIGHT, AlteredError, Patience, Retries, TransientError
from workers.disk import NoRoomError, PermanentError

T = TypeVar("T")

# Codes of errors with a status below 500 that may pass: the server's load, another conditional write under way, a body
# that broke off or was altered on its way, and a clock that is not yet set, as after a machine was asleep. Numbers
# stand for the answer to a HEAD, which has no body.
PASSING = {
    "408", "409", "425", "499",
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InvalidDigest", "OperationAborted",
    "PriorRequestNotComplete", "RequestLimitExceeded", "RequestThrottled", "RequestThrottledException",
    "RequestTimeTooSkewed", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}  # fmt: skip
LACKING_S = 30.0  # for which a process that never had credentials waits for some
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
# These say "wrong" of credentials that never worked, and "replaced" of some that did. The numbers stand for whatever a
# HEAD was refused with, because its answer has no body.
REPLACED = {"InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "400", "403"}
FULL = {"QuotaExceeded", "InsufficientStorage", "507"}


class S3Client:
    """The boto3 client of this process: made on first use, made anew after a fork and when its credentials have ended.

    Args:
        uri: of the storage, for messages.
        patience: how long it waits and tries again.
    """

    def __init__(self, uri: str, patience: Patience) -> None:
        self.uri = uri
        self.retries = Retries(patience)
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None
        self._worked = False  # with some credentials, at some time
        self._lacking_since = 0.0  # when it first had none

    @property
    def boto(self) -> Any:
        """The boto3 client itself."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = os.getpid(), _boto_client(self.retries.patience)
            return self._made[1]

    def call(self, operation: str, path: str, request: Callable[[Any], T], again: bool = True) -> T:
        """What `request` answers, which is given the boto3 client and may be called several times.

        Args:
            operation: GET, PUT, ... for messages.
            path: of the object below the storage, for messages.
            request: one request, its answer's body included.
            again: whether it is tried again.

        Raises:
            FileNotFoundError: there is no such object.
            NoRoomError: a quota is full. It counts as permanent: nothing that waits here would free any of it.
            GaveUpError: a fault that may pass did not until the deadline.
            OSError: any other fault, at once. Each is one line.
        """
        where = f"{operation} {'/'.join(part for part in (self.uri, path) if part)}"

        def attempt() -> T:
            from botocore.exceptions import BotoCoreError, ClientError
            from botocore.httpsession import URLLib3SSLError
            from botocore.parsers import ResponseParserError
            from botocore.response import URLLib3ProtocolError, URLLib3ReadTimeoutError

            client = None
            try:
                client = self.boto
                answer = self._unaltered(request, client)
            except ClientError as error:
                raise self._sorted(where, error, client) from error
            except (BotoCoreError, ResponseParserError) as error:
                kind = TransientError if self._may_pass(error, client) else PermanentError
                raise kind(f"{where}: {_flat(error)}") from error
            except (URLLib3SSLError, URLLib3ProtocolError, URLLib3ReadTimeoutError) as error:
                # A body that breaks off under TLS, or an error's, which botocore lets through.
                raise TransientError(f"{where}: {_flat(error)}") from error
            except TransientError as error:
                raise type(error)(f"{where}: {error}") from error
            self._worked = True
            return answer

        return self.retries.call(attempt) if again else attempt()

    def _unaltered(self, request: Callable[[Any], T], client: Any) -> T:
        """What it answers; botocore meets a number, a date or a header that was altered on its way unprepared."""
        from botocore.exceptions import BotoCoreError

        try:
            return request(client)
        except (ValueError, KeyError) as error:
            if isinstance(error, BotoCoreError):
                raise
            raise AlteredError(f"the answer cannot be read: {type(error).__name__} {_flat(error)}") from error

    def _sorted(self, where: str, error: Any, client: Any) -> OSError:
        """What a refusal of the server means."""
        detail = error.response.get("Error", {})
        code, status = str(detail.get("Code")), status_of(error)
        text = f"{where}: {code} {_flat(detail.get('Message'))}".rstrip()
        if code in ("NoSuchKey", "404"):
            return FileNotFoundError(f"{where}: there is no such object")
        if code in FULL:
            return NoRoomError(f"{text}: the quota is full; free some or raise it and run the same command again")
        if code in EXPIRED or (code in REPLACED and self._worked):
            # A signature that was right before may also have been altered on its way.
            passing = self._renewed(client) or code == "SignatureDoesNotMatch"
        else:
            passing = code in PASSING or status == 429 or (status >= 500 and status != 501)
        return (TransientError if passing else PermanentError)(text)

    def _may_pass(self, error: Exception, client: Any) -> bool:
        """Whether what boto3 raised by itself may pass: no connection, or an answer that is not whole."""
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        if isinstance(error, exceptions.SSLError):
            return "CERTIFICATE_VERIFY_FAILED" not in str(error)
        lacking = exceptions.NoCredentialsError | exceptions.PartialCredentialsError | exceptions.ConfigParseError
        if isinstance(error, lacking | exceptions.CredentialRetrievalError):
            # Their file may be being written anew, or who gives them out may be away, for a moment also at the start.
            self._lacking_since = self._lacking_since or time.monotonic()
            is_new = self.retries.patience is not PREFLIGHT and time.monotonic() - self._lacking_since < LACKING_S
            return self._renewed(client) and (self._worked or is_new)
        broken = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
        altered = (exceptions.ChecksumError, exceptions.FlexibleChecksumError, ResponseParserError)
        return isinstance(error, (*broken, *altered))

    def _renewed(self, client: Any) -> bool:
        """Makes the next attempt read the credentials anew, unless they are this process's environment, which stays."""
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            return False
        with self._lock:
            if self._made and client in (None, self._made[1]):  # another thread may have done it
                self._made = None
        return True


def status_of(error: Any) -> int:
    """The HTTP status of a refusal (botocore's ClientError)."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def s3_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to set in every process so that boto3, pyarrow and MLflow speak to the same S3 server.

    The endpoint is the first of AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL and MLFLOW_S3_ENDPOINT_URL that is set. With none
    the store is AWS itself and nothing needs setting. What the user set is kept; no secret is ever in the answer.

    Raises:
        ValueError: the endpoint is not a URL, or MLFLOW_S3_ENDPOINT_URL names another server than the AWS variables.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    given = {name: environ[name] for name in names if environ.get(name)}
    if not given:
        return {}
    source, endpoint = next(iter(given.items()))
    if not re.fullmatch(r"https?://[^/@\s]+(/\S*)?", endpoint):
        got = endpoint.rpartition("@")[2]  # what stands before it may be a secret
        raise ValueError(f"{source} must be a URL such as http://127.0.0.1:9000, got {got!r}; correct it")
    mlflow = given.get("MLFLOW_S3_ENDPOINT_URL", endpoint)
    if mlflow.rstrip("/") != endpoint.rstrip("/"):
        got = mlflow.rpartition("@")[2]
        raise ValueError(
            f"MLFLOW_S3_ENDPOINT_URL must equal {source} ({endpoint}), got {got}; unset it, it is set from {source}"
        )
    wanted = dict.fromkeys(names, endpoint) | {
        # Servers other than AWS's refuse or ignore the checksums that the SDKs add by default.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        # Outside AWS nobody answers there, and looking for credentials would only wait.
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return {name: environ.get(name) or value for name, value in wanted.items()}


def _boto_client(patience: Patience) -> Any:
    import boto3
    from botocore.config import Config

    settings = s3_environment(os.environ)
    config = Config(
        request_checksum_calculation=settings.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported"),
        response_checksum_validation=settings.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_supported"),
        connect_timeout=patience.connect_s,
        read_timeout=patience.read_s,
        max_pool_connections=16,  # a few files at once, of which each comes in a few parts at once
        retries={"mode": "standard", "total_max_attempts": 1},  # `Retries` does all of it
    )
    # A session of its own: boto3's default session is not made for several threads.
    return boto3.session.Session().client("s3", endpoint_url=settings.get("AWS_ENDPOINT_URL_S3"), config=config)


def diagnosis(uri: str, error: OSError) -> str:
    """Why the preflight failed and what to do, in one line."""
    from botocore.exceptions import ConnectionError as NoConnectionError
    from botocore.exceptions import HTTPClientError, NoCredentialsError, PartialCredentialsError

    cause = error.__cause__
    endpoint = s3_environment(os.environ).get("AWS_ENDPOINT_URL_S3", "AWS")
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    answer = getattr(cause, "response", None) or {}
    code = answer.get("Error", {}).get("Code", "")
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(cause, NoCredentialsError | PartialCredentialsError):
        rule, got, do = "have credentials", f"none or only a part for {uri}", f"set {keys}"
    elif isinstance(cause, HTTPClientError | NoConnectionError):
        rule, got = "be reachable", f"no answer from {endpoint} for {uri} ({_flat(cause)})"
        do = "start the server or correct AWS_ENDPOINT_URL"
    elif code == "NoSuchBucket":
        rule, got = "lie in a bucket that exists", f"no bucket {uri.split('/')[2]} at {endpoint}"
        do = "create the bucket or correct the URI"
    elif status in (401, 403) and not isinstance(error, NoRoomError):
        rule, got = "be writable with the given credentials", f"{code} from {endpoint} for {uri}"
        do = f"correct {keys} or the bucket's policy"
    else:
        rule, got, do = "work", f"{_flat(error)} at {endpoint}", "mend the server or name another storage"
    return f"storage must {rule}, got {got}; {do}"


def _flat(message: object) -> str:
    return " ".join(str(message or "").split())
