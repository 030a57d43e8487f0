"""A Hub dataset under Prefect: only changed files are fetched, and available files are tokenised."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import download
from flows.console.dataset import verify
from flows.console.settings import Settings
from flows.inspection.status import dataset_status
from flows.pretrain import build_dataset
from flows.tokenise import tokenise_shards
from model.config import RunConfig
from model.runs.job import note_failure
from storage.datasets import records
from storage.datasets.manifest import Manifest, latest_manifest, read_manifest
from storage.datasets.records import read_record
from storage.errors import SourceInvalid, SourceUnavailable
from storage.keys import DatasetKeys
from storage.stores import retries
from storage.stores.opening import open_store
from tests.hub import Hub
from tests.making import document, settings_of, tiny_config, write_parquet

pytestmark = pytest.mark.usefixtures("api")


def body_of(folder: Path, number: int, documents: int = 40) -> bytes:
    path = write_parquet(folder / "published.parquet", [document(number * 1_000 + row) for row in range(documents)])
    return path.read_bytes()


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request deadline of one second, and no retries of tasks, whose delays are 5 and 30 seconds."""
    monkeypatch.setattr(retries, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(download, "prepare_file", download.prepare_file.with_options(retries=0))


@pytest.fixture
def files(tmp_path: Path, hub: Hub) -> dict[str, bytes]:
    """Three files, published as the first commit of org/edu."""
    published = {f"data/part-{number}.parquet": body_of(tmp_path, number) for number in range(3)}
    hub.dataset("org/edu", published)
    return published


@pytest.fixture
def config(tmp_path: Path, files: dict[str, bytes]) -> RunConfig:
    return tiny_config(str(tmp_path / "store"), "org/edu", "data.config=default", "data.shard_tokens=600")


def changed(config: RunConfig, **fields: object) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=fields)})


def sealed(config: RunConfig) -> Manifest:
    digest = build_dataset(config)
    return read_manifest(open_store(config.store_url), "small", digest)


def stored(hub: Hub) -> list[str]:
    """The files that were downloaded."""
    return [request.path.rpartition("/")[2] for request in hub.received("/stored/*")]


def shard_ids(manifest: Manifest) -> set[str]:
    return set(manifest.shard_ids)


def test_a_hub_dataset_gives_the_shards_of_its_files(
    tmp_path: Path, config: RunConfig, files: dict[str, bytes]
) -> None:
    from_hub = sealed(config)
    folder = tmp_path / "local"
    folder.mkdir()
    for name, body in files.items():
        (folder / Path(name).name).write_bytes(body)
    local = sealed(tiny_config(str(tmp_path / "other"), str(folder), "data.shard_tokens=600"))
    assert local.columns == from_hub.columns
    assert from_hub.origin["dataset"] == "org/edu"
    assert from_hub.origin["licence"] == "odc-by"
    assert from_hub.source_files["name"] == list(files)
    assert local.source_files["digest"] == from_hub.source_files["digest"]


def test_the_manifest_is_the_same_with_and_without_a_mirror(tmp_path: Path, config: RunConfig, hub: Hub) -> None:
    digest = build_dataset(config)
    assert sorted(stored(hub)) == ["part-0.parquet", "part-1.parquet", "part-2.parquet"]
    hub.requests.clear()
    other = changed(config, mirror=False).model_copy(update={"store_url": str(tmp_path / "other")})
    assert build_dataset(other) == digest
    assert {request.headers["range"][:6] for request in hub.received("/stored/*")} == {"bytes="}
    assert list(open_store(other.store_url).list("sources/")) != []  # the listing
    assert [listed for listed in open_store(other.store_url).list("sources/") if listed.key.endswith("parquet")] == []


def test_a_refresh_of_an_unchanged_dataset_is_one_request(config: RunConfig, hub: Hub) -> None:
    digest = build_dataset(config)
    store = open_store(config.store_url)
    for listed in store.list("sources/"):
        if listed.key.endswith(".parquet"):
            store.delete(listed.key)  # not needed for the refresh
    hub.requests.clear()
    assert build_dataset(config) == digest
    assert [(request.method, request.path) for request in hub.requests] == [
        ("GET", "/api/datasets/org/edu/revision/main")
    ]


def test_a_refresh_fetches_only_the_crawl_that_is_new(tmp_path: Path, hub: Hub) -> None:
    crawls = {f"CC-MAIN-2025-{week}": body_of(tmp_path, number) for number, week in enumerate(("05", "08", "13"))}
    repository = hub.dataset("org/edu", {}, configs={name: {"train": f"data/{name}/*"} for name in crawls})

    def publish(*names: str) -> None:
        repository.card["configs"] = {name: {"train": f"data/{name}/*"} for name in names}
        repository.commit({f"data/{name}/train.parquet": crawls[name] for name in names})

    publish("CC-MAIN-2025-05", "CC-MAIN-2025-08")
    config = tiny_config(str(tmp_path / "store"), "org/edu", "data.config=newest:2", "data.shard_tokens=600")
    first = sealed(config)
    hub.requests.clear()
    assert sealed(config) == first
    assert [request.path for request in hub.requests] == ["/api/datasets/org/edu/revision/main"]
    publish(*crawls)
    hub.requests.clear()
    second = sealed(config)
    assert {request.path.split("/")[-2] for request in hub.received("/stored/*")} == {"CC-MAIN-2025-13"}
    assert second.origin["configs"] == "CC-MAIN-2025-08, CC-MAIN-2025-13"
    assert shard_ids(first) - shard_ids(second)  # the train shards of the first crawl


def test_a_repair_reads_the_commit_of_the_version(config: RunConfig, hub: Hub, files: dict[str, bytes]) -> None:
    """The file of the damaged shard has been deleted from the Hub's main since."""
    before = sealed(config)
    store, lost = open_store(config.store_url), before.shard_ids[-1]
    hub.repositories["org/edu"].commit({name: body for name, body in files.items() if "part-2" not in name})
    for listed in store.list("sources/"):
        store.delete(listed.key)
    records.delete_shard(store, "small", lost)
    verify(settings=Settings(None, tuple(settings_of(config))), repair=True, verbose=True)
    assert latest_manifest(store, "small") == before
    assert records.is_finished(store, "small", lost)


def test_a_repair_needs_no_hub_if_the_store_has_the_files(config: RunConfig, hub: Hub) -> None:
    before = sealed(config)
    store, lost = open_store(config.store_url), before.shard_ids[-1]
    records.delete_shard(store, "small", lost)
    hub.inject("*", *["reset"] * 1_000)  # type: ignore[arg-type]
    verify(settings=Settings(None, tuple(settings_of(config))), repair=True, verbose=True)
    assert records.is_finished(store, "small", lost)


def test_failures_are_deleted_when_a_version_is_sealed(config: RunConfig) -> None:
    """Also those of jobs that are no longer planned, for example after the file was fixed."""
    store = open_store(config.store_url, create=True)
    note_failure(store, DatasetKeys("small").record("part-0-00000-000000000000"), "row 3: no text")
    assert "failed" in {line.state for line in dataset_status(store, "small")}
    build_dataset(config)
    assert records.failures(store, "small") == {}


def test_a_changed_card_gives_no_new_version(config: RunConfig, hub: Hub, files: dict[str, bytes]) -> None:
    digest = build_dataset(config)
    hub.repositories["org/edu"].commit(files | {"notes.txt": b"new"})
    hub.requests.clear()
    assert build_dataset(config) == digest
    assert stored(hub) == []


@pytest.mark.parametrize("how", ["new", "changed", pytest.param("removed", marks=pytest.mark.full)])
def test_a_refresh_builds_only_the_shards_of_changed_files(
    tmp_path: Path, config: RunConfig, hub: Hub, files: dict[str, bytes], how: str
) -> None:
    first = sealed(config)
    hub.requests.clear()
    changes: dict[str, Callable[[], dict[str, bytes]]] = {
        "new": lambda: files | {"data/part-3.parquet": body_of(tmp_path, 3)},
        "changed": lambda: files | {"data/part-1.parquet": body_of(tmp_path, 7)},
        "removed": lambda: {name: body for name, body in files.items() if "part-1" not in name},
    }
    hub.repositories["org/edu"].commit(changes[how]())
    second = sealed(config)
    assert second.parent == first.digest
    assert list(second.rows("val")) == list(first.rows("val"))
    fetched = {"new": ["part-3.parquet"], "changed": ["part-1.parquet"], "removed": []}
    assert stored(hub) == fetched[how]
    store = open_store(config.store_url)
    shards_of: dict[str, set[str]] = {"part-1.parquet": set(), "part-3.parquet": set()}
    for shard_id in shard_ids(first) | shard_ids(second):
        source = read_record(store, "small", shard_id).source.rpartition("/")[2]
        shards_of.setdefault(source, set()).add(shard_id)
    if how == "new":
        assert shard_ids(second) - shard_ids(first) == shards_of["part-3.parquet"] != set()
    else:
        assert shard_ids(first) ^ shard_ids(second) == shards_of["part-1.parquet"] != set()


def test_available_files_are_tokenised_and_nothing_is_sealed(config: RunConfig, hub: Hub) -> None:
    hub.inject("/stored/*/data/part-1.parquet", *["500"] * 1_000)  # type: ignore[arg-type]
    with pytest.raises(SourceUnavailable, match=r"'small': 1 source files were unavailable.*part-1"):
        build_dataset(config)
    store = open_store(config.store_url)
    prefix = DatasetKeys("small").shards
    shards = [listed.key.removeprefix(prefix)[:-4] for listed in store.list(prefix) if listed.key.endswith(".bin")]
    files = {read_record(store, "small", shard_id).source.rpartition("/")[2] for shard_id in shards}
    assert files == {"part-0.parquet", "part-2.parquet"}
    assert latest_manifest(store, "small") is None
    hub.faults.clear()
    hub.requests.clear()
    assert len(sealed(config).source_files["name"]) == 3
    assert stored(hub) == ["part-1.parquet"]


def test_a_build_from_the_mirror_needs_no_hub(config: RunConfig, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = build_dataset(config)
    store = open_store(config.store_url)
    for listed in list(store.list(DatasetKeys("small").prefix)):
        store.delete(listed.key)
    hub.inject("*", *["reset"] * 10_000)  # type: ignore[arg-type]
    items = config.evaluation.model_copy(update={"hellaswag": "org/swag"})  # not needed for the dataset
    assert build_dataset(config.model_copy(update={"evaluation": items})) == digest


def test_a_token_limit_fetches_only_the_needed_files(tmp_path: Path, config: RunConfig, hub: Hub) -> None:
    few = changed(config, max_tokens=2_000, dataset="few")
    limited = read_manifest(open_store(config.store_url, create=True), "few", build_dataset(few))
    assert stored(hub) == ["part-0.parquet"]
    assert limited.source_files["name"] == ["data/part-0.parquet"]
    assert 1_800 < sum(row.tokens for row in limited.rows()) <= 2_000
    more = changed(config, max_tokens=4_000, dataset="more")
    build_dataset(more)
    assert stored(hub) == ["part-0.parquet", "part-1.parquet"]
    assert build_dataset(few) == limited.digest


def test_an_invalid_parquet_file_stops_the_build_before_any_shard(
    config: RunConfig, hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/edu"].commit(files | {"data/part-1.parquet": b"PAR1 not"})
    monkeypatch.setattr(tokenise_shards, "submit", lambda *_: pytest.fail("shards were built"))
    with pytest.raises(SourceInvalid, match=r"part-1\.parquet"):
        build_dataset(config)


def test_hellaswag_of_the_hub_is_mirrored(tmp_path: Path, config: RunConfig, hub: Hub) -> None:
    item = {
        "ctx": "A man",
        "activity_label": "x",
        "ctx_a": "A",
        "ctx_b": "man",
        "endings": ["a", "b", "c", "d"],
        "label": "1",
    }
    pq.write_table(pa.Table.from_pylist([item]), tmp_path / "items.parquet")
    body = (tmp_path / "items.parquet").read_bytes()
    hub.dataset("org/swag", {"data/validation-0.parquet": body}, configs={"default": {"validation": "data/v*"}})
    with_hellaswag = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"hellaswag": "org/swag"})}
    )
    downloaded = download.download(with_hellaswag)
    assert downloaded.items is not None
    assert downloaded.items.endswith("/validation-0.parquet")
    assert open_store(config.store_url).read(downloaded.items).body == body
