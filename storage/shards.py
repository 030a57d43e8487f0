"""A shard: up to `shard_tokens` token ids of whole documents in one object, and the record that makes it count.

The shard is put first and its record last, both create-only. A job that is killed in between is run again and writes
the same bytes to the same keys. Knows no tokenizer: the function that encodes a document is handed in.
"""

import json
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from storage import keys, sources
from storage.canonical import canonical_json, sha256
from storage.errors import AlreadyExists, ObjectCorrupt, ObjectMissing, ShardCorrupt, SourceInvalid
from storage.plan import ShardJob
from storage.store import Body, Store, read_json

DTYPE = np.dtype("<u2")  # gpt2's 50,257 ids fit 16 bits; little-endian whatever the host


@dataclass(frozen=True)
class Record:
    """What a finished shard is: counts, sha256 of its bytes, the rows it came from, and what made it."""

    shard_id: str
    tokens: int
    documents: int
    skipped: int
    text_bytes: int
    sha256: str
    source: str
    recipe: dict[str, Any]
    versions: dict[str, str]

    @property
    def size_bytes(self) -> int:
        """Size of the shard's object."""
        return self.tokens * DTYPE.itemsize


def build_shard(store: Store, dataset: str, job: ShardJob, encode: Callable[[str], np.ndarray], eot: int) -> Record:
    """Tokenise the job's rows, put the shard, then its record. Safe to run any number of times, at once too.

    Raises SourceInvalid when the source file changed since the plan or holds what is no text, ShardCorrupt when its
    record already says other bytes.
    """
    if sources.identify(Path(job.source.path)).sha256 != job.source.sha256:
        raise SourceInvalid(
            f"{job.source.path}: planned with sha256 {job.source.sha256[:12]}…, it has changed since. "
            f"Run the command again: it plans anew."
        )
    tokens, documents, text_bytes = _tokenise(job, encode, eot)
    body = tokens.data.cast("B")
    record = Record(
        shard_id=job.shard_id,
        tokens=len(tokens),
        documents=documents,
        skipped=0,
        text_bytes=text_bytes,
        sha256=sha256(body),
        source=job.source.name,
        recipe=job.recipe,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("gpt2-pipeline", "numpy", "tiktoken")},
    )
    put_shard(store, dataset, job.shard_id, body, record.sha256)
    try:
        store.put_new(keys.record(dataset, job.shard_id), canonical_json(asdict(record)))
    except AlreadyExists as error:
        found = read_record(store, dataset, job.shard_id)
        if found.sha256 != record.sha256:
            raise ShardCorrupt(
                f"shard {job.shard_id!r} of dataset {dataset!r}: its record says sha256 {found.sha256}, the same "
                f"recipe gives {record.sha256} now. Rebuild it: gpt2 dataset verify --repair"
            ) from error
    return record


def put_shard(store: Store, dataset: str, shard_id: str, body: Body, sha256: str) -> None:
    """Put a shard's bytes, of that sha256. Other bytes at its key are damaged ones: they and the record give way."""
    key = keys.shard(dataset, shard_id)
    try:
        store.put_new(key, body)
    except AlreadyExists:
        try:
            read_shard(store, dataset, shard_id, len(body) // DTYPE.itemsize, sha256)
        except (ObjectMissing, ShardCorrupt):  # no job of this recipe writes other bytes
            forget(store, dataset, shard_id)
            with suppress(AlreadyExists):  # somebody else mends it, too
                store.put_new(key, body)


def read_record(store: Store, dataset: str, shard_id: str) -> Record:
    """The record of a finished shard. Raises ObjectMissing when the shard is not done."""
    key = keys.record(dataset, shard_id)
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
    prefix, suffix = keys.shards(dataset), keys.failure("")
    failed = sorted(listed.key for listed in store.list(prefix) if listed.key.endswith(suffix))
    return {
        key.removeprefix(prefix).removesuffix(suffix): str((read_json(store, key) or {}).get("why")) for key in failed
    }


def done(store: Store, dataset: str, jobs: list[str], known_tokens: dict[str, int]) -> set[str]:
    """Those of the shard_ids that are done: the record is there, and the shard's size is the one it states.

    One listing; a record is read only for shards that no manifest knows (`known_tokens`: tokens by shard_id).
    """
    prefix = keys.shards(dataset)
    sizes = {listed.key: listed.size for listed in store.list(prefix)}
    finished = set()
    for shard_id in jobs:
        if keys.record(dataset, shard_id) in sizes:
            tokens = known_tokens.get(shard_id)
            stated = DTYPE.itemsize * (read_record(store, dataset, shard_id).tokens if tokens is None else tokens)
            if sizes.get(keys.shard(dataset, shard_id)) == stated:
                finished.add(shard_id)
    return finished


def is_done(store: Store, dataset: str, shard_id: str) -> bool:
    """Whether this one shard is done, without a listing: a listing by each of n jobs would be n times n objects."""
    try:
        return store.stat(keys.shard(dataset, shard_id)).size == read_record(store, dataset, shard_id).size_bytes
    except ObjectMissing:
        return False


def forget(store: Store, dataset: str, shard_id: str) -> None:
    """Remove a shard so that its job runs again: the record first, so that at no moment a record lacks its shard."""
    store.delete(keys.record(dataset, shard_id))
    store.delete(keys.shard(dataset, shard_id))


def read_shard(store: Store, dataset: str, shard_id: str, tokens: int, sha256: str) -> bytes | bytearray:
    """The bytes of a shard, proved to be those of that sha256. Raises ObjectMissing, ShardCorrupt."""
    rebuild = "Rebuild it: gpt2 dataset verify --repair"
    for _ in range(2):  # bytes that were damaged on their way come whole the next time
        try:
            found = store.read(keys.shard(dataset, shard_id), tokens * DTYPE.itemsize)
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


def _tokenise(job: ShardJob, encode: Callable[[str], np.ndarray], eot: int) -> tuple[np.ndarray, int, int]:
    """Token ids with `eot` before each document, the number of documents and their bytes; one buffer a shard."""
    row_from, row_to = job.rows
    path = Path(job.source.path)
    buffer = np.empty(1 << 16, DTYPE)
    used = documents = text_bytes = 0
    for text in sources.documents(path, job.text_column, row_from, row_to, job.start_byte):
        try:
            ids = encode(text)
        except ValueError as error:
            raise SourceInvalid(
                f"{path}: row {row_from + documents:,} cannot be tokenised: {error}. Mend or drop that row."
            ) from error
        end = used + 1 + len(ids)
        if end > len(buffer):
            buffer = np.concatenate([buffer[:used], np.empty(max(end, 2 * len(buffer)) - used, DTYPE)])
        buffer[used] = eot
        buffer[used + 1 : end] = ids
        used = end
        documents += 1
        text_bytes += len(text.encode(errors="surrogatepass"))
    return buffer[:used], documents, text_bytes
