"""A dataset's card: what a version holds, counted from the records of its shards. Opens no shard, draws nothing."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

from storage.datasets.manifest import Manifest
from storage.datasets.records import RECORDS_AT_ONCE, Record, read_record
from storage.keys import DatasetKeys
from storage.stores.store import Store, read_json

COUNTED = ("tokens", "documents", "skipped", "filtered", "text_bytes")


def card(store: Store, dataset: str, manifest: Manifest) -> dict[str, Any]:
    """Totals, each source file's part, documents by dump and by length, what was left out, and the leak report.

    Rows are those of its shards: a file of which a filter keeps nothing has none.

    `lengths[n]` counts documents of 2**n up to 2**(n+1) tokens. Raises ObjectMissing when a record is gone.
    """
    files: dict[str, Counter[str]] = {}
    dumps: Counter[str] = Counter()
    lengths: list[int] = []
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        for record in pool.map(
            lambda shard_id: read_record(store, dataset, shard_id), [*manifest.shard_ids, *manifest.empty]
        ):
            _count(record, files.setdefault(record.source, Counter()))
            dumps.update(record.dumps)
            lengths = [ours + theirs for ours, theirs in zip_longest(lengths, record.lengths, fillvalue=0)]
    left_out = sum(counts["filtered"] for counts in files.values())
    rows = left_out + sum(counts["documents"] + counts["skipped"] for counts in files.values())
    report = read_json(store, DatasetKeys(dataset).leaks(manifest.digest))
    return {
        "dataset": dataset,
        "manifest": manifest.digest,
        "parent": manifest.parent,
        "recipe": manifest.recipe,
        "tokenizer": manifest.tokenizer,
        "origin": {name: value for name, value in manifest.source.items() if name != "files"},
        "totals": manifest.totals,
        "files": [
            {"name": name} | {what: counts[what] for what in ("shards", *COUNTED)} for name, counts in files.items()
        ],
        "dumps": dict(sorted(dumps.items())),
        "lengths": lengths,
        "rows": rows,
        "filtered": left_out,
        "filtered_share": left_out / rows if rows else 0.0,
        "audit": report,
    }


def _count(record: Record, counts: Counter[str]) -> None:
    counts["shards"] += record.tokens > 0
    for name in COUNTED:
        counts[name] += getattr(record, name)
