"""Six kills of one training; `make stress` kills it a hundred times."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import servers
from tests.conftest import S3Url
from tests.stress_training import stress


@pytest.mark.nightly
@pytest.mark.timeout(900)  # 90 s on an idle machine
def test_six_kills_lose_nothing(running: Callable[[str], servers.Server], s3_url: S3Url, tmp_path: Path) -> None:
    s3_url("seaweedfs")  # points this process to the server until the test ends
    assert stress(running("seaweedfs"), tmp_path, kills=6, seed=1).kills.total() == 6
