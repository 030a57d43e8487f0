"""What every test may ask for: a store, source files made on the spot, a small sealed dataset, a tiny configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest

from model.config import RunConfig
from storage import sources
from storage.layout import open_store
from storage.manifest import Manifest
from storage.store import Store
from tests.making import build_dataset, document, tiny_config, write_parquet

pytest.register_assert_rewrite("tests.model.training", "tests.storage.sealing")  # they assert for the tests


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what the person who runs it has remembered of source files."""
    monkeypatch.setattr(sources, "REMEMBERED", tmp_path_factory.mktemp("home") / "digests")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), create=True)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A glob of two parquet files of 40 documents each, about 8,000 tokens in all."""
    for index in range(2):
        write_parquet(tmp_path / "source" / f"file_{index}.parquet", [document(index * 40 + n) for n in range(40)])
    return str(tmp_path / "source" / "*.parquet")


@pytest.fixture
def config(tmp_path: Path, source: str) -> RunConfig:
    return tiny_config(str(tmp_path / "store"), source)


BuildDataset = Callable[[RunConfig], Manifest]


@pytest.fixture
def build() -> BuildDataset:
    """A function that makes a configuration's dataset without Prefect."""
    return build_dataset
