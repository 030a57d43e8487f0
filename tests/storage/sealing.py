"""Builders of sealed datasets: small source files, their shards and manifests, and a recording store."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from model import tokenizer
from storage.datasets import sealing, shards
from storage.datasets.manifest import Manifest
from storage.datasets.plan import FilePlan, ShardJob, plan_file
from storage.datasets.recipe import DatasetSettings, DatasetSpec
from storage.keys import DatasetKeys
from storage.sources import reading
from storage.sources.files import Listing
from storage.stores.store import Store
from tests.making import document, read_json, write_parquet

IDENTITY = tokenizer.identity()
SPEC = DatasetSpec("small", DatasetSettings(500, IDENTITY["sha256"]), "*.parquet", "", 2, IDENTITY)
NO_FILES = Listing((), {})


def seal(store: Store, dataset: str, planned: list[str], source: Listing | None = None, **changes: Any) -> Manifest:
    """Seal planned shards under `SPEC`, with these fields changed."""
    return sealing.seal(store, replace(SPEC, name=dataset, **changes), planned, source or NO_FILES)


def source_file(folder: Path, number: int, documents: int = 20) -> Path:
    """Write a source file of three to four shards."""
    return write_parquet(
        folder / f"file_{number}.parquet", [document(number * 1_000 + row) for row in range(documents)]
    )


def plans_of(*paths: Path | str, **settings: Any) -> list[FilePlan]:
    """The plans of the files: shards of 500 tokens, unless the settings differ."""
    return [plan_file(reading.identify(path), replace(SPEC.settings, **settings), tokenizer.encode) for path in paths]


def jobs_of(*paths: Path, **settings: Any) -> list[ShardJob]:
    return [job for plan in plans_of(*paths, **settings) for job in plan.jobs()]


def rows_of(job: ShardJob) -> tuple[int, int]:
    """The first row of a shard, and the row after its last."""
    return job.recipe.row_from, job.recipe.row_to


def built(
    store: Store, *paths: Path, dataset: str = "small", order: Callable[[list[ShardJob]], None] | None = None
) -> list[str]:
    """Build the shards of the files, in any order. Returns their ids in the planned order."""
    jobs = jobs_of(*paths)
    planned = [job.shard_id for job in jobs]
    if order:
        order(jobs)
    for job in jobs:
        shards.build_shard(store, dataset, job, tokenizer.encode, tokenizer.EOT)
    return planned


def sealed(store: Store, *paths: Path) -> Manifest:
    return seal(store, "small", built(store, *paths))


def shard_key(shard_id: str) -> str:
    return DatasetKeys("small").shard(shard_id)


def record_key(shard_id: str) -> str:
    return DatasetKeys("small").record(shard_id)


def pointer(store: Store, dataset: str = "small") -> dict[str, Any]:
    latest = read_json(store, DatasetKeys(dataset).latest)
    assert latest is not None
    return latest


def manifests(store: Store, dataset: str = "small") -> list[str]:
    return [listed.key for listed in store.list(DatasetKeys(dataset).prefix + "manifests/")]


class RecordingStore:
    """A store that records the keys that are read, and calls `before_swap` before the first swap."""

    def __init__(self, store: Store, before_swap: Callable[[], object] | None = None) -> None:
        self._store, self._act, self.read_keys = store, before_swap, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str) -> Any:
        self.read_keys.append(key)
        return self._store.read(key)

    def swap(self, *arguments: Any) -> str:
        act, self._act = self._act, None
        if act:
            act()
        return self._store.swap(*arguments)
