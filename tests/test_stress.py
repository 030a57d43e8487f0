"""A dozen random faults during a build and a training; `make stress` injects hundreds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.stores import s3_client
from tests import servers
from tests.conftest import S3Url
from tests.storage.store_kinds import SERVERS
from tests.stress import READ_SECONDS, stress


@pytest.mark.nightly
@pytest.mark.parametrize("kind", SERVERS)
def test_a_dozen_faults_lose_nothing(
    kind: str,
    running: Callable[[str], servers.Server],
    s3_url: S3Url,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_url(kind)  # points this process to the server until the test ends
    monkeypatch.setattr(s3_client, "READ_SECONDS", READ_SECONDS)
    assert stress(running(kind), tmp_path, faults=12, seed=1).faults.total() >= 12


@pytest.mark.full
def test_a_real_minio_is_among_the_stores() -> None:
    assert "minio" in SERVERS, "make minio"
