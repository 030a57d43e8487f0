"""The leak report: val documents that are also in train, train documents that repeat, test items that train contains.

A document takes 24 bytes, and 76 during the sort: 3.8 GB for 50 million documents, five times FineWeb-Edu's 10BT.
"""

import multiprocessing
import struct
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from storage.datasets.building import Decode
from storage.datasets.manifest import ShardRow
from storage.datasets.records import DTYPE
from storage.datasets.shards import document_bounds, read_shard
from storage.datasets.val_documents import normalised
from storage.inspection.matching import NGRAM_WORDS, HashSet, ngrams, text_digest
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, read_as

Progress = Callable[[], None]
Document = tuple[str, int]  # shard_id, and the document's number in that shard
SHARDS_AT_ONCE = 64  # handed to the pool together: 230 KB of results each
EXAMPLES = 100  # of each kind in a report
SEEN = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("document", "<u4")])  # digest and place


class Repeats(NamedTuple):
    """Documents whose normalised text occurs more than once."""

    duplicates: dict[str, int]  # repeats of an earlier train document in train, and of any in val
    leaks: list[Document]  # val documents in train
    examples: dict[str, list[tuple[Document, Document]]]


class ItemOverlap(BaseModel, frozen=True, populate_by_name=True, serialize_by_alias=True):
    """Test items that share an n-gram with train: in their context, or in an n-gram that reaches into an ending."""

    contexts: int
    count: int  # of all items
    endings: int
    numbers: dict[str, list[int]]  # of the items, by kind
    shorter: int  # items whose context has fewer words than an n-gram
    ngram_words: int = Field(NGRAM_WORDS, alias="words")


class LeakReport(BaseModel, frozen=True, populate_by_name=True, serialize_by_alias=True):
    """The leak report of one version. `items_key` is the key of the test items, if any were searched."""

    items_key: str | None = Field(alias="asked")
    dataset: str
    documents: dict[str, int]
    duplicates: dict[str, int]
    examples: dict[str, list[tuple[Document, Document]]]
    items: ItemOverlap | None
    leaks: list[Document]
    manifest: str

    def is_complete(self) -> bool:
        return self.documents.keys() >= {"train", "val"} and self.duplicates.keys() >= {"train", "val_in_train"}


def read_leak_report(store: Store, dataset: str, manifest_digest: str) -> LeakReport | None:
    """The leak report of a version, or None if it was never written. Raises ObjectCorrupt."""
    key, remedy = DatasetKeys(dataset).leaks(manifest_digest), "Delete it, then run gpt2 dataset audit."
    return read_as(store, key, LeakReport, LeakReport.is_complete, remedy)


def find_repeats(
    url: str, dataset: str, rows: list[ShardRow], decode: Decode, hashes: np.ndarray, workers: int, on_shard: Progress
) -> tuple[Repeats, np.ndarray]:
    """The repeated documents of the shards, and which n-gram `hashes` train has. Raises ShardCorrupt, ObjectMissing."""
    context = multiprocessing.get_context("spawn")  # a fork could copy a lock that a thread of this process holds
    batches = (rows[start : start + SHARDS_AT_ONCE] for start in range(0, len(rows), SHARDS_AT_ONCE))
    parts, hits = [np.empty(0, SEEN)], np.empty(0, np.uint64)
    processes = max(min(workers, len(rows)), 1)
    with ProcessPoolExecutor(processes, context, _start_worker, (url, dataset, decode, hashes)) as pool:
        scanned = chain.from_iterable(pool.map(_scan_shard, batch) for batch in batches)
        for number, (documents, shard_hits) in enumerate(scanned):
            documents["shard"] = number
            parts.append(documents)
            if rows[number].split == "train":
                hits = np.union1d(hits, shard_hits)
            on_shard()
    seen = np.concatenate(parts)
    parts.clear()  # saves 24 bytes per document during the sort
    train = np.array([row.split == "train" for row in rows], bool)[seen["shard"]]
    # Equal documents become neighbours, train first. The sort is stable, so each split keeps its order.
    order = np.lexsort((~train, seen["low"], seen["high"]))
    seen, train = seen[order], train[order]
    repeated = np.zeros(len(seen), bool)  # equal to the previous document
    repeated[1:] = (seen["high"][1:] == seen["high"][:-1]) & (seen["low"][1:] == seen["low"][:-1])
    first = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(seen))))  # the first equal document
    masks = {"train": repeated & train, "val_in_train": repeated & ~train & train[first]}

    def named(index: Any) -> Document:
        return rows[int(seen["shard"][index])].shard_id, int(seen["document"][index])

    places = {kind: np.flatnonzero(mask) for kind, mask in masks.items()}
    examples = {kind: [(named(at), named(first[at])) for at in found[:EXAMPLES]] for kind, found in places.items()}
    duplicates = {kind: len(found) for kind, found in places.items()}
    return Repeats(duplicates, sorted(map(named, places["val_in_train"])), examples), hits


_worker: tuple[Store, str, Decode, HashSet]  # set once per process: building a HashSet of 1.1 million takes 0.7 s


def _start_worker(store_url: str, dataset: str, decode: Decode, hashes: np.ndarray) -> None:
    global _worker  # noqa: PLW0603  # a pool's initializer cannot return anything
    _worker = (open_store(store_url), dataset, decode, HashSet(hashes))


def _scan_shard(row: ShardRow) -> tuple[np.ndarray, np.ndarray]:
    """A shard's documents that contain words, as SEEN, and the searched hashes that occur in them."""
    store, dataset, decode, searched = _worker
    ids = np.frombuffer(read_shard(store, dataset, row), DTYPE)
    seen, hits = [], [np.empty(0, np.uint64)]
    for number, (start, stop) in enumerate(zip(*document_bounds(ids), strict=True)):
        if words := normalised(decode(ids[start + 1 : stop].tolist())):
            seen.append((*struct.unpack("<2Q", text_digest(words)), 0, number))
            hits.append(searched.intersect(ngrams(words)))
    return np.array(seen, SEEN), np.unique(np.concatenate(hits))
