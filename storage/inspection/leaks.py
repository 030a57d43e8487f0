"""The leak report: val documents that are also in train, train documents that repeat, test items that train contains.

Each shard is read once, by one of several processes. A document becomes 24 bytes in memory, and takes 76 while they are
sorted: 1.2 and 3.8 GB for 50 million documents, five times FineWeb-Edu's sample-10BT. The tokenizer is not known here:
the function that decodes a document is passed in.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np

from storage.datasets.manifest import ShardRow
from storage.datasets.records import DTYPE
from storage.datasets.shards import document_bounds, read_shard
from storage.errors import ObjectCorrupt
from storage.inspection.matching import NGRAM_WORDS, HashSet, ngrams, normalised, text_digest
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, read_json

Decode = Callable[[list[int]], bytes]
Document = tuple[str, int]  # shard_id, and the document's number in that shard
Scanned = tuple[np.ndarray, np.ndarray]  # a shard's documents as SEEN, and hashes of n-grams
SHARDS_AT_ONCE = 64  # handed to the pool together: 160 KB of results each
EXAMPLES = 100  # of each kind in a report
SEEN = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("document", "<u4")])  # digest and place


class Repeats(NamedTuple):
    """Documents whose normalised text occurs more than once.

    `train` counts documents of train that repeat an earlier one of train; `leaks` are all documents of val that are
    also in train. `pairs` has examples of both: a document, and the first one of train that it equals.
    """

    train: int
    leaks: list[Document]
    pairs: dict[str, list[tuple[Document, Document]]]


@dataclass(frozen=True)
class ItemOverlap:
    """Test items that share an n-gram with train, by number: through their context, or only through an ending.

    Of the `count` items, `shorter` have a context of fewer words than an n-gram.
    """

    count: int
    shorter: int
    contexts: list[int]
    endings: list[int]
    ngram_words: int = NGRAM_WORDS

    def to_json(self) -> dict[str, Any]:
        """The overlap as a report holds it."""
        return {
            "contexts": len(self.contexts),
            "count": self.count,
            "endings": len(self.endings),
            "numbers": {"contexts": self.contexts, "endings": self.endings},
            "shorter": self.shorter,
            "words": self.ngram_words,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The overlap of a report. Raises KeyError, TypeError."""
        numbers = value["numbers"]
        return cls(value["count"], value["shorter"], numbers["contexts"], numbers["endings"], value["words"])


@dataclass(frozen=True)
class LeakReport:
    """The leak report of one version. `items_key` names the test items that train was searched for, if any."""

    dataset: str
    manifest: str
    items_key: str | None
    documents: dict[str, int]
    repeats: Repeats
    items: ItemOverlap | None

    def to_json(self) -> dict[str, Any]:
        """The report as it is stored."""
        examples = {
            kind: [[list(document), list(other)] for document, other in pairs]
            for kind, pairs in self.repeats.pairs.items()
        }
        return {
            "asked": self.items_key,
            "dataset": self.dataset,
            "documents": self.documents,
            "duplicates": {"train": self.repeats.train, "val_in_train": len(self.repeats.leaks)},
            "examples": examples,
            "items": None if self.items is None else self.items.to_json(),
            "leaks": [list(document) for document in self.repeats.leaks],
            "manifest": self.manifest,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The report of its JSON. Raises KeyError, TypeError, ValueError."""
        pairs = {
            kind: [(_document(document), _document(other)) for document, other in examples]
            for kind, examples in value["examples"].items()
        }
        leaks = [_document(document) for document in value["leaks"]]
        items = None if value["items"] is None else ItemOverlap.from_json(value["items"])
        repeats = Repeats(value["duplicates"]["train"], leaks, pairs)
        return cls(value["dataset"], value["manifest"], value["asked"], value["documents"], repeats, items)


def read_leak_report(store: Store, dataset: str, manifest_digest: str) -> LeakReport | None:
    """The leak report of a version, None if it was never made. Raises ObjectCorrupt."""
    key = DatasetKeys(dataset).leaks(manifest_digest)
    value: dict[str, Any] | None = read_json(store, key)
    if value is None:
        return None
    try:
        return LeakReport.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ObjectCorrupt(
            f"object {key!r} of store {store.url!r} should be a leak report, found {str(value)[:40]!r}. "
            f"Delete it, then run gpt2 dataset audit."
        ) from error


def find_repeats(
    store_url: str,
    dataset: str,
    rows: Sequence[ShardRow],
    decode: Decode,
    hashes: np.ndarray,
    workers: int,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[Repeats, np.ndarray]:
    """The repeated documents of these shards, and which of the n-gram `hashes` occur in train.

    Calls `on_progress` after each shard. Raises ShardCorrupt, ObjectMissing.
    """
    parts, hits = [np.empty(0, SEEN)], np.empty(0, np.uint64)
    for number, (documents, shard_hits) in enumerate(_scan_all(store_url, dataset, rows, decode, hashes, workers)):
        documents["shard"] = number
        parts.append(documents)
        if rows[number].split == "train":
            hits = np.union1d(hits, shard_hits)
        on_progress()
    seen = np.concatenate(parts)
    parts.clear()  # 24 bytes a document less while they are sorted
    return _repeats(seen, rows), hits


def scan_shard(store: Store, dataset: str, decode: Decode, hashes: HashSet, row: ShardRow) -> Scanned:
    """A shard's documents, without those that have no words, and the hashes whose n-grams occur in them."""
    ids = np.frombuffer(read_shard(store, dataset, row.shard_id, row.tokens, row.sha256), DTYPE)
    seen, hits = [], [np.empty(0, np.uint64)]
    for number, (start, stop) in enumerate(zip(*document_bounds(ids), strict=True)):
        words = normalised(decode(ids[start + 1 : stop].tolist()))
        if words:
            digest = text_digest(words)
            seen.append((int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"), 0, number))
            hits.append(hashes.intersect(ngrams(words)))
    return np.array(seen, SEEN), np.unique(np.concatenate(hits))


def _scan_all(
    store_url: str, dataset: str, rows: Sequence[ShardRow], decode: Decode, hashes: np.ndarray, workers: int
) -> Iterator[Scanned]:
    """The scanned shards in order."""
    context = multiprocessing.get_context("spawn")  # a fork could copy a lock that a thread of this process holds
    arguments = (store_url, dataset, decode, hashes)
    processes = max(min(workers, len(rows)), 1)
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=arguments) as pool:
        for start in range(0, len(rows), SHARDS_AT_ONCE):
            yield from pool.map(_scan_in_worker, rows[start : start + SHARDS_AT_ONCE])


_worker_scan: Callable[[ShardRow], Scanned]  # in a process of the pool, set once: the hashes are large


def _start_worker(store_url: str, dataset: str, decode: Decode, hashes: np.ndarray) -> None:
    global _worker_scan  # noqa: PLW0603  # a pool's initializer cannot return anything
    _worker_scan = partial(scan_shard, open_store(store_url), dataset, decode, HashSet(hashes))


def _scan_in_worker(row: ShardRow) -> Scanned:
    return _worker_scan(row)


def _repeats(seen: np.ndarray, rows: Sequence[ShardRow]) -> Repeats:
    """The repeats among all documents, which are in the dataset's order."""
    train = np.array([row.split == "train" for row in rows], bool)[seen["shard"]]
    # Equal documents become neighbours, train's first. The sort is stable: within a split they stay in order.
    order = np.lexsort((~train, seen["low"], seen["high"]))
    seen, train = seen[order], train[order]
    repeated = np.zeros(len(seen), bool)  # equal to the document before
    repeated[1:] = (seen["high"][1:] == seen["high"][:-1]) & (seen["low"][1:] == seen["low"][:-1])
    first = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(seen))))  # of its equals
    repeats, leaks = repeated & train, repeated & ~train & train[first]

    def named(index: Any) -> Document:
        return rows[int(seen["shard"][index])].shard_id, int(seen["document"][index])

    pairs = {
        kind: [(named(index), named(first[index])) for index in np.flatnonzero(mask)[:EXAMPLES]]
        for kind, mask in (("train", repeats), ("val_in_train", leaks))
    }
    return Repeats(int(repeats.sum()), sorted(named(index) for index in np.flatnonzero(leaks)), pairs)


def _document(value: Any) -> Document:
    shard_id, number = value
    return str(shard_id), int(number)
