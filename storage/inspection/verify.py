"""Proves that a dataset's version is what its manifest says. Changes nothing, knows no tokenizer.

Three depths: `quick` believes the store's listing and the sums it keeps, `full` reads every byte, `deep` tokenises some
documents of the source again and looks for them in the shards.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from storage.datasets.manifest import Manifest, ShardRow, read_manifest
from storage.datasets.recipe import ShardRecipe
from storage.datasets.records import DTYPE, ShardSummary, read_record
from storage.datasets.shards import document_bounds, read_shard
from storage.errors import ObjectMissing, StorageError
from storage.inspection.lineage import source_rows
from storage.keys import DatasetKeys
from storage.sources.files import SourceFile
from storage.sources.mirror import locate
from storage.stores.store import Store


class Damage(NamedTuple):
    """What is wrong, with which shard or manifest."""

    name: str
    wrong: str


def check_quickly(store: Store, dataset: str, row: ShardRow) -> Damage | None:
    """What the shard's size, the sum that the store keeps of it, or a missing record show, without reading it."""
    try:
        found = store.stat(DatasetKeys(dataset).shard(row.shard_id))
        store.stat(DatasetKeys(dataset).record(row.shard_id))
    except ObjectMissing as error:
        return Damage(row.shard_id, str(error))
    size_bytes = row.tokens * DTYPE.itemsize
    if found.size != size_bytes:
        return Damage(row.shard_id, f"expected {size_bytes:,} bytes, found {found.size:,}")
    if found.sha256 not in (None, row.sha256):
        return Damage(row.shard_id, f"expected sha256 {row.sha256}, the store keeps {found.sha256}")
    return None


def check_fully(store: Store, dataset: str, row: ShardRow, eot: int) -> Damage | None:
    """What reading every byte shows: the sum, the record, one `eot` a document, no id above it."""
    try:
        ids = np.frombuffer(read_shard(store, dataset, row.shard_id, row.tokens, row.sha256), DTYPE)
        record = read_record(store, dataset, row.shard_id)
    except StorageError as error:
        return Damage(row.shard_id, str(error))
    for name in ShardSummary._fields:
        if getattr(record, name) != getattr(row, name):
            return Damage(
                row.shard_id,
                f"{name}: the manifest says {getattr(row, name)}, its record {getattr(record, name)}",
            )
    found = (len(ids), int(np.count_nonzero(ids == eot)))
    if found != (row.tokens, row.documents):
        return Damage(row.shard_id, f"expected tokens, documents {row.tokens:,}, {row.documents:,}, found {found}")
    if int(ids.max()) > eot:
        return Damage(row.shard_id, f"expected ids up to {eot:,}, found {int(ids.max()):,}")
    return None


def check_versions(store: Store, dataset: str, manifest: Manifest) -> Iterator[Damage]:
    """The version's ancestors that cannot be read, and shards of `val` whose rows are in `train` too."""
    parent = manifest.parent
    while parent is not None:
        try:
            parent = read_manifest(store, dataset, parent).parent
        except StorageError as error:
            yield Damage(f"manifest {parent}", str(error))
            return
    yield from _overlaps(store, dataset, manifest)


def check_documents(
    store: Store,
    dataset: str,
    manifest: Manifest,
    files: Iterable[SourceFile],
    encode: Callable[[str], np.ndarray],
    *,
    count: int,
    seed: int,
) -> Iterator[Damage | None]:
    """Tokenise `count` documents of the source again, drawn by `seed`, and compare: a Damage or None for each."""
    by_digest = {file.digest: file for file in files}
    rows = list(manifest.rows())
    ends = np.cumsum([row.documents for row in rows])
    chosen = np.sort(np.random.default_rng(seed).choice(int(ends[-1]), min(count, int(ends[-1])), replace=False))
    shard_of = np.searchsorted(ends, chosen, side="right")
    for shard in np.unique(shard_of):
        row = rows[shard]
        here = chosen[shard_of == shard] - (ends[shard] - row.documents)
        try:
            ids = np.frombuffer(read_shard(store, dataset, row.shard_id, row.tokens, row.sha256), DTYPE)
            record = read_record(store, dataset, row.shard_id)
            starts, stops = document_bounds(ids)
            if len(starts) != row.documents:
                yield Damage(row.shard_id, f"expected {row.documents:,} documents, found {len(starts):,}")
                continue
            file = by_digest.get(record.recipe.source)
            if file is None:
                yield Damage(row.shard_id, f"its source file {record.source} is no longer among the source's files")
                continue
            for document, text in source_rows(locate(store, file), record, here.tolist()):
                found = ids[starts[document] + 1 : stops[document]]
                same = np.array_equal(found, encode(text.text))
                yield None if same else Damage(row.shard_id, f"document {document:,} is not what its source gives now")
        except StorageError as error:
            yield Damage(row.shard_id, str(error))


def _overlaps(store: Store, dataset: str, manifest: Manifest) -> Iterator[Damage]:
    """Shards of `train` that share rows of a source file with one of `val`. Reads the records of those files only."""
    val: dict[str, list[tuple[str, int, int]]] = {}
    for shard_id, recipe in _recipes(store, dataset, [row.shard_id for row in manifest.rows("val")]):
        val.setdefault(recipe.source, []).append((shard_id, recipe.row_from, recipe.row_to))
    of_val = (name for name, digest in manifest.files.items() if digest in val)  # renamed ones, too
    stems = {SourceFile(name, size_bytes=0, digest="", place="").stem for name in of_val}
    near = [row.shard_id for row in manifest.rows("train") if row.shard_id.rsplit("-", 2)[0] in stems]
    for shard_id, recipe in _recipes(store, dataset, near):
        for name, row_from, row_to in val.get(recipe.source, []):
            if recipe.row_from < row_to and row_from < recipe.row_to:
                yield Damage(shard_id, f"shares rows of its source file with {name}, which is of split val")


def _recipes(store: Store, dataset: str, shard_ids: list[str]) -> Iterator[tuple[str, ShardRecipe]]:
    for shard_id in shard_ids:
        with suppress(StorageError):  # no record, no rows: `check_fully` has named it
            yield shard_id, read_record(store, dataset, shard_id).recipe
