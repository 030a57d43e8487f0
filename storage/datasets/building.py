"""Builds a dataset: finds and builds the missing shards, then seals a version. Independent of Prefect.

start_build ─▶ Build.missing_jobs ─▶ build_shard, in any order, by any number of workers ─▶ finish_build
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage.datasets.lease import claim
from storage.datasets.manifest import Manifest, latest_manifest
from storage.datasets.plan import FilePlan, ShardJob, plan_files
from storage.datasets.recipe import DatasetSpec
from storage.datasets.records import failures, finished_shards
from storage.datasets.sealing import check_binding, check_rebuilt, seal
from storage.datasets.shards import Encode, build_shard
from storage.errors import DatasetMismatch
from storage.keys import DatasetKeys, failure
from storage.sources.files import Listing
from storage.stores.store import Store


@dataclass(frozen=True)
class Build:
    """One build: the plans of the source files, their shards, the missing shards, and the previous version."""

    spec: DatasetSpec
    plans: Sequence[FilePlan]
    planned: list[str]
    missing: frozenset[str]
    parent: Manifest | None

    @property
    def missing_jobs(self) -> Iterator[ShardJob]:
        return (job for plan in self.plans for job in plan.jobs() if job.shard_id in self.missing)


def start_build(store: Store, spec: DatasetSpec, plans: Sequence[FilePlan]) -> Build:
    """Take the dataset's lease and find its missing shards. Raises DatasetMismatch, and Conflict while gpt2 gc runs."""
    check_binding(store, spec)
    claim(store, spec.name, "build")  # before relying on any stored shard
    parent = latest_manifest(store, spec.name)
    planned = [shard_id for plan in plans for shard_id in plan.shard_ids]
    finished = finished_shards(store, spec.name, planned, parent.rows_by_id if parent else {})
    return Build(spec, plans, planned, frozenset(planned) - finished.keys(), parent)


def finish_build(store: Store, build: Build, origin: dict[str, str]) -> Manifest:
    """Seal the build after its shards are built, and delete failure notes. Raises as `check_rebuilt` and `seal`."""
    dataset = build.spec.name
    if build.parent:
        check_rebuilt(store, dataset, build.parent, build.missing)
    listing = Listing(tuple(plan.file for plan in build.plans), origin)
    manifest = seal(store, build.spec, build.planned, listing)
    if build.missing:
        for shard_id in failures(store, dataset):  # including jobs that are no longer planned
            store.delete(failure(DatasetKeys(dataset).record(shard_id)))
    return manifest


def build_dataset(store: Store, spec: DatasetSpec, listing: Listing, encode: Encode) -> Manifest:
    """Plan the files, build the missing shards one by one, and seal."""
    plans = list(plan_files(store, spec.name, listing.files, spec.settings))
    build = start_build(store, spec, plans)
    for job in build.missing_jobs:
        build_shard(store, spec.name, job, encode, spec.tokenizer["eot"])
    return finish_build(store, build, listing.origin)


def lost_shards(store: Store, dataset: str, manifest: Manifest, plans: Sequence[FilePlan]) -> set[str]:
    """The manifest's shards that the store has lost. Raises DatasetMismatch if the plans lack any of them."""
    finished = finished_shards(store, dataset, manifest.shard_ids, manifest.rows_by_id)
    lost = set(manifest.shard_ids) - finished.keys()
    recoverable = lost.intersection(shard_id for plan in plans for shard_id in plan.shard_ids)
    if len(recoverable) < len(lost):
        raise DatasetMismatch(
            f"dataset {dataset!r}: {len(lost):,} shards of manifest {manifest.digest[:12]} are missing from "
            f"{store.url!r}, and the available source files can rebuild only {len(recoverable):,} of them. Restore the "
            f"missing or changed source files, or start a run with another name."
        )
    return lost
