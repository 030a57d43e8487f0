"""Checks a version against its manifest: sizes (`quick`) or all bytes (`full`), and tokenises documents again."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from storage.datasets.manifest import COUNTS, Manifest, ShardRow, ancestors
from storage.datasets.plan import Encode
from storage.datasets.records import DTYPE, read_record
from storage.datasets.shards import document_bounds, read_shard
from storage.errors import ObjectCorrupt, ObjectMissing, ShardCorrupt, SourceInvalid
from storage.inspection.lineage import source_of, source_rows
from storage.keys import DatasetKeys
from storage.sources.files import SourceFile
from storage.stores.store import Store

DAMAGES = (ObjectMissing, ObjectCorrupt, ShardCorrupt)  # an unreachable store is not damage, and must not be repaired
SHARDS_AT_ONCE = 4  # one shard is read while another is hashed
Progress = Callable[[], None]


class Damage(NamedTuple):
    """A damaged shard or manifest, and what is wrong with it."""

    name: str
    wrong: str
    repairable: bool = False  # by building the shard again
    of_source: bool = False  # the source file is gone or changed: nothing was compared, and the shard may be intact


def verify_dataset(
    store: Store, dataset: str, manifest: Manifest, *, eot: int, quick: bool, on_progress: Progress = lambda: None
) -> list[Damage]:
    """The damaged shards of a version in order; unless `quick`, also a damaged ancestor. Raises StorageError."""
    check = partial(check_quickly, store, dataset) if quick else partial(check_fully, store, dataset, eot=eot)
    damages: list[Damage] = []
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for shard_id, wrong in zip(manifest.shard_ids, pool.map(check, manifest.rows()), strict=True):
            damages += [Damage(shard_id, wrong, repairable=True)] if wrong else []
            on_progress()
    return damages if quick else [*damages, *check_versions(store, dataset, manifest)]


def check_quickly(store: Store, dataset: str, row: ShardRow) -> str | None:
    """What is wrong with the shard's size, its stored checksum or that it has a record. Does not read the shard."""
    try:
        status = store.stat(DatasetKeys(dataset).shard(row.shard_id))
        store.stat(DatasetKeys(dataset).record(row.shard_id))
    except ObjectMissing as error:
        return str(error)
    size_bytes = row.tokens * DTYPE.itemsize
    if status.size != size_bytes:
        return f"expected {size_bytes:,} bytes, found {status.size:,}"
    if status.sha256 not in (None, row.sha256):
        return f"expected sha256 {row.sha256}, the store has {status.sha256}"
    return None


def check_fully(store: Store, dataset: str, row: ShardRow, eot: int) -> str | None:
    """What is wrong with the sha256, the record, the number of documents (each has one `eot`), or ids above `eot`."""
    try:
        ids = np.frombuffer(read_shard(store, dataset, row), DTYPE)
        record = read_record(store, dataset, row.shard_id)
    except DAMAGES as error:
        return str(error)
    for name in (*COUNTS, "sha256"):
        listed, recorded = getattr(row, name), getattr(record, name)
        if listed != recorded:
            return f"{name}: the manifest has {listed}, the record {recorded}"
    documents = int(np.count_nonzero(ids == eot))
    if (len(ids), documents) != (row.tokens, row.documents):
        expected = f"{row.tokens:,} tokens in {row.documents:,} documents"
        return f"expected {expected}, found {len(ids):,} in {documents:,}"
    if int(ids.max()) > eot:
        return f"expected ids up to {eot:,}, found {int(ids.max()):,}"
    return None


def check_versions(store: Store, dataset: str, manifest: Manifest) -> Iterator[Damage]:
    """The first unreadable ancestor of a version."""
    try:
        for version in ancestors(store, dataset, manifest):
            parent = version.parent
    except DAMAGES as error:
        yield Damage(f"manifest {parent}", str(error))


def check_documents(
    store: Store, dataset: str, manifest: Manifest, files: Iterable[SourceFile], encode: Encode, count: int, seed: int
) -> Iterator[Damage | None]:
    """Tokenise `count` random documents again: a Damage or None for each; one for a shard that cannot be compared."""
    files_by_digest = {file.digest: file for file in files}
    rows = list(manifest.rows())
    ends = np.cumsum([row.documents for row in rows])
    chosen = np.sort(np.random.default_rng(seed).choice(int(ends[-1]), min(count, int(ends[-1])), replace=False))
    shard_of = np.searchsorted(ends, chosen, side="right")
    for shard in np.unique(shard_of):
        row = rows[shard]
        numbers = chosen[shard_of == shard] - (ends[shard] - row.documents)
        try:
            ids = np.frombuffer(read_shard(store, dataset, row), DTYPE)
            record = read_record(store, dataset, row.shard_id)
            starts, stops = document_bounds(ids)
            if len(starts) != row.documents:
                yield Damage(row.shard_id, f"expected {row.documents:,} documents, found {len(starts):,}")
                continue
            file = source_of(store, record, files_by_digest)
            for number, source_row in source_rows(file, record, numbers.tolist()):
                is_same = np.array_equal(ids[starts[number] + 1 : stops[number]], encode(source_row.text))
                yield None if is_same else Damage(row.shard_id, f"document {number:,} differs from its source")
        except (*DAMAGES, SourceInvalid) as error:
            yield Damage(row.shard_id, str(error), of_source=isinstance(error, SourceInvalid))
