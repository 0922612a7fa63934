"""Temporary files of a process that was killed do not stay on the machine; those of one that lives do."""

import subprocess
import sys
from pathlib import Path

import pytest

from workers.disk import scratch_directory

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
