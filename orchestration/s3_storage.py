"""A storage in a bucket of any S3 server that honours If-None-Match on PutObject.

Every object carries its SHA-256 and the name of its writer as metadata. So a reader can tell an answer that was altered
on its way (read again) from an object that is another than its manifest says (corrupt), and a writer whose answer was
lost can tell its own object from another's.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import io
import logging
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from orchestration.retry import PATIENT, PREFLIGHT, AlteredError, GaveUpError, Patience
from orchestration.s3_client import S3Client, diagnosis, status_of
from orchestration.storage import Paths, Storage, changed, clean, join, object_path, problem_of
from workers.disk import room_for
from workers.manifest import MANIFEST, CorruptError, FileEntry, Manifest

log = logging.getLogger(__name__)
A = TypeVar("A")
B = TypeVar("B")
Found = list[dict[str, Any]]  # inside the class, `list` is its method

PART = 8 * 2**20  # bytes; files from this size on travel in parts, the lower end of what AWS recommends
MAX_PARTS = 10_000  # of an upload, by S3's rules
AT_ONCE = 4  # parts of a file, and files of a directory
ABANDONED_S = 24 * 3600  # an upload begun so long ago belongs to a writer that died


class S3Storage(Storage):
    """A prefix of a bucket.

    Args:
        bucket: its name.
        prefix: relative POSIX path in it, "" for all of it.
        patience: how long faults of the store are waited for.
    """

    is_local = False

    def __init__(self, bucket: str, prefix: str, patience: Patience = PATIENT):
        super().__init__(join(f"s3://{bucket}", prefix))
        self.bucket, self.prefix = bucket, prefix
        self.client = S3Client(self.uri, patience)

    def read(self, path: str) -> bytes:
        def request(client: Any) -> bytes:
            answer = client.get_object(**self._at(path))
            data = bytes(answer["Body"].read())
            if answer["Metadata"].get("sha256", _sha256(data)) != _sha256(data):
                raise AlteredError("what came has another SHA-256 than what was stored")
            return data

        with self._corrupt_if_altered(path):
            return self.client.call("GET", path, request)

    def put(self, path: str, data: bytes) -> None:
        self.client.call("PUT", path, lambda client: client.put_object(**self._content(path, data)))

    def put_new(self, path: str, data: bytes) -> bool:
        content = self._content(path, data)
        writer = content["Metadata"]["writer"]

        def request(client: Any) -> bool:
            try:
                client.put_object(**content | {"Body": io.BytesIO(data)}, IfNoneMatch="*")
            except client.exceptions.ClientError as error:
                if status_of(error) != 412:
                    raise
                return False
            return True

        # What is there may be what an earlier attempt of this call made, whose answer was lost.
        return self.client.call("PUT", path, request) or self._writer(path) == writer

    def exists(self, path: str) -> bool:
        try:
            self._head(path)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Paths:
        start = len(join(self.prefix, "x")) - 1

        def request(client: Any) -> Paths:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._folder(prefix))
            return sorted(found["Key"][start:] for page in pages for found in page.get("Contents", ()))

        return self.client.call("LIST", prefix, request)

    def delete(self, prefix: str) -> None:
        paths = [object_path(prefix), *self.list(prefix)]
        for path in sorted(paths, key=lambda path: PurePosixPath(path).name != MANIFEST):
            self._remove(path)

    def check(self) -> None:
        hasty = S3Storage(self.bucket, self.prefix, PREFLIGHT)
        try:
            hasty._probe()
        except OSError as error:
            raise ValueError(diagnosis(self.uri, error)) from error
        if not self.prefix:
            return  # others may have uploads under way in this bucket
        try:
            hasty.discard_unfinished("", ABANDONED_S)
        except OSError as error:  # perhaps the credentials do not cover it: nothing that a run needs
            log.warning("uploads that were never finished may go on costing space: %s", error)

    def discard_unfinished(self, prefix: str, older_s: float = 0) -> None:
        folder = self._folder(prefix)

        def request(client: Any) -> Found:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=folder)
            return [upload for page in pages for upload in page.get("Uploads", ())]

        for upload in self.client.call("LIST", prefix, request):
            if (datetime.now(UTC) - upload["Initiated"]).total_seconds() >= older_s:
                self._abort({"Bucket": self.bucket, "Key": upload["Key"]}, prefix, upload["UploadId"])

    def copy_out(self, path: str, target: Path) -> None:
        size = self._head(path)["ContentLength"]
        temp = target.with_name(f".{uuid.uuid4().hex}.part")
        with room_for(target, size):
            try:
                with temp.open("wb") as file:
                    for data in _in_order(lambda start: self._range(path, start, size), range(0, size, PART)):
                        file.write(data)
                os.replace(temp, target)
            finally:
                temp.unlink(missing_ok=True)

    def _at(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": join(self.prefix, object_path(path))}

    def _folder(self, prefix: str) -> str:
        """What the keys below a directory begin with."""
        return join(self.prefix, clean(prefix), "x")[:-1]

    def _content(self, path: str, data: bytes) -> dict[str, Any]:
        """The parameters of a PutObject."""
        # A file rather than bytes, which botocore would want to be taken up whole within `connect_s`.
        sent = {"Body": io.BytesIO(data), "ContentMD5": _md5(data)}
        return {**self._at(path), **sent, "Metadata": {"sha256": _sha256(data), "writer": uuid.uuid4().hex}}

    def _head(self, path: str) -> Any:
        return self.client.call("HEAD", path, lambda client: client.head_object(**self._at(path)))

    def _remove(self, path: str) -> None:
        self.client.call("DELETE", path, lambda client: client.delete_object(**self._at(path)))

    def _writer(self, path: str) -> str | None:
        try:
            metadata: dict[str, str] = self._head(path)["Metadata"]
        except FileNotFoundError:
            return None
        return metadata.get("writer")

    def _copy_in(self, source: Path, path: str, entry: FileEntry) -> None:
        if entry.size >= PART:
            self._upload(source, path, entry)
            return
        data = source.read_bytes()
        if _sha256(data) != entry.sha256:
            raise changed(source)
        self.put(path, data)

    def _upload(self, source: Path, path: str, entry: FileEntry) -> None:
        """Uploads a file in parts, each tried again by itself; an upload that fails is removed."""
        at, metadata = self._at(path), {"sha256": entry.sha256, "writer": uuid.uuid4().hex}
        begun = self.client.call("POST", path, lambda client: client.create_multipart_upload(**at, Metadata=metadata))
        upload = {**at, "UploadId": begun["UploadId"]}
        try:
            parts = self._put_parts(source, path, entry, upload)
            self._complete(path, upload, parts, metadata["writer"])
        except BaseException:
            try:
                self._abort(at, path, begun["UploadId"], again=False)
            except OSError as error:
                log.warning("%s; the unfinished upload will be removed later", error)
            raise

    def _put_parts(self, source: Path, path: str, entry: FileEntry, upload: dict[str, str]) -> Found:
        """Sends the parts, and makes sure that together they are what `entry` says."""
        size, digest = max(PART, -(-entry.size // MAX_PARTS)), hashlib.sha256()

        def put(part: tuple[int, bytes]) -> dict[str, Any]:
            number, data = part
            md5 = _md5(data)

            def request(client: Any) -> Any:
                return client.upload_part(**upload, PartNumber=number, Body=io.BytesIO(data), ContentMD5=md5)

            return {"PartNumber": number, "ETag": self.client.call("PUT", path, request)["ETag"]}

        def parts() -> Iterator[tuple[int, bytes]]:
            with source.open("rb") as file:
                for number, data in enumerate(iter(lambda: file.read(size), b""), 1):
                    digest.update(data)
                    yield number, data

        done = list(_in_order(put, parts()))
        if digest.hexdigest() != entry.sha256:
            raise changed(source)
        return done

    def _complete(self, path: str, upload: dict[str, str], parts: Found, writer: str) -> None:
        def request(client: Any) -> bool:
            try:
                client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
            except client.exceptions.NoSuchUpload:  # an earlier attempt of this call did it, unless it was aborted
                return False
            return True

        if not self.client.call("POST", path, request) and self._writer(path) != writer:
            raise OSError(f"POST {join(self.uri, path)}: another process ended the upload; a path has one writer")

    def _abort(self, at: dict[str, str], path: str, upload: str, again: bool = True) -> None:
        def request(client: Any) -> None:
            try:
                client.abort_multipart_upload(**at, UploadId=upload)
            except client.exceptions.NoSuchUpload:
                log.info("the upload %s to %s has ended already", upload, at["Key"])

        self.client.call("DELETE", path, request, again=again)

    def _range(self, path: str, start: int, size: int) -> bytes:
        """One part of an object of `size` bytes."""
        end = min(start + PART, size)

        def request(client: Any) -> bytes:
            answer = client.get_object(**self._at(path), Range=f"bytes={start}-{end - 1}")
            data = bytes(answer["Body"].read())
            if len(data) != end - start:
                raise AlteredError(f"{len(data)} bytes came instead of {end - start}")
            return data

        return self.client.call("GET", path, request)

    def _verified(self, path: str, manifest: Manifest, into: Path) -> Path:
        def bring(file: tuple[str, FileEntry]) -> None:
            if problem_of(into, *file):
                self._bring(path, *file, into)

        into.parent.mkdir(parents=True, exist_ok=True)
        with (into.parent / f".{into.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of the workers of a machine, which ask for the same, one brings it
            for left in into.rglob(".*.part"):  # by a process that was killed
                left.unlink(missing_ok=True)
            for _ in _in_order(bring, manifest.files.items()):
                pass
            (into / MANIFEST).write_text(manifest.to_json())
        return into

    def _bring(self, path: str, name: str, entry: FileEntry, into: Path) -> None:
        """Downloads one file, again while it is not what the store holds."""
        target, whole, reads = into / name, join(path, name), 0
        target.parent.mkdir(parents=True, exist_ok=True)

        def attempt() -> None:
            nonlocal reads
            reads += 1
            try:
                self.copy_out(whole, target)
            except FileNotFoundError as error:
                raise CorruptError(join(self.uri, path), name, "is missing") from error
            if problem := problem_of(into, name, entry):
                # Where the store itself holds something else there is nothing to wait for; one more look is cheap.
                if reads > 1 and self._head(whole)["Metadata"].get("sha256") != entry.sha256:
                    raise CorruptError(join(self.uri, path), name, problem)
                raise AlteredError(problem)

        with self._corrupt_if_altered(whole):
            self.client.retries.call(attempt)

    @contextmanager
    def _corrupt_if_altered(self, path: str) -> Iterator[None]:
        """What comes altered until the deadline is taken for altered where it lies."""
        try:
            yield
        except GaveUpError as error:
            if not isinstance(error.last, AlteredError):
                raise
            folder, _, name = path.rpartition("/")
            raise CorruptError(join(self.uri, folder), name, str(error)) from error


def _in_order(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """The results in order, a few at a time worked on, and no more than that in memory; of failures the first."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        begun: deque[Future[B]] = deque()
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > AT_ONCE:
                yield begun.popleft().result()
        for result in begun:
            yield result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
