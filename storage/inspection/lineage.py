"""Traces token ids back to text: which row of which source file a document of a shard came from."""

from collections.abc import Collection, Iterator, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from storage.datasets.manifest import FILE_COLUMNS, Manifest, ShardRow
from storage.datasets.records import Record, read_record
from storage.datasets.shards import document_bounds
from storage.errors import SourceInvalid, StorageError
from storage.sources import hub
from storage.sources.documents import documents
from storage.sources.files import SourceFile, hive_columns
from storage.sources.mirror import locate
from storage.sources.rows import ID, URL, Row
from storage.stores.store import Store

Span = tuple[int, int]  # tokens of a shard: the first, and the last + 1


class Traced(NamedTuple):
    """A document, or its part within a span, as `--json` prints it. `why` says why its source file cannot be read."""

    dataset: str
    shard_id: str
    document: int
    source: str
    row: int | None
    id: Any
    url: Any
    why: str
    ids: np.ndarray


def source_of(store: Store, record: Record, files: Mapping[str, SourceFile]) -> SourceFile:
    """The source file of a shard, or its parquet if the store has one. Raises SourceInvalid if there is neither."""
    folders = next((file.columns for file in files.values()), {})  # of any file: those of all files pass the filters
    before = SourceFile(record.source, 0, record.recipe.source, "", folders)  # its small files may be packed anew since
    file = locate(store, files.get(record.recipe.source, before))
    if not file.place:
        raise SourceInvalid(f"{record.source} is not among the files of data.source; set the source of the build")
    return file


def source_rows(file: SourceFile, record: Record, numbers: Collection[int]) -> Iterator[tuple[int, Row]]:
    """The source rows of documents of a shard, in order, with their numbers. Raises SourceInvalid if rows are gone."""
    if not numbers:
        return
    recipe = record.recipe
    row_from, row_to = recipe.row_from, recipe.row_to
    first = 0  # the first document that is read
    left_out = {*record.skipped_rows, *record.in_val_rows}
    if not (record.filtered or left_out):  # each row is a document: read only the requested rows
        first = min(numbers)
        row_from, row_to = row_from + first, row_from + max(numbers) + 1
    read = documents(file, recipe.text_column, row_from, row_to, filters=recipe.filters, names=(ID, URL))
    rows = (row for row in read if row.number not in left_out)
    for number, row in enumerate(islice(rows, max(numbers) + 1 - first), first):
        if number in numbers:
            yield number, row


def hub_files(manifest: Manifest) -> dict[str, SourceFile]:
    """The source files of a version of a Hub dataset, at the version's commit, by digest; empty for another source."""
    origin, files = manifest.origin, dict[str, SourceFile]()
    if "commit" in origin:
        for name, digest, size_bytes in zip(*(manifest.source_files[name] for name in FILE_COLUMNS), strict=True):
            place = hub.place_of(origin["dataset"], origin["commit"], name)
            files[digest] = SourceFile(name, size_bytes, digest, place, hive_columns(name))
    return files


def trace(
    store: Store, dataset: str, row: ShardRow, ids: np.ndarray, spans: list[Span], files: Mapping[str, SourceFile]
) -> Iterator[tuple[int, Traced]]:
    """The documents in some spans of a shard, each with its span's index. `files`: readable source files by digest."""
    record = read_record(store, dataset, row.shard_id)
    starts, stops = document_bounds(ids)
    numbers_of = [range(starts.searchsorted(first, "right") - 1, starts.searchsorted(stop)) for first, stop in spans]
    rows, reason = dict[int, Row](), f"the folders of {record.source} are unknown; set the source of the build"
    try:
        rows = dict(source_rows(source_of(store, record, files), record, {*chain(*numbers_of)}))
    except (StorageError, ValueError) as error:  # ValueError: a Hub dataset that is gone or private now
        reason = str(error)
    for index, ((first, stop), numbers) in enumerate(zip(spans, numbers_of, strict=True)):
        for number in numbers:
            part = ids[max(first, int(starts[number])) : min(stop, int(stops[number]))]
            found = rows.get(number)
            place = (record.source, found.number if found else None)
            if found and isinstance(found.packed_row, int):  # else a column of the source has this name
                place = (found.packed_file, found.packed_row)
            name: tuple[Any, Any] = (found.id, found.url) if found else (None, None)
            yield index, Traced(dataset, row.shard_id, number, *place, *name, "" if found else reason, part)
