"""The record of a shard: the JSON that makes the shard count as done. It is written after the shard, create-only."""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from storage.datasets.recipe import ShardRecipe
from storage.digests import canonical_json
from storage.errors import AlreadyExists, ObjectMissing, ShardCorrupt
from storage.keys import DatasetKeys, failure
from storage.stores.store import Store, overwrite, read_json

DTYPE = np.dtype("<u2")  # of token ids: gpt2's 50,257 fit 16 bits; little-endian on every host
RECORDS_AT_ONCE = 16  # from a bucket each is a round trip of 3 ms or more
RECORDS_IN_FLIGHT = 1_000  # 130,000 futures at once would take 200 MB


class ShardSummary(NamedTuple):
    """What a manifest holds of a shard: its counts and the sha256 of its bytes."""

    tokens: int
    documents: int
    skipped: int
    text_bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """A finished shard: its counts, the sha256 of its bytes, its recipe, and the versions that made it.

    Of the recipe's rows, `documents` were tokenised, `skipped` could not be (`skipped_rows` lists them) and `filtered`
    were dropped by a filter. `lengths[n]` counts documents of 2**n to 2**(n+1) - 1 tokens, EOT included; `dumps` counts
    documents of each crawl.
    """

    shard_id: str
    tokens: int
    documents: int
    skipped: int
    text_bytes: int
    sha256: str
    source: str
    recipe: ShardRecipe
    versions: dict[str, str]
    filtered: int = 0
    skipped_rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    dumps: dict[str, int] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return self.tokens * DTYPE.itemsize

    @property
    def summary(self) -> ShardSummary:
        return ShardSummary(self.tokens, self.documents, self.skipped, self.text_bytes, self.sha256)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"recipe": self.recipe.to_json()}


def read_record(store: Store, dataset: str, shard_id: str) -> Record:
    """The record of a shard. Raises ObjectMissing if the shard is not done, ShardCorrupt if it is unreadable."""
    body = store.read(DatasetKeys(dataset).record(shard_id)).body
    try:
        value = json.loads(body)
        return Record(**(value | {"recipe": ShardRecipe.from_json(value["recipe"])}))
    except (ValueError, TypeError, KeyError) as error:
        raise ShardCorrupt(
            f"shard {shard_id!r} of dataset {dataset!r}: its record should be JSON, found {body[:40]!r}. "
            f"Rebuild it: gpt2 dataset verify --repair"
        ) from error


def put_record(store: Store, dataset: str, record: Record) -> None:
    """Put a record. An unreadable one is replaced. Raises ShardCorrupt if one with another sha256 is stored."""
    key, body = DatasetKeys(dataset).record(record.shard_id), canonical_json(record.to_json())
    try:
        store.put_new(key, body)
    except AlreadyExists as error:
        stored = _readable_summary(store, dataset, record.shard_id)
        if stored is None:
            overwrite(store, key, body)
        elif stored.sha256 != record.sha256:
            raise ShardCorrupt(
                f"shard {record.shard_id!r} of dataset {dataset!r}: its record has sha256 {stored.sha256}, but the "
                f"same recipe now gives {record.sha256}. Rebuild it: gpt2 dataset verify --repair"
            ) from error


def finished_shards(
    store: Store, dataset: str, shard_ids: Iterable[str], known: Mapping[str, ShardSummary]
) -> dict[str, ShardSummary]:
    """The shards that are done: the record is stored, and the shard has the size that it states.

    Costs one listing. Records are read only for shards that are not `known` from a manifest. Keeps 8 bytes and a
    reference per shard, so that 130,000 shards fit.
    """
    numbers = {shard_id: number for number, shard_id in enumerate(shard_ids)}
    sizes, has_record = np.full(len(numbers), -1, np.int64), np.zeros(len(numbers), bool)
    for shard_id, is_record, size_bytes in _listed(store, dataset):
        number = numbers.get(shard_id)
        if number is not None and is_record:
            has_record[number] = True
        elif number is not None:
            sizes[number] = size_bytes
    finished: dict[str, ShardSummary] = {}
    recorded = (shard_id for shard_id, number in numbers.items() if has_record[number])
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        while window := list(islice(recorded, RECORDS_IN_FLIGHT)):
            unknown = [shard_id for shard_id in window if shard_id not in known]
            summaries = pool.map(lambda shard_id: _readable_summary(store, dataset, shard_id), unknown)
            read = dict(zip(unknown, summaries, strict=True))
            for shard_id in window:
                summary = known.get(shard_id) or read[shard_id]
                if summary and sizes[numbers[shard_id]] == summary.tokens * DTYPE.itemsize:
                    finished[shard_id] = summary
    return finished


def is_finished(store: Store, dataset: str, shard_id: str) -> bool:
    """Whether one shard is done, without a listing: n jobs that each list n shards would cost n * n."""
    try:
        size_bytes = store.stat(DatasetKeys(dataset).shard(shard_id)).size
        return size_bytes == read_record(store, dataset, shard_id).size_bytes
    except (ObjectMissing, ShardCorrupt):
        return False


def recorded_shards(store: Store, dataset: str) -> set[str]:
    """The shards that have a record."""
    return {shard_id for shard_id, is_record, _ in _listed(store, dataset) if is_record}


def delete_shard(store: Store, dataset: str, shard_id: str) -> None:
    """Delete a shard so that its job runs again: the record first, so that no record ever lacks its shard."""
    store.delete(DatasetKeys(dataset).record(shard_id))
    store.delete(DatasetKeys(dataset).shard(shard_id))


def failures(store: Store, dataset: str) -> dict[str, str]:
    """Why each shard job that last failed did so, by shard_id."""
    prefix, suffix = DatasetKeys(dataset).shards, failure("")
    failed_keys = sorted(listed.key for listed in store.list(prefix) if listed.key.endswith(suffix))
    reasons = {key: read_json(store, key) or {} for key in failed_keys}
    return {key.removeprefix(prefix).removesuffix(suffix): str(note.get("why")) for key, note in reasons.items()}


def _readable_summary(store: Store, dataset: str, shard_id: str) -> ShardSummary | None:
    try:
        return read_record(store, dataset, shard_id).summary
    except ShardCorrupt:
        return None


def _listed(store: Store, dataset: str) -> Iterator[tuple[str, bool, int]]:
    """Each stored shard and record: shard_id, whether it is the record, size in bytes."""
    dataset_keys = DatasetKeys(dataset)
    for listed in store.list(dataset_keys.shards):
        shard_id, is_record = dataset_keys.shard_of(listed.key)
        if shard_id is not None:
            yield shard_id, is_record, listed.size
