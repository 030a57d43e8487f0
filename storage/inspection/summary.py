"""A dataset's summary: what a version holds, counted from the records of its shards. Opens no shard."""

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

from pydantic import BaseModel

from storage.datasets.manifest import COUNTS, Manifest, read_manifest
from storage.datasets.recipe import TokenizerIdentity
from storage.datasets.records import RECORDS_AT_ONCE, read_record
from storage.inspection.leaks import LeakReport, read_leak_report
from storage.stores.store import Store

COUNTED = (*COUNTS, "filtered")


class FileSummary(BaseModel, frozen=True):
    """The counts of one source file."""

    name: str
    shards: int
    tokens: int
    documents: int
    skipped: int
    filtered: int
    text_bytes: int
    in_val: int


class DatasetSummary(BaseModel, frozen=True):
    """A version in numbers, as `gpt2 dataset show --json` prints it."""

    dataset: str
    manifest: str
    parent: str | None
    recipe: dict[str, Any]
    tokenizer: TokenizerIdentity
    origin: dict[str, str]
    totals: dict[str, dict[str, int]]
    files: list[FileSummary]
    dumps: dict[str, int]
    lengths: list[int]  # entry n counts documents of 2**n to 2**(n+1) - 1 tokens
    rows: int  # source rows of all shards
    filtered: int  # rows that filters dropped
    filtered_share: float
    in_val: int  # rows that train leaves out
    in_val_added: int  # the same, in shards that the parent lacks
    audit: LeakReport | None


def summarise(store: Store, dataset: str, manifest: Manifest) -> DatasetSummary:
    """Read the record of every shard. Raises ObjectMissing for a missing record, ShardCorrupt if unreadable."""
    counts, dumps, lengths = defaultdict[str, Counter[str]](Counter), Counter[str](), list[int]()
    parent = read_manifest(store, dataset, manifest.parent) if manifest.parent else None
    in_parent = {*parent.shard_ids, *parent.empty} if parent else set()
    in_val_added = 0
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        shard_ids = [*manifest.shard_ids, *manifest.empty]
        for record in pool.map(lambda shard_id: read_record(store, dataset, shard_id), shard_ids):
            counted = {name: getattr(record, name) for name in COUNTED}
            counts[record.source].update(counted, shards=int(record.tokens > 0))
            in_val_added += 0 if record.shard_id in in_parent else record.in_val
            dumps.update(record.dumps)
            lengths = [total + count for total, count in zip_longest(lengths, record.lengths, fillvalue=0)]
    files = [FileSummary(name=name, **counted) for name, counted in counts.items()]
    filtered = sum(file.filtered for file in files)
    rows = sum(file.documents + file.skipped + file.filtered + file.in_val for file in files)
    version = {name: getattr(manifest, name) for name in ("parent", "tokenizer", "origin", "totals")}
    return DatasetSummary(
        **version,
        dataset=dataset,
        manifest=manifest.digest,
        recipe=manifest.recipe.to_json(),
        files=files,
        dumps=dict(sorted(dumps.items())),
        lengths=lengths,
        rows=rows,
        filtered=filtered,
        filtered_share=filtered / rows if rows else 0.0,
        in_val=sum(file.in_val for file in files),
        in_val_added=in_val_added,
        audit=read_leak_report(store, dataset, manifest.digest),
    )
