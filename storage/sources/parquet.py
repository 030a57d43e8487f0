"""Parquet: tokens of all rows from one column or the footer, and any rows of any row group."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import SourceInvalid
from storage.sources.files import SourceFile
from storage.sources.filters import check_columns, keeps_row
from storage.sources.reading import open_source
from storage.sources.rows import COUNT_COLUMN, EOT_TOKENS, MOST_TOKENS, Columns, RowTokens, estimated_tokens

ROWS_AT_ONCE = 250  # of a row group of 1,000 or more: 1,000 at once take 30 MB more a worker and save no time


def count_tokens(file: SourceFile, columns: Columns, *, strict: bool) -> RowTokens:
    """Tokens of every row, of the `token_count` column or estimated from the sizes in the footer.

    Raises SourceInvalid for missing columns or a text column of another type, and if `strict` when the footer shows
    null text.
    """
    with _opened(file) as parquet:
        _check_text_type(parquet, file.place, columns.text)
        if strict:
            _check_no_null(parquet, file.place, columns.text)
        check_columns(columns.filters, parquet.schema_arrow.names, file.place)
        tokens = _counted(parquet)
        if tokens is None:
            tokens = _estimated(parquet, columns.text)
        if columns.filters:
            tokens *= _kept(parquet, columns)
    return RowTokens(tokens, None)


def read_rows(
    file: SourceFile,
    columns: Columns,
    row_from: int,
    row_to: int,
    start_byte: int,  # noqa: ARG001  # the footer says where each row group starts
) -> Iterator[dict[str, Any]]:
    """Rows `row_from` to `row_to - 1`, fewer if the file ends, each as its columns by name. Raises SourceInvalid."""
    with _opened(file) as parquet:
        present = parquet.schema_arrow.names
        _check_text_type(parquet, file.place, columns.text)
        check_columns(columns.filters, present, file.place)
        names = [name for name in columns.names if name in present]
        group_from = 0
        for group in range(parquet.num_row_groups):
            group_to = group_from + parquet.metadata.row_group(group).num_rows
            if group_from < row_to and group_to > row_from:
                yield from _rows_of_group(parquet, group, names, row_from - group_from, row_to - group_from)
            group_from = group_to


def _rows_of_group(
    parquet: pq.ParquetFile, group: int, names: list[str], row_from: int, row_to: int
) -> Iterator[dict[str, Any]]:
    """The rows of one row group, counted from its first, which either limit may lie beyond."""
    first = 0
    for batch in _batches(parquet, names, [group]):
        start, stop = max(row_from - first, 0), min(row_to - first, batch.num_rows)
        if start < stop:
            yield from _as_rows(batch.slice(start, stop - start))
        first += batch.num_rows
        if first >= row_to:
            return


@contextmanager
def _opened(file: SourceFile) -> Iterator[pq.ParquetFile]:
    """The file, open. Raises SourceInvalid for what pyarrow cannot read, also within the block."""
    source = open_source(file)
    try:
        with pq.ParquetFile(source) as parquet:
            yield parquet
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise SourceInvalid(
            f"{file.place}: not a readable parquet file: {str(error).splitlines()[0]} "
            f"It is truncated or damaged: download it again, or remove it from data.source."
        ) from error


def _batches(parquet: pq.ParquetFile, names: list[str], groups: list[int] | None = None) -> Iterator[pa.RecordBatch]:
    return parquet.iter_batches(ROWS_AT_ONCE, groups, names)  # type: ignore[no-any-return]


def _check_text_type(parquet: pq.ParquetFile, place: str, text_column: str) -> None:
    names = parquet.schema_arrow.names
    if text_column not in names:
        raise SourceInvalid(
            f"{place}: no column {text_column!r}, found {', '.join(names) or 'no columns'}. "
            f"Set the column with the text: --set data.text_column=…"
        )
    kind = parquet.schema_arrow.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SourceInvalid(
            f"{place}: column {text_column!r} should hold strings, found {kind}. "
            f"Set the column with the text: --set data.text_column=… (the file has {', '.join(names)})."
        )


def _check_no_null(parquet: pq.ParquetFile, place: str, text_column: str) -> None:
    """Raise SourceInvalid if the footer's statistics, where it has any, count a null text."""
    for group in range(parquet.num_row_groups):
        statistics = _text_chunk(parquet, group, text_column).statistics
        if statistics is not None and statistics.has_null_count and statistics.null_count:
            raise SourceInvalid(
                f"{place}: column {text_column!r} should hold text in every row, found {statistics.null_count} null in "
                f"row group {group}. Delete those rows, or skip them: --set data.on_bad_document=skip"
            )


def _text_chunk(parquet: pq.ParquetFile, group: int, text_column: str) -> pq.ColumnChunkMetaData:
    """The text column's part of a row group. Its index is not the schema's: a nested column has several leaves."""
    row_group = parquet.metadata.row_group(group)  # `parquet.schema` keeps the footer, 8 MB, until Python collects it
    chunks = (row_group.column(leaf) for leaf in range(row_group.num_columns))
    return next(chunk for chunk in chunks if chunk.path_in_schema == text_column)


def _counted(parquet: pq.ParquetFile) -> np.ndarray | None:
    """Tokens of each row by the `token_count` column; None if it is missing, not of integers, or has a null."""
    schema = parquet.schema_arrow
    if COUNT_COLUMN not in schema.names or not pa.types.is_integer(schema.field(COUNT_COLUMN).type):
        return None
    tokens, row = np.empty(parquet.metadata.num_rows, np.int64), 0
    for batch in _batches(parquet, [COUNT_COLUMN]):
        if batch.column(0).null_count:
            return None
        tokens[row : row + batch.num_rows] = np.from_dlpack(batch.column(0))  # to_numpy imports pandas
        row += batch.num_rows
    return np.clip(tokens, 0, MOST_TOKENS, out=tokens) + EOT_TOKENS


def _estimated(parquet: pq.ParquetFile, text_column: str) -> np.ndarray:
    """Tokens of each row by the mean size of the texts of its row group."""
    estimates = [np.empty(0, np.int64)]
    for group in range(parquet.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        size_bytes = _text_chunk(parquet, group, text_column).total_uncompressed_size
        estimates.append(np.full(count, estimated_tokens(-(-size_bytes // max(count, 1))), np.int64))
    return np.concatenate(estimates)


def _kept(parquet: pq.ParquetFile, columns: Columns) -> np.ndarray:
    names = list(dict.fromkeys(condition.column for condition in columns.filters))
    rows = (row for batch in _batches(parquet, names) for row in _as_rows(batch))
    return np.array([keeps_row(columns.filters, row) for row in rows], bool)


def _as_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    values = [_values(column) for column in batch.columns]
    return (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    """The column's values. Text that is not UTF-8 stays bytes, so that the error can name its row."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
        for index, body in enumerate(values):
            with suppress(UnicodeDecodeError):
                values[index] = None if body is None else body.decode()
    return values
