"""What every test may ask for: a store, source files made on the spot, a small sealed dataset, a tiny configuration."""

import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import hub as stand_in

# The Hub's client reads these when it is imported: whatever a test does, it speaks to the stand-in.
os.environ |= {
    "HF_ENDPOINT": stand_in.ENDPOINT,
    "HF_HOME": tempfile.mkdtemp(prefix="hf-"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
}
os.environ.pop("HF_TOKEN", None)
# One thread a process: the workers of pytest share the cores, and OpenMP's threads that wait for each other spin, which
# doubles the CPU time of a training.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell in the background ignores Ctrl-C, nohup a closed terminal, and so would every process that a test signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

from model.config import RunConfig
from storage.cache import host as host_cache
from storage.datasets.manifest import Manifest
from storage.sources import mirror, reading
from storage.stores import s3, s3_client
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import servers
from tests.making import build_dataset, document, tiny_config, write_parquet

pytest.register_assert_rewrite("tests.model.training_runs", "tests.storage.sealing")  # they assert for the tests


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what the person who runs it keeps at home: digests, cached shards, AWS credentials."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(reading, "REMEMBERED", home / "digests")
    monkeypatch.setattr(host_cache, "FOLDER", home / "shards")
    monkeypatch.setattr(mirror, "FOLDER", home / "incoming")


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


S3Url = Callable[[str], str]


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], servers.Server]]:
    """A function that gives the running server of a kind, started when it is first asked for."""
    started: dict[str, servers.Server] = {}

    def server(kind: str) -> servers.Server:
        if kind not in started:
            started[kind] = servers.start(kind, tmp_path_factory.mktemp(kind))
        return started[kind]

    yield server
    for found in started.values():
        found.stop()


@pytest.fixture
def forget_client() -> Iterator[Callable[[], None]]:
    """A function after which the next S3 store reads the environment anew; called once more at the end."""

    def forget() -> None:
        if s3_client.own_client.cache_info().currsize:
            s3_client.own_client().close()
        s3_client.own_client.cache_clear()
        s3.S3Store.checked_buckets.clear()

    yield forget
    forget()


@pytest.fixture
def s3_url(
    running: Callable[[str], servers.Server], monkeypatch: pytest.MonkeyPatch, forget_client: Callable[[], None]
) -> S3Url:
    """A function that gives the URL of a new store on the server of a kind, which this process now talks to."""

    def url(kind: str) -> str:
        for name, value in running(kind).environment.items():
            monkeypatch.setenv(name, value)
        forget_client()
        return f"s3://{servers.BUCKET}/{secrets.token_hex(6)}"

    return url


@pytest.fixture(scope="session")
def running_hub() -> Iterator[stand_in.Hub]:
    with stand_in.serving() as found:
        yield found


@pytest.fixture
def hub(running_hub: stand_in.Hub) -> stand_in.Hub:
    """The stand-in for the Hub, without a dataset, a fault or a request."""
    running_hub.reset()
    return running_hub
