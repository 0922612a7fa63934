"""The report: one file that needs no other, in which everything is said and nothing said by others is executed."""

import base64
import copy
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image
from test_results import ARM_LEVELS, CELLS, PRIMARY, Fabricated, slow_flow_of
from test_summary import SEVERAL, SeveralBases

from orchestration import report
from orchestration.figures import metric_curves
from orchestration.report import slow_flow_table, text_table, write_report
from orchestration.results import format_interval, summarise
from orchestration.titles import companions, title
from workers.evaluate import metrics_of

METRICS = metrics_of(["digits"])
SLOW_FLOW = ("slow_flow_euler20-s1.png", "slow_flow_sde8-to0.96-last_none-s1.png")
MIXED = ((4, 3), (8, 1), (20, 3))  # steps and bases of cells
HOSTILE = "<b onclick=alert(1)>&\"'"


class Page(HTMLParser):
    """Tags with their attributes, and the text between them, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def write(made: Fabricated, directory: Path) -> tuple[Page, dict[str, Any]]:
    directory.mkdir()
    summary = summarise(made.workspace)
    write_report(made.workspace, summary, directory)
    return Page((directory / "report.html").read_text()), summary


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any], Path, Fabricated]:
    directory = tmp_path_factory.mktemp("report")
    made = Fabricated(directory / HOSTILE)  # the workspace's path is shown in the report
    page, summary = write(made, directory / "out")
    return page, summary, directory / "out", made


def test_the_page_needs_no_other_file(written):
    page, *_ = written
    fetched = [
        value
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "poster", "action", "background")
    ]
    assert len(fetched) == 4 + len(CELLS) * len(ARM_LEVELS)
    assert all(str(value).startswith("data:image/png;base64,") for value in fetched)
    assert {"link", "iframe", "object", "embed", "base"}.isdisjoint(tag for tag, _ in page.tags)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", page.source)


def test_only_the_pages_own_script_may_run(written):
    """The policy names the hash of the one script, as a browser computes it, and forbids every connection."""
    page, *_ = written
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert "default-src 'none'" in str(policy)


def test_the_figures_are_pictures_and_the_grids_are_those_of_the_samples(written):
    page, _, directory, _ = written
    images = [str(attributes["src"]).partition(",")[2] for tag, attributes in page.tags if tag == "img"]
    contents = [base64.b64decode(image, validate=True) for image in images]
    names = ("metrics.png", *SLOW_FLOW, "times.png")
    for content, name in zip(contents[:4], names, strict=True):
        assert content == (directory / name).read_bytes()
        assert min(Image.open(io.BytesIO(content)).size) > 300
    assert contents[4:] == [f"png of {arm} 0 {cell}".encode() for cell in CELLS for arm in ARM_LEVELS]


def test_everything_is_said(written):
    page, summary, _, made = written
    for arm, found in summary["arms"].items():
        assert arm in page.text
        assert ("span", {"class": f"verdict {found['verdict']['verdict']}"}) in page.tags
        for reason in found["verdict"]["reasons"]:
            assert reason in page.text
        for cell in CELLS:
            for metric in METRICS:
                assert format_interval(found["metrics"][cell][metric]) in page.text
                for control in made.experiment.controls_of(arm):
                    difference = found["differences"][control][cell][metric]
                    assert format_interval(difference, signed=True) in page.text
    for cell, nfe in (("euler20/s1", 20), ("heun4/s1.5", 16)):
        assert f"{cell} NFE {nfe}" in page.text
    assert summary["rule"] in page.text
    assert PRIMARY in page.text
    assert made.experiment.identity in page.text
    for key, value in summary["protocol"].items():
        if key not in ("samplers", "nfe"):
            assert f"{key} {value}" in page.text


def test_the_cost_is_the_sum_of_what_was_recorded(written):
    """Four replicates of 1.5 seconds each: three arms are trained, four are sampled."""
    page, *_ = written
    assert "arms 12 18.0 2 0.0100" in page.text  # 36 device-seconds
    assert "samples 16 24.0 2" in page.text
    assert "base 1 1.5 2" in page.text


def test_hostile_names_are_text(written):
    page, _, _, made = written
    assert made.workspace.storage.uri in page.text
    assert HOSTILE in page.text
    assert not any("onclick" in attributes for _, attributes in page.tags)
    assert "&lt;b onclick" in page.source


def test_results_json_is_the_summary(written):
    _, summary, directory, _ = written
    assert json.loads((directory / "results.json").read_text()) == json.loads(json.dumps(summary))
    assert sorted(path.name for path in directory.iterdir()) == [
        *("metrics.png", "report.html", "results.json", *SLOW_FLOW, "times.png")
    ]


def test_a_table_for_the_terminal(written):
    _, summary, *_ = written
    lines = text_table(summary).splitlines()
    assert lines[0].split() == ["arm", "fd_digits", "at", "euler20/s1,", "mean", "[95", "%]", "verdict"]
    found = {line.split()[0]: line for line in lines[1:] if not line.startswith(" ")}
    assert list(found) == list(ARM_LEVELS)
    for arm, line in found.items():
        assert format_interval(summary["arms"][arm]["metrics"]["euler20/s1"]["fd_digits"]) in line
        assert line.endswith(summary["arms"][arm]["verdict"]["verdict"])
    assert sum(line.strip().startswith(("better than", "worse than", "not told")) for line in lines) == sum(
        len(arm["verdict"]["reasons"]) for arm in summary["arms"].values()
    )
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.filterwarnings("error")
def test_more_arms_than_colours_and_guided_cells_alone(tmp_path):
    extra = [f"arms.extra{i}={{train: false}}" for i in range(14)]
    page, _ = write(Fabricated(tmp_path / "made", *extra), tmp_path / "out")
    coloured = [attributes["style"] for tag, attributes in page.tags if tag == "b" and "style" in attributes]
    assert len(coloured) == (1 + len(METRICS)) * 18
    assert "extra13" in page.text

    only = ["evaluation.samplers=[{method: heun, num_steps: 4, guidance_scale: 1.5}]"]
    only += ["evaluation.primary=fd_digits/heun4/s1.5"]
    page, _ = write(Fabricated(tmp_path / "guided", *only), tmp_path / "out2")
    assert "Verdicts on the primary cell, fd_digits/heun4/s1.5" in page.text


@pytest.fixture(scope="module")
def enriched(written, tmp_path_factory) -> Page:
    """The report of a summary with everything that it may hold, and with metrics that nobody has heard of."""
    _, summary, _, made = written
    summary = copy.deepcopy(summary)
    for level, arm in enumerate(summary["arms"].values()):
        for cell, found in arm["metrics"].items():
            for metric in ("fid", "fd_patches", "recall_digits", "mystery_score"):
                found[metric] = {"mean": 77.0 + level, "low": 76.0, "high": 99.0, "sd": 0.5, "n": 4}
            found["recall_digits"] = {"mean": 0.3125, "low": 0.3, "high": 0.35, "sd": 0.5, "n": 4}
            found["fd_digits"]["within_sd"] = 0.0625
            for by_cell in arm["differences"].values():
                by_cell[cell]["fd_digits"] |= {"call": "inconclusive", "pairs_needed": 13, "less_than": None}
                by_cell[cell]["precision_digits"] |= {"call": "better", "pairs_needed": 2}
        arm["by_count"] = {
            "euler20/s1": {"fd_digits": [[500, 12.0 + level, 11.0, 19.0], [2000, 9.0 + level, 8.0, 18.0]]}
        }
    directory = tmp_path_factory.mktemp("enriched")
    write_report(made.workspace, summary, directory)
    assert (directory / "counts.png").exists()
    return Page((directory / "report.html").read_text())


def test_metrics_come_from_the_summary(enriched):
    assert "Frechet Inception distance (fid, lower is better) arm" in enriched.text
    assert "Frechet distance in patches at full resolution (fd_patches, lower is better) arm" in enriched.text
    assert "mystery score (mystery_score) arm" in enriched.text


def test_both_sources_of_variation_are_shown(enriched, written):
    sd = written[1]["arms"]["mixflow"]["metrics"]["euler20/s1"]["fd_digits"]["sd"]
    assert f"sd over seeds, within a seed {sd:.4f}, 0.0625" in enriched.text
    assert f"sd over seeds {sd:.4f}" in written[0].text, "where it was not estimated nothing is said of it"
    assert "within a seed " not in written[0].text


def test_the_report_says_how_images_were_resampled(tmp_path, written):
    resampled = "a bootstrap of the generated images, of distances in features alone,"
    assert f"{resampled} as many of each class, as the labels are equal)" in written[0].text
    page, _ = write(Fabricated(tmp_path / "made", "evaluation.label_law=random"), tmp_path / "out")
    assert f"{resampled} of whatever class, as the labels are random)" in page.text


def test_which_gamma_is_what_the_campaign_found(written, monkeypatch):
    """In the page, README and docs; the numbers from the campaign's own lines."""
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "tests" / "benchmarks")
    import gamma_campaign as campaign

    entries = campaign.read_results(campaign.RESULTS)
    found = json.loads((root / "orchestration" / "which_gamma.json").read_text())
    assert found == campaign.findings(entries)
    assert campaign.short_table(found) in (root / "README.md").read_text()
    docs = (root / "docs" / "results.md").read_text().splitlines()
    assert set(campaign.table(entries).splitlines()) <= set(docs)

    # By hand, of the trained base of 8 x 8 digits: gamma 0 is the best, and each seed's gamma of the others is 0.2.
    (entry,) = [e for e in entries if (e["images"], e["base"]) == ("digits8", "trained")]
    fd = {name: values["euler20/s1"] for name, values in entry["fd"].items()}
    worse = [a / b - 1 for a, b in zip(fd["gamma-0.2"], fd["matched-0.2"], strict=True)]
    (row,) = [r for r in found["settings"] if (r["images"], r["base"]) == ("digits8", "trained")]
    cell = row["cells"][found["cells"].index("euler20/s1")]
    assert (cell["best"], cell["matched"][0]) == (0, pytest.approx(sum(worse) / 3, abs=1e-4))
    assert "digits8 trained" in written[0].text
    assert "0 +57 % [+55, +60]" in written[0].text


def test_with_several_bases_their_variation_is_named(tmp_path, written):
    summary = copy.deepcopy(written[1])
    for arm in summary["arms"].values():
        arm["metrics"]["euler20/s1"]["fd_digits"] |= {"sd": 0.25, "seeds_sd": 0.125, "within_sd": 0.0625}
    write_report(written[3].workspace, summary, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "sd over bases, over seeds of a base, within a seed 0.2500, 0.1250, 0.0625" in page.text


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("several")
    return write(SeveralBases(directory / "made", *SEVERAL), directory / "out")


def test_the_terminals_table_says_how_much_is_needed(several):
    summary = copy.deepcopy(several[1])
    cells = [claim["cells"]["euler20/s1"] for claim in summary["claims"]]
    cells[0] |= {"agreement": "inconclusive", "pairs_needed": 17}
    for found in cells[1:]:
        found |= {"agreement": "agrees", "pairs_needed": 3}
    table = text_table(summary)
    assert "inconclusive, 17 bases needed" in table
    assert table.count("needed") == 1


def test_what_intervals_are_over_is_said_of_every_cell(several, written):
    page, _ = several
    assert "euler20/s1 NFE 20, over 3 bases" in page.text
    assert "heun4/s1.5 NFE 16, over base 0 alone, 2 seeds" in page.text
    assert "euler20/s1 over 3 bases heun4/s1.5 over base 0 alone, 2 seeds" in page.text, "the claims' heads"
    assert "over the seeds" not in page.text.replace("over the seeds of a base", "")
    assert "agrees, one base" in page.text
    assert "disagrees, one base" in page.text
    assert page.text.count("Open markers, not joined to the others: base 0 alone.") == 1
    assert "euler20/s1 NFE 20, over 4 seeds" in written[0].text
    assert not re.search("base 0|one base|Open markers", written[0].text)


def test_where_arms_have_unequal_numbers_each_interval_says_its_own(written, tmp_path):
    summary = copy.deepcopy(written[1])
    summary["arms"]["none"]["metrics"]["euler20/s1"]["fd_digits"]["n"] = 7
    write_report(written[3].workspace, summary, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    for arm, over in (("none", "7 seeds"), ("mixflow", "4 seeds")):
        found = summary["arms"][arm]["metrics"]["euler20/s1"]["fd_digits"]
        assert f"{arm} {format_interval(found)} {over}" in page.text


def test_the_pairs_needed_are_said_for_what(several, enriched, tmp_path, written):
    page, summary = several
    assert "how many pairs, here bases, are needed, more than there are" in page.text
    assert "“less than 5 %” where its interval lies within that share of the control's mean" in page.text
    assert "how many pairs are needed" in enriched.text
    assert "13 pairs needed against standard" in enriched.text, "beside the verdict"
    summary = copy.deepcopy(summary)
    for by_cell in summary["arms"]["mixflow"]["differences"].values():
        for found in by_cell.values():
            found["fd_digits"] |= {"call": "inconclusive", "pairs_needed": 13, "less_than": None}
    write_report(SeveralBases(tmp_path / "made", *SEVERAL).workspace, summary, tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "13 bases needed against standard" in text
    assert "inconclusive, 13 bases needed" in text
    assert "inconclusive, 13 pairs needed" in text, "of base 0 alone"


def test_points_of_one_base_are_drawn_apart(monkeypatch):
    drawn, original = [], Axes.errorbar

    def errorbar(self: Axes, x: list[float], *others: Any, **style: Any) -> Any:
        drawn.append((x, style["fmt"], style.get("mfc")))
        return original(self, x, *others, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    arm = {"metrics": {f"euler{n}/s1": {"fd": {"mean": n, "low": 0, "high": 9, "bases": b}} for n, b in MIXED}}
    metric_curves({"a": arm}, ["fd"], {f"euler{n}/s1": n for n, _ in MIXED}, {"a": "red"})
    assert drawn == [([4.0, 20.0], "o-", None), ([8.0], "o", "none")]


def test_recall_and_full_resolution_stand_beside_a_feature_distance(enriched, written):
    assert "recall_digits, fd_patches 0.3125, 77.00" in enriched.text
    recall, pixels = (
        written[1]["arms"]["none"]["metrics"]["euler20/s1"][m]["mean"] for m in ("recall_digits", "fd_patches")
    )
    assert f"recall_digits, fd_patches {recall:.4f}, {pixels:.2f}" in written[0].text


def test_a_call_is_shown_with_the_pairs_that_it_lacks(enriched):
    assert "inconclusive, 13 pairs needed" in enriched.text
    assert "better" in enriched.text
    assert "better, 2 pairs needed" not in enriched.text


def test_as_many_pairs_as_there_are_are_not_asked_for(several, tmp_path):
    summary = copy.deepcopy(several[1])
    for by_cell in summary["arms"]["mixflow"]["differences"].values():
        for found in by_cell.values():
            found["fd_digits"] |= {"call": "inconclusive", "pairs_needed": 2, "less_than": None}
            found["recall_digits"] |= {"call": "inconclusive", "pairs_needed": 2, "less_than": 0.05}
    write_report(SeveralBases(tmp_path / "made", *SEVERAL).workspace, summary, tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "2 bases needed" not in text
    assert "inconclusive, less than 5 %" in text


def test_the_distance_by_the_number_of_samples_is_drawn_where_it_is_known(enriched, written):
    assert "The same distances with fewer samples, euler20/s1" in enriched.text
    assert "samples are too few for a covariance" not in enriched.text
    assert "samples are too few for a covariance" in written[0].text


@pytest.mark.parametrize(
    ("metric", "text", "beside"),
    [
        ("fd_digits", "Frechet distance in classifier features (fd_digits, lower is better)", ["recall", "fd_patches"]),
        ("fid", "Frechet Inception distance (fid, lower is better)", ["recall", "fd_patches"]),
        ("sfid", "Frechet distance in spatial Inception features (sfid, lower is better)", ["recall", "fd_patches"]),
        ("kid", "Kernel distance (kid, lower is better)", ["recall", "fd_patches"]),
        (
            "fd_dinov2",
            "Frechet distance in DINOv2 features (fd_dinov2, lower is better)",
            ["recall_dinov2", "fd_patches"],
        ),
        ("fd_patches", "Frechet distance in patches at full resolution (fd_patches, lower is better)", ["recall"]),
        ("kid_shapes", "Kernel distance in shapes features (kid_shapes, lower is better)", ["recall", "fd_patches"]),
        ("recall_dinov2", "Recall in DINOv2 features (recall_dinov2, higher is better)", []),
        ("inception_score", "Inception score (inception_score, higher is better)", []),
        ("precision", "Precision (higher is better)", []),
        ("fiddle", "fiddle", []),
        ("some_new_thing", "some new thing (some_new_thing)", []),
    ],
)
def test_titles_of_metrics_and_what_stands_beside_them(metric, text, beside):
    known = ["fd_digits", "recall", "recall_dinov2", "fd_patches", "fid"]
    assert title(metric) == text
    assert companions(metric, known) == beside
    assert companions(metric, []) == []


def test_slow_flow_for_a_terminal(written):
    """Every number of the made-up measurement with its interval, an end that few samples do not give as a dash."""
    table = slow_flow_table({"of": "mixflow", **slow_flow_of(written[3].experiment)})
    lines = [line.strip() for line in table.splitlines()]
    assert lines[0].startswith("mixflow: 500 pairs;")
    assert lines[0].endswith("the exact field of the 1,200 training images")
    assert lines[1] == "euler20/s1"
    last = "0.200 [-, 0.200]  0.400 [0.400, 0.400]  0.600 [0.600, -]"
    assert f"t = 1.00  model       {last}  50.0% [43.8%, 56.2%]" in lines
    assert "t = 0.50  model       0.250 [0.125, 0.375]" in lines
    assert "error-free  0.000 [-0.062, 0.062]" in lines
    assert "t = 0.00  model       0.250 [0.125, 0.375]  0.250 [0.125, 0.375]" in lines
    assert lines.count("real pairs continued from s = 0.25: 5 %, median, 95 % of m") == 2
    (without,) = [i for i, line in enumerate(lines) if line.endswith("(no error-free field: it was left out)")]
    assert not any("error-free" in line for line in lines[without + 1 :])


def test_the_versions_of_the_code_are_those_of_the_results():
    def workspace(*versions: str | None) -> Any:
        metas = [{} if version is None else {"code": version} for version in versions]
        found = {str(n): SimpleNamespace(manifest=SimpleNamespace(meta=meta)) for n, meta in enumerate(metas)}
        return SimpleNamespace(artifact=found.get, stages=dict.fromkeys(found, SimpleNamespace(kind="metrics")))

    assert report._code(workspace("older", "older", None)) == "older"
    assert report._code(workspace("older", "newer", "newer")) == (
        "warning: results of several versions: newer (2 stages), older (1 stages); --force redoes the older"
    )
