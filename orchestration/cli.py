"""The command line: `mixflow VERB EXPERIMENT [--set dotted.key=value ...] [--json]`."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from orchestration.experiment import Experiment

DONE, FAILED, WRONG_INPUT = 0, 1, 2

# verb: (what it says of itself, the stages it is for; None for all)
STAGE_VERBS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "encode": ("the data: images to Parquet shards of pixels or latents", ("data",)),
    "run": ("the whole workflow; running it again resumes and skips what is done", None),
    "train": ("data, base and arms", ("arms",)),
    "slow-flow": ("the Slow Flow measurement of the base, of an arm or of a checkpoint", ("slow-flow/base",)),
    "sample": ("samples of every arm, with what they need", ("samples",)),
    "evaluate": ("metrics of every arm, with what they need", ("metrics",)),
}


EXPORT = "a run's weights in its family's layout, its samples for ADM's evaluator, or its mixture for other trainers"
TARGETS = (
    ".pt, .safetensors, for SD3 a directory; for samples .npz; for the mixture .json (SimpleTuner's settings) or .py "
    "(the change to a SiT-style transport, explained)"
)
VERBS = (*STAGE_VERBS, "sweep", "plan", "report", "import", "export", "replay", "submit", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0 (done), 1 (the run failed) or 2 (wrong input)."""
    arguments = _parsed(argv)
    arguments.json |= "--json" in getattr(arguments, "command", ())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if not arguments.debug:
        warnings.simplefilter("ignore")
    where = _where(arguments)
    try:
        with _terminated_like_interrupted(), _stdout_kept_for_json() if arguments.json else nullcontext():
            answer = arguments.act(arguments)
    except Exception as error:
        if arguments.debug:
            raise
        return _fail(where, error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return FAILED
    if arguments.json:
        print(json.dumps(answer, indent=1))
    return int(answer.get("exit_code", DONE))


def _where(arguments: argparse.Namespace) -> str:
    """What an error message begins with: the experiment, or the verb where there is none or more than one."""
    named = getattr(arguments, "experiment", None)
    names = [named] if isinstance(named, str) else named or []
    return names[0] if len(names) == 1 else str(arguments.verb)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """While the block runs, SIGTERM does what Ctrl-C does: what was begun is ended in order."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stdout_kept_for_json() -> Iterator[None]:
    """Sends to stderr what others print meanwhile: Ray warns on stdout, C code writes to descriptor 1."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _fail(where: str, error: Exception) -> int:
    from orchestration.launch import RunFailedError
    from orchestration.lease import HeldError
    from workers.io import StoppedError
    from workers.manifest import CorruptError

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, StoppedError):
        _say(f"{text}; the same command goes on from there")
        return FAILED
    _say(f"error: {text}" if text.startswith(f"{where}:") else f"error: {where}: {text}")
    wrong_input = isinstance(error, ValueError | CorruptError) and not isinstance(error, RunFailedError | HeldError)
    return WRONG_INPUT if wrong_input else FAILED


def _say(line: str) -> None:
    """One line on stderr: what it quotes may be of any length, and control a terminal."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(shown if len(shown) <= 1200 else f"{shown[:800]} ... {shown[-300:]}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """argparse with this project's one-line errors and nearest names."""

    def error(self, message: str) -> NoReturn:
        verb = re.search(r"argument VERB: invalid choice: '([^']*)'", message)
        other = re.search(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if other and not verb:
            message = f"{other[1]} must be one of {other[3]}, got {other[2]!r}"
        if verb:
            close = difflib.get_close_matches(verb[1], VERBS, n=1, cutoff=0.5)
            nearest = f"; did you mean {close[0]!r}?" if close else ";"
            message = f"unknown verb {verb[1]!r}{nearest} known are {', '.join(VERBS)}"
        _say(f"error: {self.prog}: {message}; see {self.prog} --help")
        sys.exit(WRONG_INPUT)


def _parsed(argv: Sequence[str] | None, hint: str = "") -> argparse.Namespace:
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.prog = f"mixflow {arguments.verb}"
        parser.error(f"no such options: {' '.join(unknown)}{hint}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mixflow", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str,
        text: str,
        act: Callable[[argparse.Namespace], dict[str, Any]],
        experiment: bool = True,
        **positional: Any,
    ) -> Any:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(act=act)
        if experiment:
            about = {"metavar": "EXPERIMENT", "help": "a recipe's name or a YAML file", **positional}
            sub.add_argument("experiment", **about)
            sub.add_argument(
                "--set",
                dest="overrides",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="override a dotted key",
            )
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout, all else on stderr")
        sub.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        return sub

    for name, (text, _) in STAGE_VERBS.items():
        sub = verb(name, text, _run)
        sub.add_argument("--resume", action="store_true", help="fail if there is nothing to resume")
        sub.add_argument(
            "--force", action="append", default=[], metavar="STAGE", help="redo a stage or all stages of a kind"
        )
        if name == "slow-flow":
            sub.add_argument("arm", nargs="?", metavar="ARM", help="an arm that trains; the base at first")
            sub.add_argument("--checkpoint", metavar="URI", help="of the experiment's model, in place of its base")
            sub.add_argument("--sha256", metavar="HASH", help="of --checkpoint")
    sub = verb("sweep", "a search over keys of the run, beside the controls; running it again goes on", _sweep)
    space: dict[str, Any] = {"action": "append", "default": [], "metavar": "KEY=LAW"}
    space["help"] = "a key to search, such as mixture.gamma=uniform(0.2,1.0)"
    sub.add_argument("--space", **space)
    sub.add_argument("--resume", action="store_true", help="fail if there is nothing to resume")
    sub.add_argument(
        "--confirm", action="store_true", help="run the best beside its controls with replicates, and register it"
    )
    sub = verb("plan", "check everything and show what a run, or a sweep, would do, without doing it", _plan)
    sub.add_argument("--space", **space)
    sub.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches, for the hours")
    sub.add_argument("--peak-tflops", type=float, help="of a device, for the hours; an H100's in training.precision")
    report = verb(
        "report",
        "the report of an experiment anew, from the workspace; or a comparison of finished runs, from MLflow alone",
        _report,
        nargs="+",
        metavar="EXPERIMENT|RUN",
        help="one recipe's name or YAML file; or MLflow runs: ids, or names of experiments (the newest finished run)",
    )
    report.add_argument("--output", metavar="FILE", help="the page of a comparison, ./comparison.html if not given")
    report.add_argument("--one-table", action="store_true", help="refuse to compare runs of unequal protocols")
    convert = verb("import", "a published checkpoint to one file, with the sections that use it", _import, False)
    convert.add_argument("source", metavar="SOURCE", help="a .pt or .safetensors file, or a diffusers directory of SD3")
    convert.add_argument("target", metavar="TARGET", help="the file to write, .safetensors or .pt")
    convert.add_argument("--family", choices=("sit", "repa", "rae"), help="where the file does not say it")
    convert.add_argument(
        "--set", dest="given", action="append", default=[], metavar="KEY=VALUE", help="what the file does not say"
    )
    export = verb("export", EXPORT, _export)
    export.add_argument("arm", metavar="ARM", help="an arm that trains, or for weights base; for samples any arm")
    export.add_argument("target", metavar="TARGET", help=TARGETS)
    export.add_argument("--cell", metavar="CELL", help="of samples, such as euler20/s1; the primary one at first")
    export.add_argument("--replicate", type=int, default=0, metavar="K", help="which of its runs, 0 at first")
    export.add_argument("--adapters", action="store_true", help="of a LoRA run, the adapters alone")
    verb("replay", "send MLflow what it has not seen", _replay, experiment=False)
    sub = verb("submit", "a verb as a Ray job, followed to its end; its exit code is the job's", _submit, False)
    sub.add_argument("--address", metavar="URL", help="of Ray's job server; that of docker/compose.yaml at first")
    sub.add_argument("--dry-run", action="store_true", help="make the package and print the `ray job submit` line")
    sub.add_argument("command", nargs=argparse.REMAINDER, metavar="-- VERB ...", help="such as -- run quickstart")
    about = "look at Ray, GPUs, object storage, MLflow, versions, and all nodes of a cluster, and say how to mend them"
    sub = verb("doctor", about, _doctor, False)
    sub.add_argument("--init-env", action="store_true", help="write docker/.env, the passwords of docker/compose.yaml")
    return parser


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration import mlflow_server
    from orchestration.recipe import load
    from orchestration.report import slow_flow_table
    from orchestration.run import open_place, run_experiment

    names = STAGE_VERBS[arguments.verb][1]
    experiment = load(arguments.experiment, [*arguments.overrides, *_checkpoint(arguments)])
    if getattr(arguments, "arm", None):
        names = (_measured_arm(experiment, arguments.arm),)
    outcome = run_experiment(
        experiment,
        open_place(),
        targets=lambda stage: names is None or stage.name in names or stage.kind in names,
        force=tuple(arguments.force),
        resume=arguments.resume,
    )
    if not arguments.json:
        if "table" in outcome:
            print(outcome["table"])
        elif "slow_flow" in outcome:
            print(slow_flow_table(outcome["slow_flow"]))
            print(f"JSON:    {outcome['slow_flow']['measured']}")
            print(f"plot:    {outcome['slow_flow']['plot']}")
        if "data" in outcome:
            _say_data(outcome["data"])
        for name, uri in (outcome.get("weights") or outcome.get("samples") or {}).items():
            print(f"{name}: {uri}")
        if "report" in outcome:
            print(f"report:  {outcome['report']}")
        print(f"MLflow:  {mlflow_server.ui_command(outcome['tracking']['uri'])}")
    return outcome


def _checkpoint(arguments: argparse.Namespace) -> list[str]:
    """The settings by which `slow-flow --checkpoint` stands for the base."""
    given = [getattr(arguments, name, None) for name in ("checkpoint", "sha256")]  # of slow-flow alone
    if given == [None, None]:
        return []
    if None in given:
        raise ValueError("--checkpoint and --sha256 must be given together; sha256sum FILE prints it")
    if not re.fullmatch("[0-9a-f]{64}", str(given[1])):
        raise ValueError(f"--sha256 must be 64 hexadecimal digits, got {given[1]!r}; sha256sum FILE prints them")
    if arguments.arm:
        raise ValueError(f"--checkpoint must be left out for an arm, got both it and {arguments.arm!r}; choose one")
    path = json.dumps(given[0])  # YAML that reads as text whatever is in it
    return ["base.train=", f"base.checkpoint={path}", f"base.sha256={given[1]}", "bases=1", "replicates=2"]


def _measured_arm(experiment: Experiment, arm: str) -> str:
    """The stage that measures an arm's Slow Flow."""
    trained = ["base", *(name for name, its in experiment.arms.items() if its.train)]
    if arm not in trained:
        raise ValueError(f"the arm to measure must be one of {', '.join(trained)}, got {arm!r}")
    return f"slow-flow/{arm}"


def _sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration import mlflow_server
    from orchestration.confirm import confirm, write_best
    from orchestration.recipe import load
    from orchestration.run import open_place
    from orchestration.sweep import run_sweep

    experiment = load(arguments.experiment, arguments.overrides, spaces=arguments.space)
    place = open_place()
    outcome = run_sweep(experiment, place, resume=arguments.resume)
    if not arguments.json:
        print(outcome["table"])
        print(f"figure:  {outcome['figure']}", flush=True)
    if outcome["best"]:
        outcome["best_file"] = write_best(experiment, outcome, place)
        if not arguments.json:
            print(f"best:    {outcome['best_file']}, an experiment whose arm best has its parameters", flush=True)
    if arguments.confirm and outcome["best"]:
        outcome["confirmed"] = confirm(experiment, outcome, place)
    if not arguments.json:
        if "confirmed" in outcome:
            print(outcome["confirmed"]["table"])
            print(f"report:  {outcome['confirmed']['report']}")
        print(f"MLflow:  {mlflow_server.ui_command(outcome['tracking']['uri'])}")
    return {**outcome, "exit_code": DONE if outcome["best"] else FAILED}


def _say_data(data: Mapping[str, Any]) -> None:
    """Where encoded data lie, and which images are not among them."""
    print(f"data:    {data['uri']} ({_count(data)})")
    for found in data["unreadable"][:20]:
        print(f"unreadable, left out: {found['name']} ({found['reason']})")
    if len(data["unreadable"]) > 20:
        print(f"unreadable, left out: {len(data['unreadable'])} in all, listed in {data['uri']}/unreadable.json")


def _count(data: Mapping[str, Any]) -> str:
    """How many images there are, and where that is another number than was in their source, why."""
    count, listed, unreadable = data["num_images"], data["num_in_source"], len(data["unreadable"])
    if listed in (None, count) and not unreadable:
        return f"{count:,} images"
    mirrored = " with mirrored copies" if count > listed - unreadable else ""
    lost = f", {unreadable:,} of them unreadable" if unreadable else ""
    return f"{count:,} images{mirrored}, of {listed:,} in the source{lost}"


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration.plan import cost_lines, costs, make_plan, plan_text
    from orchestration.recipe import filled, read, to_be_given, validated
    from orchestration.run import open_place

    for name, most in (("mfu", 1.0), ("peak_tflops", 1e6)):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= most:
            raise ValueError(f"--{name.replace('_', '-')} must lie in (0, {most:g}], got {value}; correct it")
    raw = read(arguments.experiment, arguments.overrides, arguments.space)
    missing = to_be_given(raw)
    if missing:
        plan = costs(validated(arguments.experiment, filled(raw)))
        if not arguments.json:
            print("\n".join(cost_lines(plan, arguments.mfu, arguments.peak_tflops)))
        print(f"error: {arguments.experiment}: to be given: {', '.join(missing)}; add --set KEY=VALUE", file=sys.stderr)
        return {**plan, "to_be_given": missing, "exit_code": WRONG_INPUT}
    experiment = validated(arguments.experiment, raw)
    plan = make_plan(experiment, open_place())
    if experiment.sweep:
        from orchestration.sweep_report import budget
        from orchestration.trials import check_space

        plan["sweep"] = budget(experiment, check_space(experiment), arguments.mfu, arguments.peak_tflops)
    if not arguments.json:
        print(plan_text(plan, arguments.mfu, arguments.peak_tflops))
        if "sweep" in plan:
            print(f"\nsweep       {plan['sweep']['text']}")
    return plan


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration.recipe import recipes

    names = arguments.experiment
    if len(names) == 1 and (names[0] in recipes() or names[0].endswith((".yaml", ".yml"))):
        if arguments.output or arguments.one_table:
            raise ValueError(
                "--output and --one-table must be left out for an experiment; they are for MLflow runs: "
                "name the run's id"
            )
        return _remake_report(names[0], arguments)
    file = next((name for name in names if name.endswith((".yaml", ".yml"))), None)
    if file is not None:
        raise ValueError(f"{file} must be the only argument, got {len(names)}; name its MLflow experiment instead")
    if arguments.overrides:
        raise ValueError(f"--set must be left out for MLflow runs, got {arguments.overrides[0]!r}; they are finished")
    return _compare(names, arguments)


def _remake_report(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration.recipe import load
    from orchestration.run import open_place, run_experiment
    from orchestration.workflow import Workspace

    experiment, place = load(name, arguments.overrides), open_place()
    workspace = Workspace(experiment, place.storage)
    missing = [stage.name for stage in workspace.pending(list(workspace.stages.values())) if stage.kind != "report"]
    if missing:
        raise ValueError(
            f"report must have finished stages to read, but {missing[0]} is still to do ({len(missing)} in all); "
            f"run `mixflow run {name}` with the same --set"
        )
    outcome = run_experiment(experiment, place, force=("report",))
    if not arguments.json:
        print(outcome["report"])
    return outcome


def _compare(names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration.comparison import write_comparison
    from orchestration.mlflow_server import default_tracking_uri
    from orchestration.recipe import recipes
    from orchestration.run import open_workspace
    from orchestration.tracked import read_experiments

    try:
        experiments = read_experiments(default_tracking_uri(open_workspace()), names)
    except ValueError as error:
        close = difflib.get_close_matches(names[0], recipes(), n=1, cutoff=0.8)
        if len(names) > 1 or not close:
            raise
        raise ValueError(
            f"unknown recipe {names[0]!r}; did you mean {close[0]!r}? As an MLflow run: {error}"
        ) from error
    answer = write_comparison(experiments, Path(arguments.output or "comparison.html"), one_table=arguments.one_table)
    if not arguments.json:
        print(answer["comparison"])
    return answer


def _import(arguments: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from orchestration.convert import import_weights
    from orchestration.recipe import parse_overrides

    given = parse_overrides(arguments.given)
    answer = import_weights(Path(arguments.source), Path(arguments.target), family=arguments.family, given=given)
    if not arguments.json:
        print(yaml.safe_dump(answer, sort_keys=False, default_flow_style=None, width=120), end="")
    return answer


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration.convert import export_mixture, export_samples, export_weights
    from orchestration.recipe import load
    from orchestration.run import open_place

    experiment, target = load(arguments.experiment, arguments.overrides), Path(arguments.target)
    kind = {".json": "settings", ".py": "settings", ".npz": "samples"}.get(target.suffix, "weights")
    for option, of in (("cell", "samples"), ("adapters", "weights")):
        if getattr(arguments, option) and kind != of:
            raise ValueError(f"--{option} must be left out where {kind} are written, got it with {target}; remove it")
    if kind == "settings":
        answer = export_mixture(experiment, arguments.arm, target)
        if not arguments.json:
            print(f"{answer['stage']}: {answer['written']}")
            print("".join(f"no counterpart: {text}\n" for text in answer.get("no_counterpart", ())), end="")
        return answer
    which = experiment, open_place(), arguments.arm, arguments.replicate
    if kind == "samples":
        answer = export_samples(*which, arguments.cell, target)
    else:
        answer = export_weights(*which, target, adapters=arguments.adapters)
    if not arguments.json:
        print(f"{answer['stage']}: {answer['written']}")
    return answer


def _replay(arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration.lease import HeldError, hold
    from orchestration.mlflow_server import without_password
    from orchestration.run import open_place
    from orchestration.spool import list_spools
    from orchestration.tracking import replay

    place = open_place()
    answer: dict[str, Any] = {"tracking": without_password(place.tracking_uri), "spools": [], "running": []}
    for spool in list_spools(place.storage):
        name = spool.rpartition("/")[2]
        kind = "sweeps" if place.storage.exists(f"sweeps/{name}/experiment.json") else "experiments"
        try:
            with hold(place.storage, f"{kind}/{name}/lease.json", spool):
                found = replay(place.storage, place.tracking_uri, spool)
        except HeldError:
            answer["running"].append(spool)
            if not arguments.json:
                print(f"{spool}: its run is at work and sends its events itself")
            continue
        answer["spools"].append({"spool": spool, **asdict(found)})
        if not arguments.json:
            refused = f" ({found.rejected} of them refused, kept in {spool}/rejected)" if found.rejected else ""
            print(f"{spool}: {found.sent} events sent{refused}, {found.pending} still waiting")
    if not (answer["spools"] or answer["running"] or arguments.json):
        print(f"no spool in {place.storage.uri}: nothing to send")
    pending = sum(spool["pending"] for spool in answer["spools"])
    return {**answer, "exit_code": FAILED if pending else DONE}


def _submit(arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration.recipe import load, relative_paths
    from orchestration.submit import check_verb, known_environment, refuse_secrets, submit
    from orchestration.trials import check_space

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    check_verb(command)
    refuse_secrets(command, known_environment())  # before any message quotes it
    its = _parsed(command, " (submit's own go before its verb)")
    if its.verb in (*STAGE_VERBS, "sweep"):  # what is wrong in the words is said here, not by a job minutes later
        overrides = [*its.overrides, *_checkpoint(its)]
        experiment = load(its.experiment, overrides, getattr(its, "space", ()))
        for where, path in relative_paths(its.experiment, overrides).items():
            raise ValueError(
                f"{where} must be an s3:// URI or an absolute path on a disk that all nodes see in a job, got {path!r}"
            )
        if its.verb == "sweep":
            check_space(experiment)
    answer = submit(command, arguments.address, dry_run=arguments.dry_run, as_json=arguments.json)
    if arguments.dry_run and not arguments.json:
        print(answer["command"])
    return answer


def _doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    from orchestration.doctor import examine, init_env

    if arguments.init_env:
        answer = init_env()
        if not arguments.json:
            print(f"{answer['written']}: fresh passwords; docker compose -f docker/compose.yaml up -d uses them")
        return answer
    findings = examine(dict(os.environ))
    if not arguments.json:
        for finding in findings:
            print(f"{'ok  ' if finding['ok'] else 'FAIL'}  {finding['what']:<14} {finding['says']}")
    return {"findings": findings, "exit_code": DONE if all(f["ok"] for f in findings) else FAILED}


if __name__ == "__main__":
    sys.exit(main())
