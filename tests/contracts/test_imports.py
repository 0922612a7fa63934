"""Who may import what: the three packages point in one direction, and heavy libraries live in one file each.

Read from the syntax trees, so imports inside functions count.
"""

from __future__ import annotations

import ast
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mixflow_core", "workers", "orchestration")

# package -> what it may import besides itself and the standard library, anywhere in it
ALLOWED = {
    "mixflow_core": {"torch"},
    "workers": {"mixflow_core", "torch", "numpy", "pyarrow", "pydantic", "safetensors", "PIL", "sklearn"},
    "orchestration": {
        "mixflow_core", "workers", "ray", "pydantic", "yaml", "pyarrow", "matplotlib", "jinja2", "tqdm",
        "psutil",
    },
}  # fmt: skip
# what only these files may import
WORKERS = ("worker", "stages", "measuring", "objective", "site", "nodes")  # of orchestration, what runs on a worker
CONFINED = {
    "torchdiffeq": ["mixflow_core/samplers.py"],
    "diffusers": ["workers/*.py"],
    "transformers": ["workers/*.py"],
    "peft": ["workers/*.py"],
    "boto3": ["orchestration/s3_client.py"],
    "botocore": ["orchestration/s3_client.py"],
    # one makes the client, one writes, one reads
    "mlflow": [f"orchestration/{name}.py" for name in ("mlflow_server", "tracking", "tracked")],
    "psycopg2": ["orchestration/mlflow_server.py"],
    "optuna": ["orchestration/space.py"],
    # WORKERS' files and encode.py's Worker run on a worker; the others ask torch about the machine (DRIVER_TORCH).
    "orchestration:torch": [f"orchestration/{name}.py" for name in (*WORKERS, "encode", "cluster", "doctor")],
    "orchestration:numpy": ["orchestration/measuring.py"],
    # run.py writes the weights of a base that was given.
    "orchestration:safetensors": [f"orchestration/{name}.py" for name in (*WORKERS, "run")],
}
# Devices, threads, and the meta device to count parameters: all that the driver may use of torch.
DRIVER_TORCH = {
    "torch.cuda", "torch.cuda.device_count", "torch.cuda.is_available", "torch.cuda.get_device_name", "torch.device",
    "torch.set_num_threads",
}  # fmt: skip
ONE_FILE = ("diffusers", "transformers", "peft", "boto3", "torchdiffeq")
# The core computes: no files, processes, network, environment, clock or random numbers of its own.
CORE_STDLIB = {
    "__future__", "abc", "collections", "contextlib", "dataclasses", "enum", "functools", "hashlib", "itertools",
    "math", "operator", "typing",
}  # fmt: skip


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(module: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import, those by name through importlib included."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, package if node.level else (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"line {node.lineno}: a computed import cannot be checked"
            yield node.lineno, str(name.value).split(".")[0]


def violations(package: str, path: str, module: ast.Module) -> list[str]:
    found = []
    for line, name in imported(module, package):
        places = CONFINED.get(f"{package}:{name}") or CONFINED.get(name)
        if name == package:
            allowed = True
        elif name in sys.stdlib_module_names:
            allowed = package != "mixflow_core" or name in CORE_STDLIB
        elif places is not None:
            allowed = any(fnmatch.fnmatch(path, place) for place in places)
        else:
            allowed = name in ALLOWED[package]
        if not allowed:
            found.append(f"{path}:{line} imports {name}")
    return found


def global_randomness(path: str, module: ast.Module) -> list[str]:
    """Draws from torch's global generator, and whatever else depends on the process instead of the arguments."""
    draws = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
    in_place = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_"}
    without_generator = {"rand_like", "randn_like", "randint_like", "dropout", "poisson"}
    forbidden = {f"torch.{name}" for name in ("manual_seed", "seed", "set_rng_state", "random", "cuda", "load", "save")}
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in forbidden:
            found.append(f"{path}:{node.lineno} uses {ast.unparse(node)}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rsplit(".", 1)[-1]
        has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
        if (
            (name.startswith("torch.") and last in draws and not has_generator)
            or (last in in_place and not has_generator)
            or last in without_generator
            or name in ("open", "print", "input", "exec", "eval")
        ):
            found.append(f"{path}:{node.lineno} calls {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_table(package):
    assert sources(package), f"{package} has no sources under {ROOT}"
    found = [
        violation
        for path in sources(package)
        for violation in violations(package, path.relative_to(ROOT).as_posix(), tree(path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("library", ONE_FILE)
def test_a_heavy_library_lives_in_one_file(library):
    users = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in sources(package)
        if library in {name for _, name in imported(tree(path), package)}
    }
    assert len(users) <= 1, users


def test_the_driver_computes_with_no_tensor():
    found = [
        f"{path.name}:{node.lineno} uses {ast.unparse(node)}"
        for path in sources("orchestration")
        if path.stem not in WORKERS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.")
        if ast.unparse(node) not in DRIVER_TORCH
    ]
    assert not found, "\n".join(found)


def test_the_core_has_no_randomness_or_files_of_its_own():
    found = [v for path in sources("mixflow_core") for v in global_randomness(path.name, tree(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("mixflow_core/x.py", "import numpy"),
        ("mixflow_core/x.py", "def f():\n    import ray"),
        ("mixflow_core/x.py", "from workers.config import RunConfig"),
        ("mixflow_core/x.py", "import os"),
        ("mixflow_core/x.py", "from time import monotonic"),
        ("mixflow_core/x.py", "import torchdiffeq"),
        ("workers/x.py", "import mlflow"),
        ("workers/x.py", "import torchvision"),
        ("workers/x.py", "import torch_fidelity"),
        ("workers/x.py", "if True:\n    from ray import train"),
        ("workers/x.py", "import orchestration.storage"),
        ("workers/x.py", "import importlib\nimportlib.import_module('boto3')"),
        ("orchestration/x.py", "import boto3"),
        ("orchestration/x.py", "from mlflow.tracking import MlflowClient"),
        ("orchestration/x.py", "import torch"),
        ("orchestration/x.py", "import sklearn"),
    ],
)
def test_the_table_refuses(path, code):
    assert violations(path.split("/")[0], path, ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "torch.manual_seed(0)",
        "torch.randn(3)",
        "x = torch.rand(2, dtype=torch.float32)",
        "torch.randn_like(x)",
        "x.normal_()",
        "open('file')",
        "seed = torch.manual_seed",
    ],
)
def test_global_randomness_is_recognised(code):
    assert global_randomness("x.py", ast.parse(code))
    assert not global_randomness("x.py", ast.parse("torch.randn(3, generator=g); torch.Generator().manual_seed(1)"))
