"""Copies a dataset from one store to another, every version of it: shards, records, the split, manifests, `latest`.

The order is the one of a build: what is named comes before what names it, so a copy that was killed is just unfinished.
"""

from contextlib import suppress

from storage.datasets.lease import claim
from storage.datasets.manifest import ShardRow, update_latest
from storage.datasets.shards import finished_shards, put_shard, read_shard
from storage.datasets.versions import history
from storage.errors import AlreadyExists, DatasetMismatch, ObjectMissing
from storage.keys import DatasetKeys
from storage.stores.store import Store, read_json


class Copying:
    """One copy: which versions and shards, which of them are missing in the other store.

    Raises ObjectMissing when the dataset was never sealed, DatasetMismatch when the name is taken in the other store.
    """

    def __init__(self, source: Store, target: Store, dataset: str) -> None:
        self._source, self._target, self._dataset = source, target, dataset
        self._versions = list(history(source, dataset))
        self.manifest = self._versions[0]
        self._check_target()
        claim(target, dataset, "build")
        rows = {row.shard_id: row for version in self._versions for row in version.rows()}
        there = finished_shards(target, dataset, list(rows), {row.shard_id: row.made for row in rows.values()})
        self.total = len(rows)
        self.missing = [row for row in rows.values() if row.shard_id not in there]

    def copy_shard(self, row: ShardRow) -> None:
        """Copy a shard, proved by its sha256, then its record. Raises ShardCorrupt, ObjectMissing."""
        body = read_shard(self._source, self._dataset, row.shard_id, row.tokens, row.sha256)
        put_shard(self._target, self._dataset, row.shard_id, body, row.sha256)
        self._copy(DatasetKeys(self._dataset).record(row.shard_id))

    def finish(self) -> None:
        """Copy the split and the manifests, oldest first, and point the other store's `latest` at the newest.

        With each goes what belongs to it: the records of shards of which nothing was kept, and its leak report.
        """
        self._copy(DatasetKeys(self._dataset).split)
        for version in reversed(self._versions):
            for shard_id in version.empty:
                self._copy(DatasetKeys(self._dataset).shard(shard_id))
                self._copy(DatasetKeys(self._dataset).record(shard_id))
            self._copy(DatasetKeys(self._dataset).manifest(version.digest))
            with suppress(ObjectMissing):  # nobody asked for one
                self._copy(DatasetKeys(self._dataset).leaks(version.digest))
        update_latest(self._target, self._dataset, self.manifest, self._check_target())

    def _check_target(self) -> str | None:
        """The version that the other store's `latest` names; it and the split must be ours."""
        pointer = read_json(self._target, DatasetKeys(self._dataset).latest)
        stands_at = str(pointer["manifest"]) if pointer else None
        split = read_json(self._target, DatasetKeys(self._dataset).split)
        ours = [version.digest for version in self._versions]
        if stands_at not in (None, *ours) or split not in (
            None,
            read_json(self._source, DatasetKeys(self._dataset).split),
        ):
            raise DatasetMismatch(
                f"dataset {self._dataset!r}: {self._target.url!r} holds another dataset of this name (manifest "
                f"{stands_at}), which {self._source.url!r} does not know. Copy to another store or prefix."
            )
        return stands_at

    def _copy(self, key: str) -> None:
        with suppress(AlreadyExists):  # create-only, so it is the same: `_check_target` has looked
            self._target.put_new(key, self._source.read(key).body)
