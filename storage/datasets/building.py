"""Builds a dataset: finds and builds the missing shards, then seals a version. Independent of Prefect.

start_build ─▶ build_shard for each missing val shard ─▶ put_val_documents ─▶ the same for train ─▶ finish_build
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from storage.datasets import val_documents
from storage.datasets.lease import claim
from storage.datasets.manifest import Manifest, latest_manifest
from storage.datasets.plan import Encode, FilePlan, ShardJob, ValSplit, plan_files, planner
from storage.datasets.recipe import DatasetSpec
from storage.datasets.records import DTYPE, failures, finished_shards, read_record
from storage.datasets.sealing import check_binding, check_rebuilt, seal
from storage.datasets.shards import build_shard, document_bounds, read_shard
from storage.digests import digest
from storage.errors import DatasetMismatch, ObjectCorrupt, ObjectMissing
from storage.keys import DatasetKeys, failure
from storage.sources.files import Listing
from storage.stores.store import Store

Decode = Callable[[list[int]], bytes]


@dataclass(frozen=True)
class Build:
    """One build: the plans of the source files, the val split, all and the missing shards, and the previous version."""

    spec: DatasetSpec
    plans: list[FilePlan]
    split: ValSplit
    planned: list[str]
    missing: frozenset[str]
    parent: Manifest | None


def val_split(store: Store, spec: DatasetSpec, plans: Sequence[FilePlan]) -> ValSplit:
    """The pinned val shards or, before the first seal, those that the settings choose. Raises DatasetMismatch."""
    if (val := check_binding(store, spec)) is None:
        val = spec.val_shards_of([job.shard_id for plan in plans for job in plan.jobs()])
    return ValSplit(frozenset(val), "" if spec.settings.keep_val_duplicates else digest(val))


def missing_jobs(plans: Sequence[FilePlan], val: ValSplit, missing: Collection[str], split: str) -> Iterator[ShardJob]:
    """The jobs of the missing shards of one split, to run in any order."""
    jobs = (job for plan in plans for job in plan.jobs(val) if job.shard_id in missing)
    return (job for job in jobs if (job.shard_id in val.shard_ids) == (split == "val"))


def put_val_documents(store: Store, dataset: str, split: ValSplit, decode: Decode) -> None:
    """Hash the documents of the finished val shards for the train shards, unless it is done or they keep all."""
    if not (split.documents and split.shard_ids):
        return
    with suppress(ObjectMissing, ObjectCorrupt):
        val_documents.read(store, dataset, split.documents)
        return
    hashes = []
    for shard_id in split.shard_ids:
        ids = np.frombuffer(read_shard(store, dataset, read_record(store, dataset, shard_id)), DTYPE)
        texts = (decode(ids[start + 1 : stop].tolist()) for start, stop in zip(*document_bounds(ids), strict=True))
        hashes.append(np.fromiter(map(val_documents.hashed, texts), val_documents.HASH))
    val_documents.put(store, dataset, split.documents, np.unique(np.concatenate(hashes)))


def start_build(store: Store, spec: DatasetSpec, plans: list[FilePlan]) -> Build:
    """Take the dataset's lease and find its missing shards. Raises DatasetMismatch, and Conflict while gpt2 gc runs."""
    split = val_split(store, spec, plans)
    claim(store, spec.name, "build")  # before relying on any stored shard
    parent = latest_manifest(store, spec.name)
    planned = [job.shard_id for plan in plans for job in plan.jobs(split)]
    finished = finished_shards(store, spec.name, planned, parent.rows_by_id if parent else {})
    return Build(spec, plans, split, planned, frozenset(planned) - finished.keys(), parent)


def build_here(store: Store, spec: DatasetSpec, listing: Listing, encode: Encode, decode: Decode, eot: int) -> Manifest:
    """Plan, build and seal a dataset in this process, one shard after the other."""
    plans = list(plan_files(store, spec.name, listing.files, spec.settings, planner(store, spec.settings, encode)))
    build = start_build(store, spec, plans)
    for split in ("val", "train"):
        for job in missing_jobs(plans, build.split, build.missing, split):
            build_shard(store, spec.name, job, encode, eot)
        put_val_documents(store, spec.name, build.split, decode)
    return finish_build(store, build, listing.origin)


def finish_build(store: Store, build: Build, origin: dict[str, str]) -> Manifest:
    """Seal the build after its shards are built, and delete failure notes. Raises as `check_rebuilt` and `seal`."""
    dataset = build.spec.name
    if build.parent:
        check_rebuilt(store, dataset, build.parent, build.missing)
    manifest = seal(store, build.spec, build.planned, Listing(tuple(plan.file for plan in build.plans), origin))
    for shard_id in failures(store, dataset):  # including jobs that are no longer planned
        store.delete(failure(DatasetKeys(dataset).record(shard_id)))
    return manifest


def lost_shards(store: Store, dataset: str, manifest: Manifest, plans: Sequence[FilePlan], val: ValSplit) -> set[str]:
    """The manifest's shards that the store has lost. Raises DatasetMismatch if the plans lack any of them."""
    lost = {*manifest.shard_ids} - finished_shards(store, dataset, manifest.shard_ids, manifest.rows_by_id).keys()
    recoverable = lost.intersection(job.shard_id for plan in plans for job in plan.jobs(val))
    if len(recoverable) < len(lost):
        problem = f"store {store.url!r} lacks {len(lost):,} shards of manifest {manifest.digest[:12]}"
        rest = f"the available source files can rebuild only {len(recoverable):,} of them"
        remedy = "Restore the missing or changed source files, or start a run with another name."
        raise DatasetMismatch(f"dataset {dataset!r}: {problem}, and {rest}. {remedy}")
    return lost
