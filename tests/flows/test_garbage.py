"""Garbage collection lists what nothing refers to, deletes only what is old, and is safe beside builds and runs."""

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows import garbage
from flows.garbage import Garbage
from model.__main__ import run_job
from model.config import RunConfig
from model.history import checkpoints, read_metrics
from model.job import ask
from model.run import pin_run, training_job
from storage import host_cache, keys, lease, s3_client
from storage.errors import Conflict
from storage.layout import open_store
from storage.lease import claim
from storage.manifest import Manifest
from storage.store import Store
from storage.verify import check_fully
from tests.conftest import S3Url
from tests.making import build_dataset, tiny_config
from tests.storage.stores import listed

EVERYTHING = -3600.0  # a grace period that ends in an hour: all there is counts as old
WEEK = 7 * 86_400.0


@pytest.fixture(params=["folder", "seaweedfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3_url: S3Url) -> Store:
    url = str(tmp_path / "store") if request.param == "folder" else s3_url(request.param)
    return open_store(url, create=True)


@pytest.fixture
def config(store: Store, source: str) -> RunConfig:
    return tiny_config(store.url, source, "train.keep_last=2", "train.checkpoint_every_steps=2")


@pytest.fixture
def manifest(config: RunConfig) -> Manifest:
    return build_dataset(config)


@pytest.fixture
def aged(tmp_path: Path) -> Store:
    """A folder store: the age of its objects can be set."""
    return open_store(str(tmp_path / "aged"), create=True)


def age(store: Store, made: set[str]) -> None:
    """Let the objects be as old as can be."""
    for key in made:
        path = store.local_path(key)
        assert path is not None
        os.utime(path, (0, 0))


def collected(store: Store, grace_seconds: float) -> list[Garbage]:
    return list(garbage.collect(store, grace_seconds))


def names(found: list[Garbage]) -> set[str]:
    return {one.name for one in found}


def orphan(store: Store) -> set[str]:
    """A shard of an abandoned build. Returns its keys."""
    made = {keys.shard("small", "orphan-00000-aaaa"), keys.record("small", "orphan-00000-aaaa")}
    for key in made:
        store.put_new(key, b"{}")
    return made


def trained(store: Store, config: RunConfig, manifest: Manifest) -> str:
    job = training_job(pin_run(store, config, manifest.digest, None))
    assert run_job(store.url, ask(store, job)) == 0
    return job.key


# Shards


def test_a_look_changes_nothing_and_finds_what_a_collection_deletes(store: Store, manifest: Manifest) -> None:
    made = orphan(store)
    before = listed(store, "")
    assert names(garbage.find(store, EVERYTHING)) == made
    assert listed(store, "") == before
    assert names(collected(store, EVERYTHING)) == made
    assert listed(store, "") == sorted(set(before) - made)
    assert garbage.find(store, EVERYTHING) == []
    assert all(check_fully(store, "small", row, 50256) is None for row in manifest.rows())


def test_what_is_young_stays(store: Store, manifest: Manifest) -> None:
    orphan(store)
    before = listed(store, "")
    assert garbage.find(store, WEEK) == collected(store, WEEK) == []
    assert listed(store, "") == before


def test_a_dataset_that_a_build_began_on_stays_whole(
    store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan(store)
    monkeypatch.setattr(garbage, "last_build", lambda *_: 1e12)  # began just now, whatever the age of its shards
    assert garbage.find(store, EVERYTHING) == collected(store, EVERYTHING) == []


def test_one_young_shard_keeps_all_of_an_unfinished_build(aged: Store) -> None:
    made = orphan(aged)
    age(aged, made)
    assert names(garbage.find(aged, WEEK)) == made
    aged.put_new(keys.shard("small", "orphan-00001-bbbb"), b"young")
    assert garbage.find(aged, WEEK) == []


def test_a_build_that_begins_while_shards_are_deleted_is_told_to_wait(store: Store, manifest: Manifest) -> None:
    orphan(store)
    collecting = garbage.collect(store, EVERYTHING)
    next(collecting)
    with pytest.raises(Conflict, match="gpt2 gc"):
        claim(store, "small", "build")
    assert len(list(collecting)) == 1
    claim(store, "small", "build")


def test_a_collector_that_was_killed_is_in_the_way_for_an_hour_at_most(
    store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(store, "small", "collector", idle_since=1e12)
    with pytest.raises(Conflict, match="60 minutes"):
        claim(store, "small", "build")
    monkeypatch.setattr(lease, "COLLECTING_SECONDS", -5.0)
    claim(store, "small", "build")


def test_a_build_that_begins_between_the_look_and_the_lease_wins(
    aged: Store, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dataset(tiny_config(aged.url, source))
    made = orphan(aged)
    age(aged, made)
    claim(aged, "small", "build")
    monkeypatch.setattr(garbage, "last_build", lambda *_: 0.0)  # the look came just before
    with pytest.raises(Conflict, match="a build has just begun"):
        collected(aged, WEEK)
    assert made < set(listed(aged, ""))


def test_builds_that_count_old_shards_lose_none_to_a_collection_at_the_same_time(aged: Store, source: str) -> None:
    """Everything of an unfinished build is a week old, so it may go, or be sealed: never both."""
    config, chance = tiny_config(aged.url, source), random.Random(2)
    outcomes = set()

    def collect() -> int:
        threading.Event().wait(chance.uniform(0, 0.02))
        try:
            return len(collected(aged, WEEK))
        except Conflict:
            return 0

    def build() -> Manifest:
        threading.Event().wait(chance.uniform(0, 0.02))
        while True:
            try:
                claim(aged, "small", "build")
                return build_dataset(config)
            except Conflict:
                threading.Event().wait(0.005)

    for _ in range(12):
        manifest = build_dataset(config)
        for key in [*listed(aged, keys.manifests("small")), keys.dataset_latest("small"), keys.lease("small")]:
            aged.delete(key)
        age(aged, set(listed(aged, keys.shards("small"))))
        with ThreadPoolExecutor(2) as pool:
            collecting, building = pool.submit(collect), pool.submit(build)
        outcomes.add(collecting.result() > 0)
        assert building.result() == manifest
        assert all(check_fully(aged, "small", row, 50256) is None for row in manifest.rows())
    assert outcomes == {True, False}, "the two were never close enough to each other"


# Runs


def test_a_run_keeps_what_it_needs_and_goes_on(store: Store, config: RunConfig, manifest: Manifest) -> None:
    trained(store, config, manifest)
    kept, history = checkpoints(store, "tiny"), read_metrics(store, "tiny")
    stray = keys.checkpoint_file("tiny", 6, "dead", "model.safetensors")
    lost = keys.metrics("tiny", 4, "dead")
    for key in (stray, lost):
        store.put_new(key, b"of a process that was killed")
    assert names(garbage.find(store, EVERYTHING)) == {stray, lost}
    assert names(collected(store, EVERYTHING)) == {stray, lost}
    assert checkpoints(store, "tiny") == kept
    assert read_metrics(store, "tiny") == history


def test_checkpoints_that_retention_gives_up_go_record_first(
    store: Store, config: RunConfig, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.trainer.retain", lambda *_: None)  # as when its process was killed just before
    trained(store, config, manifest)
    assert [record.step for record in checkpoints(store, "tiny")] == [2, 4, 6, 8, 10, 12]
    deleted = [found.name for found in collected(store, EVERYTHING)]
    assert [record.step for record in checkpoints(store, "tiny")] == [10, 12]
    assert len(read_metrics(store, "tiny")) == 12
    assert [name.endswith(".json") for name in deleted] == [True] * 4 + [False] * 8


# The rest


def test_probes_and_quarantined_files_go(store: Store) -> None:
    store.put_new(keys.probe("left"), b"1")
    aside = host_cache.FOLDER / "quarantine" / "bad"
    aside.parent.mkdir(parents=True)
    aside.write_bytes(b"123")
    assert names(collected(store, EVERYTHING)) == {keys.probe("left"), "bad"}
    assert not aside.exists()
    assert listed(store, keys.TEMPORARY) == []


def test_what_killed_writers_left_goes(store: Store) -> None:
    if (folder := store.local_path("x")) is not None:
        left = folder.parent / ".store" / "tmp" / "dead"
        left.write_bytes(b"half")
    else:
        bucket, prefix = store.url.removeprefix("s3://").split("/")
        s3_client.own_client().create_multipart_upload(Bucket=bucket, Key=f"{prefix}/large")
    assert collected(store, WEEK) == []
    assert len(garbage.find(store, EVERYTHING)) == len(collected(store, EVERYTHING)) == 1
    assert garbage.find(store, EVERYTHING) == []
