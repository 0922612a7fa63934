"""The summary of cells that hold more than values, and which summaries may share a table."""

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_results import ARM_LEVELS, CELL, CELLS, NOISE, Fabricated

from orchestration.results import check_protocols, fingerprint, summarise
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
    assert found["fd_digits"] == [[500, 5.5], [1000, 3.75], [2000, 3.0]]
    assert found["fid"] == [[500, 7.0]]  # the only number that all seeds have
    assert found["recall"] == []


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


def test_equal_protocols_share_a_table_and_a_fingerprint(measured):
    stored = json.loads(json.dumps(measured["protocol"]))
    more = {**dict(reversed(stored.items())), "replicates": 40}
    check_protocols([measured["protocol"], stored, more])
    check_protocols([])
    assert fingerprint(measured["protocol"]) == fingerprint(stored) == fingerprint(more)
    assert len(fingerprint(stored)) == 12
    assert int(fingerprint(stored), 16) > 0


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("num_samples", 500, "2000 and 500"),
        ("precision", "bf16", '"fp32" and "bf16"'),
        ("nfe", {"euler20/s1": 20}, '{"euler20/s1": 20, "heun4/s1.5": 16} and {"euler20/s1": 20}'),
        ("codec", {"kind": "rae"}, 'nothing and {"kind": "rae"}'),
        ("guide", None, "nothing and null"),
    ],
)
def test_unequal_protocols_are_refused_in_one_table(measured, key, value, shown):
    first = measured["protocol"]
    second = {**first, key: value}
    assert fingerprint(first) != fingerprint(second)
    with pytest.raises(ValueError, match=rf"^protocol\.{key} must be the same in one table, got ") as error:
        check_protocols([first, first, second])
    assert f"got {shown}; evaluate alike" in str(error.value)
    with pytest.raises(ValueError, match=rf"^protocol\.{key} "):
        check_protocols([second, first])


def test_the_first_difference_of_protocols_is_named(measured):
    first = measured["protocol"]
    with pytest.raises(ValueError, match=r"^protocol\.num_samples "):
        check_protocols([first, {**dict(reversed(first.items())), "precision": "bf16", "num_samples": 1}])
