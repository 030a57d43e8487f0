"""From tokens back to text: which row of which source file a document of a shard is. Knows no tokenizer."""

from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from storage.datasets.manifest import Manifest, ShardRow
from storage.datasets.records import Record, read_record
from storage.datasets.shards import document_bounds
from storage.errors import StorageError
from storage.sources import documents, hub
from storage.sources.documents import ID, URL, Row
from storage.sources.files import SourceFile
from storage.sources.filters import parse
from storage.sources.mirror import locate
from storage.stores.store import Store


class Traced(NamedTuple):
    """A document, or the part of it that was asked for: where it lies, where it came from, and its token ids.

    `row`, `id` and `url` are None, and `why` says so, where the source file cannot be read now.
    """

    shard_id: str
    document: int
    source: str
    row: int | None
    id: Any
    url: Any
    why: str
    ids: np.ndarray


def source_rows(file: SourceFile, record: Record, wanted: Collection[int]) -> Iterator[tuple[int, Row]]:
    """The rows that some documents of a shard were made of, in order: `wanted` are their numbers in the shard.

    Raises SourceInvalid when the file is not what the shard was made of.
    """
    if not wanted:
        return
    column, row_from, row_to = record.recipe.text_column, record.recipe.row_from, record.recipe.row_to
    asked = tuple(parse(text) for text in record.recipe.filters)
    left_out = frozenset(record.skipped_rows)
    start = 0  # the first document that is read
    first, last = row_from, row_to
    if not (record.filtered or record.skipped_rows):  # then row and document go together
        start = min(wanted)
        first, last = row_from + start, row_from + max(wanted) + 1
    read_from = 0 if file.place.endswith(".jsonl") else first  # JSON lines have no index: those before are read, too
    rows = documents.documents(file, column, read_from, last, filters=asked, left_out=left_out, names=(ID, URL))
    made = (row for row in rows if row.number >= first)
    for number, row in enumerate(islice(made, max(wanted) + 1 - start), start):
        if number in wanted:
            yield number, row


def row_numbers(file: SourceFile, record: Record, wanted: Collection[int]) -> dict[int, int]:
    """The row of each of some documents of a shard; the file is read only where rows were left out between them."""
    if record.filtered or record.skipped_rows:
        return {number: row.number for number, row in source_rows(file, record, wanted)}
    return {number: record.recipe.row_from + number for number in wanted}


def hub_files(manifest: Manifest) -> dict[str, SourceFile]:
    """A version's source files by digest, where it was made of a Hub dataset: its commit says where they are."""
    origin = manifest.source
    if "commit" not in origin:
        return {}
    columns = (origin["files"][name] for name in ("name", "size_bytes", "digest"))
    return {
        digest: SourceFile(name, size_bytes, digest, hub.place_of(origin["dataset"], origin["commit"], name))
        for name, size_bytes, digest in zip(*columns, strict=True)
    }


def trace(
    store: Store,
    dataset: str,
    row: ShardRow,
    ids: np.ndarray,
    spans: list[tuple[int, int]],
    files: Mapping[str, SourceFile],
) -> Iterator[tuple[int, Traced]]:
    """The documents that some spans of a shard (first token, token after the last) are made of, each with its span.

    `files` are the source files that are at hand, by digest.
    """
    record = read_record(store, dataset, row.shard_id)
    starts, stops = document_bounds(ids)
    touched = [
        range(int(np.searchsorted(starts, first, side="right")) - 1, int(np.searchsorted(starts, stop, side="left")))
        for first, stop in spans
    ]
    rows, why = _rows(store, record, {number for numbers in touched for number in numbers}, files)
    for span, ((first, stop), numbers) in enumerate(zip(spans, touched, strict=True)):
        for number in numbers:
            part = ids[max(first, int(starts[number])) : min(stop, int(stops[number]))]
            found = rows.get(number, Row(None, None, None, None))  # type: ignore[arg-type]  # not at hand
            yield span, Traced(row.shard_id, number, record.source, found.number, found.id, found.url, why, part)


def _rows(
    store: Store, record: Record, wanted: set[int], files: Mapping[str, SourceFile]
) -> tuple[dict[int, Row], str]:
    file = files.get(record.recipe.source)
    if file is None:
        return {}, f"{record.source} is not among the files of data.source"
    try:
        return dict(source_rows(locate(store, file), record, wanted)), ""
    except (StorageError, ValueError) as error:  # also a dataset that the Hub shows no more
        return {}, str(error)
