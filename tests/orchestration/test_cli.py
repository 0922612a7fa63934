"""The command line under wrong input: one line on stderr, exit code 2, and nothing started or written."""
# ruff: noqa: F401, F811 - fixtures are imported, and then named as arguments

import argparse
import hashlib
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow_servers import Doorkeeper, serve
from safetensors.torch import save_file

from orchestration import cluster
from orchestration.cli import main
from orchestration.inputs import check_inputs
from orchestration.progress import Progress
from orchestration.recipe import load
from orchestration.run import Place, _driver_stages, run_experiment
from orchestration.storage import open_storage
from orchestration.workflow import Workspace
from workers.data import ImageSet
from workers.manifest import CorruptError
from workers.models.sit import SiT, SiTConfig
from workers.shards import write_shards

MODEL = {
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 4,
    "num_classes": 10,
}
SETTINGS: dict[str, Any] = {
    "name": "small",
    "data": {"digits": {}},
    "model": MODEL,
    "base": {"train": {"steps": 20, "global_batch_size": 16}},
    "training": {"steps": 10, "global_batch_size": 16},
    "mixture": {"time_law": "beta", "slowing_law": "interval", "gamma": 0.8, "target_time": "m"},
    "arms": {
        "none": {"train": False},
        "standard": {"mixture": {"time_law": "uniform", "gamma": 0}},
        "mixflow": {},
        "matched": {"mixture": {"condition_on": "m"}},
    },
    "evaluation": {"samplers": [{"method": "euler", "num_steps": 4}], "primary": "fd_digits/euler4/s1"},
}
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A workspace of its own that is not there yet; starting Ray fails the test."""
    before = dict(os.environ)

    def started(*_: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(cluster, "connect", started)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    os.environ["MIXFLOW_WORKSPACE"] = str(tmp_path / "workspace")
    yield tmp_path / "workspace"
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], place: Path) -> Refused:
    """Runs a command that must be refused, and answers with its one line."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        left = [path for path in place.rglob("*") if path.is_file() and "cache" not in path.parts]
        assert not left, f"written before the input was checked: {left}"
        return err.rstrip("\n")

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    """Writes an experiment file: the small settings with other sections."""

    def write(**sections: Any) -> str:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | sections))
        return str(path)

    return write


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("traning.steps=5", "unknown key 'traning'; did you mean 'training'?"),
        ("arms.mixflow.mixture.gama=0.3", "arms.mixflow.mixture: unknown key 'gama'; did you mean 'gamma'?"),
        ("evaluation.samplers.0.num_step=3", "'evaluation.samplers.0.num_step'; did you mean 'num_steps'?"),
        ("training.steps=abc", "training.steps must be an integer, got 'abc'"),
        ("training.steps=1.5", "training.steps must be an integer, got 1.5"),
        ("training.reproducible=1", "training.reproducible must be true or false, got 1"),
        ("mixture.gamma=true", "mixture.gamma must be a number, got True"),
        ("mixture.gamma=auto", "nothing measured before was found to predict the best: search it by a sweep"),
        ("mixture.gamma=1.5", "mixture.gamma must lie in [0, 1], got 1.5; "),
        ("arms.mixflow.mixture.gamma=1.5", "arms.mixflow.mixture: gamma must lie in [0, 1], got 1.5; "),
        ("mixture.gamma=.nan", "mixture.gamma must lie in [0, 1], got nan; "),
        ("replicates=1", "replicates times bases must be at least 2 for an interval, got 1; raise one"),
        ("training.steps=1e3", "training.steps must be an integer, got 1000.0; write 1000"),
        ("training=", "training must be a map of settings, got nothing; give a value"),
        ("arms=[1]", "arms must be a map of settings, got a list of 1"),
        ("evaluation.samplers=[]", "evaluation.samplers must be a list of at least 1, got a list of 0"),
        ("evaluation.samplers.0.method=eulr", "must be 'euler', 'heun', 'dopri5', 'sde' or 'sde_heun', got 'eulr'"),
        ("evaluation.samplers.7.num_steps=3", "'7' must be a place in a list of 6"),
        ("evaluation.primary=fd_digits/euler21/s1", "'euler20/s1', 'heun10/s1', 'sde20/s1', 'euler8/s1.5'] joined"),
        ("evaluation.primary=fid/euler20/s1", "evaluation.primary must be one of the metrics ['fd_digits'"),
        ("training.global_batch_size=100", "must be a multiple of num_shards 8, got 100; choose 96"),
        ("base.train.global_batch_size=3", "base.train.global_batch_size must be a multiple of num_shards 8, got 3"),
        ("cluster.num_workers=9", "cluster.num_workers must be at most training.num_shards 8, got 9; raise num_shards"),
        ("model.class_dropout_prob=0", "must have guidance_scale 1 for a model with class_dropout_prob 0"),
        ("model.num_classes=11", "model.num_classes must be 10 for the digits, got 11"),
        ("model.input_size=16", "model.input_size must be data.digits.image_size 8 with in_channels 1, got 16"),
        ("name=a/b", "name must be letters, digits, '_', '.' and '-', a letter or digit first, got 'a/b'"),
        ("name=!!binary aGk=", "--set name must be a plain YAML number, text, list or map, got a bytes; correct it"),
        (
            "data.shards=x",
            "data must give exactly one of 'digits', 'shards' and 'images'; add one, or set another to null",
        ),
        ("base.checkpoint=x.safetensors", "base must give exactly one of 'checkpoint' and 'train'"),
        ("base={checkpoint: x.safetensors}", "base must give 'checkpoint' and 'sha256' together; sha256sum FILE"),
        (
            "base={checkpoint: x.safetensors, sha256: abc}",
            "base.sha256 must be 64 hexadecimal digits, as sha256sum prints them, got 'abc'",
        ),
        ("base.train=", "base must give exactly one of 'checkpoint' and 'train'"),
        ("evaluation.num_samples=1000000000000", "evaluation.num_samples must be at most 10000000, got 1000000000000"),
        ("training.keep_checkpoints=100000", "training.keep_checkpoints must be at most 1000, got 100000"),
        ("arms.<b>x={}", "arms must have names of letters, digits, '_', '.' and '-', got '<b>x'; rename it"),
    ],
)
def test_a_wrong_setting(refused, verb, override, words):
    line = refused(verb, "quickstart", "--set", override)
    assert line.startswith("error: quickstart: ")
    assert words in line


@pytest.mark.parametrize("verb", ["plan", "run", "train", "sample", "evaluate", "slow-flow", "report"])
def test_an_unknown_recipe_names_the_nearest(refused, verb):
    assert "unknown recipe 'quickstrat'; did you mean 'quickstart'?" in refused(verb, "quickstrat")


def test_an_unknown_verb_and_a_missing_experiment(refused):
    line = refused("frobnicate", "quickstart")
    assert "'frobnicate'" in line
    assert "known are encode, run, train" in line
    assert "unknown verb 'trian'; did you mean 'train'?" in refused("trian", "quickstart")
    assert "EXPERIMENT" in refused("run")
    assert "--frob" in refused("run", "quickstart", "--frob")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1\nb: }\n", "must be YAML"),
        (b"a: *x\n", "must be YAML"),
        (b'!!python/object/apply:os.system ["touch /tmp/x"]\n', "must be YAML"),
        (b"name: a\nname: b\n", "the key 'name' is given twice"),
        (b"[1, 2]\n", "must be a map of settings, got list"),
        (b"", "must be a map of settings, got nothing"),
        (b"just words\n", "must be a map of settings, got str"),
        (b"\xff\xfe\x00", "must be readable text"),
        (b"name: x\n", "data must be given; add it"),
    ],
)
def test_a_file_that_is_no_experiment(refused, tmp_path, content, words):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    line = refused("plan", str(path))
    assert line.startswith(f"error: {path}: ")
    assert words in line


def test_a_file_that_is_not_there(refused, tmp_path):
    assert "must exist" in refused("plan", str(tmp_path / "absent.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "must exist" in refused("plan", str(tmp_path / "folder.yaml"))


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_more_workers_than_this_machine_has(refused, verb):
    cpus = len(os.sched_getaffinity(0))
    line = refused(verb, "quickstart", "--set", "cluster.num_workers=2", "--set", f"cluster.cpus_per_worker={cpus}")
    assert "cluster.num_workers must fit this machine: 2 workers ask for " in line
    assert f"{2 * cpus:g} CPUs, {cpus} are here; lower it, or set RAY_ADDRESS" in line


def test_guidance_without_a_null_label_in_a_file(refused, recipe):
    evaluation = {
        "samplers": [{"method": "euler", "num_steps": 4, "guidance_scale": 2.0}],
        "primary": "fd_digits/euler4/s2",
    }
    file = recipe(model=MODEL | {"class_dropout_prob": 0.0}, evaluation=evaluation)
    assert "guidance_scale 1 for a model with class_dropout_prob 0" in refused("plan", file)


# ------------------------------------------------------------------------------------------------------ verbs


@pytest.mark.parametrize("verb", ["run", "train"])
def test_resume_needs_something_to_resume(refused, verb):
    assert "--resume needs an earlier run of quickstart" in refused(verb, "quickstart", "--resume")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["none"], "the arm to measure must be one of base, standard, mixflow, matched, got 'none'"),
        (["--checkpoint", "x.safetensors"], "--checkpoint and --sha256 must be given together; sha256sum FILE"),
        (["--sha256", "0" * 64], "--checkpoint and --sha256 must be given together; sha256sum FILE"),
        (["mixflow", "--checkpoint", "x", "--sha256", "0" * 64], "--checkpoint must be left out for an arm"),
        (["--checkpoint", "x.safetensors", "--sha256", "abc"], "--sha256 must be 64 hexadecimal digits, got 'abc'"),
        (["--checkpoint", "x: y.safetensors", "--sha256", "0" * 64], "x: y.safetensors"),
    ],
)
def test_what_slow_flow_cannot_measure(refused, argv, words):
    assert words in refused("slow-flow", "quickstart", *argv)


def test_a_checkpoint_takes_the_bases_place():
    """By its hash, whatever its name, with the times that the experiment says its base was trained with."""
    from orchestration.cli import _checkpoint
    from orchestration.recipe import load
    from orchestration.workflow import stages_of

    def stages(path: str, *overrides: str) -> dict:
        arguments = argparse.Namespace(checkpoint=path, sha256="1" * 64, arm=None)
        return {s.name: s for s in stages_of(load("quickstart", [*overrides, *_checkpoint(arguments)]))}

    one = stages("/a/x.pt")
    assert one["base"].settings["sha256"] == "1" * 64
    assert one["slow-flow/base"].inputs == ("data", "features", "base")
    assert stages("/b/1e3.pt", "bases=2")["base"] == one["base"]


def test_force_needs_a_stage(refused):
    line = refused("run", "quickstart", "--force", "arm")
    assert "--force must name a stage or a kind of stages (data, base, " in line
    assert line.endswith("got 'arm'; plan lists them all")


def test_a_report_needs_finished_stages(refused):
    line = refused("report", "quickstart")
    assert "data is still to do" in line
    assert "run `mixflow run quickstart`" in line


def test_debug_shows_the_traceback(place):
    with pytest.raises(ValueError, match="unknown recipe 'quickstrat'"):
        main(["plan", "quickstrat", "--debug"])


def test_a_failure_inside_is_exit_code_1_in_one_line(capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("orchestration.plan.make_plan", fail)
    assert main(["plan", "quickstart"]) == 1
    assert capsys.readouterr().err == "error: quickstart: first line second line\n"


def test_plan_of_a_fresh_directory(capsys, place):
    assert main(["plan", "quickstart", "--json", "--set", "cluster.num_workers=1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {stage["state"] for stage in plan["stages"]} == {"to do"}
    # 3 seeds of 3 trained arms and the base; every seed of 4 arms is sampled and measured.
    kinds = [stage["name"].split("/")[0] for stage in plan["stages"]]
    assert [kinds.count(kind) for kind in ("base", "arms", "samples", "metrics", "report")] == [1, 9, 12, 12, 1]
    assert plan["training_steps"] == 3000 + 9 * 1000
    assert plan["workspace"] == str(place)
    assert not list(place.rglob("*.*"))


def test_plan_shows_a_sweeps_budget_and_refuses_its_space(capsys, place):
    assert main(["plan", "quickstart", "--space", "mixture.gamma=uniform(0,1)", "--json"]) == 0
    sweep = json.loads(capsys.readouterr().out)["sweep"]
    assert (sweep["trials"], sweep["controls"], sweep["steps"]) == (8, 2, 10_000)
    assert main(["plan", "quickstart", "--space", "training.steps=uniform(500,1000)"]) == 2
    assert "training.steps must be an integer, got" in capsys.readouterr().err
    for wrong in ("5", "[1]", "{space: 5}"):
        assert main(["plan", "quickstart", "--set", f"sweep={wrong}", "--space", "mixture.gamma=uniform(0,1)"]) == 2
        assert "sweep and sweep.space must have settings by name" in capsys.readouterr().err


def test_plan_tells_what_is_done(capsys, place, recipe):
    from orchestration.recipe import load
    from orchestration.workflow import Workspace

    file = recipe()
    workspace = Workspace(load(file), open_storage(str(place)))
    workspace.publish("data", Data(place.parent / "data").write(), seconds=1.0)
    assert main(["plan", file]) == 0
    out = capsys.readouterr().out
    assert "done     1 stages  data\n" in out
    assert "to do  " in out


def test_verbs_without_an_experiment(capsys, place):
    assert main(["replay", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spools"] == []
    assert main(["doctor", "--json"]) == 0
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert all(finding["ok"] for finding in findings.values()), findings
    assert torch.__version__.split("+")[0] in findings["packages"]["says"]
    assert str(place) in findings["storage"]["says"]
    assert f"{place}/mlflow.db" in findings["mlflow"]["says"]


def test_replay_leaves_the_events_of_a_run_that_is_at_work_to_it(capsys, place):
    """Two senders would make each of its runs in MLflow twice."""
    storage = open_storage(str(place))
    for name in ("experiments/one-1", "sweeps/two-2"):
        storage.put(f"tracking/{name.partition('/')[2]}/spool.json", b'{"experiment": "it"}')
        storage.put(f"{name}/experiment.json", b"{}")
        holder = {"host": "elsewhere", "pid": 7, "time": time.time(), "token": "t"}
        storage.put(f"{name}/lease.json", json.dumps(holder).encode())
    assert main(["replay", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["spools"], answer["running"]) == ([], ["tracking/one-1", "tracking/two-2"])
    storage.delete("sweeps/two-2/lease.json")
    assert main(["replay", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [spool["spool"] for spool in answer["spools"]] == ["tracking/two-2"]
    assert not storage.exists("sweeps/two-2/lease.json")


def test_a_sweep_in_which_nothing_finished_has_failed(capsys, monkeypatch):
    from orchestration import sweep

    outcome = {"best": None, "table": "best: no trial has finished", "figure": "", "tracking": {"uri": "sqlite:///x"}}
    monkeypatch.setattr(sweep, "run_sweep", lambda *_, **__: dict(outcome))
    command = ["sweep", "quickstart", "--space", "mixture.gamma=uniform(0,1)"]
    for more in ([], ["--confirm"]):
        assert main([*command, *more]) == 1
        assert "no trial has finished" in capsys.readouterr().out
    outcome |= {"best": {"label": "t000", "params": {"mixture.gamma": 0.3}}, "sweep": "sweeps/one"}
    assert main(command) == 0
    assert "sweeps/one/best.yaml, an experiment" in capsys.readouterr().out


def test_doctor_names_what_does_not_work(capsys, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    os.environ["MIXFLOW_WORKSPACE"] = str(tmp_path / "file" / "workspace")
    assert main(["doctor", "--json"]) == 1
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert [what for what, finding in findings.items() if not finding["ok"]] == ["storage", "mlflow"]
    assert "storage must be a writable directory" in findings["storage"]["says"]
    os.environ["MIXFLOW_WORKSPACE"] = str(tmp_path / "workspace")
    os.environ["MLFLOW_TRACKING_URI"] = "ftp://there"
    assert main(["doctor", "--json"]) == 1
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert [what for what, finding in findings.items() if not finding["ok"]] == ["mlflow"]


def test_in_a_process_of_its_own(tmp_path):
    """What a shell sees: code, streams and no traceback, whatever was imported on the way."""
    environment = os.environ | {"MIXFLOW_WORKSPACE": str(tmp_path / "own")}

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestration", *argv]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    wrong = run("run", "quickstart", "--set", "mixture.gamma=1.5")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert "gamma must lie in [0, 1], got 1.5" in wrong.stderr
    assert not (tmp_path / "own").exists()
    debug = run("run", "quickstart", "--set", "mixture.gamma=1.5", "--debug")
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    right = run("plan", "quickstart", "--json", "--set", "cluster.num_workers=1")
    assert (right.returncode, right.stderr) == (0, "")
    assert json.loads(right.stdout)["experiment"]["name"] == "quickstart"


# -------------------------------------------------------------------------------------------------- the place


def test_a_workspace_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    os.environ["MIXFLOW_WORKSPACE"] = str(tmp_path / "file" / "workspace")
    for verb in ("plan", "run"):
        line = refused(verb, "quickstart")
        assert f"storage must be a writable directory, got {tmp_path}/file/workspace" in line


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "s3://", "s3://Bucket_/x", "s3://key:secret@b/x"])
def test_a_workspace_of_an_unknown_kind(refused, uri):
    os.environ["MIXFLOW_WORKSPACE"] = uri
    line = refused("plan", "quickstart")
    assert "storage must be a local path, file:///path or s3://bucket/prefix" in line
    assert "secret" not in line


def test_a_workspace_on_s3_needs_a_tracking_server(refused, moto_s3):
    os.environ["MIXFLOW_WORKSPACE"] = moto_s3
    assert "MLFLOW_TRACKING_URI must be set when the workspace is on s3" in refused("run", "quickstart")
    assert open_storage(moto_s3).list("") == []


def test_a_bucket_that_is_not_there(refused, moto_s3):
    os.environ |= {"MIXFLOW_WORKSPACE": "s3://no-such-bucket/x", "MLFLOW_TRACKING_URI": closed_port()}
    assert "lie in a bucket that exists, got no bucket no-such-bucket" in refused("run", "quickstart")


def test_an_endpoint_that_does_not_answer(refused, moto_s3):
    os.environ |= {"MIXFLOW_WORKSPACE": moto_s3, "MLFLOW_TRACKING_URI": closed_port()}
    os.environ["AWS_ENDPOINT_URL"] = closed_port()
    for verb in ("plan", "run"):
        line = refused(verb, "quickstart")
        assert f"storage must be reachable, got no answer from {os.environ['AWS_ENDPOINT_URL']}" in line


@pytest.mark.s3
def test_wrong_credentials(refused, ceph_s3):
    os.environ |= {"MIXFLOW_WORKSPACE": ceph_s3, "MLFLOW_TRACKING_URI": closed_port()}
    os.environ["AWS_SECRET_ACCESS_KEY"] = "a-guess"
    line = refused("run", "quickstart")
    assert "storage must be writable with the given credentials, got SignatureDoesNotMatch" in line
    assert "a-guess" not in line


@pytest.mark.parametrize("status", [401, 403])
def test_mlflow_that_refuses(refused, serve, status):
    doorkeeper = Doorkeeper(status, "Basic none")
    serve(doorkeeper)
    os.environ |= {"MLFLOW_TRACKING_URI": doorkeeper.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    for verb in ("plan", "run"):
        assert f"must accept the credentials, got {status} from {doorkeeper.uri}" in refused(verb, "quickstart")


def test_another_server_at_mlflows_address(refused, serve):
    other = Doorkeeper(404, "Basic none")
    serve(other)
    os.environ |= {"MLFLOW_TRACKING_URI": other.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    assert f"must be the address of an MLflow server, got 404 (no such page) from {other.uri}" in refused(
        "plan", "quickstart"
    )


def test_mlflow_that_does_not_answer_is_a_warning(capsys):
    os.environ["MLFLOW_TRACKING_URI"] = closed_port()
    assert main(["plan", "quickstart", "--json", "--set", "cluster.num_workers=1"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert f"MLflow at {os.environ['MLFLOW_TRACKING_URI']} does not answer" in warning


def test_a_tracking_uri_of_an_unknown_kind(refused):
    os.environ["MLFLOW_TRACKING_URI"] = "file:///tmp/mlruns"
    assert "MLFLOW_TRACKING_URI must start with http, https, sqlite or postgresql" in refused("plan", "quickstart")


@pytest.mark.parametrize("workspace", ["", "./here"])
def test_a_job_needs_a_workspace_that_outlives_it(refused, workspace):
    os.environ |= {"MIXFLOW_WORKSPACE": workspace, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert f"or an absolute path on a shared disk inside a Ray job, got {workspace!r}" in refused("run", "quickstart")


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# ------------------------------------------------------------------------------------------------------- data


class Data:
    """A directory of published shards, right unless told otherwise."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        numbers = np.random.default_rng(0)
        self.images = numbers.integers(0, 256, (140, 1, 8, 8), dtype=np.uint8)
        self.labels = np.arange(140, dtype=np.int64) % 10
        self.num_classes = 10

    def write(self) -> Path:
        train, held_out = (ImageSet(self.images[part], self.labels[part]) for part in (slice(0, 40), slice(40, 140)))
        write_shards({"train": train, "held_out": held_out}, self.directory, num_classes=self.num_classes)
        return self.directory

    def publish(self) -> str:
        storage = open_storage(str(self.directory.parent / "published"))
        storage.publish(self.write(), "set")
        return f"{storage.uri}/set"


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path / "data")


def test_data_that_is_right_is_planned(data, recipe, capsys):
    """The control of the refusals below: the same set, unspoilt."""
    assert main(["plan", recipe(data={"shards": data.publish()}), "--json"]) == 0
    states = {stage["name"]: stage["state"] for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert (states["data"], states["base"]) == ("done", "to do")


def test_data_that_cannot_be_compared_with(refused, recipe, data):
    data.labels[:40] = 3
    assert "data must hold training images of every class, got none of class 0" in refused(
        "plan", recipe(data={"shards": data.publish()})
    )


def test_too_few_held_out_images(refused, recipe, data):
    data.images, data.labels = data.images[:139], data.labels[:139]
    assert "data must hold out at least 100 images to compare with, got 99" in refused(
        "plan", recipe(data={"shards": data.publish()})
    )


def test_latents_cannot_be_evaluated_as_pixels(refused, recipe, data):
    data.images = data.images.astype(np.float32)
    assert "data must be uint8 pixels, got float32 in train" in refused("plan", recipe(data={"shards": data.publish()}))


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_data_without_a_manifest(refused, recipe, data, verb):
    uri = data.publish()
    Path(uri, "manifest.json").unlink()
    assert f"data.shards must be a directory with a manifest.json, got {uri!r}" in refused(
        verb, recipe(data={"shards": uri})
    )


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_shard_that_is_missing_or_altered(refused, recipe, data, verb):
    uri = data.publish()
    shard = Path(uri, "train-00000.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "train-00000.parquet has another SHA-256" in refused(verb, recipe(data={"shards": uri}))
    shard.write_bytes(content[:-1])
    assert f"train-00000.parquet has {len(content) - 1} bytes" in refused(verb, recipe(data={"shards": uri}))
    shard.unlink()
    assert "train-00000.parquet is missing; restore it" in refused(verb, recipe(data={"shards": uri}))


def label_outside(data: Data) -> None:
    data.labels[7] = 10
    data.num_classes = 11  # so that they can be written


def label_negative(data: Data) -> None:
    data.labels[7] = -1


def other_classes(data: Data) -> None:
    data.num_classes = 12


def other_shape(data: Data) -> None:
    data.images = np.zeros((140, 1, 16, 16), np.uint8)


def other_channels(data: Data) -> None:
    data.images = np.zeros((140, 3, 8, 8), np.uint8)


def not_a_number(data: Data) -> None:
    data.images = data.images.astype(np.float32)
    data.images[7, 0, 3, 3] = np.nan


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (label_outside, "model.num_classes must be the data's 11, got 10"),
        (other_classes, "model.num_classes must be the data's 12, got 10"),
        (other_shape, "must fit the data's shape (1, 16, 16), got 8 and 1"),
        (other_channels, "must fit the data's shape (3, 8, 8), got 8 and 1"),
        (not_a_number, "train-00000.parquet: image values must be finite, got NaN or infinity in row 7"),
    ],
)
def test_data_that_does_not_fit(refused, recipe, data, verb, spoil, words):
    spoil(data)
    assert words in refused(verb, recipe(data={"shards": data.publish()}))


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_outside_the_classes(refused, recipe, data, label):
    """Written by hand, because write_shards cannot count such a label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard = data.write() / "held_out-00000.parquet"
    table = pq.read_table(shard)
    labels = table["label"].to_numpy().copy()
    labels[5] = label
    pq.write_table(table.set_column(1, "label", pa.array(labels)), shard)
    storage = open_storage(str(data.directory.parent / "published"))
    storage.publish(data.directory, "set")
    line = refused("plan", recipe(data={"shards": f"{storage.uri}/set"}))
    assert f"held_out-00000.parquet: label must lie in [0, 9], got {label} in row 5" in line


def test_an_artifact_of_an_earlier_run_that_was_altered(capsys, data, place, recipe):
    from orchestration.recipe import load
    from orchestration.workflow import Workspace

    file = recipe()
    Workspace(load(file), open_storage(str(place))).publish("data", data.write(), seconds=1.0)
    next(place.glob("data/*/train-*.parquet")).write_bytes(b"altered")
    for verb in ("plan", "run"):
        assert main([verb, file]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "train-00000.parquet has 7 bytes instead of" in err


# ------------------------------------------------------------------------------------------------- checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(SiT(SiTConfig(**MODEL)).state_dict(), path)
    return path


def given(path: Path | str, sha256: str = "") -> dict[str, str]:
    return {"checkpoint": str(path), "sha256": sha256 or hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def test_a_checkpoint_that_fits_is_planned(capsys, checkpoint, recipe):
    """The control of the refusals below."""
    assert main(["plan", recipe(base=given(checkpoint)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training_steps"] == 9 * 10


def test_force_looks_first_whether_it_can_be_done_again(recipe, checkpoint, place):
    """The copy in the workspace may be the last there is of a given base; altered data are what is to be mended."""
    file = recipe(base=given(checkpoint))
    experiment, storage = load(file, ()), open_storage(str(place))
    workspace, progress = Workspace(experiment, storage), Progress([], 0)
    with ExitStack() as cleanup:
        _driver_stages(workspace, list(workspace.stages.values()), progress, cleanup)
    progress.close()
    checkpoint.unlink()
    with pytest.raises(ValueError, match=r"^base\.checkpoint must be a file"):
        run_experiment(experiment, Place(storage, "", []), force=("base",))
    assert Workspace(experiment, storage).artifact("base"), "what cannot be made again is kept"
    shard = next(Path(workspace.result("data").full_uri).glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=shard.name):
        check_inputs(Workspace(experiment, storage))
    assert check_inputs(Workspace(experiment, storage), ["data"]).warnings == []


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_checkpoint_that_cannot_be_the_base(refused, recipe, checkpoint, tmp_path, verb):
    wrong = "0" * 64
    right = given(checkpoint)["sha256"]
    line = refused(verb, recipe(base=given(checkpoint, wrong)))
    assert f"base.sha256 must be the checkpoint's {right}, got {wrong}" in line

    line = refused(verb, "quickstart", "--set", "base.train=", "--set", f"base.checkpoint={checkpoint}",
                   "--set", f"base.sha256={wrong}")  # fmt: skip
    assert f"base.sha256 must be the checkpoint's {right}, got {wrong}" in line

    line = refused(verb, recipe(base=given(checkpoint), model=MODEL | {"depth": 2}))
    assert "base.checkpoint " in line
    assert "must fit the model, but blocks.1." in line
    assert "is missing" in line
    line = refused(verb, recipe(base=given(checkpoint), model=MODEL | {"hidden_size": 64}))
    assert "set model.hidden_size to 32" in line

    line = refused(verb, recipe(base=given(tmp_path / "absent.safetensors", wrong)))
    assert "base.checkpoint must be a file" in line
    assert "absent.safetensors" in line
    line = refused(verb, recipe(base=given(tmp_path, wrong)))
    assert "base.checkpoint must be a file" in line

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:-100])
    assert "must be a readable safetensors file" in refused(verb, recipe(base=given(cut)))
    other = tmp_path / "weights.bin"
    other.write_bytes(checkpoint.read_bytes())
    assert "must end in .safetensors, .pt or .pth" in refused(verb, recipe(base=given(other)))


class Code:
    """Unpickling it would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(refused, recipe, tmp_path):
    trace = tmp_path / "was-run"
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(Code(trace), file)
    torch.save({"ema": Code(trace)}, tmp_path / "zip.pt")
    for name in ("plain.pt", "zip.pt"):
        for verb in ("plan", "run"):
            assert "must hold tensors only" in refused(verb, recipe(base=given(tmp_path / name)))
    assert not trace.exists()


def test_a_checkpoint_and_data_on_s3_that_are_not_there(refused, recipe, moto_s3):
    wrong = "0" * 64
    for uri in (f"{moto_s3}/absent.safetensors", "s3://no-such-bucket/absent.safetensors"):
        line = refused("plan", recipe(base=given(uri, wrong)))
        assert "base.checkpoint must be " in line
        assert uri in line
    for uri in (f"{moto_s3}/absent", "s3://no-such-bucket/absent"):
        line = refused("plan", recipe(data={"shards": uri}))
        assert "data.shards must be " in line
        assert uri in line
    os.environ["AWS_ENDPOINT_URL"] = closed_port()
    os.environ.pop("AWS_ENDPOINT_URL_S3", None)
    os.environ.pop("MLFLOW_S3_ENDPOINT_URL", None)
    assert "data.shards must be " in refused("plan", recipe(data={"shards": f"{moto_s3}/absent"}))


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nowhere"])
def test_a_ray_address_where_nothing_listens(refused, recipe, monkeypatch, verb, address):
    with socket.socket() as probe:  # a port that is free and stays so: bound, but not listening
        probe.bind(("127.0.0.1", 0))
        address = address.format(port=probe.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"RAY_ADDRESS must be host:port of a running cluster, got {address!r}" in refused(verb, recipe())


def test_altered_results_are_refused(capsys, place, recipe):
    from orchestration.recipe import load
    from orchestration.workflow import Workspace

    file = recipe()
    workspace = Workspace(load(file), open_storage(str(place)))
    data = workspace.publish("data", Data(place.parent / "data").write(), seconds=1.0)
    (place.parent / "base").mkdir()
    (place.parent / "base" / "weights.safetensors").write_bytes(b"weights")
    base = workspace.publish("base", place.parent / "base", seconds=1.0)
    for artifact, name in ((base, "weights.safetensors"), (data, "statistics.json")):
        path = Path(artifact.full_uri, name)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert main(["plan", file]) == 2
        assert f"{name} has another SHA-256" in capsys.readouterr().err
