"""Finds and deletes objects and files that nothing refers to and that are older than a grace period.

The shards of every manifest and the files of every checkpoint that retention keeps are live. So are all shards of a
dataset on which a build started, or in which an unlisted shard was written, within the grace period.
"""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from typing import NamedTuple

from flows.inspection.status import dataset_names, run_names
from model.checkpoints.records import checkpoints, retained
from model.config import TrainingConfig
from model.runs.job import Job
from model.runs.run import find_run, training_job
from storage.cache import host
from storage.datasets.lease import claim, holds, last_build, release
from storage.datasets.manifest import read_manifest, read_pointer
from storage.datasets.versions import version_digests
from storage.errors import Conflict, ObjectCorrupt, ObjectMissing, StoreUnusable
from storage.keys import CONVERTED, TEMPORARY, DatasetKeys, RunKeys
from storage.sources.conversion import Conversion
from storage.stores.store import Stat, Store, clock, read_as

SUFFIX = re.compile(r"(\.failure)?\.(json|bin)$")  # of a shard's token ids, record and failure note


class Garbage(NamedTuple):
    """An unreferenced object or file; or a damaged run or dataset, of which gpt2 gc therefore deletes nothing."""

    kind: str
    name: str
    size_bytes: int = 0
    damage: str = ""


def collect(store: Store, grace_seconds: float, *, remove: bool = True) -> Iterator[Garbage]:
    """Delete garbage, or list it. Yields each item once it is gone. Raises Conflict if a build starts meanwhile."""
    before = time.time() - grace_seconds
    with nullcontext() if remove else suppress(StoreUnusable):  # a store that cannot be written can be listed
        before = clock(store) - grace_seconds
    parts = [(f"dataset {name}", _shards(store, name, before, remove=remove)) for name in dataset_names(store)]
    for name in run_names(store):
        parts.append((f"run {name}", _objects(store, "run", _dead_run_objects(store, name, before), remove)))
    parts.append(("converted source files", _objects(store, "source", _unrecorded(store, before), remove)))
    for part, garbage in parts:
        try:
            yield from garbage
        except (ObjectCorrupt, ObjectMissing, ValueError) as error:
            yield Garbage("damaged", part, damage=str(error))
    yield from _objects(store, "probe", _old(store, TEMPORARY, before), remove)
    yield from _unfinished(store, before, remove=remove)


def _objects(store: Store, kind: str, dead: Iterable[Stat], remove: bool) -> Iterator[Garbage]:
    for listed in dead:
        if remove:
            store.delete(listed.key)
        yield Garbage(kind, listed.key, listed.size)


def _unfinished(store: Store, before: float, *, remove: bool) -> Iterator[Garbage]:
    """Unfinished writes, and damaged files in this host's cache."""
    for upload in store.unfinished(before, remove=remove):
        yield Garbage("unfinished", upload)
    for path in host.HostCache(host.FOLDER, 0).quarantined():
        with suppress(FileNotFoundError):  # another gpt2 gc on this host deleted it
            stat = path.stat()
            if stat.st_ctime < before:
                if remove:
                    path.unlink()
                yield Garbage("quarantine", path.name, stat.st_size)


def _shards(store: Store, dataset: str, before: float, *, remove: bool) -> Iterator[Garbage]:
    """A dataset's dead shards, deleted under a lease. Raises Conflict when a build takes the lease over."""
    unleased = _dead_shards(store, dataset, before)
    if not remove or not unleased:
        yield from _objects(store, "shard", unleased, remove=False)
        return
    lease = claim(store, dataset, "collector", before)
    try:
        for dead in _records_first(_dead_shards(store, dataset, before, leased=True)):
            if not holds(store, dataset, lease):
                raise Conflict(f"dataset {dataset!r}: a build has started. Run gpt2 gc again when it has ended.")
            store.delete(dead.key)
            yield Garbage("shard", dead.key, dead.size)
    finally:
        release(store, dataset, lease)


def _dead_shards(store: Store, dataset: str, before: float, *, leased: bool = False) -> list[Stat]:
    """The objects of shards that no version lists; none while a build may still use them."""
    prefix, latest = DatasetKeys(dataset).shards, read_pointer(store, dataset).manifest
    listed_shards = list(store.list(prefix))  # before the manifests, in case of a concurrent seal
    live: set[str] = set()
    for digest in {*version_digests(store, dataset), *filter(None, [latest])}:  # a build seals a lost `latest` again
        version = read_manifest(store, dataset, digest)
        live.update(version.shard_ids, version.empty)
    dead = [listed for listed in listed_shards if SUFFIX.sub("", listed.key.removeprefix(prefix)) not in live]
    last_build_at = 0.0 if leased else last_build(store, dataset)
    return dead if max([last_build_at, *(listed.modified for listed in dead)]) < before else []


def _dead_run_objects(store: Store, name: str, before: float) -> Iterator[Stat]:
    """Checkpoints beyond retention, files of killed attempts, and metrics that no kept checkpoint lists."""
    run = find_run(store, name)
    if run is None:
        return  # an imported model has one checkpoint and no training

    def train_of(job: Job | None) -> TrainingConfig:  # retention as last requested
        values = run.config["train"] | (job.how.train if job else {})
        return TrainingConfig.model_validate(values, extra="ignore")

    train = train_of(read_as(store, training_job(run).key, Job, train_of))
    old = [*_old(store, RunKeys(name).checkpoints, before), *_old(store, RunKeys(name).metrics, before)]
    live = set()
    for record in retained(checkpoints(store, name), train):
        live.add(RunKeys(name).checkpoint_record(record.step))
        live.update(RunKeys(name).checkpoint_file(record.step, record.attempt, file) for file in record.files)
        live.update(record.metrics)
    yield from _records_first(listed for listed in old if listed.key not in live)


def _unrecorded(store: Store, before: float) -> Iterator[Stat]:
    """The converted source files that no record names, left by a conversion that was repeated."""
    converted = _old(store, CONVERTED, before)
    records = (listed.key for listed in store.list(CONVERTED) if listed.key.endswith(".json"))
    live = {conversion.key for key in records if (conversion := read_as(store, key, Conversion))}
    yield from (listed for listed in converted if listed.key not in live and not listed.key.endswith(".json"))


def _records_first(dead: Iterable[Stat]) -> list[Stat]:
    """Sort records before data, so that no record ever refers to deleted data."""
    return sorted(dead, key=lambda listed: not listed.key.endswith(".json"))


def _old(store: Store, prefix: str, before: float) -> list[Stat]:
    return [listed for listed in store.list(prefix) if listed.modified < before]
