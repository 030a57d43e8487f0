"""Copies every version of a dataset to another store, each object before the object that names it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from storage.datasets.lease import claim
from storage.datasets.manifest import Manifest, ShardRow, read_pointer
from storage.datasets.records import finished_shards
from storage.datasets.shards import put_shard, read_shard
from storage.datasets.versions import history, update_latest
from storage.errors import DatasetMismatch, ObjectMissing
from storage.keys import DatasetKeys
from storage.stores.store import ReadableStore, Store, put_once, read_as

SHARDS_AT_ONCE = 4  # one shard is hashed while another is in transit


def copy_dataset(
    source: ReadableStore, target: Store, dataset: str, on_progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[Manifest, int, int]:
    """Copy what the target store lacks and verify each shard. Idempotent: a second call resumes.

    Returns the newest version, the number of shards in all versions, and how many of them this call copied.
    `on_progress` receives 1 for each shard, and the number to copy. Raises ObjectMissing, ShardCorrupt,
    DatasetMismatch for another dataset of that name in the target, and Conflict while gpt2 gc or a build changes it.
    """
    versions = list(history(source, dataset))
    check_target(source, target, dataset, versions)
    claim(target, dataset, "build")
    rows = {row.shard_id: row for version in versions for row in version.rows()}
    finished = finished_shards(target, dataset, list(rows), rows)
    missing = [row for row in rows.values() if row.shard_id not in finished]
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for _ in pool.map(lambda row: _copy_shard(source, target, dataset, row), missing):
            on_progress(1, len(missing))
    for key, body in version_objects(source, dataset, versions):
        put_once(target, key, body)
    update_latest(target, dataset, versions[0], check_target(source, target, dataset, versions))
    return versions[0], len(rows), len(missing)


def check_target(source: ReadableStore, target: ReadableStore, dataset: str, versions: list[Manifest]) -> str | None:
    """The digest in the target's `latest`, or None. Raises DatasetMismatch for a version or split not in the source."""
    dataset_keys = DatasetKeys(dataset)
    latest = read_pointer(target, dataset).manifest
    split = read_as(target, dataset_keys.split, dict[str, Any])
    known = [version.digest for version in versions]
    if latest not in (None, *known) or split not in (None, read_as(source, dataset_keys.split, dict[str, Any])):
        problem = f"{target.url!r} holds another dataset or a later version (newest manifest: {latest or 'none'})"
        expected = f"not manifest {known[0][:12]} of {source.url!r} or one before it"
        raise DatasetMismatch(f"dataset {dataset!r}: {problem}, {expected}. Choose another target or data.dataset.")
    return latest


def version_objects(
    source: ReadableStore, dataset: str, versions: list[Manifest]
) -> Iterator[tuple[str, bytes | bytearray]]:
    """Key and body of the split, then, oldest first, of each manifest after its empty shards, and its leak report."""
    dataset_keys = DatasetKeys(dataset)
    yield dataset_keys.split, source.read(dataset_keys.split).body
    for version in reversed(versions):
        for shard_id in version.empty:
            for key in (dataset_keys.shard(shard_id), dataset_keys.record(shard_id)):
                yield key, source.read(key).body
        yield dataset_keys.manifest(version.digest), source.read(dataset_keys.manifest(version.digest)).body
        with suppress(ObjectMissing):  # not every version has a leak report
            yield dataset_keys.leaks(version.digest), source.read(dataset_keys.leaks(version.digest)).body


def _copy_shard(source: ReadableStore, target: Store, dataset: str, row: ShardRow) -> None:
    put_shard(target, dataset, row, read_shard(source, dataset, row))
    key = DatasetKeys(dataset).record(row.shard_id)
    put_once(target, key, source.read(key).body)
