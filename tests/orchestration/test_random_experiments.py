"""Random and hostile experiment files: a valid experiment, or one line that names what is wrong; nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).parents[1] / "benchmarks"
LAUGHS = "model:\n  a0: &a0 [lol]\n"
MERGES = "model:\n  a0: &a0 {k: 1}\n"
for _i in range(1, 12):
    _ten = ", ".join([f"*a{_i - 1}"] * 10)
    LAUGHS += f"  a{_i}: &a{_i} [{_ten}]\n"
    MERGES += f"  a{_i}: &a{_i} {{<<: [{_ten}]}}\n"
HOSTILE = {
    "code": "name: !!python/object/apply:os.mkdir [/tmp/mixflow-was-here]\n",
    "a class": "name: !!python/name:os.system\n",
    "billion laughs": LAUGHS,
    "billion merges": MERGES,
    "a list in itself": "name: &a [*a]\n",
    "a map in itself": "model: &a {model: *a}\n",
    "nesting in brackets": "name: " + "[" * 100_000,
    "nesting in maps": "name: " + "{a: " * 100_000,
    "nesting that is closed": "name: " + "[" * 300 + "]" * 300,
    "a large file": "name: " + "x" * 2**19,
    "a number of many digits": "seed: " + "9" * 10_000,
    "an integer that is none": 'seed: !!int ""',
    "a time that is none": "seed: !!timestamp x",
}


@pytest.fixture
def campaign(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(CAMPAIGN)
    import experiment_campaign

    return experiment_campaign


def test_three_hundred_random_experiments(campaign: Any, tmp_path: Path) -> None:
    found = campaign.play(300, None, tmp_path)
    assert not found["found"]
    assert found["valid"] > 10
    assert found["refused"] > 100


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(campaign: Any, tmp_path: Path, kind: str) -> None:
    assert campaign.judge(HOSTILE[kind], [], tmp_path / "experiment.yaml")[0] == "refused"
    assert (
        campaign.judge("", [f"seed={HOSTILE[kind].partition(': ')[2]}"], tmp_path / "experiment.yaml")[0] == "refused"
    )
    assert not Path("/tmp/mixflow-was-here").exists()


def test_laughs_take_no_memory(tmp_path: Path) -> None:
    """10^11 values in a kilobyte, in a process that may have 200 MB more than Python with this project needs."""
    for number, text in enumerate((LAUGHS, MERGES)):
        (tmp_path / f"{number}.yaml").write_text(text)
    code = (
        "import resource, sys\nfrom orchestration.cli import main\nfrom orchestration.recipe import load\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "codes = [main(['run', name]) for name in sys.argv[1:]]\n"
        "print(*codes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    files = sorted(str(path) for path in tmp_path.glob("*.yaml"))
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    *codes, grown_mib = map(int, done.stdout.split())
    assert codes == [2, 2]
    assert done.stderr.count("\n") == 2
    assert grown_mib < 200


def test_aliases_are_copies(campaign: Any, tmp_path: Path) -> None:
    """What `--set` changes in one place stays as it was in the others."""
    from orchestration.recipe import read

    (tmp_path / "x.yaml").write_text("training: &t {steps: 5}\nbase: {train: *t}\n")
    raw = read(str(tmp_path / "x.yaml"), ["training.steps=7"])
    assert json.loads(json.dumps(raw)) == {"training": {"steps": 7}, "base": {"train": {"steps": 5}}}


def test_a_line_is_short_and_cannot_control_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestration.cli import main

    assert main(["run", "quickstart", "--set", "name=\x1b[31m\u202e" + "x" * 10**5]) == 2
    line = capsys.readouterr().err
    assert line.removesuffix("\n").isprintable()
    assert len(line) < 1300
    assert "name must" in line
