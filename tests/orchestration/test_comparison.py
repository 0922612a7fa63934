"""Finished experiments compared from MLflow alone, without their workspaces."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_servers import MlflowServer
from recorded import Drawn, record
from test_report import Page
from test_results import ARM_LEVELS, CELLS

from orchestration.cli import main
from orchestration.comparison import write_comparison
from orchestration.protocols import difference, fingerprint
from orchestration.results import format_interval, summarise
from orchestration.tracked import TrackedExperiment, read_experiments

SEEDS = "replicates=2"
DASH = "\u2013"  # where there is nothing to say


class Tracked:
    """MLflow with finished experiments in it, whose workspaces are gone."""

    def __init__(self, directory: Path, uri: str) -> None:
        self.uri, self.directory = uri, directory
        self.ids: dict[str, str] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        for name, overrides in {
            "first": [],
            "gentle": ["mixture.gamma=0.4", "replicates=3"],
            "fewer": ["evaluation.num_samples=500", "seed=5"],
        }.items():
            made = Drawn(directory / name, SEEDS, f"name={name}", *overrides)
            self.ids[name] = record(made, uri)
            self.summaries[name] = json.loads(json.dumps(summarise(made.workspace)))
            keep = directory / name / "workspace" / "mlartifacts"
            for path in (directory / name / "workspace").iterdir():
                if path.is_file():
                    path.unlink()
                elif path != keep:
                    shutil.rmtree(path)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Tracked:
    directory = tmp_path_factory.mktemp("tracked")
    shutil.copy(empty_database, directory / "mlflow.db")
    return Tracked(directory, f"sqlite:///{directory}/mlflow.db")


@pytest.fixture
def report(tracked: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Any]:
    """`mixflow report ...` on a machine that has the tracking URI and no workspace; exit code, stdout and stderr."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracked.uri)
    monkeypatch.setenv("MIXFLOW_WORKSPACE", str(tmp_path / "no-workspace"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["report", *arguments])
        assert not (tmp_path / "no-workspace").exists()
        return code, *capsys.readouterr()

    return run


def page_of(path: Path) -> Page:
    return Page(path.read_text())


# --------------------------------------------------------------------------------------------------- what is shown


@pytest.fixture(scope="module")
def experiments(tracked: Tracked) -> dict[str, TrackedExperiment]:
    return {e.name: e for e in read_experiments(tracked.uri, list(tracked.ids.values()))}


@pytest.fixture(scope="module")
def compared(experiments, tmp_path_factory) -> tuple[Page, dict[str, Any]]:
    target = tmp_path_factory.mktemp("compared") / "page.html"
    answer = write_comparison(list(experiments.values()), target)
    return page_of(target), answer


def test_what_was_recorded_is_read_back(experiments, tracked):
    for name, experiment in experiments.items():
        assert experiment.run_id == tracked.ids[name]
        assert experiment.summary == tracked.summaries[name]
        replicates = experiment.summary["protocol"]["replicates"]
        assert [(seed.arm, seed.replicate) for seed in experiment.seeds] == [
            (arm, k) for arm in ARM_LEVELS for k in range(replicates)
        ]
    mixflow = next(seed for seed in experiments["gentle"].seeds if seed.arm == "mixflow")
    assert mixflow.params["mixture.gamma"] == "0.4"
    assert [step for step, _ in mixflow.curves["train/loss"]] == list(range(50, 1001, 50))
    assert mixflow.url is None, "a database has no pages"
    assert all(content.startswith(b"\x89PNG") for content in experiments["first"].grids.values())
    assert list(experiments["first"].grids) == list(ARM_LEVELS)


def test_curves_are_in_order_whenever_their_points_came(tracked, tmp_path):
    parent = record(Drawn(tmp_path / "late", SEEDS, "name=late"), tracked.uri)
    client = MlflowClient(tracked.uri)
    where = f"tags.`mlflow.parentRunId` = '{parent}' and tags.mixflow.arm = 'mixflow'"
    for run in client.search_runs([client.get_experiment_by_name("late").experiment_id], where):
        client.log_metric(run.info.run_id, "train/loss", 9.0, step=25)
    (experiment,) = read_experiments(tracked.uri, ["late"])
    curve = next(seed.curves["train/loss"] for seed in experiment.seeds if seed.arm == "mixflow")
    assert [step for step, _ in curve] == [25, *range(50, 1001, 50)]
    assert curve[0] == (25, 9.0)


def test_the_code_that_made_the_numbers_stands_beside_them(compared, experiments):
    page, _ = compared
    made_by = {name: experiment.tags["mixflow.code"] for name, experiment in experiments.items()}
    assert all(re.fullmatch("[0-9a-f]{12}", code) for code in made_by.values())
    for name, code in made_by.items():
        assert f"{name} {experiments[name].run_id} {code} " in page.text


def test_one_table_for_each_protocol(compared, experiments):
    page, answer = compared
    assert [table["runs"] for table in answer["tables"]] == [["first", "gentle"], ["fewer"]]
    prints = [fingerprint(experiments[name].summary["protocol"]) for name in ("first", "gentle", "fewer")]
    assert prints[0] == prints[1] != prints[2]
    assert [table["protocol"] for table in answer["tables"]] == [prints[0], prints[2]]
    assert f"Not to be compared with protocol {prints[0]}: num_samples is 2000 there and 500 here." in page.text


def test_every_number_with_its_interval(compared, tracked):
    page, _ = compared
    for name, summary in tracked.summaries.items():
        for arm, found in summary["arms"].items():
            assert f"{name} / {arm}" in page.text
            for cell in CELLS:
                for interval in found["metrics"][cell].values():
                    assert format_interval(interval) in page.text


def test_bases_seeds_and_what_intervals_are_over_are_said(compared, tracked):
    page, _ = compared
    assert "primary cell bases seeds a base verdicts" in page.text
    for name, seeds in (("first", 2), ("gentle", 3), ("fewer", 2)):
        found = tracked.summaries[name]["arms"]["mixflow"]["metrics"]["euler20/s1"]["fd_digits"]
        assert f"fd_digits/euler20/s1 1 {seeds} none" in page.text
        text = f"{name} / mixflow {format_interval(found)}"
        assert (f"{text} {seeds} seeds" in page.text) == (name != "fewer")  # which has a table of its own
    assert "NFE 20, over 2 seeds" in page.text


def test_curves_and_grids_are_pictures(compared, experiments):
    page, _ = compared
    pictures = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2 + 1 + 3 * len(ARM_LEVELS)  # metrics by protocol, training curves, grids
    contents = [base64.b64decode(picture.partition(",")[2], validate=True) for picture in pictures]
    assert all(content.startswith(b"\x89PNG") for content in contents)
    grids = [content for experiment in experiments.values() for content in experiment.grids.values()]
    assert contents[3:] == grids


def test_grids_stand_together_where_the_noise_is_the_same(compared, experiments, tmp_path):
    page, _ = compared
    headings = re.findall(r"euler20/s1: the same noise and labels in each \(seed (\d), 1x8, protocol", page.text)
    assert headings == ["0", "5"]
    gentle = experiments["gentle"]
    other_seed = replace(gentle, params={**gentle.params, "seed": "7"})
    write_comparison([experiments["first"], other_seed], tmp_path / "page.html")
    text = page_of(tmp_path / "page.html").text
    assert re.findall(r"the same noise and labels in each \(seed (\d), 1x8", text) == ["0", "7"]


def test_cost(compared):
    """Each stage took 3 device-seconds."""
    page, _ = compared
    hours = f"{3 * 2 / 3600:.5f}"
    assert f"first / mixflow {hours} {hours} {hours} 256,000" in page.text
    assert f"first / none {DASH} {hours} {hours} {DASH}" in page.text
    assert "first / mixflow 16 20" in page.text  # network evaluations of each cell


def test_only_differing_settings_are_shown(compared):
    page, _ = compared
    assert "mixture.gamma 0.8 0.4 0.8" in page.text
    assert "seed 0 0 5" in page.text
    assert "replicates 2 3 2" in page.text
    assert "training.steps" not in page.text
    assert "mixture.condition_on t t m t t m" in page.text  # of the three arms that train, twice at first


def test_runs_are_named_and_nothing_is_fetched(compared, tracked):
    page, _ = compared
    for run_id in tracked.ids.values():
        assert run_id in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object", "embed", "base"})
    assert not [a for tag, a in page.tags if "src" in a and not str(a["src"]).startswith("data:")]


def test_hostile_names_are_text(experiments, tmp_path):
    hostile = "<b onclick=alert(1)>&\"'"
    experiment = experiments["first"]
    arms = {hostile: experiment.summary["arms"]["mixflow"]}
    made = replace(
        experiment, name=hostile, url="https://host/#/<script>", summary={**experiment.summary, "arms": arms}
    )
    write_comparison([made], tmp_path / "page.html")
    page = page_of(tmp_path / "page.html")
    assert hostile in page.text
    assert not any("onclick" in attributes for _, attributes in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 1


# ------------------------------------------------------------------------------------------------- the command line


def test_runs_by_id_and_by_experiment(report, tracked, tmp_path):
    code, out, err = report("first", tracked.ids["gentle"])
    assert (code, out, err) == (0, f"{tmp_path}/comparison.html\n", "")
    assert "Compared: first, gentle" in page_of(tmp_path / "comparison.html").text
    code, out, _ = report("gentle", "--json", "--output", "deep/down/page.html")
    answer = json.loads(out)
    assert code == 0
    assert answer["comparison"] == str(tmp_path / "deep/down/page.html")
    assert answer["runs"] == [{"run_id": tracked.ids["gentle"], "experiment": "gentle", "label": "gentle", "url": None}]


def test_a_page_is_made_anew_and_other_files_are_left_alone(report, tmp_path):
    assert report("first")[0] == report("first")[0] == 0
    (tmp_path / "thesis.html").write_text("<html>years of work</html>")
    code, out, err = report("first", "--output", "thesis.html")
    assert (code, out) == (2, "")
    assert "--output must be free or a page of mixflow, got thesis.html, another file" in err
    assert (tmp_path / "thesis.html").read_text() == "<html>years of work</html>"
    assert report("first", "--output", ".")[0] == 2


def test_one_table_of_unequal_protocols_is_refused(report, tmp_path):
    code, out, err = report("first", "gentle", "fewer", "--one-table")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--one-table must have runs of one protocol, got num_samples 2000 in first and 500 in fewer; " in err
    assert not (tmp_path / "comparison.html").exists()
    assert report("first", "gentle", "--one-table")[0] == 0


def test_wrong_runs_are_one_line(report, tracked, tmp_path):
    client = MlflowClient(tracked.uri)
    where = f"tags.`mlflow.parentRunId` = '{tracked.ids['first']}' and tags.mixflow.arm = 'matched'"
    experiment_id = client.get_experiment_by_name("first").experiment_id
    child = client.search_runs([experiment_id], where, order_by=["tags.`mixflow.replicate` ASC"])[0]
    unfinished = client.create_run(client.create_experiment("unfinished"), tags={"mixflow.experiment": "x"})
    foreign = client.create_run(client.create_experiment("foreign"), run_name="somebody else's")
    client.set_terminated(foreign.info.run_id)
    made = Drawn(tmp_path / "bare", SEEDS, "name=bare")
    bare = record(made, tracked.uri, report="")
    for runs, words in (
        (["frist"], "got 'frist', which sqlite:///"),
        (["frist"], "does not hold; did you mean 'first'?"),
        (["0" * 32], f"got '{'0' * 32}', which"),
        ([child.info.run_id], f"which is matched/0 of one; name {tracked.ids['first']}"),
        (["unfinished"], "experiment 'unfinished' must have a finished run of mixflow, got none"),
        (["foreign"], "experiment 'foreign' must have a finished run of mixflow, got none"),
        ([foreign.info.run_id], "must have results.json among its artifacts"),
        ([unfinished.info.run_id], "must have results.json among its artifacts"),
        (["bare"], f"run {bare} (bare-"),
        (["first", "bare"], "must have results.json among its artifacts"),
        (["first", tracked.ids["first"]], "got one of them twice, as 'first'"),
        (["quickstrat"], "unknown recipe 'quickstrat'; did you mean 'quickstart'?"),
        (["first", "some.yaml"], "some.yaml must be the only argument, got 2"),
        (["first", "--set", "mixture.gamma=0.1"], "--set must be left out for MLflow runs"),
        (
            ["quickstart", "--one-table"],
            "must be left out for an experiment; they are for MLflow runs: name the run's id",
        ),
    ):
        code, out, err = report(*runs)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert words in err
    assert not (tmp_path / "comparison.html").exists()


def test_no_runs_at_all(report, tmp_path):
    with pytest.raises(SystemExit) as stop:
        report()
    assert stop.value.code == 2
    with pytest.raises(ValueError, match="runs must be given to be compared, got none"):
        write_comparison([], tmp_path / "page.html")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"arms": {}, "primary": "a/b/c", "protocol": {"num_samples": 1}}']
)
def test_results_that_are_none(report, tracked, tmp_path, content):
    client = MlflowClient(tracked.uri)
    run = client.create_run("0", tags={"mixflow.experiment": "x"})
    (tmp_path / "results.json").write_bytes(content)
    client.log_artifact(run.info.run_id, str(tmp_path / "results.json"))
    code, _, err = report(run.info.run_id)
    assert (code, err.count("\n")) == (2, 1)
    assert "must have a results.json with arms, primary cell and protocol, got another" in err


def test_a_database_that_is_not_there_is_not_made(report, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    code, _, err = report("first")
    assert code == 2
    assert "where there is nothing yet" in err
    assert not (tmp_path / "none.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    code, _, err = report("first")
    assert (code, err.count("\n")) == (1, 1)
    assert "does not answer" in err
    assert "secret" not in err


def test_the_newest_of_several_finished_runs(report, tracked, tmp_path):
    """Named by their experiment, and apart in the page by the beginning of their ids."""
    older, newer = (
        record(Drawn(tmp_path / str(gamma), SEEDS, "name=twice", f"mixture.gamma={gamma}"), tracked.uri)
        for gamma in (0.3, 0.6)
    )
    # A part of the workflow, or a sweep, is a finished run of the same name; there is nothing of it to compare.
    record(Drawn(tmp_path / "part", SEEDS, "name=twice", "mixture.gamma=0.9"), tracked.uri, report="")
    answer = json.loads(report("twice", "--json")[1])
    assert [run["run_id"] for run in answer["runs"]] == [newer]
    answer = json.loads(report("twice", older, "--json")[1])
    assert [run["label"] for run in answer["runs"]] == [f"twice {newer[:8]}", f"twice {older[:8]}"]


@pytest.mark.mlflow
def test_through_a_server(mlflow_server: MlflowServer, report, tmp_path, monkeypatch):
    """Artifacts come through the server, and the page links to MLflow's own."""
    mlflow_server.start()
    parent = record(Drawn(tmp_path / "served", SEEDS, "name=served"), mlflow_server.uri)
    shutil.rmtree(tmp_path / "served")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri.replace("//", "//somebody:secret@"))
    code, _, err = report("served")
    assert code == 0, err
    page = page_of(tmp_path / "comparison.html")
    links = [str(attributes["href"]) for tag, attributes in page.tags if tag == "a"]
    assert re.fullmatch(
        rf"{mlflow_server.uri}/#/experiments/\d+/runs/{parent}\?workflowType=machine_learning", links[0]
    )
    assert len(links) == 1 + 2 * len(ARM_LEVELS)
    assert "secret" not in page.source


# ---------------------------------------------------------------------------------------------------- the protocols


PROTOCOL = {
    "samplers": [{"method": "euler", "num_steps": 20}],
    "nfe": {"euler20/s1": 20, "dopri51/s1": 38},
    "num_samples": 2000,
    "codec": {"kind": "autoencoder_kl", "sha256": "aa"},
    "replicates": 3,
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, None),
        ({"replicates": 9, "samplers": []}, None),
        ({"nfe": {"euler20/s1": 20, "heun4/s1": 8, "dopri51/s1": 44}}, None),
        ({"nfe": {"euler20/s1": 40}}, ("nfe.euler20/s1", 20, 40)),
        ({"num_samples": 500}, ("num_samples", 2000, 500)),
        ({"codec": {"kind": "autoencoder_kl", "sha256": "bb"}}, ("codec.sha256", "aa", "bb")),
        ({"codec": "none"}, ("codec", {"kind": "autoencoder_kl", "sha256": "aa"}, "none")),
        ({"added": 1}, ("added", None, 1)),
    ],
)
def test_what_keeps_protocols_apart(change, found):
    other = PROTOCOL | change
    assert difference(PROTOCOL, other) == found
    assert (difference(other, PROTOCOL) is None) == (found is None)
    if "nfe" not in change:
        assert (fingerprint(PROTOCOL) == fingerprint(other)) == (found is None)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint(PROTOCOL) == fingerprint(dict(reversed(PROTOCOL.items())))
    assert re.fullmatch("[0-9a-f]{12}", fingerprint(PROTOCOL))
