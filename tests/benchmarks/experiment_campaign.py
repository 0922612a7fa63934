"""Random experiments, made by spoiling real ones: each is a valid experiment, or one line that names what is wrong.

    python tests/benchmarks/experiment_campaign.py --experiments 5000

An experiment is a recipe with a few changes: values of other types and sizes, keys taken away, added, misspelt or
nested, lists cut and mixed, characters struck out of the file or put in, and `--set` of anything anywhere. It is given
to `mixflow run`, up to where the run would begin. It passes when the command takes it and it survives being written
and read (an equal experiment of the same identity), or when the command ends with exit code 2 and one `error:` line
that names a key of the experiment; always in less than a second of CPU time. Hypothesis draws them, in batches that
are functions of their number. Each batch is one JSON line in the result file, and a campaign that was stopped goes on
after the batches there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from campaigns import append_result, read_results
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from orchestration import cli, run
from orchestration.experiment import Experiment
from orchestration.recipe import filled, read, recipes

RESULTS = Path(__file__).parent / "results" / "experiment_campaign.jsonl"
BATCH = 250
LONGEST_S, LONGEST_LINE = 1.0, 2000

BASES = {name: filled(read(name)) for name in recipes()}
NUMBERS = [0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**53 + 1, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308]
WORDS = ["", " ", "x", "true", "null", "1e5", "0x10", "..", "/etc/passwd", "s3://", "s3://b/../c", "file://x", "é",
         "\u202e", "\u2028", "\U0001f600", "\ud800", "\x00", "a\nb", "\x1b[31m", "!!python/object:os.system x",
         "TO-BE-GIVEN", "${HOME}", "{{ 1 }}", "<<", "*a", "&a", "x" * 5000, "9" * 5000, "١٢"]  # fmt: skip
TEXTS = ["", " ", "[", "{", "[1, 2", "{a: 1}", "[[]]", "~", "1e400", ".nan", "-.inf", "1_000", "0b11", "1:30",
         "2026-99-99", "2026-01-01", "!!python/object/apply:os.getcwd []", "!!binary aGk=", "!!set {a}", "&a [*a]",
         "*a", "{1: 2, [3]: 4}", "{? {a: 1} : 2}", "{<<: {a: 1}}", "{<<: 3}", "'", '"\\ud800"', "9" * 5000,
         "[" * 400, "{a: " * 400, "x" * 5000, "%", "@x", "`x", "? x", "- 1", "---", "...", "a: b: c",
         "\t", "é", "\u2028", "\x07"]  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=20),
    st.dates(),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | SCALARS, inner, max_size=3),
    max_leaves=6,
)
Path_ = tuple[Any, ...]


def paths_of(value: Any, at: Path_ = ()) -> list[Path_]:
    """Where every section, list and value of a nested setting lies."""
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, its in inner for path in paths_of(its, (*at, key)))]


PATHS = {name: paths_of(base)[1:] for name, base in BASES.items()}


@st.composite
def spoilt(draw: Any) -> tuple[str, list[str]]:
    """The text of an experiment file and `--set` arguments."""
    name = draw(st.sampled_from(sorted(BASES)))
    raw = json.loads(json.dumps(BASES[name]))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        _change(draw, raw)
    try:
        text = json.dumps(raw) if draw(st.booleans()) else yaml.safe_dump(raw, allow_unicode=draw(st.booleans()))
    except (TypeError, ValueError, yaml.YAMLError):  # a date, or what YAML cannot say
        text = yaml.dump(json.loads(json.dumps(raw, default=str, skipkeys=True)))
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2]))):
        place = draw(st.integers(0, len(text)))
        inserted = draw(
            st.sampled_from(["", " ", ":", "-", "[", "}", "&a ", "*a", "!!x ", "\t", "\n", "'", "#", "é", "\x00"])
        )
        text = text[:place] + inserted + text[place + draw(st.integers(0, 2)) :]
    return text, [_override(draw, name) for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2])))]


def _change(draw: Any, raw: dict[str, Any]) -> None:
    """One change of nested settings, in place."""
    places = paths_of(raw)[1:]
    if not places:
        return
    *parents, last = draw(st.sampled_from(places))
    target: Any = raw
    for key in parents:
        target = target[key]
    kind = draw(
        st.sampled_from(
            ["junk", "number", "scale", "scale", "scale", "remove", "add", "misspell", "nest", "list", "swap"]
        )
    )
    if kind == "junk":
        target[last] = draw(JUNK)
    elif kind == "number":
        target[last] = draw(st.sampled_from(NUMBERS) | st.floats(0, 2) | st.integers(0, 100))
    elif kind == "scale" and isinstance(target[last], int | float):
        target[last] = draw(st.sampled_from([target[last] * 2, target[last] / 2, target[last] // 2, target[last] + 1]))
    elif kind == "remove":
        del target[last]
    elif kind == "add" and isinstance(target, dict):
        target[draw(st.sampled_from(WORDS) | st.sampled_from([str(path[-1]) for path in places]))] = draw(JUNK)
    elif kind == "misspell" and isinstance(target, dict):
        target[f"{last}{draw(st.sampled_from(['s', '_', '.', ' ', 'é']))}"] = target.pop(last)
    elif kind == "nest":
        target[last] = draw(st.sampled_from([[target[last]], {"x": target[last]}, {str(last): target[last]}]))
    elif kind == "list" and isinstance(target[last], list):
        target[last] = draw(st.sampled_from([[], target[last] * 2, [*target[last], None], target[last][:1], {"0": 1}]))
    elif kind == "swap":
        other: Any = raw
        for key in draw(st.sampled_from(places)):
            other = other[key] if isinstance(other, dict | list) and _has(other, key) else other
        target[last] = json.loads(json.dumps(other, default=str, skipkeys=True))


def _has(value: Any, key: Any) -> bool:
    return key in value if isinstance(value, dict) else isinstance(key, int) and key < len(value)


def _override(draw: Any, name: str) -> str:
    """A `--set` argument: nearly always of a key that is there, or of one beside it."""
    key = ".".join(str(part) for part in draw(st.sampled_from(PATHS[name])))
    key = draw(st.sampled_from([key, key, key, f"{key}.x", f"{key}.0", f"{key}.", f".{key}", f"{key}s", key.upper(),
                                "scale", "mixflow_gamma", "extends", "scales.a", "sweep.space.training.steps",
                                "a." * 2000 + "b", f"{key}.{'9' * 5000}", "\ud800", ""]))  # fmt: skip
    value = draw(st.sampled_from(TEXTS) | st.sampled_from([str(number) for number in NUMBERS]) | st.text(max_size=8))
    return draw(st.sampled_from([f"{key}={value}"] * 9 + [f"{key}{value}"]))


# ------------------------------------------------------------------------------------------------------------ verdicts


def keys_of(section: Any) -> set[str]:
    """All keys of a configuration class and the classes in it."""
    found: set[str] = set()
    if isinstance(section, type) and (issubclass(section, BaseModel) or hasattr(section, "__dataclass_fields__")):
        fields = getattr(section, "model_fields", None) or section.__dataclass_fields__  # type: ignore[attr-defined]
        for name, field in fields.items():
            found |= {name} | keys_of(getattr(field, "annotation", None) or getattr(field, "type", None))
    for inner in getattr(section, "__args__", ()):
        found |= keys_of(inner)
    return found


KEYS = keys_of(Experiment) | {"extends", "scale", "scales", "mixflow_gamma"}


def judge(text: str, overrides: list[str], file: Path) -> tuple[str, float]:
    """What `mixflow run` makes of an experiment: `valid`, `refused`, or what is wrong with that; with CPU seconds."""
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    taken: list[Experiment] = []

    def begin(experiment: Experiment, *_: Any, **__: Any) -> dict[str, Any]:
        taken.append(experiment)
        return {"tracking": {"uri": ""}}

    out, err = io.StringIO(), io.StringIO()
    argv = ["run", str(file), *(f"--set={override}" for override in overrides)]
    with (
        mock.patch.object(run, "run_experiment", begin),
        mock.patch.object(run, "open_place"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        start = time.process_time()
        try:
            code = cli.main(argv)
        except BaseException as error:
            return f"raised {type(error).__name__}: {str(error)[:200]}", time.process_time() - start
        seconds = time.process_time() - start
    if seconds > LONGEST_S:
        return f"took {seconds:.2f} s", seconds
    if taken:
        return (_unlike_itself(taken[0]) if code == 0 else f"exit code {code}") or "valid", seconds
    return _misworded(code, out.getvalue(), err.getvalue(), file) or "refused", seconds


def _unlike_itself(experiment: Experiment) -> str:
    again = Experiment.model_validate_json(experiment.model_dump_json())
    return (
        "" if again == experiment and again.identity == experiment.identity else "another after being written and read"
    )


def _misworded(code: int, out: str, err: str, file: Path) -> str:
    line = err.removesuffix("\n")
    if code != 2 or out:
        return f"exit code {code}: {line[:300]!r}"
    if len(line.splitlines()) != 1 or not line.isprintable() or not line.startswith("error: "):
        return f"not one line: {line[:300]!r}"
    if len(line) > LONGEST_LINE:
        return f"a line of {len(line)} characters: {line[:200]!r}"
    said = line.removeprefix(f"error: {file}: ").replace(str(file), "")
    said = said.partition(", got ")[0]  # what was got may be anything, keys of the file among it
    is_whole = re.search(
        "file must|a key of the file must", said
    )  # the file is no YAML, or its top level is none of ours
    is_junk = said.split(".")[0].partition(" must ")[0] in WORDS  # a key that the file has and no experiment knows
    if "--set" not in said and not is_whole and not is_junk and not set(re.findall(r"\w+", said)) & KEYS:
        return f"names no key: {line[:300]!r}"
    return ""


def play(examples: int, number: int | None, directory: Path) -> dict[str, Any]:
    """A batch of experiments, those of `number`; for None always those that hypothesis thinks of first."""
    counts, faults, slowest = Counter[str](), list[dict[str, Any]](), 0.0

    def one(drawn: tuple[str, list[str]]) -> None:
        nonlocal slowest
        found, seconds = judge(*drawn, directory / "experiment.yaml")
        slowest = max(slowest, seconds)
        counts[found if found in ("valid", "refused") else "faults"] += 1
        if found not in ("valid", "refused"):
            faults.append({"found": found, "text": drawn[0], "set": drawn[1]})

    profile = settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    test = profile(given(spoilt())(one))
    (test if number is None else seed(number)(test))()
    return {"batch": number, **{name: counts[name] for name in ("valid", "refused", "faults")},
            "slowest_s": round(slowest, 3), "found": faults}  # fmt: skip


def main() -> int:
    """Command line; 1 if any experiment was neither valid nor refused as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=5000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    batches = read_results(options.results)
    with tempfile.TemporaryDirectory(prefix="mixflow-experiments-") as name:
        while (
            made := sum(entry["valid"] + entry["refused"] + entry["faults"] for entry in batches)
        ) < options.experiments:
            batches.append(play(min(BATCH, options.experiments - made), len(batches), Path(name)))
            append_result(options.results, batches[-1])
            print({key: value for key, value in batches[-1].items() if key != "found"}, flush=True)
    total = {key: sum(entry[key] for entry in batches) for key in ("valid", "refused", "faults")}
    print(f"{sum(total.values())} experiments: {total}, the slowest took {max(e['slowest_s'] for e in batches)} s")
    return 1 if total["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
