"""From metrics to verdicts, against scipy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from orchestration.experiment import Experiment
from orchestration.recipe import load
from orchestration.results import (
    format_interval,
    judge,
    protocol,
    summarise,
)
from orchestration.storage import open_storage
from orchestration.workflow import Workspace
from workers.evaluate import metrics_of
from workers.manifest import CorruptError

METRICS = metrics_of(["digits"])
CELL = "euler20/s1"
PRIMARY = f"fd_digits/{CELL}"
# Four replicates; nothing about them is symmetric.
NOISE = np.array([0.30, -0.10, 0.05, -0.21])


def values(primary: Any, recall: Any = (0.5, 0.5, 0.5, 0.5), metric: str = "fd_digits") -> dict[str, Any]:
    return {
        "recall": {CELL: list(map(float, recall))},
        metric: {CELL: list(map(float, primary)), "euler4/s1": [0.0, 0.0, 0.0, 0.0]},
    }


def verdict(arm: Any, *controls: Any, primary: str = PRIMARY, margin: float = 0.02) -> Any:
    names = [f"control{i}" for i in range(len(controls))]
    return judge("arm", names, {"arm": arm, **dict(zip(names, controls, strict=True))}, primary, margin)


def test_promoted_when_better_than_every_control():
    found = verdict(values(3 + NOISE), values(5 - NOISE / 2), values(4 + NOISE / 3))
    assert found.verdict == "promote"
    assert [reason.split(":")[0] for reason in found.reasons] == ["better than control0", "better than control1"]


def test_the_reason_states_scipys_interval():
    arm, control = 3 + NOISE, 5 - NOISE / 2
    interval = stats.ttest_rel(arm, control).confidence_interval(0.95)
    (reason,) = verdict(values(arm, recall=[0.5, 0.4, 0.5, 0.4]), values(control)).reasons
    mean = (arm - control).mean()
    assert f"{mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}], recall -0.050" in reason


def test_inconclusive_when_one_control_is_not_told_apart():
    found = verdict(values(3 + NOISE), values(5 - NOISE), values(3 - NOISE))
    assert found.verdict == "inconclusive"
    assert found.reasons[1].startswith("not told apart from control1")


def test_rejected_when_worse_than_one_control_even_if_better_than_the_other():
    found = verdict(values(3 + NOISE), values(5 - NOISE), values(1 + NOISE / 2))
    assert found.verdict == "reject"
    assert [reason.split(" ")[0] for reason in found.reasons] == ["better", "worse"]


def test_the_seeds_are_paired():
    """A spread between seeds that is common to both arms hides nothing; unpaired, it would."""
    common = np.array([0.0, 10.0, 20.0, 30.0])
    arm, control = common + NOISE / 10, common + 1
    assert stats.ttest_ind(arm, control).pvalue > 0.5
    assert verdict(values(arm), values(control)).verdict == "promote"


@pytest.mark.parametrize("mean", [-0.45, -0.35, -0.3, 0.3, 0.45])
def test_the_verdict_flips_where_scipys_test_does(mean):
    arm, control = mean + NOISE, np.zeros(4)
    test = stats.ttest_rel(arm, control)
    expected = "inconclusive" if test.pvalue > 0.05 else "promote" if mean < 0 else "reject"
    assert verdict(values(arm), values(control)).verdict == expected


def test_the_flips_above_are_all_there():
    found = {stats.ttest_rel(mean + NOISE, np.zeros(4)).pvalue > 0.05 for mean in (-0.45, -0.3)}
    assert found == {True, False}


def test_recall_may_fall_by_the_margin_and_no_more():
    better = 3 + NOISE
    control = values(5 - NOISE, recall=[0.5, 0.5, 0.75, 0.75])
    assert verdict(values(better, recall=[0.5] * 4), control, margin=0.125).verdict == "promote"
    assert verdict(values(better, recall=[0.5] * 4), control, margin=0.124).verdict == "reject"
    # One control is enough to be measured against, and a better recall is no harm.
    kind = values(5 - NOISE, recall=[0.1] * 4)
    for both in ((kind, control), (control, kind)):
        assert verdict(values(better, recall=[0.5] * 4), *both, margin=0.124).verdict == "reject"
    assert verdict(values(better, recall=[0.5] * 4), kind, margin=0.0).verdict == "promote"


def test_recall_alone_rejects_nothing_that_is_inconclusive():
    found = verdict(values(3 + NOISE, recall=[0.0] * 4), values(3 - NOISE, recall=[1.0] * 4))
    assert found.verdict == "inconclusive"


@pytest.mark.parametrize(
    ("metric", "recall", "lower"),
    [
        ("fd_digits", "recall", True),
        ("kid_digits", "recall_digits", True),
        ("fid", "recall", True),
        ("fd_patches", "recall_digits", True),
        ("inception_score", "recall", False),
        ("precision_digits", "recall_digits", False),
    ],
)
def test_the_better_side_of_each_metric(metric, recall, lower):
    low = {recall: {CELL: [0.5] * 4}, metric: {CELL: list(0.3 + NOISE / 100)}}
    high = {recall: {CELL: [0.5] * 4}, metric: {CELL: list(0.6 - NOISE / 100)}}
    primary = f"{metric}/{CELL}"
    assert verdict(low, high, primary=primary, margin=1).verdict == ("promote" if lower else "reject")
    assert verdict(high, low, primary=primary, margin=1).verdict == ("reject" if lower else "promote")


def test_the_recall_of_the_primary_metrics_features_counts():
    """Recall in other features may fall as it likes; the reason names the one that counts."""
    arm, control = values(3 + NOISE, recall=[0.9] * 4), values(5 - NOISE, recall=[0.1] * 4)
    arm["recall_digits"], control["recall_digits"] = {CELL: [0.25] * 4}, {CELL: [0.5] * 4}
    found = verdict(arm, control)
    assert found.verdict == "reject"
    assert found.reasons[0].endswith("], recall_digits -0.250")
    assert verdict(control | {"fd_digits": arm["fd_digits"]}, arm | {"fd_digits": control["fd_digits"]}).verdict == (
        "promote"
    )


def test_no_verdict_without_the_primary_metric_or_its_recall():
    with pytest.raises(ValueError, match=r"that was measured, \['fd_digits', 'recall'\], got fid$"):
        verdict(values(3 + NOISE), values(5 - NOISE), primary=f"fid/{CELL}")
    arm = {"fid": {CELL: [1.0] * 4}, "recall_digits": {CELL: [0.5] * 4}}
    with pytest.raises(
        ValueError, match=r"with recall beside it, got fid beside \['recall_digits'\]; measure that too"
    ):
        verdict(arm, arm, primary=f"fid/{CELL}")


def test_without_a_control_nothing_is_claimed():
    assert verdict(values(3 + NOISE)).verdict == "inconclusive"


def test_equal_values_are_not_told_apart():
    assert verdict(values([1.0] * 4), values([1.0] * 4)).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("mean", "text"),
    [
        (0.12346, "0.1235 [-0.5000, 10.0000]"),
        (1.23456, "1.235 [-0.500, 10.000]"),
        (-1.23456, "-1.235 [-0.500, 10.000]"),
        (12.3456, "12.35 [-0.50, 10.00]"),
        (0.002, "0.00 [-0.50, 10.00]"),
    ],
)
def test_an_interval_has_the_decimals_of_its_size(mean, text):
    assert format_interval({"mean": mean, "low": -0.5, "high": 10.0}) == text


def test_a_small_interval_keeps_its_digits():
    assert format_interval({"mean": 4.2e-5, "low": 1.1e-5, "high": 7.3e-5}) == "0.0000420 [0.0000110, 0.0000730]"
    assert format_interval({"mean": -4.2e-5, "low": None}) == "-0.0000420 (n = 1)"
    assert format_interval({"mean": 0.0, "low": 0.0, "high": 0.0}) == "0.0000 [0.0000, 0.0000]"


def test_a_difference_has_its_sign():
    assert format_interval({"mean": 1.23456, "low": -0.5, "high": 10.0}, signed=True) == "+1.235 [-0.500, +10.000]"


# ---------------------------------------------------------------------------------------- a fabricated workspace

OVERRIDES = (
    "replicates=4",
    "evaluation.samplers=[{method: euler, num_steps: 20}, {method: heun, num_steps: 4, guidance_scale: 1.5}]",
    f"evaluation.primary={PRIMARY}",
)
CELLS = ("euler20/s1", "heun4/s1.5")
ARM_LEVELS = {"none": 9.0, "standard": 6.0, "mixflow": 3.0, "matched": 5.0}


def metric_value(arm: str, replicate: int, cell: str, metric: str) -> float:
    """Made up, and different for each argument."""
    if metric.startswith("recall"):
        return 0.5 + 0.001 * replicate
    slope = 1 + 0.1 * [*ARM_LEVELS, arm].index(arm)
    return ARM_LEVELS.get(arm, 9.0) + slope * NOISE[replicate] / 2 + 20 * CELLS.index(cell) + 50 * METRICS.index(metric)


def slow_flow_of(experiment: Experiment) -> dict[str, Any]:
    """A measurement, made up: of the first sampler with an error-free field, of the others without."""
    rows = [[0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.3, 0.4, 0.5, 0.6]]
    ends = {"low": [[None, *row[1:]] for row in rows], "high": [[*row[:-1], None] for row in rows]}
    quantiles = {"times": [0.5, 1.0], "levels": [0.05, 0.25, 0.5, 0.75, 0.95], "values": rows, **ends}
    intervals = [[0.25, 0.125, 0.375], [0.5, 0.4375, 0.5625]]
    read = {
        **dict.fromkeys(("same_class", "probe"), quantiles),
        "continuation": [{"from": 0.25, **quantiles}],
        "deficit_times": [0.0, 0.5],
        **dict.fromkeys(("slowed", "probe_lag", "deficit_generated", "deficit_true"), intervals),
    }
    samplers = [sampler.name for sampler in experiment.slow_flow_samplers]
    found = {name: {"model": read, "error_free": "it was left out"} for name in samplers}
    found[samplers[0]] = {"model": read, "error_free": {**read, "probe_lag": [[0.0, -0.0625, 0.0625]] * 2}}
    return {"num_samples": 500, "num_images": 1200, "samplers": found}


class Fabricated:
    """A finished workspace without any training: every stage published, its files made up."""

    def __init__(self, directory: Path, *overrides: str) -> None:
        self.experiment: Experiment = load("quickstart", [*OVERRIDES, *overrides])
        self.directory = directory
        self.workspace = Workspace(self.experiment, open_storage(str(directory / "workspace")))
        for name, stage in self.workspace.stages.items():
            if stage.kind != "report":
                self.publish(name, stage.kind)

    def publish(self, name: str, kind: str) -> None:
        files, about = getattr(self, kind.replace("-", "_"))(*name.split("/")[1:])
        made = self.directory / "made" / name
        made.mkdir(parents=True)
        for file, content in files.items():
            (made / file).write_bytes(content)
        self.workspace.publish(name, made, seconds=1.5, num_workers=2, **about)

    def data(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        return {"train-00000.parquet": b"data"}, {}

    def base(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        return {"weights.safetensors": b"base"}, {}

    def features(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        return {"classifier.safetensors": b"classifier"}, {"held_out_accuracy": 0.987}

    def reference(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        return {"digits.safetensors": b"reference"}, {"num_images": 597}

    def arms(self, arm: str, replicate: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        times = {"edges": [0.0, 0.5, 1.0], "num_draws": 10, "t": [4, 6], "m": [7, 3], "lag": [9, 1]}
        return {"weights.safetensors": f"{arm} {replicate}".encode(), "times.json": json.dumps(times).encode()}, {}

    def slow_flow(self, of: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        return {"slow_flow.json": json.dumps(slow_flow_of(self.experiment)).encode()}, {}

    def samples(self, arm: str, replicate: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        files = {f"{cell.replace('/', '-')}.png": f"png of {arm} {replicate} {cell}".encode() for cell in CELLS}
        return files, {"nfe": {"euler20/s1": 20, "heun4/s1.5": 16}}

    def metrics(self, arm: str, replicate: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        found = {
            cell: {metric: metric_value(arm, int(replicate), cell, metric) for metric in METRICS} for cell in CELLS
        }
        return {"metrics.json": json.dumps(found).encode()}, {}


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    return Fabricated(tmp_path_factory.mktemp("fabricated"))


@pytest.fixture(scope="module")
def summary(fabricated: Fabricated) -> dict[str, Any]:
    return summarise(fabricated.workspace)


def of(arm: str, cell: str, metric: str) -> list[float]:
    return [metric_value(arm, k, cell, metric) for k in range(4)]


def test_every_mean_has_scipys_interval(summary):
    for arm in ARM_LEVELS:
        for cell in CELLS:
            for metric in METRICS:
                found, x = summary["arms"][arm]["metrics"][cell][metric], of(arm, cell, metric)
                interval = stats.t.interval(0.95, len(x) - 1, np.mean(x), stats.sem(x))
                assert found["values"] == x
                assert (found["mean"], found["n"]) == (pytest.approx(np.mean(x)), 4)
                assert (found["low"], found["high"]) == pytest.approx(interval)


def test_every_difference_is_scipys_paired_one(summary):
    assert set(summary["arms"]["mixflow"]["differences"]) == {"standard", "matched"}
    for control, by_cell in summary["arms"]["mixflow"]["differences"].items():
        for cell in CELLS:
            for metric in METRICS:
                if metric.startswith("recall"):  # equal in all arms: no spread, for which scipy has no interval
                    assert [by_cell[cell][metric][key] for key in ("mean", "low", "high")] == [0, 0, 0]
                    continue
                a, b = of("mixflow", cell, metric), of(control, cell, metric)
                interval = stats.ttest_rel(a, b).confidence_interval(0.95)
                found = by_cell[cell][metric]
                assert found["mean"] == pytest.approx(np.mean(a) - np.mean(b))
                assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))


def test_the_summary_is_plain_json_and_complete(summary, fabricated):
    assert json.loads(json.dumps(summary, allow_nan=False)).keys() == summary.keys()
    assert list(summary["arms"]) == ["none", "standard", "mixflow", "matched"]
    assert summary["primary"] == PRIMARY
    assert summary["identity"] == fabricated.experiment.identity
    assert {name: arm["verdict"]["verdict"] for name, arm in summary["arms"].items()} == {
        "none": "reject",  # worse than standard
        "standard": "reject",  # worse than matched
        "mixflow": "promote",
        "matched": "promote",  # better than standard
    }
    assert summary["arms"]["none"]["mixture"] is None
    assert summary["arms"]["mixflow"]["mixture"]["gamma"] == 0.8
    assert summary["arms"]["matched"]["mixture"]["condition_on"] == "m"
    assert summary["arms"]["mixflow"]["seeds"] == [0, 1, 2, 3]
    assert "by no more than 0.02 below" in summary["rule"]


def test_a_difference_is_called_by_where_its_interval_lies(summary):
    by_cell = summary["arms"]["matched"]["differences"]["standard"]
    calls = {metric: by_cell["euler20/s1"][metric]["call"] for metric in METRICS}
    expected = {"precision": "worse", "recall": "inconclusive"}  # lower by 1 in all else
    assert calls == {metric: expected.get(metric.split("_")[0], "better") for metric in METRICS}


def test_files_of_values_alone_are_read(summary):
    """Where neither resamples nor smaller sets were measured, that is said."""
    assert summary["effect"] == 0.05
    for arm in summary["arms"].values():
        for cell in CELLS:
            assert all(arm["metrics"][cell][metric]["within_sd"] is None for metric in METRICS)
            assert arm["by_count"][cell] == {metric: [] for metric in METRICS}


def test_a_number_carries_its_protocol(summary, fabricated):
    found = summary["protocol"]
    assert found == protocol(fabricated.workspace)
    assert found["estimators"]["precision_recall_neighbours"] == 3
    assert (found["estimators"]["patch_pixels"], found["estimators"]["inception_score_splits"]) == (8, 10)
    assert found["nfe"] == {"euler20/s1": 20, "heun4/s1.5": 16}
    assert [(s["method"], s["num_steps"], s["guidance_scale"]) for s in found["samplers"]] == [
        ("euler", 20, 1.0),
        ("heun", 4, 1.5),
    ]
    assert (found["num_samples"], found["sample_batch_size"], found["replicates"]) == (2000, 250, 4)
    assert found["classifier_accuracy"] == 0.987
    data, features = fabricated.workspace.artifact("data"), fabricated.workspace.artifact("features")
    assert data.manifest.digest[:16] in found["reference"]
    assert found["extractors"] == {"digits": features.manifest.files["classifier.safetensors"].sha256[:16]}
    assert {"label_law", "precision", "rounding"} <= found.keys()


def test_a_protocol_differs_with_its_data(fabricated, tmp_path, summary):
    class OtherData(Fabricated):
        def data(self) -> tuple[dict[str, bytes], Mapping[str, Any]]:
            return {"train-00000.parquet": b"other data"}, {}

    other = protocol(OtherData(tmp_path).workspace)
    assert other["reference"] != summary["protocol"]["reference"]


def test_missing_metrics_are_named(tmp_path):
    made = Fabricated(tmp_path)
    made.workspace.forget(["metrics/mixflow/2"])
    with pytest.raises(RuntimeError, match="metrics/mixflow/2 was asked for before it was done"):
        summarise(made.workspace)


def test_altered_metrics_never_reach_a_verdict(tmp_path):
    made = Fabricated(tmp_path)
    path = Path(made.workspace.result("metrics/mixflow/0").full_uri) / "metrics.json"
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(CorruptError, match=r"metrics\.json has another SHA-256"):
        summarise(made.workspace)
