"""A shard: up to `shard_tokens` token ids of whole documents in one object, and the record that makes it count.

The shard is put first and its record last, both create-only. A job that is killed in between is run again and writes
the same bytes to the same keys. Knows no tokenizer: the function that encodes a document is handed in.
"""

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from storage import keys
from storage.datasets.plan import ShardJob
from storage.digests import canonical_json, sha256
from storage.errors import AlreadyExists, ObjectCorrupt, ObjectMissing, ShardCorrupt
from storage.keys import DatasetKeys
from storage.sources import documents
from storage.sources.mirror import locate
from storage.stores.store import Body, Store, overwrite, read_json

DTYPE = np.dtype("<u2")  # gpt2's 50,257 ids fit 16 bits; little-endian whatever the host
BUFFER_TOKENS = 1 << 24  # more than a full shard has: growing would hold two copies
RECORDS_AT_ONCE = 16  # of a bucket each is a round trip of 3 ms and more
RECORDS_IN_FLIGHT = 1_000  # asked for at once: 130,000 futures would take 200 MB


class ShardSummary(NamedTuple):
    """What a manifest says of a shard: its counts and the sha256 of its bytes."""

    tokens: int
    documents: int
    skipped: int
    text_bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What a finished shard is: counts, sha256 of its bytes, the rows it came from, and what made it.

    Of the rows of its recipe `documents` were tokenised, `skipped` could not be (which: `skipped_rows`), `filtered`
    were left out by a filter, or as a leak of val into train.
    `lengths[n]` counts the documents of 2**n up to 2**(n+1) tokens (EOT counted), `dumps` those of each crawl.
    """

    shard_id: str
    tokens: int
    documents: int
    skipped: int
    text_bytes: int
    sha256: str
    source: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    filtered: int = 0
    skipped_rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    dumps: dict[str, int] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Size of the shard's object."""
        return self.tokens * DTYPE.itemsize

    @property
    def made(self) -> ShardSummary:
        """What a manifest says of it."""
        return ShardSummary(self.tokens, self.documents, self.skipped, self.text_bytes, self.sha256)


def build_shard(store: Store, dataset: str, job: ShardJob, encode: Callable[[str], np.ndarray], eot: int) -> Record:
    """Tokenise the job's rows, put the shard, then its record. Safe to run any number of times, at once too.

    Raises SourceInvalid when the source file changed since the plan or holds what cannot be tokenised, ShardCorrupt
    when its record already says other bytes.
    """
    tokens, facts = _tokenise(store, job, encode, eot)
    body = tokens.view(np.uint8).data
    record = Record(
        shard_id=job.shard_id,
        tokens=len(tokens),
        sha256=sha256(body),
        source=job.source.name,
        recipe=job.recipe,
        versions=_versions(),
        **facts,
    )
    put_shard(store, dataset, job.shard_id, body, record.sha256)
    _put_record(store, dataset, record)
    return record


def _put_record(store: Store, dataset: str, record: Record) -> None:
    """Put a record. One that is there and cannot be read gives way, one that says other bytes does not."""
    key, body = DatasetKeys(dataset).record(record.shard_id), canonical_json(asdict(record))
    try:
        store.put_new(key, body)
    except AlreadyExists as error:
        found = _made(store, dataset, record.shard_id)
        if found is None:
            overwrite(store, key, body)
        elif found.sha256 != record.sha256:
            raise ShardCorrupt(
                f"shard {record.shard_id!r} of dataset {dataset!r}: its record says sha256 {found.sha256}, the same "
                f"recipe gives {record.sha256} now. Rebuild it: gpt2 dataset verify --repair"
            ) from error


def _made(store: Store, dataset: str, shard_id: str) -> ShardSummary | None:
    """What the record says, None when it cannot be read: then the job makes both again."""
    try:
        return read_record(store, dataset, shard_id).made
    except ShardCorrupt:
        return None


@cache
def _versions() -> dict[str, str]:
    """What made a shard; asking the installed packages takes 9 ms, as long as 30,000 tokens."""
    found = {name: version(name) for name in ("gpt2-pipeline", "numpy", "tiktoken")}
    return {"python": platform.python_version()} | found


def put_shard(store: Store, dataset: str, shard_id: str, body: Body, sha256: str) -> None:
    """Put a shard's bytes, of that sha256. Other bytes at its key are damaged ones: they and the record give way."""
    key = DatasetKeys(dataset).shard(shard_id)
    try:
        store.put_new(key, body)
    except AlreadyExists:
        try:
            read_shard(store, dataset, shard_id, len(body) // DTYPE.itemsize, sha256)
        except (ObjectMissing, ShardCorrupt):  # no job of this recipe writes other bytes
            delete_shard(store, dataset, shard_id)
            with suppress(AlreadyExists):  # somebody else mends it, too
                store.put_new(key, body)


def read_record(store: Store, dataset: str, shard_id: str) -> Record:
    """The record of a finished shard. Raises ObjectMissing when the shard is not done."""
    key = DatasetKeys(dataset).record(shard_id)
    body = store.read(key).body
    try:
        return Record(**json.loads(body))
    except (ValueError, TypeError) as error:
        raise ShardCorrupt(
            f"shard {shard_id!r} of dataset {dataset!r}: its record should be JSON, found {body[:40]!r}. "
            f"Rebuild it: gpt2 dataset verify --repair"
        ) from error


def failures(store: Store, dataset: str) -> dict[str, str]:
    """Why each shard job that failed last did so, by shard_id."""
    prefix, suffix = DatasetKeys(dataset).shards, keys.failure("")
    failed = sorted(listed.key for listed in store.list(prefix) if listed.key.endswith(suffix))
    return {
        key.removeprefix(prefix).removesuffix(suffix): str((read_json(store, key) or {}).get("why")) for key in failed
    }


def finished_shards(
    store: Store, dataset: str, shard_ids: Iterable[str], known: Mapping[str, ShardSummary]
) -> dict[str, ShardSummary]:
    """Those of the shards that are done: the record is there, and the shard's size is the one it states.

    One listing; a record is read only for shards that no manifest knows (`known`, by shard_id). Keeps 8 bytes and a
    reference of each shard: a flow over 130,000 of them stays small.
    """
    asked = {shard_id: number for number, shard_id in enumerate(shard_ids)}
    sizes, has_record = np.full(len(asked), -1, np.int64), np.zeros(len(asked), bool)
    for shard_id, is_record, size_bytes in _listed(store, dataset):
        number = asked.get(shard_id)
        if number is not None and is_record:
            has_record[number] = True
        elif number is not None:
            sizes[number] = size_bytes
    found: dict[str, ShardSummary] = {}
    there = (shard_id for shard_id, number in asked.items() if has_record[number])
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        while window := list(islice(there, RECORDS_IN_FLIGHT)):
            unknown = [shard_id for shard_id in window if shard_id not in known]
            read = dict(zip(unknown, pool.map(lambda one: _made(store, dataset, one), unknown), strict=True))
            for shard_id in window:
                made = known.get(shard_id) or read[shard_id]
                if made and sizes[asked[shard_id]] == made.tokens * DTYPE.itemsize:
                    found[shard_id] = made
    return found


def recorded_shards(store: Store, dataset: str) -> set[str]:
    """The shards whose record is there."""
    return {shard_id for shard_id, is_record, _ in _listed(store, dataset) if is_record}


def _listed(store: Store, dataset: str) -> Iterator[tuple[str, bool, int]]:
    """Each shard and each record that is there: shard_id, whether it is the record, size in bytes."""
    for listed in store.list(DatasetKeys(dataset).shards):
        shard_id, is_record = DatasetKeys(dataset).shard_of(listed.key)
        if shard_id is not None:
            yield shard_id, is_record, listed.size


def is_finished(store: Store, dataset: str, shard_id: str) -> bool:
    """Whether this one shard is done, without a listing: a listing by each of n jobs would be n times n objects."""
    try:
        return store.stat(DatasetKeys(dataset).shard(shard_id)).size == read_record(store, dataset, shard_id).size_bytes
    except (ObjectMissing, ShardCorrupt):
        return False


def delete_shard(store: Store, dataset: str, shard_id: str) -> None:
    """Remove a shard so that its job runs again: the record first, so that at no moment a record lacks its shard."""
    store.delete(DatasetKeys(dataset).record(shard_id))
    store.delete(DatasetKeys(dataset).shard(shard_id))


def read_shard(store: Store, dataset: str, shard_id: str, tokens: int, sha256: str) -> bytes | bytearray:
    """The bytes of a shard, proved to be those of that sha256. Raises ObjectMissing, ShardCorrupt."""
    rebuild = "Rebuild it: gpt2 dataset verify --repair"
    for _ in range(2):  # bytes that were damaged on their way come whole the next time
        try:
            found = store.read(DatasetKeys(dataset).shard(shard_id), tokens * DTYPE.itemsize)
        except (ObjectMissing, ObjectCorrupt) as error:
            kind = ObjectMissing if isinstance(error, ObjectMissing) else ShardCorrupt
            raise kind(
                f"shard {shard_id!r} of dataset {dataset!r}: expected sha256 {sha256}. {error} {rebuild}"
            ) from error
        if found.sha256 == sha256:
            return found.body
    raise ShardCorrupt(
        f"shard {shard_id!r} of dataset {dataset!r}: expected sha256 {sha256}, found {found.sha256} "
        f"({len(found.body) // DTYPE.itemsize:,} of {tokens:,} tokens). {rebuild}"
    )


def document_bounds(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each document of a shard begins, at the EOT that all of them begin with, and where it ends."""
    starts = np.flatnonzero(ids == ids[0])
    return starts, np.append(starts[1:], len(ids))


def _tokenise(
    store: Store, job: ShardJob, encode: Callable[[str], np.ndarray], eot: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Token ids with `eot` before each document, and what the record says of them; one buffer a shard."""
    file = locate(store, job.source)
    row_from, row_to = job.rows
    buffer = np.empty(BUFFER_TOKENS, DTYPE)  # memory that nobody touches is none
    used = text_bytes = kept = 0
    skipped_rows: list[int] = []
    lengths: list[int] = []
    dumps: Counter[str] = Counter()
    for row in documents.documents(
        file,
        job.text_column,
        row_from,
        row_to,
        start_byte=job.start_byte,
        filters=job.filters,
        left_out=job.left_out,
    ):
        kept += 1
        try:
            if not isinstance(row.text, str):
                raise ValueError(documents.no_text(row, job.text_column))
            ids = encode(row.text)
        except ValueError as error:
            if not job.skips_bad_documents:
                raise documents.bad_document(file, row, str(error)) from error
            skipped_rows.append(row.number)
            continue
        end = used + 1 + len(ids)
        if end > len(buffer):
            buffer = np.concatenate([buffer[:used], np.empty(max(end, 2 * len(buffer)) - used, DTYPE)])
        buffer[used] = eot
        buffer[used + 1 : end] = ids
        lengths.append(end - used)
        used = end
        text_bytes += len(row.text) if row.text.isascii() else len(row.text.encode(errors="surrogatepass"))
        if row.dump is not None:
            dumps[str(row.dump)] += 1
    return buffer[:used], {
        "documents": len(lengths),
        "skipped": len(skipped_rows),
        "skipped_rows": skipped_rows,
        "filtered": row_to - row_from - kept,
        "text_bytes": text_bytes,
        "lengths": np.bincount(np.log2(np.array(lengths, np.int64)).astype(np.int64)).tolist() if lengths else [],
        "dumps": dict(dumps),
    }
