"""A dataset's summary: what a version holds, counted from the records of its shards. Opens no shard."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from storage.datasets.manifest import Manifest
from storage.datasets.records import RECORDS_AT_ONCE, Record, read_record
from storage.inspection.leaks import LeakReport, read_leak_report
from storage.stores.store import Store

COUNTED = ("tokens", "documents", "skipped", "filtered", "text_bytes")


@dataclass(frozen=True)
class FileSummary:
    """The part of one source file."""

    name: str
    shards: int
    tokens: int
    documents: int
    skipped: int
    filtered: int
    text_bytes: int


@dataclass(frozen=True)
class DatasetSummary:
    """A version in numbers: totals by split, each source file's part, documents by crawl and by length, and leaks.

    `lengths[n]` counts documents of 2**n to 2**(n+1) - 1 tokens. `rows` are those of the version's shards, `filtered`
    those of them that filters dropped; a file of which a filter keeps no row has no shard and is not counted.
    """

    manifest: Manifest
    dataset: str
    files: list[FileSummary]
    dumps: dict[str, int]
    lengths: list[int]
    leaks: LeakReport | None

    @property
    def filtered(self) -> int:
        """Rows that filters dropped."""
        return sum(file.filtered for file in self.files)

    @property
    def rows(self) -> int:
        """Rows of the version's shards."""
        return sum(file.documents + file.skipped + file.filtered for file in self.files)

    @property
    def filtered_share(self) -> float:
        """The share of the rows that filters dropped."""
        return self.filtered / self.rows if self.rows else 0.0

    def to_json(self) -> dict[str, Any]:
        """The summary as `gpt2 dataset show --json` prints it."""
        manifest = self.manifest
        return {
            "dataset": self.dataset,
            "manifest": manifest.digest,
            "parent": manifest.parent,
            "recipe": manifest.recipe,
            "tokenizer": manifest.tokenizer,
            "origin": {name: value for name, value in manifest.source.items() if name != "files"},
            "totals": manifest.totals,
            "files": [asdict(file) for file in self.files],
            "dumps": self.dumps,
            "lengths": self.lengths,
            "rows": self.rows,
            "filtered": self.filtered,
            "filtered_share": self.filtered_share,
            "audit": None if self.leaks is None else self.leaks.to_json(),
        }


def summarise(store: Store, dataset: str, manifest: Manifest) -> DatasetSummary:
    """Read the record of every shard. Raises ObjectMissing if one is gone."""
    counts: dict[str, Counter[str]] = {}
    dumps: Counter[str] = Counter()
    lengths: list[int] = []
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        shard_ids = [*manifest.shard_ids, *manifest.empty]
        for record in pool.map(lambda shard_id: read_record(store, dataset, shard_id), shard_ids):
            _count(record, counts.setdefault(record.source, Counter()))
            dumps.update(record.dumps)
            lengths = [total + count for total, count in zip_longest(lengths, record.lengths, fillvalue=0)]
    return DatasetSummary(
        manifest=manifest,
        dataset=dataset,
        files=[_file_summary(name, count) for name, count in counts.items()],
        dumps=dict(sorted(dumps.items())),
        lengths=lengths,
        leaks=read_leak_report(store, dataset, manifest.digest),
    )


def _count(record: Record, counts: Counter[str]) -> None:
    counts["shards"] += int(record.tokens > 0)
    for name in COUNTED:
        counts[name] += getattr(record, name)


def _file_summary(name: str, counts: Counter[str]) -> FileSummary:
    return FileSummary(name, counts["shards"], **{counted: counts[counted] for counted in COUNTED})
