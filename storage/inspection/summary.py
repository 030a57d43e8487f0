"""A dataset's summary: what a version holds, counted from the records of its shards. Opens no shard."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

from pydantic import BaseModel

from storage.datasets.manifest import Manifest
from storage.datasets.recipe import TokenizerIdentity
from storage.datasets.records import RECORDS_AT_ONCE, read_record
from storage.inspection.leaks import LeakReport, read_leak_report
from storage.stores.store import Store

COUNTED = ("tokens", "documents", "skipped", "filtered", "text_bytes")


class FileSummary(BaseModel, frozen=True):
    """The counts of one source file."""

    name: str
    shards: int
    tokens: int
    documents: int
    skipped: int
    filtered: int
    text_bytes: int


class DatasetSummary(BaseModel, frozen=True):
    """A version in numbers, as `gpt2 dataset show --json` prints it.

    `lengths[n]` counts documents of 2**n to 2**(n+1) - 1 tokens. `rows` counts the source rows of the version's
    shards, and `filtered` the rows that filters dropped. A file without any kept row has no shard and is not counted.
    `audit` is the leak report.
    """

    dataset: str
    manifest: str
    parent: str | None
    recipe: dict[str, Any]
    tokenizer: TokenizerIdentity
    origin: dict[str, str]
    totals: dict[str, dict[str, int]]
    files: list[FileSummary]
    dumps: dict[str, int]
    lengths: list[int]
    rows: int
    filtered: int
    filtered_share: float
    audit: LeakReport | None


def summarise(store: Store, dataset: str, manifest: Manifest) -> DatasetSummary:
    """Read the record of every shard. Raises ObjectMissing for a missing record, ShardCorrupt if unreadable."""
    counts: dict[str, Counter[str]] = {}
    dumps: Counter[str] = Counter()
    lengths: list[int] = []
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        shard_ids = [*manifest.shard_ids, *manifest.empty]
        for record in pool.map(lambda shard_id: read_record(store, dataset, shard_id), shard_ids):
            counted = counts.setdefault(record.source, Counter())
            counted.update({name: getattr(record, name) for name in COUNTED}, shards=int(record.tokens > 0))
            dumps.update(record.dumps)
            lengths = [total + count for total, count in zip_longest(lengths, record.lengths, fillvalue=0)]
    files = [FileSummary(name=name, **counted) for name, counted in counts.items()]
    filtered = sum(file.filtered for file in files)
    rows = sum(file.documents + file.skipped + file.filtered for file in files)
    return DatasetSummary(
        dataset=dataset,
        manifest=manifest.digest,
        parent=manifest.parent,
        recipe=manifest.recipe.to_json(),
        tokenizer=manifest.tokenizer,
        origin=manifest.origin,
        totals=manifest.totals,
        files=files,
        dumps=dict(sorted(dumps.items())),
        lengths=lengths,
        rows=rows,
        filtered=filtered,
        filtered_share=filtered / rows if rows else 0.0,
        audit=read_leak_report(store, dataset, manifest.digest),
    )
