"""Copying a dataset, also into a store with the remains of a killed or damaged copy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model import tokenizer
from storage.datasets.copy import copy_dataset
from storage.datasets.manifest import Manifest, latest_manifest
from storage.datasets.records import read_record
from storage.datasets.shards import build_shard
from storage.errors import ShardCorrupt
from storage.inspection.verify import check_fully, check_versions
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite
from tests.making import document, write_parquet
from tests.storage.sealing import jobs_of, record_key, seal, sealed, shard_key
from tests.storage.store_kinds import listed


@pytest.fixture
def source(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "from"), create=True)


@pytest.fixture
def manifest(source: Store, files: list[Path]) -> Manifest:
    return sealed(source, *files)


@pytest.fixture
def target(url: str) -> Store:
    return open_store(url)


def copied(source: Store, target: Store) -> Manifest:
    copied, _, _ = copy_dataset(source, target, "small")
    assert latest_manifest(target, "small") == copied
    return copied


LEFTOVERS: dict[str, Callable[[bytes], bytes]] = {
    "whole": lambda body: body,
    "damaged": lambda body: bytes(len(body)),
    "cut": lambda body: body[:100],
}


@pytest.mark.parametrize(
    ("left", "recorded"),  # a recorded shard of the right size counts as done: `verify` finds damage in it
    [("nothing", False), ("nothing", True), ("whole", False), ("damaged", False), ("cut", False), ("cut", True)],
)
def test_a_copy_is_intact_whatever_an_earlier_one_left(
    source: Store, target: Store, manifest: Manifest, left: str, recorded: bool
) -> None:
    row = list(manifest.rows())[3]
    if left != "nothing":
        target.put_new(shard_key(row.shard_id), LEFTOVERS[left](bytes(source.read(shard_key(row.shard_id)).body)))
    if recorded:
        target.put_new(record_key(row.shard_id), source.read(record_key(row.shard_id)).body)
    copy = copied(source, target)
    assert copy == manifest
    assert [check_fully(target, "small", row, tokenizer.EOT) for row in copy.rows()] == [None] * len(copy.shard_ids)
    assert list(check_versions(target, "small", copy)) == []


def test_empty_shards_and_leak_reports_are_copied(source: Store, target: Store, files: list[Path]) -> None:
    (short,) = jobs_of(write_parquet(files[0].with_name("short.parquet"), [document(1)]))
    jobs = [*jobs_of(*files), replace(short, recipe=replace(short.recipe, filters=("length > 100_000",)))]
    for job in jobs:
        build_shard(source, "small", job, tokenizer.encode, tokenizer.EOT)
    manifest = seal(source, "small", [job.shard_id for job in jobs])
    assert manifest.empty == (jobs[-1].shard_id,)
    source.put_new(DatasetKeys("small").leaks(manifest.digest), b"{}")
    assert copied(source, target) == manifest
    assert read_record(target, "small", manifest.empty[0]) == read_record(source, "small", manifest.empty[0])
    assert target.read(DatasetKeys("small").leaks(manifest.digest)).body == b"{}"


def test_a_damaged_shard_of_the_source_store_is_not_copied(source: Store, target: Store, manifest: Manifest) -> None:
    row = next(manifest.rows())
    overwrite(source, shard_key(row.shard_id), bytes(row.tokens * 2))
    with pytest.raises(ShardCorrupt, match=row.shard_id):
        copy_dataset(source, target, "small")
    assert not {shard_key(row.shard_id), record_key(row.shard_id)} & set(listed(target, DatasetKeys("small").shards))
    assert latest_manifest(target, "small") is None
