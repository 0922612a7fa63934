"""kill -9 at random moments and while checkpoints are written: the finished run is the one that was never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from worker_toys import differences

from orchestration.storage import open_storage
from workers.checkpoint import CheckpointStore

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "kill_campaign.py"
NUM_KILLS = 20


def campaign(results: Path, kills: int, scratch: Path) -> subprocess.CompletedProcess[str]:
    """The campaign as a process of its own: it forks, which a process that ran other tests must not."""
    return played(CAMPAIGN, "--kills", kills, results, scratch)


def played(script: Path, option: str, number: int, results: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), option, str(number), "--results", str(results)]
    return subprocess.run(
        command, env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, text=True, timeout=500, check=False
    )


def test_twenty_kills_change_no_bit(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    done = campaign(results, NUM_KILLS, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = [json.loads(line) for line in results.read_text().splitlines()]
    kills = [kill for entry in rounds for kill in entry["kills"]]
    assert len(kills) == NUM_KILLS
    assert any(kill["torn"] for kill in kills), "no kill hit the writing of a checkpoint"
    assert any(0 < kill["step_reached"] < 120 for kill in kills), "every kill came before the first checkpoint"

    # The truth, made here: the run in one piece, read back from its last checkpoint.
    monkeypatch.syspath_prepend(CAMPAIGN.parent)
    import kill_campaign

    kill_campaign.train(tmp_path / "whole", None)
    manifest = kill_campaign.newest(tmp_path / "whole")
    assert manifest.meta["step"] == 120
    assert {entry["digest"] for entry in rounds} == {manifest.digest}
    assert set(manifest.files) == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "history.jsonl", "run.json"
    }  # fmt: skip


def test_another_number_of_workers_changes_no_bit(tmp_path):
    """Groups of 1, 2, 4, 3 and 1 workers, ended by SIGKILL of one of them or by a wish, in reproducible mode."""
    results = tmp_path / "results.jsonl"
    done = played(CAMPAIGN.parent / "workers_campaign.py", "--seeds", 2, results, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = [json.loads(line) for line in results.read_text().splitlines()]
    changes = [change for entry in rounds for change in entry["changes"]]
    assert {(change["workers"], change["how"]) for change in changes} >= {(2, "stopped"), (2, "killed")}
    assert all(change["from_step"] < change["to_step"] for change in changes), "every group made steps"
    assert rounds[0]["equal"] is rounds[1]["equal"] is True
    assert rounds[0]["digest"] == rounds[1]["digest"]


def test_a_stopped_campaign_goes_on_and_says_when_a_round_is_not_equal(tmp_path):
    results = tmp_path / "results.jsonl"
    kill = {"aim": "random", "killed": True, "after_s": 0.5, "step_reached": 6, "torn": False}
    entry = {"seed": 0, "kills": [kill, kill], "digest": "other", "equal": False}
    results.write_text(json.dumps(entry) + "\n" + '{"seed": 1, "kil')
    done = campaign(results, 2, tmp_path)
    assert done.returncode == 1
    assert done.stdout.endswith("2 kills in 1 rounds, 0 left a torn checkpoint; 0 rounds equal, 1 not: [0]\n")
    assert results.read_text() == json.dumps(entry) + "\n", "the line that was cut off is gone"


def test_the_comparison_sees_one_bit(tmp_path, monkeypatch):
    """The digest that the campaign compares changes with one bit of one weight."""
    monkeypatch.syspath_prepend(CAMPAIGN.parent)
    import kill_campaign

    kill_campaign.train(tmp_path, None)
    before = kill_campaign.newest(tmp_path)
    state = CheckpointStore(open_storage(str(tmp_path)), "checkpoints", keep=2, about={}).restore()
    other = CheckpointStore(open_storage(str(tmp_path / "other")), "checkpoints", keep=2, about={})
    other.save(state, 0.0)
    other.wait()
    assert kill_campaign.newest(tmp_path / "other").digest == before.digest
    changed = state.snapshot()
    changed.optimizer["exp_avg/final_layer.linear.bias"].view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    assert differences(state, changed) == ["optimizer/exp_avg/final_layer.linear.bias"]
    other.save(changed, 0.0)
    other.wait()
    digests = {open_storage(str(tmp_path / "other")).manifest(f"checkpoints/{name}").digest for name in other.names()}
    assert len(digests) == 2
