"""For the tests of garbage collection: a store with orphan shards, whose objects can be aged."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from model import tokenizer
from storage import keys
from storage.datasets import lease, records, shards
from storage.datasets.manifest import Manifest
from storage.inspection.verify import check_fully, check_versions
from storage.keys import DatasetKeys
from storage.stores.store import Store
from tests.making import read_json
from tests.storage.sealing import built, jobs_of, record_key, seal, shard_key, source_file

HOUR = 3600.0


class Place:
    """A store with the sealed dataset `small` and orphan shards, and a grace period that aged objects exceed.

    In a folder, objects are aged by their file times. In S3 that is impossible, so there the grace period is negative.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.in_folder = store.local_path(keys.FORMAT) is not None
        self.grace = HOUR if self.in_folder else -HOUR
        self.source, self.other = source_file(folder / "source", 0), source_file(folder / "source", 1)
        self.manifest = seal(store, "small", built(store, self.source))
        self.orphans = built(store, self.other)
        self.age("")

    def age(self, prefix: str) -> None:
        """Make the objects below a prefix two hours old."""
        if self.in_folder:
            make_old(self.store, prefix)

    def stored_keys(self) -> set[str]:
        return {listed.key for listed in self.store.list("") if listed.key != lease_key()}

    def orphan_keys(self) -> set[str]:
        return {key(name) for name in self.orphans for key in (shard_key, record_key)}

    def whole(self, manifest: Manifest | None = None) -> bool:
        """Whether every byte of the version is intact, and no record lacks its shard."""
        manifest = manifest or self.manifest
        listed_keys = self.stored_keys()
        for key in listed_keys:
            if key.startswith(DatasetKeys("small").shards) and key.endswith(".json") and "failure" not in key:
                assert key.removesuffix(".json") + ".bin" in listed_keys, key
        damaged = [check_fully(self.store, "small", row, tokenizer.EOT) for row in manifest.rows()]
        return not any(damaged) and not list(check_versions(self.store, "small", manifest))


def make_old(store: Store, prefix: str) -> None:
    """Set the file times of a folder store's objects below a prefix to two hours ago."""
    for listed in list(store.list(prefix)):
        if path := store.local_path(listed.key):
            os.utime(path, (time.time() - 2 * HOUR,) * 2)


def lease_key() -> str:
    return DatasetKeys("small").lease


def holder(store: Store) -> object:
    return (read_json(store, lease_key()) or {}).get("holder")


def build(store: Store, *paths: Path, before_seal: Callable[[], object] = lambda: None) -> Manifest:
    """Build as `gpt2 dataset build` does, without Prefect: claim, build the missing shards, seal."""
    lease.claim(store, "small", "build")
    jobs = jobs_of(*paths)
    finished = records.finished_shards(store, "small", [job.shard_id for job in jobs], {})
    for job in jobs:
        if job.shard_id not in finished:
            shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)
    before_seal()
    return seal(store, "small", [job.shard_id for job in jobs])
