"""Copies every version of a dataset to another store, each object before the object that names it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from storage.datasets.lease import claim
from storage.datasets.manifest import Manifest, ShardRow, read_pointer
from storage.datasets.records import finished_shards
from storage.datasets.shards import put_shard, read_shard
from storage.datasets.versions import history, update_latest
from storage.errors import AlreadyExists, DatasetMismatch, ObjectMissing
from storage.keys import DatasetKeys
from storage.stores.store import Store, read_json

SHARDS_AT_ONCE = 4  # one shard is hashed while another is in transit


def copy_dataset(
    source: Store, target: Store, dataset: str, on_progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[Manifest, int, int]:
    """Copy what the target store lacks and verify each shard. Idempotent: a second call resumes.

    Returns the newest version, the number of shards in all versions, and how many of them this call copied.
    `on_progress` receives 1 for each shard, and the number to copy. Raises ObjectMissing, ShardCorrupt,
    DatasetMismatch for another dataset of that name in the target, and Conflict while gpt2 gc or a build changes it.
    """
    versions = list(history(source, dataset))
    _check_target(source, target, dataset, versions)
    claim(target, dataset, "build")
    rows = {row.shard_id: row for version in versions for row in version.rows()}
    finished = finished_shards(target, dataset, list(rows), rows)
    missing = [row for row in rows.values() if row.shard_id not in finished]
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for _ in pool.map(lambda row: _copy_shard(source, target, dataset, row), missing):
            on_progress(1, len(missing))
    _copy_versions(source, target, dataset, versions)
    update_latest(target, dataset, versions[0], _check_target(source, target, dataset, versions))
    return versions[0], len(rows), len(missing)


def _copy_shard(source: Store, target: Store, dataset: str, row: ShardRow) -> None:
    body = read_shard(source, dataset, row.shard_id, row.tokens, row.sha256)
    put_shard(target, dataset, row.shard_id, body, row.sha256)
    _copy_object(source, target, DatasetKeys(dataset).record(row.shard_id))


def _copy_versions(source: Store, target: Store, dataset: str, versions: list[Manifest]) -> None:
    """Copy the split, then each manifest, oldest first, with its empty shards and its leak report."""
    dataset_keys = DatasetKeys(dataset)
    _copy_object(source, target, dataset_keys.split)
    for version in reversed(versions):
        for shard_id in version.empty:
            _copy_object(source, target, dataset_keys.shard(shard_id))
            _copy_object(source, target, dataset_keys.record(shard_id))
        _copy_object(source, target, dataset_keys.manifest(version.digest))
        with suppress(ObjectMissing):  # not every version has a leak report
            _copy_object(source, target, dataset_keys.leaks(version.digest))


def _check_target(source: Store, target: Store, dataset: str, versions: list[Manifest]) -> str | None:
    """The digest in the target's `latest`, or None. Raises DatasetMismatch for a version or split not in the source."""
    dataset_keys = DatasetKeys(dataset)
    latest = read_pointer(target, dataset).manifest
    split = read_json(target, dataset_keys.split)
    known = [version.digest for version in versions]
    if latest not in (None, *known) or split not in (None, read_json(source, dataset_keys.split)):
        raise DatasetMismatch(
            f"dataset {dataset!r}: {target.url!r} holds another dataset of this name, or versions that {source.url!r} "
            f"lacks (newest manifest: {latest or 'none'}). Copy to another store or prefix."
        )
    return latest


def _copy_object(source: Store, target: Store, key: str) -> None:
    with suppress(AlreadyExists):  # create-only, and `_check_target` has compared the datasets
        target.put_new(key, source.read(key).body)
