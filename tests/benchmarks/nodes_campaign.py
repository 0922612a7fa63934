"""Kills nodes of a Ray cluster, and cuts them off, while a run goes on; compares its result with that of a quiet run.

    python tests/benchmarks/nodes_campaign.py --rounds 10      # as root, with iproute2

Every node has a network namespace with an address of its own; artifacts lie on a Ceph RADOS Gateway. A round is one
`mixflow train` of a small quickstart in reproducible mode with `num_workers: [1, 2]`, on a head without CPUs and two
nodes of one CPU. Twice, at random moments, a random node that has a worker is lost: once all of its processes are
killed (`killed`), once it is cut off for good, in random order: its cable is taken out (`cut`, in even rounds), or it
still reaches the store and nobody else (`parted`, in odd ones from the third on). The run has to go on with the one
worker that is left; then another node is added, and the run has to take it in. A round is equal when the SHA-256 of all
files that the run made are those of the quiet run, on two workers and a local disk, and MLflow has heard everything.
`recovered_s` is the time from a loss to the next step in training. Each round is one JSON line in the result file, and
a campaign that was stopped goes on after the rounds that are there. With `--small` one node is killed in fewer steps,
and none comes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "servers"))
sys.path.append(str(Path(__file__).parents[1] / "orchestration"))
import s3_servers
from campaigns import append_result, read_results
from clusters import RESULT_KINDS, Run, small
from netns_nodes import AUTHENTICATION, HOST, STORE, Nodes, network, nodes_of

from orchestration.storage import open_storage

RESULTS = Path(__file__).parent / "results" / "nodes_campaign.jsonl"
LOSSES, STEPS = ("killed", "cut", "parted"), 600  # of each of six arms
STEPS_SMALL = 200


def command(steps: int) -> list[str]:
    """The run of a round."""
    return [
        *("train", "quickstart", "--json"),
        *small(
            replicates=2,
            base__train__reproducible=True,
            training__reproducible=True,
            training__steps=steps,
            training__checkpoint_every=100,
            training__log_every=10,
            cluster__hang_timeout_s=30,
            cluster__max_failures=9,
        ),
    ]


def files_of(workspace: str) -> dict[str, str]:
    """SHA-256 of every file that the run made, by its path in the workspace."""
    storage, found = open_storage(workspace), {}
    for path in (path for kind in RESULT_KINDS for path in storage.list(kind) if path.endswith("/manifest.json")):
        manifest = storage.manifest(path.removesuffix("/manifest.json"))
        assert manifest
        found.update({f"{path}: {name}": entry.sha256 for name, entry in manifest.files.items()})
    return found


def place(run: Run) -> tuple[int, int]:
    """How far the run is: the number of its stage and the step in it, as it tells."""
    found = re.findall(r"stage (\d+)/\d+  arms/\S+ step (\d+)/", run.err.read_text())
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def lose(run: Run, nodes: Nodes, how: str, numbers: random.Random, steps: int) -> dict[str, Any]:
    """Loses a node that has a worker, and waits until the run goes on without it."""
    run.until(lambda: len(nodes.with_workers()) == 2 and place(run)[0], "two workers are at work", 400)
    begin = place(run)
    aim = numbers.randrange(steps // 2)
    run.until(lambda: place(run)[0] > begin[0] or place(run)[1] >= aim, "the step at which a node is lost", 400)
    at, starts, start = place(run), starts_of(run), time.monotonic()
    node = numbers.choice(nodes.with_workers())
    {"killed": nodes.kill, "cut": nodes.cut, "parted": nodes.part}[how](node)
    run.until(lambda: starts_of(run) > starts and place(run) != at, "it goes on without the node", 400)
    return {"how": how, "stage": at[0], "step": at[1], "recovered_s": round(time.monotonic() - start, 1)}


def grow(run: Run, nodes: Nodes, another: int) -> None:
    """Adds a node, and waits until the run has taken it in."""
    nodes.add(another)
    run.until(lambda: len(nodes.with_workers()) == 2, "it takes the new node in", 400)


def starts_of(run: Run) -> int:
    """How often the group of workers began."""
    return max(map(int, re.findall(r"started again \((\d+)\)", run.err.read_text())), default=0)


def play(number: int, bridge: str, wanted: dict[str, str], scratch: Path, *, is_small: bool) -> dict[str, Any]:
    """One round."""
    numbers, directory = random.Random(number), scratch / f"round-{number}"
    workspace = f"s3://{s3_servers.BUCKET}/round-{number}"
    environment = {
        **AUTHENTICATION,
        "NO_PROXY": f"127.0.0.1,{HOST},{STORE}",
        "MIXFLOW_WORKSPACE": workspace,
        "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
    }
    with nodes_of(bridge, scratch / f"nodes-{number}.log", 2, 3) as nodes:
        steps = STEPS_SMALL if is_small else STEPS
        elastic = [*command(steps), "--set", "cluster.num_workers=[1,2]"]
        run = Run(elastic, directory, {**environment, "RAY_ADDRESS": nodes.address})
        lost = []
        off = "parted" if number % 2 and number > 1 else "cut"
        for another, how in enumerate(["killed"] if is_small else numbers.sample(["killed", off], 2), 4):
            lost.append(lose(run, nodes, how, numbers, steps))
            if not is_small:
                grow(run, nodes, another)
        answer = run.answer()
    found = files_of(workspace)
    equal, pending = found == wanted, answer["tracking"]["pending"]
    return {"seed": number, "lost": lost, "files": len(found), "equal": equal, "passed": equal and not pending}


def campaign(results: Path, rounds: int, scratch: Path, *, is_small: bool) -> list[dict[str, Any]]:
    """Plays the rounds that are not in the result file."""
    played = read_results(results)
    workspace = str(scratch / "quiet/workspace")
    Run(command(STEPS_SMALL if is_small else STEPS), scratch / "quiet", {"MIXFLOW_WORKSPACE": workspace}).answer()
    wanted = files_of(workspace)
    print(f"the quiet run made {len(wanted)} files; {len(played)} rounds are there", flush=True)
    with network() as bridge, s3_servers.ceph(scratch / "ceph", STORE) as ceph:
        # Credentials are the nodes' own; this process reads the results.
        os.environ.update(s3_servers.s3_variables(ceph.endpoint))
        for number in range(len(played), rounds):
            played.append(play(number, bridge, wanted, scratch, is_small=is_small))
            append_result(results, played[-1])
            print(json.dumps(played[-1]), flush=True)
    return played


def main() -> int:
    """Command line; 1 if any round was not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--small", action="store_true", help="to be kept in another result file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that nodes, network and servers end too
    with tempfile.TemporaryDirectory(prefix="mixflow-nodes-") as name:
        rounds = campaign(options.results, options.rounds, Path(name), is_small=options.small)
    passed = sum(entry["passed"] for entry in rounds)
    print(f"{passed} of {len(rounds)} rounds equal, {sum(len(entry['lost']) for entry in rounds)} nodes lost")
    for how in LOSSES:
        if not (took := [lost["recovered_s"] for entry in rounds for lost in entry["lost"] if lost["how"] == how]):
            continue
        print(f"{how}: training went on after {median(took):g} s, at most {max(took):g}")
    return 0 if passed == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
