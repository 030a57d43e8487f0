"""Parquet: tokens of all rows from one column or the footer, and any rows of any row group."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import SourceInvalid
from storage.sources.files import SourceFile
from storage.sources.filters import Filter, check_columns, keeps_row
from storage.sources.reading import RangeFile, open_source
from storage.sources.rows import COUNT_COLUMN, DUMP, EOT_TOKENS, ID, MOST_TOKENS, RowTokens, estimated_tokens, no_column

ROWS_AT_ONCE = 250  # 1,000 at once take 30 MB more per worker and save no time
PLAUSIBLE_ROWS = 1 << 24  # more rows, and less than a byte each, are a damaged footer; a plan takes 8 bytes a row
TEXT = (pa.string(), pa.large_string(), pa.string_view())
BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())


def count_tokens(file: SourceFile, text_column: str, filters: list[Filter], *, strict: bool) -> RowTokens:
    """Tokens of every row, from the `token_count` column or estimated from the footer. Raises SourceInvalid."""
    names = sorted({condition.column for condition in filters})
    with _opened(file, text_column, [COUNT_COLUMN, DUMP, ID, *names]) as parquet:
        groups = {group: rows for group, rows in enumerate(_row_counts(parquet)) if rows}
        counts = np.array(list(groups.values()), np.int64)
        if not groups:
            return RowTokens(np.array([], np.int64), None, False, counts)
        kinds = _kinds(parquet.schema_arrow)
        check_columns(filters, list(kinds), file.shown_place)
        others = {COUNT_COLUMN, DUMP, ID, *names} & kinds.keys()
        _check_metadata(parquet, file, [*product(groups, [text_column]), *product(list(groups)[:1], others)])
        footer = parquet.metadata
        paths = [footer.schema.column(leaf).path for leaf in range(footer.num_columns)]  # nested columns have several
        chunks = [footer.row_group(group).column(paths.index(text_column)) for group in groups]
        nulls = sum(chunk.statistics.null_count or 0 for chunk in chunks if chunk.statistics)
        if nulls and strict and not filters:
            problem = f"column {text_column!r} should hold text in every row, found {nulls:,} nulls"
            remedy = "Delete those rows, or skip them: --set data.on_bad_document=skip"
            raise SourceInvalid(f"{file.place}: {problem}. {remedy}")
        tokens = _counted(parquet)
        counted = tokens is not None
        if tokens is None:  # estimated from the mean text size of each row group
            sizes = np.array([chunk.total_uncompressed_size for chunk in chunks], np.int64)
            tokens = np.repeat(estimated_tokens(-(-sizes // counts)), counts)
        kept = np.ones(sum(counts), bool)
        if filters:
            batches = parquet.iter_batches(ROWS_AT_ONCE, columns=names)
            rows = enumerate(row for batch in batches for row in _as_rows(batch, names))
            kept = np.array([keeps_row(filters, row, file.shown_place, number) for number, row in rows], bool)
        if not len(tokens) == len(kept) == sum(counts):
            raise pa.ArrowInvalid("its columns have different numbers of rows")
    return RowTokens(tokens * kept, None, counted, np.cumsum(counts) - counts)


def read_rows(
    file: SourceFile, text_column: str, others: list[str], row_from: int, row_to: int, _start_byte: int
) -> Iterator[dict[str, object]]:
    """Rows `row_from` to `row_to - 1`, fewer if the file ends. Raises SourceInvalid."""
    with _opened(file, text_column, others) as parquet:
        names = sorted({text_column, *others} & _kinds(parquet.schema_arrow).keys())
        starts = np.cumsum([0, *_row_counts(parquet)])
        groups = [group for group in range(len(starts) - 1) if starts[group] < row_to and starts[group + 1] > row_from]
        first = int(starts[groups[0]]) if groups else 0
        # One call per group: pyarrow holds all groups of a call in memory.
        for batch in chain.from_iterable(parquet.iter_batches(ROWS_AT_ONCE, [group], names) for group in groups):
            start, stop = max(row_from - first, 0), min(row_to - first, batch.num_rows)
            if start < stop:
                yield from _as_rows(batch.slice(start, stop - start), names, text_column)
            first += batch.num_rows
            if first >= row_to:
                return


@contextmanager
def _opened(file: SourceFile, text_column: str, others: list[str]) -> Iterator[pq.ParquetFile]:
    """Open the file to read these columns (if it has rows). Raises SourceInvalid, also for errors in the block."""
    source = open_source(file)
    try:
        with pq.ParquetFile(source) as parquet:
            if (rows := sum(_row_counts(parquet))) > max(PLAUSIBLE_ROWS, file.size_bytes):
                raise pa.ArrowInvalid(f"its footer claims {rows:,} rows in {file.size_bytes:,} bytes")
            if rows:
                _check_schema(parquet.schema_arrow, file, text_column, others)
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError: the name of a column
        reason = str(error).partition("\n")[0].rstrip(". ")
        remedy = "Check the file's permissions, and whether it is encrypted; if it is damaged, download it again"
        problem = f"{file.shown_place}: cannot be read as parquet: {reason}"
        raise SourceInvalid(f"{problem}. {remedy} or remove it from data.source.") from error


def _row_counts(parquet: pq.ParquetFile) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]


def _check_schema(schema: pa.Schema, file: SourceFile, text_column: str, others: list[str]) -> None:
    for name in (text_column, *others):
        if (count := schema.names.count(name)) > 1:
            raise SourceInvalid(f"{file.shown_place}: {count} columns are named {name!r}. Rename all but one of them.")
    kinds = _kinds(schema)
    if text_column not in kinds:
        raise SourceInvalid(no_column(file, text_column, list(kinds)))
    if _storage(kinds[text_column]) not in (*TEXT, *BYTES, pa.null()):
        raise SourceInvalid(no_column(file, text_column, list(kinds), kinds[text_column]))


def _kinds(schema: pa.Schema) -> dict[str, pa.DataType]:
    """The type of each column, and of each field inside one, by its path: `meta.score`."""
    kinds: dict[str, pa.DataType] = {}
    fields = [(field.name, field.type) for field in schema]
    while fields:
        name, kind = fields.pop(0)
        kinds.setdefault(name, kind)
        if pa.types.is_struct(kind):
            fields += [(f"{name}.{field.name}", field.type) for field in kind]
    return kinds


def _storage(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary or an extension type."""
    while isinstance(kind, pa.DictionaryType | pa.BaseExtensionType):
        kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind.storage_type
    return kind


class _ValuesReached(Exception):
    """pyarrow has accepted a column's metadata, and begins to read its values."""


def _check_metadata(parquet: pq.ParquetFile, file: SourceFile, places: Iterable[tuple[int, str]]) -> None:
    """Raise ArrowInvalid if the metadata of a row group's column are encrypted or damaged. Reads no values.

    `RowGroupMetaData.column` would abort the process; an attempt to read values raises an error, 0.2 ms a row group.
    """

    def stop(*_: int) -> bytes:
        raise _ValuesReached

    with pq.ParquetFile(RangeFile(file.size_bytes, stop), metadata=parquet.metadata) as without_values:
        for group, name in places:
            try:
                next(without_values.iter_batches(1, [group], [name]), None)
            except _ValuesReached:
                continue
            except (pa.ArrowException, OSError) as error:
                raise pa.ArrowInvalid(f"column {name!r} of row group {group}: {error}") from error


def _counted(parquet: pq.ParquetFile) -> np.ndarray | None:
    """Tokens of each row from the `token_count` column; None if it is missing, not of integers, or has a null."""
    schema = parquet.schema_arrow
    if COUNT_COLUMN not in schema.names or not pa.types.is_integer(schema.field(COUNT_COLUMN).type):
        return None
    column = parquet.read([COUNT_COLUMN], use_threads=False).column(0).combine_chunks()
    if column.null_count:
        return None
    counts = np.from_dlpack(column).astype(np.int64)  # to_numpy imports pandas
    return np.clip(counts, 0, MOST_TOKENS) + EOT_TOKENS


def _as_rows(batch: pa.RecordBatch, names: list[str], text_column: str = "") -> Iterator[dict[str, object]]:
    columns = [_values(_column(batch, name), name == text_column) for name in names]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _column(batch: pa.RecordBatch, path: str) -> pa.Array:
    if path in batch.schema.names:
        return batch.column(path)
    outer = next(name for name in batch.schema.names if path.startswith(f"{name}."))  # which may have a dot, too
    return pc.struct_field(batch.column(outer), path.removeprefix(f"{outer}.").split("."))


def _values(column: pa.Array, is_text: bool) -> list[Any]:
    """The values, bytes as text. Not UTF-8: bytes if `is_text`, so that the error names its row; else escapes."""
    if (kind := _storage(column.type)) not in BYTES:
        with suppress(ValueError, OverflowError, LookupError):  # not UTF-8; a date after 9999; an unknown time zone
            return list(column.to_pylist())
    values: list[Any] = column.cast(pa.large_binary() if kind in (*TEXT, *BYTES) else pa.string()).to_pylist()
    for index, body in enumerate(values):
        if isinstance(body, bytes):
            with suppress(UnicodeDecodeError):
                values[index] = body.decode(errors="strict" if is_text else "backslashreplace")
    return values
