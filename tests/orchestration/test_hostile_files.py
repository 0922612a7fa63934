"""Files made to do harm: the campaign with one variant of each kind, and object names that lead outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration import given
from orchestration.mlflow_server import without_password
from orchestration.storage import open_storage

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "hostile_campaign.py"


def test_one_file_of_each_kind(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, str(CAMPAIGN), "--variants", "1", "--results", str(results)]
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(entries) > 20
    assert not [entry for entry in entries if entry["faults"]]


@pytest.mark.parametrize("inner", ["/{outside}/harm", "../../harm", "a/../../harm"])
def test_objects_with_names_outside_are_not_brought(tmp_path: Path, moto_s3: str, inner: str) -> None:
    """Of S3 any text is a name: `it//etc/x` lies below `it`, and its rest is an absolute path."""
    import boto3

    bucket, _, prefix = moto_s3.removeprefix("s3://").partition("/")
    outside = tmp_path / "outside"
    outside.mkdir()
    client = boto3.client("s3", region_name="us-east-1")
    names = {
        inner.format(outside=outside),
        inner.format(outside=outside).lstrip("/"),
    }  # the second is what S3 is asked for
    for name in names:
        client.put_object(Bucket=bucket, Key=f"{prefix}/it/{name}", Body=b"x")
    assert open_storage(moto_s3).list("it")
    with pytest.raises(ValueError, match="must hold files with names that stay below it") as caught:
        given._bring("weights", f"{moto_s3}/it", tmp_path / "into")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("harm"))


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://u:se%2Fcret@h:5000/x", "http://u:***@h:5000/x"),
        ("http://u:se@c/ret@h:5000", "http://u:***@h:5000"),
        ("postgresql://u@h/db?password=secret&x=1", "postgresql://u@h/db?password=***&x=1"),
        ("GET http://u:secret@h/a failed; see http://h/b", "GET http://u:***@h/a failed; see http://h/b"),
        ("http://h:5000/a", "http://h:5000/a"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
    ],
)
def test_a_uri_is_shown_without_its_password(uri: str, shown: str) -> None:
    assert without_password(uri) == shown
