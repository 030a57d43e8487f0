"""The record of a shard: the JSON that makes the shard count as done. It is written after the shard, create-only."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field

from storage.datasets.manifest import COUNTS, LARGEST_SHARD_TOKENS, Count, Digest, ShardId, ShardRow, Tokens
from storage.datasets.recipe import ShardRecipe, without_fixed
from storage.digests import canonical_json
from storage.errors import Conflict, ObjectCorrupt, ObjectMissing, ShardCorrupt, StorageError
from storage.keys import DatasetKeys, failure
from storage.stores.store import Store, overwrite, read_as

DTYPE = np.dtype("<u2")  # of token ids: gpt2's 50,257 fit in 16 bits; little-endian on every host
RECORDS_AT_ONCE = 16  # each read from a bucket is a round trip of 3 ms or more
RECORDS_IN_FLIGHT = 1_000  # 130,000 futures at once would take 200 MB


@dataclass(frozen=True)
class Record:
    """A finished shard. `lengths[n]` counts documents of 2**n to 2**(n+1) - 1 tokens, EOT included."""

    shard_id: ShardId
    tokens: Tokens
    documents: Count
    skipped: Count  # rows that could not be tokenised: `skipped_rows`
    text_bytes: Count
    sha256: Digest
    source: str
    recipe: Annotated[ShardRecipe, BeforeValidator(without_fixed)]
    versions: dict[str, str]
    filtered: Count = 0  # rows that a filter dropped
    skipped_rows: list[Count] = field(default_factory=list)
    lengths: Annotated[list[Count], Field(max_length=LARGEST_SHARD_TOKENS.bit_length())] = field(default_factory=list)
    dumps: dict[str, Count] = field(default_factory=dict)  # documents of each crawl
    in_val_rows: list[Count] = field(default_factory=list)  # rows that hold val documents

    @property
    def in_val(self) -> int:
        return len(self.in_val_rows)

    @property
    def row(self) -> ShardRow:
        return ShardRow(shard_id=self.shard_id, sha256=self.sha256, **{name: getattr(self, name) for name in COUNTS})

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"recipe": self.recipe.to_json()}


def corrupt(dataset: str, shard_id: str, wrong: str, kind: type[StorageError] = ShardCorrupt) -> StorageError:
    """The error for a shard that has to be rebuilt."""
    older = f"If no newest version lists it, delete {DatasetKeys(dataset).record(shard_id)!r} and build again."
    remedy = f"Rebuild it: gpt2 dataset verify --repair. {older}"
    return kind(f"shard {shard_id!r} of dataset {dataset!r}: {wrong} {remedy}")


def read_record(store: Store, dataset: str, shard_id: str) -> Record:
    """The record of a shard. Raises ObjectMissing if it does not exist, ShardCorrupt if it is unreadable."""
    key = DatasetKeys(dataset).record(shard_id)
    try:
        record = read_as(store, key, Record, lambda record: record.shard_id == shard_id)
    except ObjectCorrupt as error:
        reason = str(error).rpartition(". ")[0]  # without the error's own remedy
        raise corrupt(dataset, shard_id, f"its record is unreadable: {reason}.") from error
    if record is None:
        raise corrupt(dataset, shard_id, f"store {store.url!r} has no object {key!r}.", ObjectMissing)
    return record


def put_record(store: Store, dataset: str, record: Record) -> None:
    """Put a record, or replace an unreadable record. Raises ShardCorrupt if the stored record has another sha256."""
    key, body = DatasetKeys(dataset).record(record.shard_id), canonical_json(record.to_json())
    try:
        store.put_new(key, body)
    except Conflict as error:
        if (stored := _readable_row(store, dataset, record.shard_id)) is None:
            overwrite(store, key, body)
        elif stored.sha256 != record.sha256:
            wrong = f"its record has sha256 {stored.sha256}, but the same recipe now gives {record.sha256}."
            raise corrupt(dataset, record.shard_id, f"{wrong} Other package versions can cause this.") from error


def finished_shards(store: Store, dataset: str, wanted: list[str], known: dict[str, ShardRow]) -> dict[str, ShardRow]:
    """The wanted shards with a record and of the recorded size. Costs a listing, and a read for each not `known`."""
    dataset_keys = DatasetKeys(dataset)
    sizes = {listed.key: listed.size for listed in store.list(dataset_keys.shards)}
    rows = {shard_id: known.get(shard_id) for shard_id in wanted if dataset_keys.record(shard_id) in sizes}
    unread = iter([shard_id for shard_id, row in rows.items() if row is None])
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        while window := list(islice(unread, RECORDS_IN_FLIGHT)):
            read = pool.map(lambda shard_id: _readable_row(store, dataset, shard_id), window)
            rows.update(zip(window, read, strict=True))
    return {
        shard_id: row
        for shard_id, row in rows.items()
        if row and sizes.get(dataset_keys.shard(shard_id)) == row.tokens * DTYPE.itemsize
    }


def is_finished(store: Store, dataset: str, shard_id: str) -> bool:
    """Whether one shard is done, without a listing: n jobs that each list n shards would cost n * n."""
    with suppress(ObjectMissing, ShardCorrupt):
        size_bytes = store.stat(DatasetKeys(dataset).shard(shard_id)).size
        return size_bytes == read_record(store, dataset, shard_id).tokens * DTYPE.itemsize
    return False


def delete_shard(store: Store, dataset: str, shard_id: str) -> None:
    """Delete a shard so that its job runs again: the record first, so that no record ever lacks its shard."""
    store.delete(DatasetKeys(dataset).record(shard_id))
    store.delete(DatasetKeys(dataset).shard(shard_id))


def failures(store: Store, dataset: str) -> dict[str, str]:
    """The reason of each failed shard job, by shard_id."""
    prefix, suffix = DatasetKeys(dataset).shards, failure("")
    failed_keys = sorted(listed.key for listed in store.list(prefix) if listed.key.endswith(suffix))
    return {key.removeprefix(prefix).removesuffix(suffix): read_failure(store, key) for key in failed_keys}


def read_failure(store: Store, key: str) -> str:
    """The reason in the failure note at a key, empty without a note. A damaged note is a reason too."""
    try:
        note = read_as(store, key, dict[str, str], lambda note: "why" in note)
    except ObjectCorrupt as error:
        return str(error)
    return note["why"] if note else ""


def _readable_row(store: Store, dataset: str, shard_id: str) -> ShardRow | None:
    with suppress(ShardCorrupt):
        return read_record(store, dataset, shard_id).row
    return None
