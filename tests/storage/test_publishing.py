"""Publishing a dataset on the stand-in for the Hub and pulling it: what moves, in which order, and what is refused."""

import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flows.pages.dataset_card import hub_card
from storage import publishing
from storage.datasets.copy import copy_dataset
from storage.datasets.manifest import Manifest, latest_manifest
from storage.errors import DatasetMismatch, ObjectCorrupt, ObjectMissing, SourceInvalid
from storage.keys import DatasetKeys
from storage.sources.files import Listing
from storage.stores import retries
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.hub import TOKEN, Hub
from tests.storage.sealing import built, seal, sealed, source_file
from tests.storage.store_kinds import listed

# The Hub's client gives the bodies of files to httpx2 as `data=`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "me/tokens"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(retries, "RETRY_SECONDS", 1.0)


@pytest.fixture
def manifest(store: Store, tmp_path: Path) -> Manifest:
    return sealed(store, source_file(tmp_path, 0))


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "other"), create=True)


@pytest.fixture
def client_log() -> Iterator[io.StringIO]:
    """What the Hub's client logs, at first with its own verbosity."""
    log, logger = io.StringIO(), logging.getLogger("huggingface_hub")
    handler = logging.StreamHandler(log)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield log
    logger.removeHandler(handler)


Shards = Callable[[int, int], None]


def publish(
    store: Store, manifest: Manifest, on_progress: Shards = lambda *_: None, *, private: bool = False, name: str = NAME
) -> tuple[str, int, int]:
    return publishing.publish(store, "small", manifest, name, hub_card(name, manifest), private, on_progress)


def pull(store: Store, revision: str = "main") -> tuple[Manifest, int, int]:
    return publishing.pull(NAME, revision, store, "small", lambda *_: None)


def newest(hub: Hub) -> dict[str, bytes]:
    """The files of the repository's newest commit."""
    return list(hub.repositories[NAME].commits.values())[-1]


def sent(hub: Hub) -> list[str]:
    return [request.path for request in hub.received("/sent/*", "PUT")]


def objects(store: Store) -> dict[str, bytes]:
    """The objects of the dataset, without the two that differ in each copy."""
    keys = DatasetKeys("small")
    return {
        key: bytes(store.read(key).body) for key in listed(store, keys.prefix) if key not in (keys.latest, keys.lease)
    }


def test_a_pulled_dataset_equals_a_copy_and_every_version_can_be_pulled(
    hub: Hub, store: Store, manifest: Manifest, other: Store, tmp_path: Path
) -> None:
    first, shards, _ = publish(store, manifest)
    assert len(sent(hub)) == shards == len(manifest.shard_ids)
    second = sealed(store, source_file(tmp_path, 0), source_file(tmp_path, 1))
    assert second.parent == manifest.digest
    store.put_new(DatasetKeys("small").leaks(second.digest), b"{}")
    _, shards, missing = publish(store, second)
    assert (shards, len(sent(hub))) == (len(second.shard_ids), len(second.shard_ids))
    assert missing == len(second.shard_ids) - len(manifest.shard_ids)
    assert pull(other) == (second, shards, shards)
    copy = open_store(str(tmp_path / "copy"), create=True)
    copy_dataset(store, copy, "small")
    assert objects(other) == objects(copy)
    older = open_store(str(tmp_path / "older"), create=True)
    assert pull(older, first)[0] == latest_manifest(older, "small") == manifest


def test_a_second_time_nothing_moves(hub: Hub, store: Store, manifest: Manifest, other: Store) -> None:
    commit, shards, _ = publish(store, manifest)
    pull(other)
    files = newest(hub)
    hub.requests.clear()
    assert publish(store, manifest) == (commit, shards, 0)
    assert pull(other) == (manifest, shards, 0)
    assert [request.path for request in hub.requests if request.method != "GET"] == ["/api/repos/create"]
    assert hub.received("/stored/*") == []
    assert newest(hub) == files


@pytest.mark.parametrize("done", [1, 3])
def test_a_killed_publication_is_not_readable_and_is_resumed(
    hub: Hub,
    store: Store,
    manifest: Manifest,
    other: Store,
    done: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(publishing, "COMMIT_SHARDS", 2)
    shards = iter(range(1, 100))

    def kill(*_: int) -> None:
        if next(shards) == done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(store, manifest, kill)
    with pytest.raises(ObjectMissing, match=r"me/tokens.*gpt2 dataset publish"):
        pull(other)
    publish(store, manifest)
    assert len(set(sent(hub))) == len(sent(hub)) == len(manifest.shard_ids)  # none twice
    assert pull(other)[0] == manifest
    *before, last = hub.repositories[NAME].commits.values()
    assert "latest.json" in last
    assert [name for files in before for name in files if not name.startswith((".git", "shards/"))] == []
    assert "LFS" not in capfd.readouterr().err  # a progress bar of the client


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/api/repos/create", "503"),
        ("*/tree/*", "reset"),
        ("*/lfs/objects/batch", "500"),
        ("/sent/*", "503"),
        ("*/commit/main", "reset"),
        ("*/commit/main", "lost"),
        ("/api/validate-yaml", "reset"),
    ],
)
def test_a_fault_is_retried_and_shows_no_secret(
    hub: Hub, store: Store, manifest: Manifest, other: Store, path: str, fault: Any, client_log: io.StringIO
) -> None:
    hub.inject(path, fault)
    publish(store, manifest)
    assert hub.faults == []
    assert pull(other)[0] == manifest
    assert "sekret" not in client_log.getvalue()  # the signature of an upload's URL
    assert not any("authorization" in request.headers for request in hub.requests if request.host == "localhost")


def test_a_commit_of_others_is_kept(hub: Hub, store: Store, manifest: Manifest, other: Store, tmp_path: Path) -> None:
    publish(store, manifest)
    second = sealed(store, source_file(tmp_path, 0), source_file(tmp_path, 1))
    licence = iter([b"MIT"])

    def commit_meanwhile(*_: int) -> None:
        for body in licence:
            hub.repositories[NAME].add(newest(hub) | {"LICENSE": body})

    publish(store, second, commit_meanwhile)
    assert newest(hub)["LICENSE"] == b"MIT"
    assert len(set(sent(hub))) == len(sent(hub)) == len(second.shard_ids)
    assert pull(other)[0] == second


def test_a_file_over_the_limit_is_not_downloaded(hub: Hub, store: Store, manifest: Manifest) -> None:
    publish(store, manifest)
    hub.requests.clear()
    repository = publishing.Repository(NAME, "small")
    with pytest.raises(ObjectCorrupt, match="more than the limit of 9"):
        repository.read(repository.keys.latest, limit_bytes=9)
    assert hub.received("*/resolve/*") == []


def test_a_download_that_is_cut_or_wrong_is_repeated(hub: Hub, store: Store, manifest: Manifest, other: Store) -> None:
    publish(store, manifest)
    hub.inject("/stored/*", "cut", "wrong", "short")
    assert pull(other)[0] == manifest
    assert hub.faults == []
    assert objects(other) == objects(store)


def test_an_upload_that_the_hub_refuses_is_named(
    hub: Hub, store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.hub.is_large", lambda name: name.startswith(("shards/", "manifests/")))  # above 10 MB
    for digest in ("*", manifest.digest):
        hub.inject(f"/sent/*/{digest}", "400")
        with pytest.raises(SourceInvalid, match=r"me/tokens: (shards|split\.json, manifests)/.*HF_TOKEN"):
            publish(store, manifest)
    publish(store, manifest)


@pytest.mark.parametrize("damage", ["other bytes", "none", "no record"])
def test_a_damaged_shard_of_the_repository_is_named_and_repaired_by_publishing(
    hub: Hub, store: Store, manifest: Manifest, other: Store, damage: str
) -> None:
    publish(store, manifest)
    files = dict(newest(hub))
    shard = f"shards/{manifest.shard_ids[1]}.{'json' if damage == 'no record' else 'bin'}"
    body = files.pop(shard)
    hub.repositories[NAME].add(files | ({shard: bytes(len(body))} if damage == "other bytes" else {}))
    with pytest.raises(SourceInvalid, match=f"{manifest.shard_ids[1]}.*gpt2 dataset publish") as caught:
        pull(other)
    assert "--repair" not in str(caught.value)
    assert latest_manifest(other, "small") is None
    assert publish(store, manifest)[2] == 1
    assert pull(other)[0] == manifest


def test_a_private_repository_needs_the_token(
    hub: Hub, store: Store, manifest: Manifest, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, manifest, private=True)
    assert pull(other)[0] == manifest
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"me/tokens.*private.*HF_TOKEN"):
        pull(other)


def test_what_cannot_be_published_is_refused_before_a_shard_is_sent(
    hub: Hub, store: Store, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kind: type[Exception], match: str, name: str = NAME, *, private: bool = False) -> None:
        with pytest.raises(kind, match=match) as caught:
            publish(store, manifest, private=private, name=name)
        assert TOKEN not in str(caught.value)

    refused(ValueError, "^[^@]*OWNER/NAME", "https://user:sekret@host/name")
    hub.dataset("me/texts", {"data/a.parquet": b"x"})
    refused(DatasetMismatch, r"me/texts.*data/a\.parquet", "me/texts")
    refused(ValueError, "me/texts is public.*--private", "me/texts", private=True)
    publish(store, manifest)
    there, shards = newest(hub), sent(hub)
    (tmp_path / "new").mkdir()
    stranger = open_store(str(tmp_path / "new" / "store"), create=True)
    another = sealed(stranger, source_file(tmp_path / "new", 1))
    with pytest.raises(DatasetMismatch, match=f"me/tokens.*another dataset.*{manifest.digest}"):
        publish(stranger, another)
    with pytest.raises(DatasetMismatch, match="another dataset"):
        pull(stranger)
    assert (newest(hub), sent(hub)) == (there, shards)
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    refused(SourceInvalid, "HF_TOKEN", "me/new")
    monkeypatch.delenv("HF_TOKEN")
    refused(ValueError, "HF_TOKEN")


def test_the_card_states_the_origin_and_its_code_reads_a_shard(hub: Hub, store: Store, tmp_path: Path) -> None:
    origin = {"dataset": "org/edu", "config": "ten", "commit": "c" * 40, "licence": "odc-by, mit"}
    manifest = seal(store, "small", built(store, source_file(tmp_path, 0)), Listing((), origin))
    publish(store, manifest)
    _, front, text = newest(hub)["README.md"].decode().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["license"], facts["source_datasets"]) == (["odc-by", "mit"], ["org/edu"])
    assert facts["size_categories"] == "n<1K"
    for fact in ("c" * 40, manifest.digest, manifest.tokenizer["sha256"], f"{manifest.tokens:,} tokens"):
        assert fact in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    values: dict[str, Any] = {}
    exec(code, values)  # noqa: S102  # as a reader would
    last = list(manifest.rows())[-1]
    shard = store.read(DatasetKeys("small").shard(last.shard_id)).body
    assert np.array_equal(values["tokens"], np.frombuffer(shard, "<u2"))
