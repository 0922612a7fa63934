"""Pages in a real browser: reports from files, and MLflow's own pages of runs that this project recorded."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow import MlflowClient
from mlflow_servers import MlflowServer
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from recorded import Drawn, page_of, record
from test_results import ARM_LEVELS, CELLS

from orchestration.comparison import write_comparison
from orchestration.tracked import TrackedExperiment, read_experiments

pytestmark = pytest.mark.browser

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PAPER_PX = 1031  # A4 landscape without its margins, at 96 dpi
PATIENCE_MS = 120_000  # a busy machine
MINUS = "\u2212"
ASSISTANT = "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"


@dataclass
class Seen:
    """An open page, what it complained of and what it asked for."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("chromium is not installed; install .ci/apt-packages.txt")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Seen]]:
    """Opens an address in a fresh window."""
    windows = []

    def go(address: str, width: int = 1400, height: int = 1000) -> Seen:
        windows.append(browser.new_page(viewport={"width": width, "height": height}))
        seen = Seen(windows[-1])
        seen.page.set_default_timeout(PATIENCE_MS)
        seen.page.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.add_init_script(f"localStorage.setItem({ASSISTANT!r}, 'true')")  # it covers half of MLflow's pages
        seen.page.goto(address)
        return seen

    expect.set_options(timeout=PATIENCE_MS)
    yield go
    for window in windows:
        window.close()


@dataclass
class Served:
    """An MLflow server with two finished experiments of one name, and the pages made from them."""

    uri: str
    experiment_id: str
    experiments: list[TrackedExperiment]
    children: dict[str, Any]
    pages: dict[str, Path]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    shutil.copy(empty_database, directory / "mlflow.db")
    server = MlflowServer(f"sqlite:///{directory}/mlflow.db", directory)
    server.start()
    try:
        made = [Drawn(directory / gamma, "replicates=2", f"mixture.gamma={gamma}") for gamma in ("0.8", "0.4")]
        ids = [record(each, server.uri, report="drawn") for each in made]
        experiments = read_experiments(server.uri, ids)
        client = MlflowClient(server.uri)
        experiment_id = client.get_run(ids[0]).info.experiment_id
        found = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{ids[0]}'")
        children = {run.info.run_name: run for run in found}
        pages = {"report": page_of(made[0], directory / "report"), "comparison": directory / "comparison.html"}
        write_comparison([*experiments, other_protocol(experiments[0])], pages["comparison"])
        pages["wide"] = directory / "wide.html"
        write_comparison([with_cells(experiments[0], 19)], pages["wide"])
        yield Served(server.uri, experiment_id, experiments, children, pages)
    finally:
        server.kill()


def other_protocol(experiment: TrackedExperiment) -> TrackedExperiment:
    summary = json.loads(json.dumps(experiment.summary))
    summary["protocol"]["num_samples"] = 500
    return replace(experiment, name="another", summary=summary)


def with_cells(experiment: TrackedExperiment, count: int) -> TrackedExperiment:
    """The same with many more cells, whose names are as long as names become."""
    summary = json.loads(json.dumps(experiment.summary))
    names = [f"sde_heun{100 + i}-shift6.93-from0.001-to0.999/s1.5-auto-ch3" for i in range(count)]
    summary["protocol"]["nfe"] |= {name: 100 + i for i, name in enumerate(names)}
    for arm in summary["arms"].values():
        for part in (arm["metrics"], *arm["differences"].values()):
            part |= dict.fromkeys(names, part[CELLS[0]])
    return replace(experiment, summary=summary)


PAGES = pytest.mark.parametrize("name", ["report", "comparison", "wide"])


@PAGES
def test_a_page_opens_from_a_file(visit, served, name):
    """Without a complaint, without the network, and with every picture."""
    seen = visit(served.pages[name].as_uri())
    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
    widths = seen.page.locator("img").evaluate_all("images => images.map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) >= 3 + len(ARM_LEVELS) * (name == "report")
    assert min(widths) > 0


def heads(table: Locator) -> list[str | None]:
    return table.locator("thead th").evaluate_all("heads => heads.map(h => h.getAttribute('aria-sort'))")


def arms_in(table: Locator) -> list[str]:
    return table.locator("tbody > tr:first-child > td:first-child").all_inner_texts()


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_click_on_a_head_sorts(visit, served, name):
    page = visit(served.pages[name].as_uri()).page
    table = page.locator("table.metric").first
    before = arms_in(table)
    means = {arm.rpartition(" / ")[2]: level for arm, level in ARM_LEVELS.items()}
    by_mean = sorted(before, key=lambda arm: means[arm.rpartition(" / ")[2]])
    assert before != by_mean
    assert heads(table) == [None, None, None]
    table.get_by_role("button", name=CELLS[0]).click()
    assert heads(table) == [None, "ascending", None]
    levels = [means[arm.rpartition(" / ")[2]] for arm in arms_in(table)]
    assert levels == sorted(levels)
    table.get_by_role("button", name=CELLS[0]).click()
    assert heads(table) == [None, "descending", None]
    levels = [means[arm.rpartition(" / ")[2]] for arm in arms_in(table)]
    assert levels == sorted(levels, reverse=True)


def test_what_stands_below_an_arm_moves_with_it(visit, served):
    page = visit(served.pages["report"].as_uri()).page
    table = page.locator("table.metric").first

    def pieces() -> dict[str, str]:
        return {body.split("\t")[0]: body.strip() for body in table.locator("tbody").all_inner_texts()}

    before = pieces()
    assert f"{MINUS} matched" in before["mixflow"]
    table.get_by_role("button", name=CELLS[0]).click()
    assert pieces() == before
    assert list(pieces()) == ["mixflow", "matched", "standard", "none"]


def test_sorting_needs_no_mouse(visit, served):
    page = visit(served.pages["report"].as_uri()).page
    table = page.locator("table.sortable").first
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "arm"
    page.keyboard.press("Enter")
    assert arms_in(table) == sorted(ARM_LEVELS)
    page.keyboard.press("Space")
    assert arms_in(table) == sorted(ARM_LEVELS, reverse=True)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "mixture"


def test_numbers_sort_as_numbers_and_what_is_missing_comes_last(visit, served):
    """1e+04 after 300 after 20: not by their letters."""
    page = visit(served.pages["wide"].as_uri()).page
    cost = page.locator("table.sortable", has_text="images trained on")
    cost.get_by_role("button", name="images trained on").click()
    assert arms_in(cost)[-1] == "none"
    numbers = page.evaluate(
        """() => {
          const table = [...document.querySelectorAll("table.metric")][0];
          [...table.tBodies].forEach((body, i) => body.rows[0].cells[1].dataset.value = ["300", "20", "1e4", "-5"][i]);
          table.tHead.rows[0].cells[1].querySelector("button").click();
          return [...table.tBodies].map((body) => body.rows[0].cells[1].dataset.value);
        }"""
    )
    assert numbers == ["-5", "20", "300", "1e4"]


@PAGES
def test_a_page_prints_with_no_table_cut(visit, served, name):
    seen = visit(served.pages[name].as_uri(), width=PAPER_PX)
    page = seen.page
    page.emulate_media(media="print")
    edges = page.locator("table, img").evaluate_all("all => all.map(each => each.getBoundingClientRect().right)")
    assert max(edges) <= PAPER_PX + 0.5
    hidden = page.locator("td, th").evaluate_all(
        "all => all.filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.textContent)"
    )
    assert hidden == []
    rows = page.locator("tr").evaluate_all("all => all.map(each => getComputedStyle(each).breakInside)")
    assert set(rows) == {"avoid"}
    printed = page.pdf(prefer_css_page_size=True)
    sheets = re.findall(rb"/MediaBox \[0 0 ([0-9.]+) ([0-9.]+)\]", printed)
    assert len(sheets) > 2
    assert {(round(float(width)), round(float(height))) for width, height in sheets} == {(842, 595)}, "A4 landscape"


# ------------------------------------------------------------------------------------------------- MLflow's own pages


def mlflow_page(served: Served, path: str) -> str:
    """MLflow 3 shows the menu of language models unless it is told otherwise."""
    return f"{served.uri}/#/{path}{'&' if '?' in path else '?'}workflowType=machine_learning"


def compare_page(served: Served, *names: str) -> str:
    runs = json.dumps([served.children[name].info.run_id for name in names])
    return mlflow_page(
        served, f"compare-runs?runs={quote(runs)}&experiments={quote(json.dumps([served.experiment_id]))}"
    )


@pytest.mark.mlflow
def test_the_experiment_page_lists_the_runs(visit, served):
    page = visit(mlflow_page(served, f"experiments/{served.experiment_id}/runs")).page
    parents = [MlflowClient(served.uri).get_run(e.run_id).info.run_name for e in served.experiments]
    assert len(set(parents)) == 2
    for name in parents:
        expect(page.get_by_role("link", name=name)).to_be_visible()
    assert page.get_by_role("link", name="mixflow/0").count() == 0, "arms lie below their experiment"
    row = page.locator("[role=row]", has=page.get_by_role("link", name=parents[0]))
    row.get_by_role("button").first.click()
    for name in served.children:
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()


@pytest.mark.mlflow
def test_the_page_of_a_run_shows_verdicts_and_the_report(visit, served):
    parent = served.experiments[0].run_id
    page = visit(mlflow_page(served, f"experiments/{served.experiment_id}/runs/{parent}")).page
    expect(page.get_by_role("cell", name="promote").first).to_be_visible()
    page.goto(mlflow_page(served, f"experiments/{served.experiment_id}/runs/{parent}/artifacts/report.html"))
    frame = page.frame_locator("iframe").first
    expect(frame.get_by_role("heading", name="did MixFlow post-training help?")).to_be_visible()


@pytest.mark.mlflow
def test_the_compare_page_shows_the_metrics_of_two_arms(visit, served):
    page = visit(compare_page(served, "standard/0", "mixflow/0"), width=1800).page
    expect(page.get_by_role("heading", name="Comparing 2 Runs from 1 Experiment")).to_be_visible()
    key = f"eval/fd_digits/{CELLS[0]}"
    page.get_by_role("switch", name="Metrics - Show diff only").click()
    expect(page.get_by_role("link", name=key, exact=True)).to_be_visible()
    arms = served.experiments[0].summary["arms"]
    for arm in ("standard", "mixflow"):
        value = arms[arm]["metrics"][CELLS[0]]["fd_digits"]["values"][0]
        expect(page.get_by_text(f"{value:.3f}".rstrip("0"), exact=True)).to_be_visible()
    page.get_by_role("switch", name="Parameters - Show diff only").click()
    for row in ("arm standard mixflow", "mixture.gamma 0.0 0.8", "mixture.time_law uniform beta"):
        expect(page.get_by_role("row", name=row, exact=True)).to_be_visible()
    expect(page.get_by_role("row", name="training.steps")).to_have_count(0)


@pytest.mark.mlflow
def test_the_compare_page_draws_parallel_coordinates(visit, served):
    page = visit(compare_page(served, "standard/0", "mixflow/0", "matched/0", "mixflow/1"), width=1800).page
    axes = page.locator(".parcoords .axis-title")
    expect(axes.first).to_be_visible()
    titles = axes.all_text_contents()
    assert {"arm", "mixture.gamma"} <= set(titles)
    labels = page.locator(".parcoords .axis .tick text").all_text_contents()
    assert {"standard", "mixflow", "matched"} <= set(labels)
    painted = page.locator("canvas.gl-canvas-context, .parcoords canvas, canvas").first.evaluate(
        "canvas => canvas.width * canvas.height"
    )
    assert painted > 0


@pytest.mark.mlflow
def test_the_compare_page_shows_the_samples_side_by_side(visit, served):
    """Of two runs: the pictures of three cover the list of files, whatever the files."""
    page = visit(compare_page(served, "standard/0", "mixflow/0"), width=1800, height=2400).page
    page.get_by_text("euler20-s1.png", exact=True).click()
    shown = """() => [...document.images].filter((image) => image.naturalWidth === 160)
        .map((image) => image.getBoundingClientRect()).filter((box) => box.width > 0)"""  # its zoom has hidden copies
    page.wait_for_function(f"() => new Set(({shown})().map((box) => Math.round(box.left))).size === 2")


@pytest.mark.mlflow
def test_charts_of_arms_are_bars_of_their_means(visit, served):
    """Grouped by arm, MLflow averages over the seeds."""
    page = visit(mlflow_page(served, f"experiments/{served.experiment_id}/runs?compareRunsMode=CHART"), width=1800).page
    page.get_by_role("button", name="Group by").click()
    page.get_by_text("mixflow.arm", exact=True).click()
    page.keyboard.press("Escape")
    page.get_by_placeholder("Search metric charts").fill(f"eval/fd_digits/{CELLS[0]}")
    bars = page.locator(".js-plotly-plot .bars .point")
    expect(bars).to_have_count(len(ARM_LEVELS))
