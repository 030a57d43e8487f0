"""Parquet: tokens of all rows from one column or the footer, and any rows of any row group."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import SourceInvalid
from storage.sources.files import SourceFile
from storage.sources.filters import Filter, check_columns, keeps_row
from storage.sources.reading import open_source
from storage.sources.rows import COUNT_COLUMN, EOT_TOKENS, MOST_TOKENS, RowTokens, estimated_tokens

ROWS_AT_ONCE = 250  # 1,000 at once take 30 MB more per worker and save no time


def count_tokens(file: SourceFile, text_column: str, filters: list[Filter], *, strict: bool) -> RowTokens:
    """Tokens of every row, from the `token_count` column or estimated from the footer. Raises SourceInvalid."""
    with _opened(file, text_column) as parquet:
        check_columns(filters, parquet.schema_arrow.names, file.place)
        chunks = _text_chunks(parquet.metadata, text_column)
        if strict:
            _check_no_null(chunks, file.place, text_column)
        tokens = _counted(parquet)
        counted = tokens is not None
        counts = np.array([chunk.num_values for chunk in chunks], np.int64)
        if tokens is None:  # estimated from the mean text size of each row group
            sizes = np.array([chunk.total_uncompressed_size for chunk in chunks], np.int64)
            tokens = np.repeat(estimated_tokens(-(-sizes // np.maximum(counts, 1))), counts)
        if filters:
            names = sorted({condition.column for condition in filters})
            rows = (row for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=names) for row in _as_rows(batch))
            tokens *= np.array([keeps_row(filters, row) for row in rows], bool)
    return RowTokens(tokens, None, counted, np.cumsum(counts) - counts)


def read_rows(
    file: SourceFile,
    text_column: str,
    others: list[str],
    row_from: int,
    row_to: int,
    start_byte: int,  # noqa: ARG001  # the footer states where each row group starts
) -> Iterator[dict[str, object]]:
    """Rows `row_from` to `row_to - 1`, fewer if the file ends. Raises SourceInvalid."""
    with _opened(file, text_column) as parquet:
        names = sorted({text_column, *others} & set(parquet.schema_arrow.names))
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = [group for group in range(len(sizes)) if starts[group] < row_to and starts[group + 1] > row_from]
        first = int(starts[groups[0]]) if groups else 0
        # One call per group: pyarrow holds all groups of a call in memory.
        batches = (batch for group in groups for batch in parquet.iter_batches(ROWS_AT_ONCE, [group], names))
        for batch in batches:
            start, stop = max(row_from - first, 0), min(row_to - first, batch.num_rows)
            if start < stop:
                yield from _as_rows(batch.slice(start, stop - start))
            first += batch.num_rows
            if first >= row_to:
                return


@contextmanager
def _opened(file: SourceFile, text_column: str) -> Iterator[pq.ParquetFile]:
    """Open the file. Raises SourceInvalid for a wrong text column, and for pyarrow's errors here or in the block."""
    source = open_source(file)
    try:
        with pq.ParquetFile(source) as parquet:
            _check_text_type(parquet.schema_arrow, file.place, text_column)
            yield parquet
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(". ")
        raise SourceInvalid(
            f"{file.place}: cannot be read as parquet: {reason}. "
            f"Check the file's permissions; if it is damaged, download it again or remove it from data.source."
        ) from error


def _check_text_type(schema: pa.Schema, place: str, text_column: str) -> None:
    kind = schema.field(text_column).type if text_column in schema.names else None
    if kind not in (pa.string(), pa.large_string()):
        raise SourceInvalid(
            f"{place}: column {text_column!r} should hold strings, found {kind or 'no such column'}; the file has "
            f"{', '.join(schema.names) or 'no columns'}. Set the column with the text: --set data.text_column=…"
        )


def _check_no_null(chunks: list[pq.ColumnChunkMetaData], place: str, text_column: str) -> None:
    for group, chunk in enumerate(chunks):
        if chunk.statistics is not None and chunk.statistics.null_count:
            raise SourceInvalid(
                f"{place}: column {text_column!r} should hold text in every row, found {chunk.statistics.null_count} "
                f"nulls in row group {group}. Delete those rows, or skip them: --set data.on_bad_document=skip"
            )


def _text_chunks(footer: pq.FileMetaData, text_column: str) -> list[pq.ColumnChunkMetaData]:
    """The text column's chunk of each row group, by its path: nested columns shift the schema's indices."""
    groups = (footer.row_group(group) for group in range(footer.num_row_groups))
    chunks = (group.column(leaf) for group in groups for leaf in range(group.num_columns))
    return [chunk for chunk in chunks if chunk.path_in_schema == text_column]


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


def _as_rows(batch: pa.RecordBatch) -> Iterator[dict[str, object]]:
    columns = [_values(column) for column in batch.columns]
    return (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


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
