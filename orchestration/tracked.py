"""What MLflow holds of finished experiments, read back: all that a comparison is made of, without any workspace.

It reads what recording.py wrote: a parent run with results.json, a child for each arm and seed.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestration.mlflow_server import check_tracking, is_http, mlflow_client, sqlite_file, without_password
from orchestration.results import cell_file

RESULTS = "results.json"
CURVES = ("train/loss", "eval/loss")
RUN_ID = "[0-9a-f]{32}"


@dataclass(frozen=True)
class TrackedSeed:
    """One arm under one seed: a child run.

    Attributes:
        url: of the run's page; None without a server.
        params: settings of its training, flattened with dots.
        metrics: the newest value of each key.
        curves: key -> (step, value) in order, for those of CURVES that there are.
    """

    run_id: str
    url: str | None
    arm: str
    replicate: int
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class TrackedExperiment:
    """A finished experiment: its parent run.

    Attributes:
        name: of the MLflow experiment.
        url: of the run's page; None without a server.
        summary: results.json.
        seeds: the children, by arm in the summary's order and by replicate.
        grids: arm -> PNG of its samples in the primary cell, replicate 0.
    """

    run_id: str
    name: str
    url: str | None
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    summary: Mapping[str, Any]
    seeds: Sequence[TrackedSeed]
    grids: Mapping[str, bytes]


def read_experiments(tracking_uri: str, names: Sequence[str]) -> list[TrackedExperiment]:
    """The experiments that names mean: ids of parent runs, or MLflow experiments (the newest finished parent run each).

    Raises:
        ValueError: a name that MLflow does not know, a run that is no experiment's or has no results, one given twice.
        ConnectionError: MLflow does not answer.
    """
    reader = _Reader(tracking_uri)
    runs = [reader.find(name) for name in names]
    ids = [run.info.run_id for run in runs]
    twice = next((name for name, run_id in zip(names, ids, strict=True) if ids.count(run_id) > 1), None)
    if twice is not None:
        raise ValueError(f"runs must differ from one another, got one of them twice, as {twice!r}; name it once")
    return [reader.read(run) for run in runs]


class _Reader:
    def __init__(self, tracking_uri: str) -> None:
        problem = check_tracking(tracking_uri)
        if problem:
            raise ConnectionError(problem.partition("; ")[0])
        self._uri, self._shown = tracking_uri, without_password(tracking_uri)
        # MLflow would create the database that it is asked to read.
        if tracking_uri.startswith("sqlite:") and not sqlite_file(tracking_uri).exists():
            raise ValueError(f"MLFLOW_TRACKING_URI must hold the runs, got {self._shown}, where there is nothing yet")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self._client = mlflow_client(tracking_uri)

    def find(self, name: str) -> Any:
        """The parent run that a name means."""
        run = self._run(name) if re.fullmatch(RUN_ID, name) else None
        if run is None:
            run = self._newest(name)
        tags = run.data.tags
        if "mlflow.parentRunId" in tags:
            parent = tags["mlflow.parentRunId"]
            raise ValueError(
                f"RUN must be an experiment's run, got {name!r}, which is {run.info.run_name} of one; name {parent}"
            )
        return run

    def read(self, run: Any) -> TrackedExperiment:
        """All that is compared of a parent run."""
        summary = self._summary(run)
        order = {arm: place for place, arm in enumerate(summary["arms"])}
        children = [child for child in self._children(run) if child.data.tags.get("mixflow.kind") == "arm"]
        children = [child for child in children if child.data.tags["mixflow.arm"] in order]
        children.sort(key=lambda c: (order[c.data.tags["mixflow.arm"]], int(c.data.tags["mixflow.replicate"])))
        file = f"{cell_file(summary['primary'].partition('/')[2])}.png"
        grids = {
            child.data.tags["mixflow.arm"]: self._artifact(child, file)
            for child in children
            if child.data.tags["mixflow.replicate"] == "0" and self._has(child, file)
        }
        return TrackedExperiment(
            run_id=run.info.run_id,
            name=self._client.get_experiment(run.info.experiment_id).name,
            url=self._page(run),
            params=run.data.params,
            tags=run.data.tags,
            metrics=run.data.metrics,
            summary=summary,
            seeds=[self._seed(child) for child in children],
            grids=grids,
        )

    def _run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _newest(self, name: str) -> Any:
        """The newest finished parent run of an MLflow experiment."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise ValueError(
                f"RUN must be the id of an MLflow run or the name of an experiment, got {name!r}, "
                f"which {self._shown} does not hold{self._nearest(name)}"
            )
        finished = "attributes.status = 'FINISHED' and tags.`mixflow.experiment` LIKE '%'"
        found = self._client.search_runs(
            [experiment.experiment_id], finished, order_by=["attributes.end_time DESC"], max_results=100
        )
        if not found:
            raise ValueError(
                f"experiment {name!r} must have a finished run of mixflow, got none; wait for it or run it"
            )
        # A part of the workflow, and a sweep, are runs too; they have no results that could be compared.
        return next((run for run in found if self._has(run, RESULTS)), found[0])

    def _nearest(self, name: str) -> str:
        known = [experiment.name for experiment in self._client.search_experiments(max_results=1000)]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known[:10])}"

    def _summary(self, run: Any) -> dict[str, Any]:
        if not self._has(run, RESULTS):
            raise ValueError(
                f"run {run.info.run_id} ({run.info.run_name}) must have {RESULTS} among its artifacts in "
                f"{run.info.artifact_uri}, got none; `mixflow run` or `mixflow report` makes it"
            )
        try:
            summary: dict[str, Any] = json.loads(self._artifact(run, RESULTS))
            complete = all(summary[key] for key in ("arms", "primary", "protocol"))
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            raise ValueError(
                f"run {run.info.run_id} must have a {RESULTS} with arms, primary cell and protocol, got another; "
                "`mixflow report` makes it anew"
            )
        return summary

    def _children(self, run: Any) -> list[Any]:
        where, found, token = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", [], None
        while True:
            page = self._client.search_runs([run.info.experiment_id], where, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _seed(self, child: Any) -> TrackedSeed:
        curves = {}
        for key in CURVES:
            if key in child.data.metrics:
                history = self._client.get_metric_history(child.info.run_id, key)
                curves[key] = sorted((metric.step, metric.value) for metric in history)
        tags = child.data.tags
        return TrackedSeed(
            child.info.run_id,
            self._page(child),
            tags["mixflow.arm"],
            int(tags["mixflow.replicate"]),
            child.data.params,
            child.data.metrics,
            curves,
        )

    def _has(self, run: Any, path: str) -> bool:
        return any(file.path == path for file in self._client.list_artifacts(run.info.run_id))

    def _artifact(self, run: Any, path: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="mixflow-") as scratch:
            return Path(self._client.download_artifacts(run.info.run_id, path, scratch)).read_bytes()

    def _page(self, run: Any) -> str | None:
        """The run's page in MLflow's UI, without the credentials of a tracking URI; None where no server is."""
        if not is_http(self._uri):
            return None
        parts = urlsplit(self._uri)
        server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
        page = f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        return f"{page}?workflowType=machine_learning"  # MLflow 3 has another menu for language models
