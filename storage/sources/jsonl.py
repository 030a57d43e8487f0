"""JSON lines, plain (a row is located by its first byte) or as rows of a converted file. Blank lines are not rows."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice

import numpy as np

from storage.errors import SourceInvalid
from storage.sources import parquet, rows
from storage.sources.files import SourceFile
from storage.sources.filters import Filter, check_columns, columns_like, keeps_row, nested_names, value_at
from storage.sources.reading import open_bytes

BUFFER_BYTES = 1 << 20  # over a network each refill is a request
PACKED = [rows.PACKED_FILE, rows.PACKED_ROW]


def count_tokens(file: SourceFile, text_column: str, filters: list[Filter], *, strict: bool) -> rows.RowTokens:
    """Tokens of every row, from `token_count` if every row has it, else from text sizes. Raises SourceInvalid."""
    counts, text_bytes, starts = list[int](), list[int](), list[int]()
    kept, names = list[bool](), set[str]()
    columns = [condition.column for condition in filters]
    for number, (start, item) in enumerate(_items(file, text_column, columns, 0, 0)):
        text, count = item[text_column], item.get(rows.COUNT_COLUMN)
        is_unreadable = isinstance(text, ValueError)
        if strict and (is_unreadable or not (filters or isinstance(text, str))):
            row = rows.Row(number, text, None, item.get(rows.ID), None, *(item.get(name) for name in PACKED))
            raise rows.bad_document(file, row, rows.no_text(row, text_column))
        if type(count) is int and count >= 0:  # a bool is an int, too
            counts.append(min(count, rows.MOST_TOKENS))
        elif is_unreadable:
            counts.append(0)
        text_bytes.append(len(text.encode()) if isinstance(text, str) else 0)
        starts.append(start)
        kept.append(is_unreadable or keeps_row(filters, item, file.shown_place, number))
        names.update(item.keys() - {text_column} if is_unreadable else item)
    if names:
        all_names = list(dict.fromkeys([*sorted(names), *nested_names(item)]))
        if text_column not in names:
            raise SourceInvalid(rows.no_column(file, text_column, all_names))
        check_columns(filters, all_names, file.shown_place)
    counted = len(counts) == len(starts)
    tokens = np.array(counts, np.int64) + rows.EOT_TOKENS if counted else rows.estimated_tokens(np.array(text_bytes))
    tokens = tokens * np.array(kept, bool)
    if file.holds_lines:
        return rows.RowTokens(tokens, None, counted, parquet.count_tokens(file, rows.LINE, [], strict=False).entries)
    return rows.RowTokens(tokens, np.array(starts, np.int64), counted, np.arange(len(starts)))


def read_rows(
    file: SourceFile, text_column: str, others: list[str], row_from: int, row_to: int, start_byte: int
) -> Iterator[dict[str, object]]:
    """Rows `row_from` to `row_to - 1`, fewer if the file ends, each with all of its columns. Raises SourceInvalid."""
    first = row_from if start_byte or file.holds_lines else 0
    items = _items(file, text_column, others, first, start_byte)
    return (item for _, item in islice(items, row_from - first, row_to - first))


def _items(
    file: SourceFile, text_column: str, others: Iterable[str], row_from: int, start_byte: int
) -> Iterator[tuple[int, dict[str, object]]]:
    """The first byte and the object of each row, from `row_from` of a converted file, or from `start_byte`."""
    nested = [name for name in others if "." in name]
    for start, line, packed in _converted(file, row_from) if file.holds_lines else _lines(file, start_byte):
        item = _parsed(line, text_column) | packed
        for name in nested:
            with suppress(KeyError):
                item[name] = value_at(item, name)
        if isinstance(text := item[text_column], str):  # a lone surrogate becomes U+FFFD, as in tiktoken
            item[text_column] = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for name in (rows.DUMP, rows.ID, rows.URL):
            if isinstance(value := item.get(name), str):
                item[name] = value.encode(errors="backslashreplace").decode()  # lone surrogates
        yield start, item


def _converted(file: SourceFile, row_from: int) -> Iterator[tuple[int, str | bytes, dict[str, object]]]:
    """The lines of a converted file, and what else its rows hold."""
    for row in parquet.read_rows(file, rows.LINE, PACKED, row_from, 1 << 62, 0):
        yield 0, row.pop(rows.LINE), row  # type: ignore[misc]  # text, or bytes that are not UTF-8


def _lines(file: SourceFile, start_byte: int) -> Iterator[tuple[int, bytes, dict[str, object]]]:
    """The first byte of each line from `start_byte` on, and the line."""
    try:
        with open_bytes(file, BUFFER_BYTES) as body:
            body.seek(start_byte)
            while line := body.readline(rows.DOCUMENT_BYTES):
                if len(line) == rows.DOCUMENT_BYTES and not line.endswith(b"\n"):
                    problem = f"{file.place}: the line that starts at byte {start_byte:,} is longer than"
                    remedy = "A file of JSON lines has one document in each line: split or delete it."
                    raise SourceInvalid(f"{problem} {rows.DOCUMENT_BYTES:,} bytes. {remedy}")
                if not line.isspace():
                    yield start_byte, line, {}
                start_byte += len(line)
    except OSError as error:
        raise SourceInvalid(f"{file.place}: cannot be read: {error.strerror}. Check its permissions.") from error


def _parsed(line: str | bytes, text_column: str) -> dict[str, object]:
    """The line's object. If it has no text, or the line is not an object, the text is a ValueError that says so."""
    columns: dict[str, object] = {}
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        shown = repr(line[:60])
    else:
        shown = type(item).__name__
        if isinstance(item, dict):
            with suppress(KeyError):
                return item | {text_column: value_at(item, text_column)}
            columns, shown = item, columns_like(text_column, list(item), rows.TEXT_COLUMNS)
    reason = f"should be a JSON object with column {text_column!r} (or set data.text_column), found {shown}"
    return columns | {text_column: ValueError(reason)}
