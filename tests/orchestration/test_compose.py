"""docker/compose.yaml by the real Compose, and docker/Dockerfile by hadolint; no engine is needed for either."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestration.doctor import init_env, read_env

ROOT = Path(__file__).parents[2]
SECRETS = ("S3_SECRET_KEY", "POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY", "RAY_AUTH_TOKEN")


def compose(docker: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("docker-compose")
    command = [str(program), "-f", str(docker / "compose.yaml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """A copy of the project's docker/, without an .env."""
    return Path(shutil.copytree(ROOT / "docker", tmp_path / "docker", ignore=shutil.ignore_patterns(".env")))


def resolved(docker: Path, *files: str) -> dict[str, Any]:
    done = compose(
        docker, *(argument for file in files for argument in ("-f", str(docker / file))), "config", "--format=json"
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_without_passwords_nothing_starts(docker: Path) -> None:
    refused = compose(docker, "config", "--quiet")
    assert refused.returncode != 0
    assert refused.stderr.count("\n") <= 1
    assert "run mixflow doctor --init-env first" in refused.stderr
    init_env(docker / ".env")
    complete = (docker / ".env").read_text()
    for name in (*SECRETS, "S3_ACCESS_KEY"):
        (docker / ".env").write_text(re.sub(f"{name}=.*", f"{name}=", complete))
        refused = compose(docker, "config", "--quiet")
        assert refused.returncode != 0, name
        assert f"{name} is missing a value: is not set, run mixflow doctor --init-env" in refused.stderr


def test_every_service_is_fenced_in(docker: Path) -> None:
    init_env(docker / ".env")
    services = resolved(docker)["services"]
    assert sorted(services) == ["bucket", "head", "mlflow", "postgres", "s3", "worker"]
    for name, service in services.items():
        assert int(service["mem_limit"]) > 0, name
        assert re.fullmatch(r"[\w./-]+:\d[\w.-]*", service["image"]), service["image"]  # a tag with a version
        assert service["logging"]["options"]["max-size"], name
        assert not service.get("privileged")
        assert service["restart"] == ("on-failure:5" if name == "bucket" else "unless-stopped")
        assert ("healthcheck" in service) is (name != "bucket")
        for port in service.get("ports", ()):
            assert port["host_ip"] == "127.0.0.1", (name, port)
    assert [name for name, service in services.items() if "ports" in service] == ["head", "mlflow", "s3"]
    assert services["worker"]["deploy"]["replicas"] == 2
    for name in ("head", "worker"):
        assert int(services[name]["shm_size"]) == 2 * 2**30
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
    ours = [services[name] for name in ("bucket", "mlflow", "head", "worker")]
    assert len({service["image"] for service in ours}) == 1
    for service in ours:
        assert service["cap_drop"] == ["ALL"]
    # Built by one alone: exports of one image to one name at once may fail.
    assert [name for name, service in services.items() if "build" in service] == ["head"]
    assert services["head"]["build"]["dockerfile"] == "docker/Dockerfile"
    assert [service.get("pull_policy") for service in ours if "build" not in service] == ["never"] * 3


def test_each_service_has_the_passwords_it_needs_and_none_on_a_command_line(docker: Path) -> None:
    init_env(docker / ".env")
    values = {name: value for name, value in read_env(docker / ".env").items() if name in SECRETS}
    services = resolved(docker)["services"]
    holders: dict[str, list[str]] = {name: [] for name in SECRETS}
    for service, settings in services.items():
        assert not [name for name, value in values.items() if value in json.dumps(settings["command"])]
        for name, value in values.items():
            if value in settings["environment"].values():
                holders[name].append(service)
    assert holders == {
        "S3_SECRET_KEY": ["bucket", "head", "mlflow", "s3", "worker"],
        "POSTGRES_PASSWORD": ["mlflow", "postgres"],
        "MLFLOW_ADMIN_PASSWORD": ["head", "mlflow", "worker"],
        "MLFLOW_SECRET_KEY": ["mlflow"],
        "RAY_AUTH_TOKEN": ["head", "worker"],
    }
    committed = "".join(
        path.read_text() for path in (ROOT / "docker").rglob("*") if path.name not in (".env",) and path.is_file()
    )
    assert not re.search(r"(?i)(password|secret_key|token): *[\"']?\w", committed.replace("RAY_AUTH_MODE: token", ""))


def test_gpus_are_asked_for_by_the_override(docker: Path) -> None:
    init_env(docker / ".env")
    services = resolved(docker, "compose.gpu.yaml")["services"]
    worker = services["worker"]
    assert worker["deploy"]["resources"]["reservations"]["devices"] == [
        {"capabilities": ["gpu"], "driver": "nvidia", "count": -1}
    ]
    assert services["head"]["build"]["args"] == {"CUDA": "1"}
    for name in ("bucket", "mlflow", "head", "worker"):
        assert services[name]["image"] == worker["image"]


def test_the_image_is_linted_and_runs_without_rights() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]


def test_the_image_pins_what_the_project_pins() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    pinned = dict(
        line.split("==") for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for requirement in direct:
        name, version = re.sub(r"\[.*?\]", "", requirement).split("==")
        if name != "torch":
            assert pinned[name.lower().replace("_", "-")] == version
