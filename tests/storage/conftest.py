"""A store of every kind, and the source files that the tests of manifests seal."""

from pathlib import Path

import pytest

from storage.stores.opening import open_store
from tests.conftest import S3Url
from tests.storage.sealing import source_file
from tests.storage.store_kinds import STORES, each


@pytest.fixture(params=each(STORES))
def url(request: pytest.FixtureRequest, tmp_path: Path, s3_url: S3Url) -> str:
    store_url = str(tmp_path / "contract") if request.param == "folder" else s3_url(request.param)
    open_store(store_url, create=True)
    return store_url


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [source_file(tmp_path / "source", number) for number in range(3)]
