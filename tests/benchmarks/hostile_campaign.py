"""Files made to do harm, given to whatever reads such files: nothing runs, nothing is written, one line is said.

    python tests/benchmarks/hostile_campaign.py --variants 50

Each kind of file is made in so many variants (other sizes, depths, places and calls), drawn from the variant's number,
and read as the command line or a worker would read it. It passes when it is refused by one line of ValueError, OSError
or CorruptError, or is read as what it honestly is; when no process was started, no file written outside the scratch
directory and no connection made (as Python's audit events tell); and when memory grew by less than 300 MiB. Each kind
is one JSON line in the result file, and a campaign that was stopped goes on after the kinds that are there.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch._dynamo  # pickles of torch's import it on their first use
from campaigns import append_result, read_results
from PIL import Image

from orchestration.storage import open_storage
from workers import encode, shards
from workers.adm import read_reference
from workers.manifest import CorruptError, Manifest
from workers.models.checkpoints import load_weights
from workers.pretrained import check_index, load_dinov2, load_vae
from workers.sources import Reader, list_source

RESULTS = Path(__file__).parent / "results" / "hostile_campaign.jsonl"
MOST_MIB, MOST_S = 300, 20
Maker = Callable[[Path, random.Random], Callable[[], Any]]
KINDS: dict[str, Maker] = {}


def kind(make: Maker) -> Maker:
    """Registers a kind of file: made in a directory, it answers with what reads it."""
    KINDS[make.__name__.replace("_", " ")] = make
    return make


# ------------------------------------------------------------------------------------------------------------ pickles


class Call:
    """Unpickles to a call."""

    def __init__(self, numbers: random.Random) -> None:
        self.call = numbers.choice(
            [
                (os.system, ("touch harm",)),
                (os.mkdir, ("harm",)),
                (eval, ("open('harm', 'w')",)),
                (exec, ("import os; os.mkdir('harm')",)),
                (open, ("harm", "w")),
                (compile, ("1", "harm", "exec")),
                (__import__, ("antigravity",)),
                (torch.load, ("harm.pt", "cpu")),
                (torch.hub.load, ("evil/repository", "model")),
            ]
        )

    def __reduce__(self) -> Any:
        return self.call


def nested(value: Any, numbers: random.Random) -> Any:
    """The value inside what a checkpoint may hold, at a random depth."""
    for _ in range(numbers.randrange(5)):
        value = numbers.choice(
            [
                {"ema": {"a": torch.zeros(2)}, "args": value},
                [value, 1],
                collections.OrderedDict(ema=value),
                {"model": {"a": torch.zeros(2)}, "opt": {"state": (value,)}},
                argparse.Namespace(ckpt=value),
            ]
        )
    return value


@kind
def code_in_a_zip(place: Path, numbers: random.Random) -> Callable[[], Any]:
    torch.save(nested(Call(numbers), numbers), place / "x.pt", pickle_protocol=numbers.randint(2, 5))
    return lambda: load_weights(place / "x.pt")


@kind
def code_in_torchs_old_format(place: Path, numbers: random.Random) -> Callable[[], Any]:
    torch.save(nested(Call(numbers), numbers), place / "x.pth", _use_new_zipfile_serialization=False)
    return lambda: load_weights(place / "x.pth")


@kind
def code_in_a_bare_pickle(place: Path, numbers: random.Random) -> Callable[[], Any]:
    (place / "x.pt").write_bytes(pickle.dumps(nested(Call(numbers), numbers), numbers.randint(0, 5)))
    return lambda: load_weights(place / "x.pt")


@kind
def code_in_the_tar_that_torch_once_wrote(place: Path, numbers: random.Random) -> Callable[[], Any]:
    with tarfile.open(place / "x.pt", "w") as tar:
        for name in ("storages", "tensors", "pickle", numbers.choice(["../harm", "/tmp/harm-of-a-tar"])):
            _add(tar, name, pickle.dumps(Call(numbers)))
    return lambda: load_weights(place / "x.pt")


@kind
def a_pickle_of_absurd_lengths(place: Path, numbers: random.Random) -> Callable[[], Any]:
    length = numbers.choice([2**31 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1])
    code = numbers.choice([b"\x8e", b"\x8d", b"\x95", b"\x96"]) + struct.pack("<Q", length)  # bytes, text, frame, array
    (place / "x.pt").write_bytes(b"\x80\x05" + numbers.choice([code, b"\x8b" + struct.pack("<i", 2**31 - 1)]) + b"x.")
    return lambda: load_weights(place / "x.pt")


@kind
def a_pickle_of_absurd_depth(place: Path, numbers: random.Random) -> Callable[[], Any]:
    depth = numbers.choice([10**3, 10**4, 10**5])
    (place / "x.pt").write_bytes(b"\x80\x02" + b"(" * depth + b"l" * depth + b".")
    return lambda: load_weights(place / "x.pt")


@kind
def a_few_bytes_for_a_huge_tensor(place: Path, numbers: random.Random) -> Callable[[], Any]:
    side = numbers.choice([10**4, 10**5, 10**6])
    torch.save({"a": torch.zeros(1).expand(side, side)}, place / "x.pt")
    return lambda: load_weights(place / "x.pt")


@kind
def a_zip_bomb_as_checkpoint(place: Path, numbers: random.Random) -> Callable[[], Any]:
    torch.save({"a": torch.zeros(numbers.choice([2**20, 2**26]))}, place / "honest.pt")
    with (
        zipfile.ZipFile(place / "honest.pt") as honest,
        zipfile.ZipFile(place / "x.pt", "w", numbers.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])) as bomb,
    ):
        for member in honest.infolist():
            bomb.writestr(member.filename, honest.read(member))
    (place / "honest.pt").unlink()
    return lambda: load_weights(place / "x.pt")


@kind
def pickled_objects_as_statistics(place: Path, numbers: random.Random) -> Callable[[], Any]:
    np.savez(place / "x.npz", mu=np.array([Call(numbers)], object), sigma=np.zeros(2), allow_pickle=True)
    return lambda: read_reference(place / "x.npz")


@kind
def a_zip_bomb_as_statistics(place: Path, numbers: random.Random) -> Callable[[], Any]:
    shape = numbers.choice([(2**17, 2**10), (2048, 2**16)])
    with zipfile.ZipFile(place / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("mu.npy", "sigma.npy"):
            with archive.open(name, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
                for _ in range(shape[0] * shape[1] * 8 // 2**20):
                    file.write(bytes(2**20))
    return lambda: read_reference(place / "x.npz")


@kind
def a_model_directory_with_code(place: Path, numbers: random.Random) -> Callable[[], Any]:
    config = {"model_type": numbers.choice(["dinov2", "evil"]), "auto_map": {"AutoConfig": "evil.Config"}}
    (place / "config.json").write_text(json.dumps(config))
    (place / "evil.py").write_text("open('harm', 'w')\nclass Config: pass\n")
    torch.save({"a": Call(numbers)}, place / "pytorch_model.bin")
    return lambda: numbers.choice([load_dinov2, load_vae])(place)


# -------------------------------------------------------------------------------------------------------- safetensors


def _safetensors(path: Path, header: bytes, length: int | None = None, data: bytes = bytes(64)) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


@kind
def a_safetensors_header_of_absurd_size(place: Path, numbers: random.Random) -> Callable[[], Any]:
    length = numbers.choice([0, 1, 10**8, 10**8 + 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
    _safetensors(place / "x.safetensors", b"{}", length)
    return lambda: load_weights(place / "x.safetensors")


@kind
def safetensors_that_overlap_or_lie_outside(place: Path, numbers: random.Random) -> Callable[[], Any]:
    end = numbers.choice([8, 63, 65, 10**6, 2**63, -8])
    start = numbers.choice([0, 4, 60, 2**62, -4])
    shape = numbers.choice([[2], [16], [2**40], [2**40, 2**40], [2**63, 2], [-1], [0, 2**62], []])
    one = {"dtype": numbers.choice(["F32", "U8", "F4", "X"]), "shape": shape, "data_offsets": [start, end]}
    header = {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, "b": one}
    _safetensors(place / "x.safetensors", json.dumps(header).encode())
    return lambda: load_weights(place / "x.safetensors")


@kind
def a_safetensors_header_that_is_no_map_of_tensors(place: Path, numbers: random.Random) -> Callable[[], Any]:
    depth = numbers.choice([100, 1000, 10**6])
    header = numbers.choice(
        [b"[" * depth, b'{"a":' * depth, b"null", b'{"a": 1}', b'{"a"', bytes(100), b'{"\xff": {}}']
    )
    _safetensors(place / "x.safetensors", header)
    return lambda: load_weights(place / "x.safetensors")


@kind
def an_index_that_leads_elsewhere(place: Path, numbers: random.Random) -> Callable[[], Any]:
    name = numbers.choice(["../x.safetensors", "/etc/passwd", "a/../../x", "..", "a/b"])
    (place / "m.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    return lambda: check_index(place / "m.index.json")


# ---------------------------------------------------------------------------------------------- archives and manifests


def _add(tar: tarfile.TarFile, name: str, content: bytes, **about: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in about.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content) if member.isreg() else None)


def _png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


def _read_all(source: str) -> list[Any]:
    """Lists a source and decodes what it lists, as encoding does."""
    listed = list_source(source, captions=False)
    reader = Reader(listed.kind, listed.root)
    found = [encode._decode(reader.read(place), 8) for place in listed.places]
    return [answer for answer in found if isinstance(answer, str)]


@kind
def tar_members_with_names_outside(place: Path, numbers: random.Random) -> Callable[[], Any]:
    folder = numbers.choice(["../" * numbers.randint(1, 9), "/", "/tmp/", "a/../../", "..\\..\\", "\x00/", "./.."])
    with tarfile.open(place / "x.tar", "w") as tar:
        _add(tar, f"{folder}harm.png", _png())
        _add(tar, f"{folder}harm.cls", b"0")
    return lambda: _read_all(str(place / "x.tar"))


@kind
def tar_links_pipes_and_devices(place: Path, numbers: random.Random) -> Callable[[], Any]:
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.CONTTYPE]
    with tarfile.open(place / "x.tar", "w") as tar:
        _add(tar, "a.cls", b"0")
        _add(
            tar, "a.png", b"", type=numbers.choice(kinds), linkname=numbers.choice(["/etc/passwd", "../harm", "a.cls"])
        )
    return lambda: _read_all(str(place / "x.tar"))


@kind
def a_sparse_tar_of_terabytes(place: Path, numbers: random.Random) -> Callable[[], Any]:
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1", "GNU.sparse.name": "a.cls",
              "GNU.sparse.size": str(numbers.choice([2**33, 2**40, 2**62]))}  # fmt: skip
    with tarfile.open(place / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "a.png", _png())
        _add(tar, "a.cls", b"0", pax_headers=sparse)
    return lambda: _read_all(str(place / "x.tar"))


@kind
def pipes_devices_and_links_in_a_folder(place: Path, numbers: random.Random) -> Callable[[], Any]:
    (place / "images" / "a").mkdir(parents=True)
    path = place / "images" / "a" / "x.png"
    target = numbers.choice(["pipe", "/dev/zero", "/dev/urandom", "/etc/passwd", "/dev/full"])
    os.mkfifo(path) if target == "pipe" else path.symlink_to(target)
    return lambda: _read_all(str(place / "images"))


@kind
def a_manifest_with_names_outside(place: Path, numbers: random.Random) -> Callable[[], Any]:
    name = numbers.choice(["../harm", "/tmp/harm-of-a-manifest", "a/../../harm", "..", "a\\..\\harm", "."])
    content = {"schema": 1, "meta": {}, "files": {name: {"size": 1, "sha256": "0" * 64}}}
    (place / "store" / "set").mkdir(parents=True)
    (place / "store" / "set" / "manifest.json").write_text(json.dumps(content))
    return lambda: open_storage(str(place / "store")).fetch("set", place / "into")


@kind
def a_manifest_of_absurd_content(place: Path, numbers: random.Random) -> Callable[[], Any]:
    entry = numbers.choice([{"size": "1", "sha256": "0"}, {"size": 1, "sha256": None}, {"size": True, "sha256": "0"},
                            {"size": 1, "sha256": "0", "x": 1}, 3, [], {"size": 1e400, "sha256": "0"}])  # fmt: skip
    texts = [json.dumps({"schema": 1, "meta": {}, "files": {"a": entry}}), "[" * 10**5, '{"files":' * 10**5, "1", "",
             '{"schema": 1, "files": []}', '{"schema": ' + "9" * 10**4 + "}"]  # fmt: skip
    text = numbers.choice(texts)
    return lambda: Manifest.from_json(text)


# ------------------------------------------------------------------------------------------------- images and Parquet


@kind
def an_image_of_billions_of_pixels(place: Path, numbers: random.Random) -> Callable[[], Any]:
    width, height = numbers.choice(
        [(50_000, 50_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (11_000, 11_000), (10_000, 9_000)]
    )
    (place / "images" / "a").mkdir(parents=True)
    head = struct.pack(">IIBBBBB", width, height, 8, numbers.choice([0, 2, 6]), 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    chunks = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
    )
    (place / "images" / "a" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return lambda: _read_all(str(place / "images"))


@kind
def an_image_that_starts_a_program(place: Path, numbers: random.Random) -> Callable[[], Any]:
    """PostScript, for which Pillow runs Ghostscript, and other formats that no suffix of ours names."""
    (place / "images" / "a").mkdir(parents=True)
    script = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(harm) (w) file closefile\nshowpage\n%%EOF\n"
    )
    others = {}
    for name in ("PCX", "TGA", "SGI", "ICO", "IM"):
        out = io.BytesIO()
        Image.new("RGB", (16, 16)).save(out, name)
        others[name] = out.getvalue()
    content = numbers.choice([script, script, *others.values(), b"SIMPLE  =                    T" + b" " * 2850])
    (place / "images" / "a" / "x.jpg").write_bytes(content)
    return lambda: _read_all(str(place / "images"))


@kind
def a_text_bomb_in_a_png(place: Path, numbers: random.Random) -> Callable[[], Any]:
    (place / "images" / "a").mkdir(parents=True)
    data = b"k\x00\x00" + zlib.compress(bytes(numbers.choice([2**26, 2**28])), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    content = _png()
    (place / "images" / "a" / "x.png").write_bytes(content[:33] + chunk * 3 + content[33:])
    return lambda: _read_all(str(place / "images"))


@kind
def a_shard_that_unpacks_to_more_than_may_be(place: Path, numbers: random.Random) -> Callable[[], Any]:
    """A gigabyte in some kilobytes, with the limit lowered to 64 MiB: what passes the real one takes long to make."""
    rows, side = numbers.choice([(10_000, 192), (80_000, 64)])
    about = {"schema_version": 3, "num_classes": 10, "codec": None,
             "columns": {"image": {"shape": [3, side, side], "dtype": "uint8"}}}  # fmt: skip
    group = pa.table({"image": pa.array([bytes(3 * side**2)] * 500, pa.binary(3 * side**2)), "label": [0] * 500})
    group = group.replace_schema_metadata({"mixflow": json.dumps(about)})
    with pq.ParquetWriter(place / "train-00000.parquet", group.schema) as writer:
        for _ in range(rows // 500):
            writer.write_table(group)

    def read() -> list[Any]:
        with mock.patch.object(shards, "MOST_BYTES", 2**26):
            return list(shards.read_shards(place, "train"))

    return read


@kind
def a_shard_that_says_absurd_things_of_itself(place: Path, numbers: random.Random) -> Callable[[], Any]:
    shape = numbers.choice([[2**40], [1, 8, -8], [], ["x"], None, [8.5], [0, 8, 8], [64], [1, 64], [1, 8, 8]])
    dtype = numbers.choice(["O", "V64", "uint8", "M8[s]", "U16", "no", None, "f8,f8", ">f4", "g"])
    columns = numbers.choice([{"image": {"shape": shape, "dtype": dtype}}] * 4 + [{}, ["image"]])
    about: Any = {"schema_version": 3, "num_classes": numbers.choice([10, -1, 10**18, "x", None, 0]),
                  "codec": numbers.choice([None, None, None, 3, {}, {"kind": []}]), "columns": columns}  # fmt: skip
    text = numbers.choice([json.dumps(about), json.dumps(about), "[" * 10**5, "[]", "3"])
    table = pa.table({"image": pa.array([bytes(64)] * 2, pa.binary(64)), "label": pa.array([0, 1])})
    pq.write_table(table.replace_schema_metadata({"mixflow": text}), place / "train-00000.parquet")
    return lambda: list(shards.read_shards(place, "train"))


# ------------------------------------------------------------------------------------------------------------ watching


class Watch:
    """What Python's audit events tell of processes, writes and connections while a file is read."""

    STARTS = (
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "webbrowser.open",
    )
    CHANGES = (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.symlink",
        "os.link",
        "os.truncate",
        "os.chmod",
        "shutil.rmtree",
    )

    def __init__(self) -> None:
        self.scratch: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.scratch is None:
            return
        if event in self.STARTS:
            self.seen.append(f"{event}{arguments}"[:200])
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        if event in self.CHANGES or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._written(event, arguments[0])

    def _written(self, event: str, path: Any) -> None:
        name = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else str(path)
        if not name.startswith((f"{self.scratch}/", "/dev/null")):
            self.seen.append(f"{event} {name}"[:200])


def _peak_mib(reset: bool = False) -> int:
    """The most memory of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024


def judge(name: str, variant: int, place: Path, watch: Watch) -> tuple[str, str, int]:
    """What became of a file: its fault or nothing, what was said of it, and by how many MiB memory grew."""
    read = KINDS[name](place, random.Random(f"{name} {variant}"))
    before, start = _peak_mib(reset=True), time.process_time()
    watch.seen, watch.scratch = [], str(place)
    try:
        answer = read()
        said, fault = f"read as {str(answer)[:100]}", ""
    except (ValueError, OSError, CorruptError) as error:
        said = str(error)
        fault = "" if len(said.splitlines()) == 1 and said.strip() else f"not one line: {said[:300]!r}"
    except BaseException as error:
        said, fault = "", f"raised {type(error).__name__}: {str(error)[:200]}"
    finally:
        watch.scratch = None
    grown = _peak_mib() - before
    left = [path for path in place.rglob("*harm*") if path.suffix not in (".png", ".cls")]
    if watch.seen or left:
        fault = f"did {watch.seen[:3]}, left {left[:3]}"
    elif grown > MOST_MIB:
        fault = fault or f"took {grown} MiB"
    elif time.process_time() - start > MOST_S:
        fault = fault or f"took {time.process_time() - start:.0f} s"
    return fault, said, grown


def play(name: str, variants: int, watch: Watch) -> dict[str, Any]:
    """All variants of one kind of file."""
    faults, said, grown = [], "", 0
    for variant in range(variants):
        with tempfile.TemporaryDirectory(prefix="mixflow-hostile-") as scratch:
            os.chdir(scratch)
            fault, words, mib = judge(name, variant, Path(scratch), watch)
            os.chdir("/")
        grown, said = max(grown, mib), words or said
        faults += [{"variant": variant, "fault": fault}] if fault else []
    return {"kind": name, "variants": variants, "faults": faults, "most_mib": grown, "said": said[:200]}


def main() -> int:
    """Command line; 1 if any file did what it should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, watch = options.results.absolute(), Watch()
    entries = {entry["kind"]: entry for entry in read_results(results)}
    for name in options.only:
        if entries.get(name, {}).get("variants", 0) < options.variants:
            entries[name] = play(name, options.variants, watch)
            append_result(results, entries[name])
            print(json.dumps(entries[name]), flush=True)
    bad = [name for name in options.only if entries[name]["faults"]]
    print(
        f"{sum(entries[name]['variants'] for name in options.only)} files of {len(options.only)} kinds; at fault: {bad}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
