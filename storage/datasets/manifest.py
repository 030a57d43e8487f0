"""A manifest: one immutable version of a dataset, named by the sha256 of its bytes.

It is a pure function of the records and of the manifest before it, so any number of workers in any order, with any
retries, seal the same one.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from storage.datasets.records import ShardSummary
from storage.errors import ObjectCorrupt, ObjectMissing, StoreUnusable
from storage.keys import NAME, DatasetKeys
from storage.stores.store import Store, read_json

SCHEMA = 1
COLUMNS = ("shard_id", *ShardSummary._fields, "split")
LARGEST_SHARD_TOKENS = 1 << 31  # 4 GiB
SHA256 = re.compile(r"[0-9a-f]{64}")


class ShardRow(NamedTuple):
    """One shard as the manifest lists it."""

    shard_id: str
    tokens: int
    documents: int
    skipped: int
    text_bytes: int
    sha256: str
    split: str

    @property
    def summary(self) -> ShardSummary:
        return ShardSummary(*self[1:-1])


@dataclass(frozen=True)
class Manifest:
    """One version of a dataset: what made it, where its text came from, and its shards in order as columns.

    `source` holds the source files as columns (name, digest, size_bytes) and, for a Hub dataset, its origin (dataset,
    config, commit, licence). `empty` lists shards whose every document was filtered or skipped.
    """

    digest: str
    recipe: dict[str, Any]
    tokenizer: dict[str, Any]
    source: dict[str, Any]
    totals: dict[str, dict[str, int]]
    parent: str | None
    columns: dict[str, list[Any]]
    empty: tuple[str, ...] = ()

    @property
    def shard_ids(self) -> list[str]:
        return self.columns["shard_id"]

    @property
    def files(self) -> dict[str, str]:
        return dict(zip(self.source["files"]["name"], self.source["files"]["digest"], strict=True))

    @property
    def origin(self) -> dict[str, str]:
        return {name: value for name, value in self.source.items() if name != "files"}

    @property
    def tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.totals.values())

    @property
    def summaries(self) -> dict[str, ShardSummary]:
        return {row.shard_id: row.summary for row in self.rows()}

    def rows(self, split: str | None = None) -> Iterator[ShardRow]:
        """The shards in order, of both splits or of one."""
        for values in zip(*(self.columns[name] for name in COLUMNS), strict=True):
            row = ShardRow(*values)
            if split in (None, row.split):
                yield row


def read_manifest(store: Store, dataset: str, digest: str) -> Manifest:
    """The manifest with that digest. Raises ObjectMissing, ObjectCorrupt, and StoreUnusable for a newer schema."""
    body, _, sha256 = store.read(DatasetKeys(dataset).manifest(digest))
    if sha256 != digest:
        raise ObjectCorrupt(
            f"manifest {digest} of dataset {dataset!r}: its bytes have sha256 {sha256}. Delete it and run "
            f"gpt2 dataset build, which seals the newest version again; restore an older one with gpt2 dataset copy."
        )
    try:
        value = json.loads(body)
        if value["schema"] > SCHEMA:  # before its columns, which may be others
            raise StoreUnusable(
                f"manifest {digest} of dataset {dataset!r} has schema {value['schema']}; this version reads up to "
                f"{SCHEMA}. Update gpt2-pipeline."
            )
        invalid = _invalid_values(value["shards"])
        fields = {name: value[name] for name in ("recipe", "tokenizer", "source", "totals", "parent")}
    except (ValueError, KeyError, TypeError) as error:
        invalid = [error]
    if invalid:
        raise ObjectCorrupt(
            f"manifest {digest} of dataset {dataset!r}: expected columns of shard names, digests and sizes, found "
            f"{str(invalid[0])[:80]!r}. Do not use it: gpt2 dataset build seals another."
        )
    return Manifest(digest=digest, columns=value["shards"], empty=tuple(value.get("empty", ())), **fields)


def latest_manifest(store: Store, dataset: str) -> Manifest | None:
    """The dataset's newest version, or None if it was never sealed."""
    key = DatasetKeys(dataset).latest
    pointer = read_json(store, key)
    if pointer is None:
        return None
    if "manifest" not in pointer:
        raise ObjectCorrupt(f"object {key!r} of store {store.url!r} names no manifest. Delete it and run again.")
    try:
        return read_manifest(store, dataset, str(pointer["manifest"]))
    except ObjectMissing:  # damaged and deleted, as its error advised: the next build seals it again from the records
        return None


def ancestors(store: Store, dataset: str, digest: str | None) -> Iterator[Manifest]:
    """The version with that digest and all versions before it, newest first."""
    while digest is not None:
        version = read_manifest(store, dataset, digest)
        yield version
        digest = version.parent


def _invalid_values(columns: dict[str, list[Any]]) -> list[Any]:
    """The values that cannot become keys, file names and sizes."""
    shard_ids = columns["shard_id"]
    invalid: list[Any] = [name for name in COLUMNS if len(columns[name]) != len(shard_ids)]
    invalid += [shard_id for shard_id in shard_ids if not NAME.fullmatch(shard_id)]
    invalid += [sha256 for sha256 in columns["sha256"] if not SHA256.fullmatch(sha256)]
    invalid += [
        tokens for tokens in columns["tokens"] if not (isinstance(tokens, int) and 0 < tokens <= LARGEST_SHARD_TOKENS)
    ]
    return invalid + [split for split in columns["split"] if split not in ("train", "val")]
