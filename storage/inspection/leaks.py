"""The leak report: documents of val that are in train, documents that train holds twice, test items that train shows.

Each shard is read once, by one of several processes; what stays of a document is 24 bytes on this host's disk, in as
many files as keep one of them small. Knows no tokenizer: the function that gives a text back is handed in.
"""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from storage.datasets.manifest import ShardRow
from storage.datasets.records import DTYPE
from storage.datasets.shards import document_bounds, read_shard
from storage.inspection import matching
from storage.inspection.matching import HashSet
from storage.stores.opening import open_store
from storage.stores.store import Store

Decode = Callable[[list[int]], bytes]
PARTS = 256  # files by digest: of 1.3 billion documents one holds 120 MB
WINDOW = 64  # shards whose answers may wait: 160 KB each
EXAMPLES = 100  # of each kind in a report
SEEN = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("document", "<u4")])


class Repeated(NamedTuple):
    """Documents whose normalised text occurs more than once; a document is (shard_id, its number in the shard).

    `train` counts documents of train that repeat an earlier one of train, `leaks` are all documents of val that are in
    train, `pairs` examples of both: the document, and one of train that it equals.
    """

    train: int
    leaks: list[tuple[str, int]]
    pairs: dict[str, list[tuple[tuple[str, int], tuple[str, int]]]]


def scan_shard(
    store: Store, dataset: str, row: ShardRow, decode: Decode, wanted: HashSet
) -> tuple[np.ndarray, np.ndarray]:
    """A shard's documents as SEEN (an empty one is like no other), and the wanted hashes that occur in it."""
    ids = np.frombuffer(read_shard(store, dataset, row.shard_id, row.tokens, row.sha256), DTYPE)
    seen, hits = [], [np.empty(0, np.uint64)]
    for number, (start, stop) in enumerate(zip(*document_bounds(ids), strict=True)):
        if words := matching.normalised(decode(ids[start + 1 : stop].tolist())):
            name = matching.text_digest(words)
            seen.append((int.from_bytes(name[:8], "little"), int.from_bytes(name[8:], "little"), 0, number))
            hits.append(wanted.among(matching.ngrams(words)))
    return np.array(seen, SEEN), np.unique(np.concatenate(hits))


def find_repeats(
    store_url: str,
    dataset: str,
    rows: Sequence[ShardRow],
    decode: Decode,
    grams: np.ndarray,
    workers: int,
    come: Callable[[], None] = lambda: None,
) -> tuple[Repeated, np.ndarray]:
    """What the documents of these shards repeat, and which of the hashes `grams` occur in train.

    `come` is called after each shard. Raises ShardCorrupt, ObjectMissing; needs 24 bytes of TMPDIR a document.
    """
    found = np.empty(0, np.uint64)
    with tempfile.TemporaryDirectory(prefix="gpt2-audit-") as folder:
        for number, (seen, hits) in enumerate(_looks(store_url, dataset, rows, decode, grams, workers)):
            seen["shard"] = number
            _keep(Path(folder), seen)
            found = np.union1d(found, hits)
            come()
        return _repeated(Path(folder), rows), found


def _looks(
    store_url: str, dataset: str, rows: Sequence[ShardRow], decode: Decode, grams: np.ndarray, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # Not forked: the process that asks has threads, and may hold a lock of one of them.
    context = multiprocessing.get_context("spawn")
    asked = (store_url, dataset, decode, grams)
    with ProcessPoolExecutor(max(min(workers, len(rows)), 1), context, initializer=_begin, initargs=asked) as pool:
        for start in range(0, len(rows), WINDOW):
            yield from pool.map(_look, rows[start : start + WINDOW])


class _Asked:
    """What a process of the pool was asked, once for all shards."""

    facts: tuple[Store, str, Decode, HashSet]


def _begin(store_url: str, dataset: str, decode: Decode, grams: np.ndarray) -> None:
    _Asked.facts = (open_store(store_url), dataset, decode, HashSet(grams))


def _look(row: ShardRow) -> tuple[np.ndarray, np.ndarray]:
    store, dataset, decode, wanted = _Asked.facts
    seen, hits = scan_shard(store, dataset, row, decode, wanted)
    return seen, hits if row.split == "train" else hits[:0]


def _keep(folder: Path, seen: np.ndarray) -> None:
    part = seen["high"] >> np.uint64(56)
    order = np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(PARTS + 1))
    for number in range(PARTS):
        mine = seen[order[ends[number] : ends[number + 1]]]
        if len(mine):
            with (folder / str(number)).open("ab") as file:
                file.write(mine.tobytes())


def _repeated(folder: Path, rows: Sequence[ShardRow]) -> Repeated:
    in_train = np.array([row.split == "train" for row in rows])
    found = Repeated(0, [], {"train": [], "val_in_train": []})
    for path in sorted(folder.iterdir(), key=lambda path: int(path.name)):
        seen = np.fromfile(path, SEEN)
        train = in_train[seen["shard"]]
        # Equal ones beside each other, those of train first, in the order of the dataset.
        seen = seen[np.lexsort((seen["document"], seen["shard"], ~train, seen["low"], seen["high"]))]
        train = in_train[seen["shard"]]
        same = np.append(False, (seen["high"][1:] == seen["high"][:-1]) & (seen["low"][1:] == seen["low"][:-1]))
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(seen))))  # of each group of equal ones
        repeats = same & train
        leaks = same & ~train & train[first]
        for kind, which in (("train", repeats), ("val_in_train", leaks)):
            some = np.flatnonzero(which)[: EXAMPLES - len(found.pairs[kind])]
            found.pairs[kind].extend((_named(rows, seen[one]), _named(rows, seen[first[one]])) for one in some)
        found.leaks.extend(_named(rows, one) for one in seen[leaks])
        found = found._replace(train=found.train + int(repeats.sum()))
    return found._replace(leaks=sorted(found.leaks))


def _named(rows: Sequence[ShardRow], seen: Any) -> tuple[str, int]:
    return rows[int(seen["shard"])].shard_id, int(seen["document"])
