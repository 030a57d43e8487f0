"""docker-compose.yml and the Dockerfile: images are pinned, ports local, secrets in files that `make env` writes."""

import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.platform import server

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
ONCE = {"s3-setup", "bootstrap"}
SECRETS = {"postgres", "prefect", "s3_root", "s3_pipeline", "s3_trainer", "trackio"}


def test_every_image_is_a_variable_with_a_digest_or_built_locally() -> None:
    for name, service in SERVICES.items():
        image = service["image"]
        assert image == "gpt2-pipeline:local" or re.fullmatch(
            r"\$\{[A-Z0-9_]+_IMAGE:-\S+@sha256:[0-9a-f]{64}\}", image
        ), name
    assert re.search(r"^ARG PYTHON_IMAGE=\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${PYTHON_IMAGE}"}


def test_every_port_is_on_this_host_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not any("network_mode" in service or "privileged" in service for service in SERVICES.values())


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_has_limits_and_no_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    # The worker of `train` starts processes as another user: tests/flows/runtime/test_trainer.py.
    assert service.get("cap_add", []) == (["SETUID", "SETGID", "KILL"] if name == "train" else [])
    assert (
        ("TRAINER_USER" in (service.get("environment") or {})) == (service.get("user") == "root") == (name == "train")
    )
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    if name not in ONCE:
        assert service["restart"] == "unless-stopped"
        assert "mem_limit" in service
        assert service["healthcheck"]["test"][0] == "CMD"


def test_secrets_are_files_and_each_service_has_only_its_own() -> None:
    assert COMPOSE["secrets"].keys() == SECRETS
    assert {secret["file"] for secret in COMPOSE["secrets"].values()} == {
        f"${{SECRETS:?run make env first}}/{name}" for name in SECRETS
    }
    given = {name: {secret["source"] for secret in service.get("secrets", [])} for name, service in SERVICES.items()}
    assert given == {
        "postgres": {"postgres"},
        "s3": {"s3_root"},
        "s3-setup": {"s3_root", "s3_pipeline", "s3_trainer"},
        "server": {"postgres", "prefect"},
        "bootstrap": {"prefect"},
        "trackio": {"trackio"},
        "data": {"prefect", "s3_pipeline"},
        "train": {"prefect", "s3_pipeline", "s3_trainer", "trackio"},
    }
    for service in SERVICES.values():
        for variable, value in (service.get("environment") or {}).items():
            is_secret = re.search("PASSWORD|SECRET|AUTH", variable) and not variable.endswith("_FILE")
            assert not is_secret, f"{variable} = {value}"


def test_the_image_runs_as_a_plain_user_without_telemetry() -> None:
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)
    assert re.search(
        r"install --directory --mode=700 --owner=10001 .*/run/secrets\b", DOCKERFILE
    )  # not for the trainer
    assert SERVICES["train"]["environment"]["TRAINER_USER"] in re.findall(r"useradd .* (\w+) ", DOCKERFILE)
    for setting in ("DO_NOT_TRACK=1", "PREFECT_SERVER_ANALYTICS_ENABLED=false"):
        assert setting in DOCKERFILE
    assert "--require-hashes -r requirements.lock" in DOCKERFILE
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert allowed[0] == "*"
    assert not any("secret" in line or ".env" in line or "data" in line for line in allowed)


def test_the_server_and_a_local_one_read_the_same_settings() -> None:
    assert ROOT / SERVICES["server"]["env_file"] == server.SETTINGS
    settings = [line for line in server.SETTINGS.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Z_]+=[\w.]+", line) for line in settings)  # nothing that one of the two would unquote
    local = server.prefect_environment(4200)
    for line in settings:
        name, _, value = line.partition("=")
        assert local[name] == value
        assert name not in SERVICES["server"]["environment"]


def test_the_server_answers_only_under_its_own_addresses() -> None:
    settings = SERVICES["server"]["environment"]
    origins = settings["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].replace("${UI_PORT:-4200}", "4300").split(",")
    assert all(re.fullmatch(r"http://(127\.0\.0\.1|localhost|server):\d+", origin) for origin in origins)
    clients = [settings["PREFECT_SERVER_UI_API_URL"], SERVICES["data"]["environment"]["PREFECT_API_URL"]]
    clients.append(SERVICES["server"]["healthcheck"]["test"][-1])
    used = {url.replace("${UI_PORT:-4200}", "4300").partition("/api")[0] for url in clients}
    assert used | {"http://localhost:4300"} == set(origins)
    assert "flows.platform.app:create" in SERVICES["server"]["command"]  # which reads them


def test_make_env_writes_random_secrets_once(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)

    def make_env() -> dict[str, str]:
        subprocess.run(["make", "env"], cwd=tmp_path, check=True, capture_output=True)
        return {path.name: path.read_text() for path in (tmp_path / ".secrets").iterdir()}

    first = make_env()
    assert first.keys() == SECRETS
    assert all(re.fullmatch(r"(gpt2:)?[0-9a-f]{48}", value) for value in first.values())
    assert len(set(first.values())) == len(SECRETS)
    assert stat.S_IMODE((tmp_path / ".secrets").stat().st_mode) == 0o700
    assert "SECRETS=./.secrets" in (tmp_path / ".env").read_text().splitlines()
    assert make_env() == first
    (tmp_path / ".secrets" / "prefect").unlink()
    renewed = make_env()
    assert renewed.pop("prefect") != first.pop("prefect")
    assert renewed == first
