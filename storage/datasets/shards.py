"""A shard: token ids of whole documents, about `shard_tokens`. A job puts it first, its record last, create-only."""

import platform
from collections import Counter
from functools import cache
from importlib.metadata import version

import numpy as np

from storage.datasets import val_documents
from storage.datasets.manifest import ShardRow
from storage.datasets.plan import Encode, ShardJob
from storage.datasets.records import DTYPE, Record, corrupt, delete_shard, put_record
from storage.digests import sha256 as sha256_of
from storage.errors import Conflict, ObjectCorrupt, ObjectMissing, ShardCorrupt
from storage.keys import DatasetKeys
from storage.sources.documents import documents
from storage.sources.mirror import locate
from storage.sources.rows import bad_document, no_text
from storage.stores.store import Body, ReadableStore, Store, put_once

BUFFER_TOKENS = 1 << 24  # more than a full shard holds: growing the buffer would need two copies


def build_shard(store: Store, dataset: str, job: ShardJob, encode: Encode, eot: int) -> Record:
    """Put a job's shard, then its record. Idempotent, even concurrently. Raises SourceInvalid or as `put_record`."""
    recipe = job.recipe
    buffer, used = np.empty(BUFFER_TOKENS, DTYPE), 0  # pages that are never touched take no memory
    text_bytes, dumps = 0, Counter[str]()
    lengths, skipped_rows, in_val_rows = list[int](), list[int](), list[int]()  # lengths in tokens, EOT included
    val = val_documents.read(store, dataset, recipe.leave_out) if recipe.leave_out else ()
    file = locate(store, job.source)
    for row in documents(file, recipe.text_column, recipe.row_from, recipe.row_to, job.start_byte, recipe.filters):
        text = row.text.encode() if isinstance(row.text, str) else b""
        if text in val:
            in_val_rows.append(row.number)
            continue
        try:
            if not isinstance(row.text, str):
                raise ValueError(no_text(row, recipe.text_column))
            ids = encode(row.text)
        except ValueError as error:
            if recipe.on_bad_document != "skip":
                raise bad_document(file, row, str(error)) from error
            skipped_rows.append(row.number)
            continue
        end = used + 1 + len(ids)
        if end > len(buffer):
            buffer = np.concatenate([buffer[:used], np.empty(max(end, 2 * len(buffer)) - used, DTYPE)])
        buffer[used] = eot
        buffer[used + 1 : end] = ids
        lengths.append(end - used)
        used = end
        text_bytes += len(text)
        if row.dump is not None:
            dumps[str(row.dump)] += 1
    body = buffer[:used].view(np.uint8).data
    record = Record(
        shard_id=job.shard_id,
        tokens=used,
        documents=len(lengths),
        skipped=len(skipped_rows),
        text_bytes=text_bytes,
        sha256=sha256_of(body),
        source=job.source.name,
        recipe=recipe,
        versions=_versions(),
        filtered=recipe.row_to - recipe.row_from - len(lengths) - len(skipped_rows) - len(in_val_rows),
        skipped_rows=skipped_rows,
        in_val_rows=in_val_rows,
        lengths=np.bincount(np.log2(np.array(lengths)).astype(np.int64)).tolist() if lengths else [],
        dumps=dict(dumps),
    )
    put_shard(store, dataset, record, body)
    put_record(store, dataset, record)
    return record


def put_shard(store: Store, dataset: str, shard: Record | ShardRow, body: Body) -> None:
    """Put the bytes that `shard` describes. Replaces damaged bytes at its key and deletes their record."""
    key = DatasetKeys(dataset).shard(shard.shard_id)
    try:
        store.put_new(key, body)
    except Conflict:
        try:
            read_shard(store, dataset, shard)
        except (ObjectMissing, ShardCorrupt):  # no job with this recipe writes other bytes
            delete_shard(store, dataset, shard.shard_id)
            put_once(store, key, body)  # unless another process repaired it first


def read_shard(store: ReadableStore, dataset: str, shard: Record | ShardRow) -> bytes | bytearray:
    """The bytes of a shard, verified against its record or row. Raises ObjectMissing, ShardCorrupt."""
    size_bytes = shard.tokens * DTYPE.itemsize
    for _ in range(2):  # bytes damaged in transit arrive intact the second time
        try:
            stored = store.read(DatasetKeys(dataset).shard(shard.shard_id), size_bytes)
        except (ObjectMissing, ObjectCorrupt) as error:
            kind = ObjectMissing if isinstance(error, ObjectMissing) else ShardCorrupt
            reason = str(error).partition(". ")[0].rstrip(".")  # without the error's own remedy
            raise corrupt(dataset, shard.shard_id, f"expected sha256 {shard.sha256}, but {reason}.", kind) from error
        if stored.sha256 == shard.sha256:
            return stored.body
    sizes = f"({len(stored.body):,} of {size_bytes:,} bytes)"
    raise corrupt(dataset, shard.shard_id, f"expected sha256 {shard.sha256}, found {stored.sha256} {sizes}.")


def document_bounds(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each document of a shard starts (at its EOT) and ends."""
    starts = np.flatnonzero(ids == ids[:1])  # every shard starts with EOT
    return starts, np.append(starts, len(ids))[1:]


@cache
def _versions() -> dict[str, str]:
    """The versions that build a shard. Cached: reading package metadata takes 9 ms, as long as 30,000 tokens take."""
    packages = {name: version(name) for name in ("gpt2-pipeline", "numpy", "tiktoken")}
    return {"python": platform.python_version()} | packages
