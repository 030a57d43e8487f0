"""The documents of a source file: what a plan needs of all its rows, and the text of some. Knows no tokenizer.

Filters decide by columns which rows count; the text itself is read only when a shard is made.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import SourceInvalid
from storage.sources import jsonl
from storage.sources.files import SourceFile
from storage.sources.filters import LENGTH, Filter, check_columns
from storage.sources.reading import open_source

BYTES_PER_TOKEN = (
    4  # English web text holds about 4.4 bytes a gpt2 token; 4 keeps estimated shards just below the limit
)
MOST_TOKENS = 1 << 31  # of a document: what a column says beyond is wrong, and would overflow sums
KEPT_BYTES = 16 << 20  # of a row group that is kept; FineWeb-Edu's, of 1,000 documents, hold 5 MB
EOT_TOKENS = 1  # each document costs one more token than its text
ROWS_AT_ONCE = 250  # of a row group of 1,000 and more: 1,000 would take 30 MB more a worker, and no time less
DUMP, ID, URL = "dump", "id", "url"  # columns that name a document's crawl, the document, and where it was found


class Rows(NamedTuple):
    """What a plan needs of a source file's rows: tokens of each, EOT counted, and for JSON lines where each begins.

    A row that a filter leaves out costs 0 tokens.
    """

    tokens: np.ndarray
    starts: np.ndarray | None


class Row(NamedTuple):
    """A row that counts: its number, its text (or what stands there instead), and what names it where it has that."""

    number: int
    text: Any
    dump: Any
    id: Any
    url: Any = None


def rows(file: SourceFile, text_column: str, filters: tuple[Filter, ...] = (), *, strict: bool = True) -> Rows:
    """Tokens of each row as the `token_count` column says, else estimated from sizes: they only steer the cut.

    Raises SourceInvalid for columns that are missing or of another type and, when `strict`, for a text that is null.
    """
    wanted = tuple(one for one in filters if one.column != LENGTH)
    if file.place.endswith(".jsonl"):
        return _jsonl_rows(file, text_column, wanted, strict)
    with _parquet(file) as parquet:
        _check_text(parquet, file.place, text_column, strict=strict and not wanted)
        check_columns(wanted, parquet.schema_arrow.names, file.place)
        tokens = _parquet_tokens(parquet, text_column)
        if wanted:
            values = (part.to_pydict() for part in _batches(parquet, [one.column for one in wanted]))
            tokens *= np.array([_kept(row, wanted) for part in values for row in _across(part)], bool)
    return Rows(tokens, None)


def documents(
    file: SourceFile,
    text_column: str,
    row_from: int,
    row_to: int,
    *,
    start_byte: int = 0,
    filters: tuple[Filter, ...] = (),
    left_out: frozenset[int] = frozenset(),
    names: tuple[str, ...] = (DUMP, ID),
) -> Iterator[Row]:
    """Those of the rows `row_from` up to `row_to` that count, with the columns that name them.

    Raises SourceInvalid when the file ends before.
    """
    number = row_from - 1
    found = (
        _jsonl_items(file, text_column, row_from, row_to, start_byte)
        if file.place.endswith(".jsonl")
        else _parquet_items(file, text_column, row_from, row_to, filters, names)
    )
    for number, item in enumerate(found, row_from):
        text = item[text_column]
        if number in left_out:
            continue
        if not filters or _kept(item | {LENGTH: len(text) if isinstance(text, str) else None}, filters):
            yield Row(number, text, item.get(DUMP), item.get(ID), item.get(URL))
    if number + 1 != row_to:
        raise SourceInvalid(
            f"{file.place}: rows up to {row_to:,} were asked for, it ends at {number + 1:,}. Run the command again."
        )


def bad_document(file: SourceFile, row: Row, why: str) -> SourceInvalid:
    """What to say of a document that cannot be taken."""
    name = f"row {row.number:,}" + ("" if row.id is None else f" (id {row.id})")
    return SourceInvalid(
        f"{file.place}: {name}: {why}. Mend or drop that row, or leave such rows out: --set data.on_bad_document=skip"
    )


def no_text(row: Row, text_column: str) -> str:
    """Why a row without text cannot be taken."""
    shown = "null" if row.text is None else f"{type(row.text).__name__} {str(row.text)[:40]!r}"
    return f"column {text_column!r} should hold text, found {shown}"


def _kept(item: dict[str, Any], filters: tuple[Filter, ...]) -> bool:
    return all(one.keeps(item.get(one.column)) for one in filters)


def _across(columns: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    names = list(columns)
    return (dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True))


@contextmanager
def _parquet(file: SourceFile) -> Iterator[pq.ParquetFile]:
    """The file, open; what its bytes lack is said in words."""
    opened = open_source(file)
    try:
        with pq.ParquetFile(opened) as parquet:
            yield parquet
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise SourceInvalid(
            f"{file.place}: a parquet file was asked for, found {str(error).splitlines()[0]} "
            f"It is cut or damaged: fetch it again, or leave it out of data.source."
        ) from error


def _batches(parquet: pq.ParquetFile, columns: list[str], groups: list[int] | None = None) -> Iterator[pa.RecordBatch]:
    return parquet.iter_batches(ROWS_AT_ONCE, groups, columns)  # type: ignore[no-any-return]


# Small row groups that were read last, of all threads: neighbouring shards share them.
_last_read: deque[tuple[tuple[Any, ...], list[pa.RecordBatch]]] = deque(maxlen=2)


def _group(parquet: pq.ParquetFile, digest: str, columns: list[str], group: int) -> Iterable[pa.RecordBatch]:
    """A row group's rows, decoded once where shards begin and end within it: half the reading at 500,000 tokens."""
    if parquet.metadata.row_group(group).total_byte_size > KEPT_BYTES:
        return _batches(parquet, columns, [group])
    key = (digest, *columns, group)
    found = next((batches for known, batches in tuple(_last_read) if known == key), None)
    if found is None:
        found = list(_batches(parquet, columns, [group]))
        _last_read.append((key, found))
    return found


def _leaf(parquet: pq.ParquetFile, name: str) -> int:
    """Where a column of no nested type stands in a row group, which counts the leaves of nested ones."""
    group = parquet.metadata.row_group(0)  # `parquet.schema` keeps the footer, 8 MB, until Python collects garbage
    return next(index for index in range(group.num_columns) if group.column(index).path_in_schema == name)


def _check_text(parquet: pq.ParquetFile, place: str, text_column: str, *, strict: bool) -> None:
    """Raise SourceInvalid when the footer shows that the documents cannot be read."""
    names = parquet.schema_arrow.names
    if text_column not in names:
        raise SourceInvalid(
            f"{place}: column {text_column!r} was asked for, found {', '.join(names) or 'no columns'}. "
            f"Name the right one: --set data.text_column=…"
        )
    found = parquet.schema_arrow.field(text_column).type
    if not (pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise SourceInvalid(
            f"{place}: column {text_column!r} should hold strings, found {found}. "
            f"Name the right one: --set data.text_column=… (found {', '.join(names)})."
        )
    groups = parquet.num_row_groups if strict else 0
    leaf = _leaf(parquet, text_column) if groups else 0
    for group in range(groups):
        statistics = parquet.metadata.row_group(group).column(leaf).statistics
        if statistics is not None and statistics.has_null_count and statistics.null_count:
            raise SourceInvalid(
                f"{place}: column {text_column!r} should hold text in every row, found {statistics.null_count} null in "
                f"row group {group}. Drop those rows, or leave them out: --set data.on_bad_document=skip"
            )


def _parquet_tokens(parquet: pq.ParquetFile, text_column: str) -> np.ndarray:
    names = parquet.schema_arrow.names
    if "token_count" in names and pa.types.is_integer(parquet.schema_arrow.field("token_count").type):
        counted, row = np.empty(parquet.metadata.num_rows, np.int64), 0
        for part in _batches(parquet, ["token_count"]):
            if part.column(0).null_count:
                break
            counted[row : row + part.num_rows] = np.from_dlpack(part.column(0))  # to_numpy imports pandas
            row += part.num_rows
        else:
            np.clip(counted, 0, MOST_TOKENS, out=counted)
            counted += EOT_TOKENS
            return counted
    estimates = [np.empty(0, np.int64)]
    for index in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(index)
        size_bytes = group.column(_leaf(parquet, text_column)).total_uncompressed_size
        per_row = -(-size_bytes // (BYTES_PER_TOKEN * max(group.num_rows, 1)))
        estimates.append(np.full(group.num_rows, per_row + EOT_TOKENS, np.int64))
    return np.concatenate(estimates)


def _parquet_items(
    file: SourceFile,
    text_column: str,
    row_from: int,
    row_to: int,
    filters: tuple[Filter, ...],
    names: tuple[str, ...],
) -> Iterator[dict[str, Any]]:
    with _parquet(file) as parquet:
        there = parquet.schema_arrow.names
        _check_text(parquet, file.place, text_column, strict=False)
        check_columns(filters, there, file.place)
        asked = dict.fromkeys([text_column, *names, *(one.column for one in filters)])
        columns = [name for name in asked if name in there]
        first = 0
        for group in range(parquet.num_row_groups):
            end = first + parquet.metadata.row_group(group).num_rows
            if first < row_to and end > row_from:
                for part in _group(parquet, file.digest, columns, group):
                    wanted = part.slice(max(row_from - first, 0), max(row_to - max(row_from, first), 0))
                    first += part.num_rows
                    yield from _across({name: _decoded(wanted.column(name)) for name in columns})
                    if first >= row_to:
                        return
            first = end


def _decoded(column: pa.Array) -> list[Any]:
    """The column's values; text that is no UTF-8 as bytes, so that its row can be named."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
        for index, body in enumerate(values):
            with suppress(UnicodeDecodeError):  # its bytes show what it is
                values[index] = None if body is None else body.decode()
    return values


def _jsonl_rows(file: SourceFile, text_column: str, filters: tuple[Filter, ...], strict: bool) -> Rows:
    counted: list[int] = []
    estimated: list[int] = []
    starts: list[int] = []
    kept: list[bool] = []
    names: set[str] = set()
    for number, (start, item) in enumerate(jsonl.lines(file, text_column)):
        text, count = item[text_column], item.get("token_count")
        if strict and not isinstance(text, str) and not filters:
            row = Row(number, text, None, item.get(ID))
            raise bad_document(file, row, no_text(row, text_column))
        if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            counted.append(min(count, MOST_TOKENS) + EOT_TOKENS)
        size_bytes = len(text.encode(errors="surrogatepass")) if isinstance(text, str) else 0
        estimated.append(-(-size_bytes // BYTES_PER_TOKEN) + EOT_TOKENS)
        starts.append(start)
        kept.append(_kept(item, filters))
        names.update(item)
    if starts:
        check_columns(filters, sorted(names), file.place)
    tokens = counted if len(counted) == len(estimated) else estimated
    return Rows(np.array(tokens, np.int64) * np.array(kept, bool), np.array(starts, np.int64))


def _jsonl_items(
    file: SourceFile, text_column: str, row_from: int, row_to: int, start_byte: int
) -> Iterator[dict[str, Any]]:
    for _, (_, item) in zip(
        range(row_from, row_to), jsonl.lines(file, text_column, row_from, start_byte), strict=False
    ):
        yield item
