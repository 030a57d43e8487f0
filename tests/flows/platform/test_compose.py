"""The compose file and the image's recipe, read: nothing unpinned, nothing open, no secret; `make env` writes those."""

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
SECRETS = {"postgres", "prefect", "s3_root", "s3_pipeline", "s3_trainer"}


def test_every_image_is_a_variable_with_a_digest_or_made_here() -> None:
    for name, service in SERVICES.items():
        image = service["image"]
        assert image == "gpt2-pipeline:local" or re.fullmatch(
            r"\$\{[A-Z0-9_]+_IMAGE:-\S+@sha256:[0-9a-f]{64}\}", image
        ), name
    assert re.search(r"^ARG PYTHON_IMAGE=\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${PYTHON_IMAGE}"}


def test_nothing_listens_beyond_this_host() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not any("network_mode" in service or "privileged" in service for service in SERVICES.values())


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_has_limits_and_no_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    if name not in ONCE:
        assert service["restart"] == "unless-stopped"
        assert "mem_limit" in service
        assert service["healthcheck"]["test"][0] == "CMD"


def test_secrets_are_files_and_each_service_has_just_its_own() -> None:
    assert COMPOSE["secrets"].keys() == SECRETS
    assert {made["file"] for made in COMPOSE["secrets"].values()} == {
        f"${{SECRETS:?run make env first}}/{name}" for name in SECRETS
    }
    given = {name: {one["source"] for one in service.get("secrets", [])} for name, service in SERVICES.items()}
    assert given == {
        "postgres": {"postgres"},
        "s3": {"s3_root"},
        "s3-setup": {"s3_root", "s3_pipeline", "s3_trainer"},
        "server": {"postgres", "prefect"},
        "bootstrap": {"prefect"},
        "data": {"prefect", "s3_pipeline"},
        "train": {"prefect", "s3_pipeline", "s3_trainer"},
    }
    for service in SERVICES.values():
        for variable, value in (service.get("environment") or {}).items():
            secret = re.search("PASSWORD|SECRET|AUTH", variable) and not variable.endswith("_FILE")
            assert not secret, f"{variable} = {value}"


def test_the_image_is_of_a_plain_user_and_tells_nobody() -> None:
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)
    for setting in ("DO_NOT_TRACK=1", "PREFECT_SERVER_ANALYTICS_ENABLED=false"):
        assert setting in DOCKERFILE
    assert "--require-hashes -r requirements.lock" in DOCKERFILE
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert allowed[0] == "*"
    assert not any("secret" in line or ".env" in line or "data" in line for line in allowed)


def test_the_server_has_the_settings_that_one_of_ones_own_has() -> None:
    image = dict(re.findall(r"(\w+)=(\S+)", DOCKERFILE))
    there = image | {name: str(value) for name, value in SERVICES["server"]["environment"].items()}
    ours = server.SETTINGS.keys() - {"PREFECT_SERVER_LOGGING_LEVEL"}  # a container's log is for its server alone
    assert {name: there.get(name) for name in ours} == {name: server.SETTINGS[name] for name in ours}


def test_make_env_writes_random_secrets_once(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)

    def made() -> dict[str, str]:
        subprocess.run(["make", "env"], cwd=tmp_path, check=True, capture_output=True)
        return {path.name: path.read_text() for path in (tmp_path / ".secrets").iterdir()}

    first = made()
    assert first.keys() == SECRETS
    assert all(re.fullmatch(r"(gpt2:)?[0-9a-f]{48}", value) for value in first.values())
    assert len(set(first.values())) == len(SECRETS)
    assert stat.S_IMODE((tmp_path / ".secrets").stat().st_mode) == 0o700
    assert "SECRETS=./.secrets" in (tmp_path / ".env").read_text().splitlines()
    assert made() == first
    (tmp_path / ".secrets" / "prefect").unlink()
    renewed = made()
    assert renewed.pop("prefect") != first.pop("prefect")
    assert renewed == first
