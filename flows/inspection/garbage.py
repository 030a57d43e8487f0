"""What nothing in the store refers to any more, and its removal. Only what is older than a grace period counts.

Live are the shards of every manifest, the files of every checkpoint that retention keeps, and all shards of a dataset
that is being built: one that a build began on, or that got a shard, within the grace period.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.inspection.status import dataset_names, run_names
from model.checkpoints.records import checkpoints, retained
from model.runs.run import find_run, training_job
from storage import keys
from storage.cache import host as host_cache
from storage.cache.host import HostCache
from storage.datasets.lease import claim, holds, last_build, release
from storage.datasets.manifest import read_manifest
from storage.datasets.versions import version_digests
from storage.errors import Conflict
from storage.keys import DatasetKeys, RunKeys
from storage.stores.store import Stat, Store, clock, read_json


@dataclass(frozen=True)
class Garbage:
    """Something that nothing refers to: what kind of thing, its name, its size."""

    kind: str
    name: str
    size_bytes: int


def find(store: Store, grace_seconds: float) -> list[Garbage]:
    """All that could be deleted now. Changes nothing."""
    before = time.time() - grace_seconds
    dead = [("shard", one) for name in dataset_names(store) for one in _shards(store, name, before)]
    dead += [("run", one) for name in run_names(store) for one in _of_run(store, name, before)]
    dead += [("probe", one) for one in _old(store, keys.TEMPORARY, before)]
    found = [Garbage(kind, one.key, one.size) for kind, one in dead]
    found += [Garbage("unfinished", name, 0) for name in store.unfinished(before)]
    return found + [Garbage("quarantine", path.name, size) for path, size in _quarantine(before)]


def collect(store: Store, grace_seconds: float) -> Iterator[Garbage]:
    """Delete what `find` finds, one after the other, safe beside running builds; yields each when it is gone.

    Raises Conflict when a build of a dataset began in the same moment.
    """
    before = clock(store) - grace_seconds
    for name in dataset_names(store):
        if _shards(store, name, before):
            yield from _collect_shards(store, name, before)
    for name in run_names(store):
        for dead in _of_run(store, name, before):
            yield _delete(store, "run", dead)
    for dead in _old(store, keys.TEMPORARY, before):
        yield _delete(store, "probe", dead)
    for left in store.unfinished(before, remove=True):
        yield Garbage("unfinished", left, 0)
    for path, size in _quarantine(before):
        path.unlink(missing_ok=True)
        yield Garbage("quarantine", path.name, size)


def _collect_shards(store: Store, dataset: str, before: float) -> Iterator[Garbage]:
    """Delete a dataset's dead shards under a lease, records first, for as long as no build takes the lease over."""
    mine = claim(store, dataset, "collector", before)
    try:
        dead = _shards(store, dataset, before, leased=True)
        for found in sorted(dead, key=lambda found: not found.key.endswith(".json")):
            if not holds(store, dataset, mine):
                raise Conflict(f"dataset {dataset!r}: a build took over. Run gpt2 gc again when it has ended.")
            yield _delete(store, "shard", found)
    finally:
        release(store, dataset, mine)


def _shards(store: Store, dataset: str, before: float, *, leased: bool = False) -> list[Stat]:
    """What no version of the dataset lists, unless a build may still want it."""
    there = list(
        store.list(DatasetKeys(dataset).shards)
    )  # before the manifests: what is sealed meanwhile is none of these
    live: set[str] = set()
    for digest in version_digests(store, dataset):
        version = read_manifest(store, dataset, digest)
        live.update(version.shard_ids, version.empty)
    dead = [found for found in there if _shard_id(dataset, found.key) not in live]
    newest = max([found.modified for found in dead] + ([] if leased else [last_build(store, dataset)]), default=0.0)
    return dead if newest < before else []


def _shard_id(dataset: str, key: str) -> str:
    name = key.removeprefix(DatasetKeys(dataset).shards)
    return name.removesuffix(".failure.json").removesuffix(".json").removesuffix(".bin")


def _of_run(store: Store, name: str, before: float) -> list[Stat]:
    """Checkpoints that retention gives up, files of killed attempts, metrics that no kept checkpoint lists."""
    run = find_run(store, name)
    if run is None:
        return []  # an imported model has one checkpoint, and no training that left anything
    asked: Any = read_json(store, training_job(run).key) or {}
    train = run.config["train"] | asked.get("how", {}).get("train", {})  # as it was asked for last
    there = [*_old(store, RunKeys(name).checkpoints, before), *_old(store, RunKeys(name).metrics, before)]
    live = set()
    for record in retained(checkpoints(store, name), train["keep_last"], train["keep_every_steps"]):
        live.add(RunKeys(name).checkpoint_record(record.step))
        live.update(RunKeys(name).checkpoint_file(record.step, record.attempt, file) for file in record.files)
        live.update(record.metrics)
    dead = [found for found in there if found.key not in live]
    return sorted(dead, key=lambda found: not found.key.endswith(".json"))  # records first


def _old(store: Store, prefix: str, before: float) -> list[Stat]:
    return [found for found in store.list(prefix) if found.modified < before]


def _quarantine(before: float) -> Iterator[tuple[Path, int]]:
    """Files that this host has set aside, and their sizes."""
    for path in HostCache(host_cache.FOLDER, 0).quarantined():
        with suppress(FileNotFoundError):  # another collector on this host was faster
            found = path.stat()
            if found.st_ctime < before:
                yield path, found.st_size


def _delete(store: Store, kind: str, dead: Stat) -> Garbage:
    store.delete(dead.key)
    return Garbage(kind, dead.key, dead.size)
