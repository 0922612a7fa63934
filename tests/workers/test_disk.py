"""Temporary files of a process that was killed do not stay on the machine; those of one that lives do."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.data import digits
from workers.disk import NoRoomError, scratch_directory
from workers.sample import read_part
from workers.shards import read_shards, write_shards

HOLDER = """
import time
from workers.disk import scratch_directory
with scratch_directory() as directory:
    (directory / "large").write_text("x" * 1000)
    print(directory, flush=True)
    time.sleep(100)
"""


def test_only_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\n{HOLDER}"
    holders = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        living, killed = (Path(str(holder.stdout and holder.stdout.readline().strip())) for holder in holders)
        holders[1].kill()
        holders[1].wait()
        assert (killed / "large").exists()
        with scratch_directory() as own:
            assert not any(own.iterdir())
            assert not killed.exists()
            assert (living / "large").exists()
            with scratch_directory() as second:
                assert second != own
                assert own.exists(), "one of its own process"
        assert not own.exists()
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
    with scratch_directory():
        assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_under_a_scratch_directory_is_one_line(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    line = rf"the disk must have room for {small_disk}, got [\d,]+ bytes free{{}}; free some and run the same command"
    with pytest.raises(NoRoomError, match=line.format("")), scratch_directory() as scratch:
        (scratch / "large").write_bytes(bytes(2**21))
    with (
        pytest.raises(NoRoomError, match=line.format(" of 2,097,152 needed")),
        scratch_directory(2**21) as scratch,
    ):
        save_file({"large": torch.zeros(2**19)}, scratch / "large")
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize(("number", "is_input"), [(errno.EIO, False), (errno.ESTALE, False), (errno.EACCES, True)])
def test_a_disk_that_fails_is_no_wrong_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_input: bool
) -> None:
    write_shards(digits(8, 100), tmp_path, num_classes=10)

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, "the disk says no")

    monkeypatch.setattr("pyarrow.parquet.read_table", failing)
    with pytest.raises(ValueError if is_input else OSError, match="the disk says no"):
        list(read_shards(tmp_path, "train"))
    with pytest.raises(ValueError if is_input else OSError, match="the disk says no"):
        read_part(tmp_path / "part")
