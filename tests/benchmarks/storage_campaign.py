"""Breaks object storage while checkpoints are saved and restored, and looks at what is left with another client.

    python tests/benchmarks/storage_campaign.py --rounds 2

Every case is one JSON line in the result file; a campaign that was stopped goes on after the lines that are there.

writes/local, writes/s3: one write of one save fails, before anything of it is there, torn, or after it is done, and so
    does everything after it. The next start has to restore the newest checkpoint whose manifest is there (the previous
    one but where the manifest was written), find none of the earlier ones gone, and save the same step again.
faults: a fault of `--seconds` begins together with a save or a restore, through the fault proxy or in Ceph itself. The
    call has to come back right by itself once the fault is over; `added_s` is what it took longer than without. A full
    quota has to fail at once instead, keep the older checkpoint, and work once it is lifted.
disk: a checkpoint that does not fit on a small tmpfs (as root).

S3 is a Ceph RADOS Gateway that this script starts. What lies there is read past the proxy and past `Storage`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import torch
from campaigns import append_result, read_results

sys.path.append(str(Path(__file__).parents[1] / "servers"))
import s3_servers

from orchestration.retry import PATIENT, Patience
from orchestration.s3_storage import S3Storage
from orchestration.storage import Storage, open_storage
from workers.checkpoint import CheckpointStore, TrainState
from workers.disk import NoRoomError

Case = Callable[[], dict[str, Any]]
RESULTS = Path(__file__).parent / "results" / "storage_campaign.jsonl"
PATH = "run/checkpoints"
MODES = {"before": "reset", "torn": "reset", "after": "lost"}
WRITES = ["PUT", "POST", "DELETE"]
NO_PATIENCE = Patience(deadline_s=0.2, connect_s=5, read_s=20, longest_wait_s=0.1)
SMALL_KEYS = ("SMALLACCESSKEY", "the-secret-of-the-small-user")
LARGE, SMALL = 2_400_000, 1_000  # numbers in model and ema: the model travels in two parts
# fault -> what the proxy does to which call, or who else does it
PROXIED: dict[str, dict[str, Any]] = {
    "500": {"mode": "http500"},
    "503": {"mode": "http503"},
    "429": {"mode": "http429"},
    "reset": {"mode": "reset"},
    "reset mid-body": {"mode": "reset", "after": 900},
    "lost answer": {"mode": "lost"},
    "truncated body": {"mode": "truncate", "after": 900, "methods": ["GET"]},
    "altered body": {"mode": "corrupt", "after": 900},
    "1 kB/s": {"mode": "slow"},
    "black hole": {"mode": "blackhole"},
}
ELSEWHERE = ["credentials expired", "store stopped"]
READ_ONLY = {"truncated body"}


def state_at(step: int) -> TrainState:
    """A training state whose numbers tell its step."""

    def parts(size: int) -> dict[str, torch.Tensor]:
        return {"weight": torch.arange(size, dtype=torch.float32) + step}

    return TrainState(step, parts(LARGE), parts(SMALL), parts(SMALL), [{"step": step, "loss": 1.0}])


def equal(found: TrainState | None, step: int) -> bool:
    """Whether this is the state of that step, bit for bit."""
    wanted = state_at(step)
    return (
        found is not None
        and (found.step, found.history) == (step, wanted.history)
        and all(
            torch.equal(getattr(found, part)["weight"], getattr(wanted, part)["weight"])
            for part in ("model", "ema", "optimizer")
        )
    )


def store_of(storage: Storage) -> CheckpointStore:
    return CheckpointStore(storage, PATH, keep=2, about={})


def save(storage: Storage, *steps: int) -> None:
    """Saves states, each of them to its end; the scores fall, so the best is the newest."""
    store = store_of(storage)
    for step in steps:
        store.save(state_at(step), 1 / step)
        store.wait()


class Raw:
    """What lies in a storage, read without the code under test."""

    def __init__(self, uri: str, endpoint: str = "") -> None:
        self.uri = uri
        if endpoint:
            keys = {"aws_access_key_id": s3_servers.ACCESS_KEY, "aws_secret_access_key": s3_servers.SECRET_KEY}
            self.client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
            self.bucket, self.prefix = uri.removeprefix("s3://").split("/", 1)

    def files(self) -> dict[str, bytes]:
        """Content by path below the checkpoints' directory."""
        if not self.uri.startswith("s3://"):
            root = Path(self.uri) / PATH
            return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/{PATH}/").get("Contents", [])
        keys = [entry["Key"] for entry in listed]
        start = len(f"{self.prefix}/{PATH}/")
        return {key[start:]: self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys}

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are whole by their manifests' sizes and hashes."""
        files, found = self.files(), []
        for name in (path for path in files if path.endswith("/manifest.json")):
            folder = name.removesuffix("manifest.json")
            try:
                entries = json.loads(files[name])["files"]
            except ValueError:
                continue
            contents = {file: files.get(folder + file, b"") for file in entries}
            if all(hashlib.sha256(contents[file]).hexdigest() == entries[file]["sha256"] for file in entries):
                found.append(int(folder.split("-")[1]))
        return sorted(found)

    def set_aside(self) -> int:
        return sum(path.endswith("/set-aside.json") for path in self.files())


# ------------------------------------------------------------------------------------------- writes that fail in turn


def after_failed_write(broken: Storage, mended: Storage, raw: Raw, mend: Callable[[], object]) -> dict[str, Any]:
    """Saves step 30 on a storage that breaks on the way, mends it, and starts again."""
    try:
        save(broken, 30)
        error = ""
    except OSError as failure:
        error = str(failure)
    mend()
    there = raw.steps()
    restored = store_of(mended).restore()
    step = restored.step if restored else 0
    kept = {10, 20} if 30 not in there else {20, 30}  # of three, retention may have removed the oldest
    result = {"error": error[:160], "whole": there, "chosen": step, "none_lost": kept <= set(there)}
    save(mended, 30)
    chosen, again = equal(restored, max(there)), equal(store_of(mended).restore(), 30)
    result["passed"] = chosen and again and result["none_lost"] and "\n" not in error
    return result


class BreakingDisk:
    """Makes write number `at` of a local storage fail in one of `MODES`, and everything after it."""

    def __init__(self, storage: Storage, at: int, mode: str) -> None:
        self.at, self.mode, self.number = at, mode, itertools.count()
        self.root = Path(storage.uri)
        for name in ("_copy_in", "put_new", "put", "delete"):
            setattr(storage, name, self.breaking(getattr(storage, name)))

    def breaking(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            number = next(self.number)
            if number < self.at:
                return write(*arguments)
            if number == self.at and self.mode == "after":
                write(*arguments)
            if number == self.at and self.mode == "torn":
                self.tear(*arguments)
            raise OSError(5, "Input/output error", str(arguments[0]))

        return guarded

    def tear(self, first: Any, second: Any = None, *_: Any) -> None:
        """Leaves half of the content at its final place, as a power failure may; or a removal that is half done."""
        if isinstance(first, Path):
            target, data = self.root / second, first.read_bytes()
        elif second is not None:
            target, data = self.root / first, second
        else:
            next((self.root / first).rglob("manifest.json")).unlink()
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data[: len(data) // 2])


def local_writes(at: int, mode: str, scratch: Path) -> dict[str, Any]:
    uri = str(scratch / uuid.uuid4().hex)
    save(open_storage(uri), 10, 20)
    broken = open_storage(uri)
    BreakingDisk(broken, at, mode)
    result = after_failed_write(broken, open_storage(uri), Raw(uri), lambda: None)
    shutil.rmtree(uri)
    return result


@dataclass
class Servers:
    """Ceph and the proxy before it, with the environment set for the proxy."""

    ceph: s3_servers.Ceph
    control: s3_servers.Control

    def storage(self, patience: Patience = PATIENT, uri: str = "") -> S3Storage:
        bucket, prefix = (uri or f"s3://{s3_servers.BUCKET}/{uuid.uuid4().hex}").removeprefix("s3://").split("/", 1)
        return S3Storage(bucket, prefix, patience)

    def raw(self, uri: str) -> Raw:
        return Raw(uri, self.ceph.endpoint)


def s3_writes(at: int, mode: str, servers: Servers) -> dict[str, Any]:
    mended = servers.storage()
    save(mended, 10, 20)
    broken = servers.storage(NO_PATIENCE, mended.uri)
    after = 10 if mode == "torn" else 0
    servers.control(mode=MODES[mode], methods=WRITES, skip=at, count=1, after=after, then="reset")
    counts: list[int] = []

    def mend() -> None:
        counts.append(servers.control()["injected"])
        servers.control(mode="ok")

    result = after_failed_write(broken, mended, servers.raw(mended.uri), mend)
    mended.delete("run")
    return {**result, "hit": counts[0] > 0}  # there may be fewer writes than numbers


# ------------------------------------------------------------------------------------------------- faults of a store


@contextmanager
def fault(name: str, seconds: float, servers: Servers, scratch: Path) -> Iterator[None]:
    """The fault, which ends by itself after `seconds`."""
    end: Callable[[], object]
    if name in PROXIED:
        servers.control(**PROXIED[name])
        end = partial(servers.control, mode="ok")
    elif name == "store stopped":
        servers.ceph.signal(signal.SIGSTOP)
        end = partial(servers.ceph.signal, signal.SIGCONT)
    else:
        servers.ceph.admin("key", "rm", "--uid=test", f"--access-key={written_key(scratch)}")
        end = partial(new_key, servers, scratch)
    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.join()  # the fault ends before anything else is asked of the store


def new_key(servers: Servers, scratch: Path) -> None:
    """Gives Ceph's user another key and writes it where boto3 looks for credentials."""
    key, secret = f"KEY{uuid.uuid4().hex[:10].upper()}", uuid.uuid4().hex
    servers.ceph.admin("key", "create", "--uid=test", f"--access-key={key}", f"--secret-key={secret}")
    text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    (scratch / "credentials.new").write_text(text)
    os.replace(scratch / "credentials.new", scratch / "credentials")


def written_key(scratch: Path) -> str:
    found = re.search(r"aws_access_key_id = (\w+)", (scratch / "credentials").read_text())
    assert found
    return found[1]


def faulty_call(name: str, call: str, seconds: float, servers: Servers, scratch: Path) -> dict[str, Any]:
    """Step 20 is saved, or restored, while the fault begins."""
    storage = servers.storage()
    save(storage, 10)
    start = time.monotonic()
    save(storage, 15)
    if call == "restore":
        save(storage, 20)
        start = time.monotonic()
        store_of(storage).restore()
    usual_s = time.monotonic() - start
    with fault(name, seconds, servers, scratch):
        start, error, found = time.monotonic(), "", None
        try:
            if call == "save":
                save(storage, 20)
            else:
                found = store_of(storage).restore()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        took_s = time.monotonic() - start
    raw = servers.raw(storage.uri)
    steps, aside = raw.steps(), raw.set_aside()
    found = found or store_of(storage).restore()
    result = {"error": error[:200], "fault_s": seconds, "took_s": round(took_s, 2), "usual_s": round(usual_s, 2)}
    result |= {"added_s": round(took_s - usual_s, 2), "whole": steps, "set_aside": aside}
    passed = not error and steps[-1:] == [20] and equal(found, 20) and not aside
    storage.delete("run")
    return {**result, "passed": passed}


def quota(servers: Servers) -> dict[str, Any]:
    """A user whose quota holds two checkpoints and no third."""
    key, secret = SMALL_KEYS
    if "small" not in servers.ceph.admin("user", "list"):
        make_small_user(servers)
    servers.ceph.admin("quota", "enable", "--quota-scope=user", "--uid=small")
    with ExitStack() as stack:
        for variable, value in (("AWS_ACCESS_KEY_ID", key), ("AWS_SECRET_ACCESS_KEY", secret)):
            os.environ[variable] = value
            stack.callback(os.environ.pop, variable)
        storage = servers.storage(uri=f"s3://small/{uuid.uuid4().hex}")
        save(storage, 10, 15)
        start, error = time.monotonic(), ""
        try:
            save(storage, 20)
        except NoRoomError as failure:
            error = str(failure)
        took_s = time.monotonic() - start
        older = store_of(storage).restore()
        servers.ceph.admin("quota", "disable", "--quota-scope=user", "--uid=small")
        save(storage, 20)
        newer = store_of(storage).restore()
        storage.delete("run")
    passed = "QuotaExceeded" in error and storage.uri in error and equal(older, 15) and equal(newer, 20)
    return {"error": error, "took_s": round(took_s, 2), "passed": passed}


def make_small_user(servers: Servers) -> None:
    key, secret = SMALL_KEYS
    keys = [f"--access-key={key}", f"--secret-key={secret}"]
    servers.ceph.admin("user", "create", "--uid=small", "--display-name=small", *keys)
    servers.ceph.admin("quota", "set", "--quota-scope=user", "--uid=small", f"--max-size={25 * 2**20}")
    s3_servers.make_bucket(servers.ceph.endpoint, "small", key, secret)


def disk_full(scratch: Path) -> dict[str, Any]:
    """A tmpfs that holds two checkpoints of 9.6 MB and no third; room for it is made afterwards."""
    mount = scratch / "tmpfs"
    mount.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"skipped": f"no tmpfs can be mounted here: {done.stderr.strip()}", "passed": True}
    try:
        storage, error = open_storage(str(mount)), ""
        save(storage, 10, 15)
        before = shutil.disk_usage(mount).free
        try:
            save(storage, 20)
        except NoRoomError as failure:
            error = str(failure)
        free = shutil.disk_usage(mount).free
        whole, older = Raw(str(mount)).steps(), equal(store_of(storage).restore(), 15)
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        save(storage, 20)
        newer = equal(store_of(storage).restore(), 20)  # a state that is kept keeps its file open
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    told = re.search(r"room for (/\S+), got ([\d,]+) bytes free of ([\d,]+) needed", error)
    passed = bool(told) and whole == [10, 15] and older and newer and free == before
    return {"error": error, "free_before": before, "free_after": free, "whole": whole, "passed": passed}


# ---------------------------------------------------------------------------------------------------------- campaign


def cases(seconds: float, servers: Servers | None, scratch: Path) -> Iterator[tuple[str, Case]]:
    """All cases by name."""
    for at, mode in itertools.product(range(7), MODES):
        yield f"writes/local/{at}/{mode}", partial(local_writes, at, mode, scratch)
    yield "disk full", partial(disk_full, scratch)
    if servers is None:
        return
    for at, mode in itertools.product(range(16), MODES):
        yield f"writes/s3/{at:02}/{mode}", partial(s3_writes, at, mode, servers)
    for name, call in itertools.product([*PROXIED, *ELSEWHERE], ("save", "restore")):
        if call == "restore" or name not in READ_ONLY:
            yield f"faults/{name}/{call}", partial(faulty_call, name, call, seconds, servers, scratch)
    yield "faults/quota full/save", partial(quota, servers)


def campaign(options: argparse.Namespace, servers: Servers | None, scratch: Path) -> list[dict[str, Any]]:
    results = read_results(options.results)
    done = {(entry["case"], entry["round"]) for entry in results}
    for number in range(options.rounds):
        for name, play in cases(options.seconds, servers, scratch):
            if (name, number) in done or not re.match(options.only, name):
                continue
            results.append({"case": name, "round": number, **play()})
            append_result(options.results, results[-1])
            print(json.dumps(results[-1]), flush=True)
    return results


def summary(results: list[dict[str, Any]]) -> str:
    """Pass counts by group and the longest time that a fault added."""
    lines = []
    for group in ("writes/local", "writes/s3", "faults", "disk"):
        of_it = [entry for entry in results if entry["case"].startswith(group)]
        passed = [entry for entry in of_it if entry["passed"]]
        skipped = sum("skipped" in entry for entry in of_it)
        lines.append(f"{group}: {len(passed)} of {len(of_it)} passed" + f", {skipped} skipped" * bool(skipped))
    for name in sorted({entry["case"] for entry in results if "added_s" in entry}):
        added = [entry for entry in results if entry["case"] == name]
        worst = max(entry["added_s"] for entry in added)
        lines.append(f"{name}: {added[0]['fault_s']:g} s of it added at most {worst:.1f} s")
    return "\n".join(lines)


def main() -> int:
    """Command line; 1 if any case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="how long a fault of the store lasts")
    parser.add_argument("--only", default="", help="a regular expression that the names of cases begin with")
    parser.add_argument("--without-s3", action="store_true", help="the cases that need no server")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that the servers are ended too
    torch.set_num_threads(1)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixflow-storage-")))
        servers = None
        if not options.without_s3:
            ceph = stack.enter_context(s3_servers.ceph(scratch / "ceph"))
            endpoint, control = stack.enter_context(s3_servers.fault_proxy(ceph.endpoint))
            servers = Servers(ceph, control)
            use_s3(endpoint, servers, scratch)
        results = campaign(options, servers, scratch)
    print(summary(results))
    return 0 if all(entry["passed"] for entry in results) else 1


def use_s3(endpoint: str, servers: Servers, scratch: Path) -> None:
    """Sets what a user sets, with the credentials in a file, where they can be replaced."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_S3_"))]:
        del os.environ[name]
    os.environ.update(s3_servers.s3_variables(endpoint))
    del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    os.environ["AWS_SHARED_CREDENTIALS_FILE"] = str(scratch / "credentials")
    new_key(servers, scratch)


if __name__ == "__main__":
    sys.exit(main())
