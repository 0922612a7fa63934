"""The summary of cells that hold more than values, and which summaries may share a table."""

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_results import ARM_LEVELS, CELL, CELLS, NOISE, Fabricated

from orchestration.results import summarise
from orchestration.workflow import Workspace


class Measured(Fabricated):
    """A workspace whose cells hold what two extractors measure, resampled, and at several numbers of images."""

    def metrics(self, arm: str, replicate: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        k, level = int(replicate), ARM_LEVELS[arm]
        slope = 1 + 0.1 * list(ARM_LEVELS).index(arm)
        found = {
            cell: {
                "fd_digits": level + slope * float(NOISE[k]) / 2,
                "recall_digits": 0.5,
                "fid": 10 * level + 2 * slope * float(NOISE[(k + 1) % 4]),
                "recall": 0.25,
                "within": {"fd_digits": 0.1 * (k + 1), "recall": 0.02} | ({"fid": 1.0} if k else {}),
                "by_count": {
                    "fd_digits": {"2000": level, "500": level + 1 + k, "1000": level + 0.5 * k},
                    "fid": {"500": 7.0} | ({"1000": 5.0} if k else {"1500": 4.0}),
                },
            }
            for cell in CELLS
        }
        return {"metrics.json": json.dumps(found, sort_keys=True).encode()}, {}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary with an effect of 2 % asked for."""
    made = Measured(tmp_path_factory.mktemp("measured"))
    evaluation = made.experiment.evaluation.model_copy(update={"effect": 0.02})
    experiment = made.experiment.model_copy(update={"evaluation": evaluation})
    return summarise(Workspace(experiment, made.workspace.storage))


def test_the_metrics_are_those_that_the_cells_hold(measured):
    assert json.loads(json.dumps(measured, allow_nan=False)).keys() == measured.keys()
    assert measured["arms"]["mixflow"]["verdict"]["verdict"] == "promote"
    for arm in measured["arms"].values():
        for cell in CELLS:
            assert set(arm["metrics"][cell]) == {"fd_digits", "recall_digits", "fid", "recall"}
            for by_cell in arm["differences"].values():
                assert set(by_cell[cell]) == {"fd_digits", "recall_digits", "fid", "recall"}
        assert all("recall_digits +0.000" in reason for reason in arm["verdict"]["reasons"])


def test_the_variation_within_a_seed_is_the_mean_over_the_seeds(measured):
    found = measured["arms"]["mixflow"]["metrics"]["heun4/s1.5"]
    assert found["fd_digits"]["within_sd"] == pytest.approx(0.25)
    assert found["recall"]["within_sd"] == pytest.approx(0.02)
    assert found["recall_digits"]["within_sd"] is None
    assert found["fid"]["within_sd"] is None  # the first seed has none


def test_values_by_number_of_images_are_means_over_the_seeds(measured):
    found = measured["arms"]["mixflow"]["by_count"]["heun4/s1.5"]
    assert found["fd_digits"] == [[500, 5.5, 4.0, 7.0], [1000, 3.75, 3.0, 4.5], [2000, 3.0, 3.0, 3.0]]
    assert found["fid"] == [[500, 7.0, 7.0, 7.0]]  # the only number that all seeds have
    assert found["recall"] == []
    arms = measured["arms"]
    found = arms["mixflow"]["differences"]["standard"]["heun4/s1.5"]["fd_digits"]["by_count"]
    assert [row["count"] for row in found] == [500, 1000, 2000]
    level = ARM_LEVELS["mixflow"] - ARM_LEVELS["standard"]  # what is added for few images is equal in both
    assert [row["mean"] for row in found] == pytest.approx([level] * 3)


def test_the_pairs_needed_are_enough_by_scipy(measured):
    """2 % of the control's mean, at 5 % and power 0.8; recalls do not vary, so that two pairs show it."""
    assert measured["effect"] == 0.02
    numbers = set()
    for name in ("mixflow", "matched"):
        for control, by_cell in measured["arms"][name]["differences"].items():
            for metric in ("fd_digits", "fid"):
                found, values = by_cell[CELL][metric], measured["arms"][control]["metrics"][CELL][metric]["values"]

                def power(n: int, ratio: float = 0.02 * np.mean(values) / found["sd"]) -> float:
                    return float(stats.nct(n - 1, ratio * np.sqrt(n)).sf(stats.t.ppf(0.975, n - 1)))

                numbers.add(found["pairs_needed"])
                assert power(found["pairs_needed"]) >= 0.8
                assert found["pairs_needed"] == 2 or power(found["pairs_needed"] - 1) < 0.8
            assert by_cell[CELL]["recall"]["pairs_needed"] == 2
    assert len(numbers) > 1


def test_unlike_metrics_are_refused(tmp_path):
    class Renamed(Fabricated):
        def metrics(self, arm: str, replicate: str) -> tuple[dict[str, bytes], dict[str, Any]]:
            files, about = super().metrics(arm, replicate)
            old, new = (b'"fd_digits"', b'"fd_new"') if (arm, replicate) == ("mixflow", "2") else (b"", b"")
            return {name: content.replace(old, new) if old else content for name, content in files.items()}, about

    with pytest.raises(
        ValueError,
        match=r"^metrics/mixflow/2 must hold the metrics of metrics/none/0 in euler20/s1, \['fd_digits', .*\], "
        r"got \['fd_new', .*\]; redo the older one with --force$",
    ):
        summarise(Renamed(tmp_path).workspace)


# ------------------------------------------------------------------------------------------------- bases and claims

SEVERAL = (
    "bases=3",
    "replicates=2",
    "base.train.steps=100",
    "evaluation.first_base_only=[heun4/s1.5]",
    "claims=[{arm: mixflow, control: standard, expected: better, published: '15.64 against 17.96'},"
    " {arm: standard, control: none, expected: equal, published: '17.96 against 17.97'},"
    " {arm: matched, control: mixflow, expected: better, published: none}]",
)
# By pair: two seeds of three bases. Bases differ more than seeds.
LUCK = np.array([0.0, 0.1, 3.0, 3.2, -2.0, -1.8])
SLOWED = np.array([0.00, 0.10, 0.20, 0.30, -0.30, -0.10])


class SeveralBases(Fabricated):
    def base(self, number: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        return {"weights.safetensors": f"base {number}".encode()}, {}

    def metrics(self, arm: str, replicate: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        pair = int(replicate)
        level = ARM_LEVELS[arm] + float(LUCK[pair]) + float(SLOWED[pair]) * (arm == "mixflow")
        cells = CELLS if pair < 2 else CELLS[:1]
        found = {cell: {"fd_digits": level, "recall_digits": 0.5 + 0.01 * pair} for cell in cells}
        return {"metrics.json": json.dumps(found).encode()}, {}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return summarise(SeveralBases(tmp_path_factory.mktemp("several"), *SEVERAL).workspace)


def test_with_several_bases_intervals_are_over_their_means(several):
    found = several["arms"]["mixflow"]["differences"]["standard"]["euler20/s1"]["fd_digits"]
    by_base = (ARM_LEVELS["mixflow"] - ARM_LEVELS["standard"] + SLOWED).reshape(3, 2).mean(1)
    interval = stats.t.interval(0.95, 2, by_base.mean(), stats.sem(by_base))
    assert found["n"] == 3
    assert (found["low"], found["high"]) == pytest.approx(interval)
    mean = several["arms"]["mixflow"]["metrics"]["euler20/s1"]["fd_digits"]
    assert (len(mean["values"]), mean["n"]) == (6, 3)
    assert several["bases"] == 3


def test_beside_the_variation_over_bases_stands_that_over_seeds(several):
    by_cell = several["arms"]["standard"]["metrics"]
    pooled = np.sqrt(LUCK.reshape(3, 2).var(1, ddof=1).mean())
    assert by_cell["euler20/s1"]["fd_digits"]["seeds_sd"] == pytest.approx(pooled)
    assert by_cell["euler20/s1"]["fd_digits"]["sd"] == pytest.approx(LUCK.reshape(3, 2).mean(1).std(ddof=1))
    assert by_cell["heun4/s1.5"]["fd_digits"]["seeds_sd"] is None, (
        "of one base the interval's own sd is that over seeds"
    )


def test_a_cell_of_the_first_base_alone_speaks_of_its_seeds(several):
    found = several["arms"]["mixflow"]["differences"]["standard"]["heun4/s1.5"]["fd_digits"]
    pairs = ARM_LEVELS["mixflow"] - ARM_LEVELS["standard"] + SLOWED[:2]
    assert found["n"] == 2
    assert (found["low"], found["high"]) == pytest.approx(stats.t.interval(0.95, 1, pairs.mean(), stats.sem(pairs)))


def test_claims_are_set_beside_what_is_found(several):
    first, second, third = several["claims"]
    assert (first["arm"], first["control"], first["published"]) == ("mixflow", "standard", "15.64 against 17.96")
    assert first["metric"] == "fd_digits"
    assert {cell: found["agreement"] for cell, found in first["cells"].items()} == {
        "euler20/s1": "agrees",
        "heun4/s1.5": "agrees",
    }
    # Six and nine are not equal; and the matched arm is clearly worse.
    assert second["cells"]["euler20/s1"]["agreement"] == "disagrees"
    assert third["cells"]["euler20/s1"]["agreement"] == "disagrees"
