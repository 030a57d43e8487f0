"""JSON lines: one object per line. Blank lines are not rows. Without an index, a row is located by its first byte."""

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from storage.errors import SourceInvalid
from storage.sources import rows
from storage.sources.files import SourceFile
from storage.sources.filters import Filter, check_columns, keeps_row
from storage.sources.reading import open_source

BUFFER_BYTES = 1 << 20  # over a network each refill is a request


def count_tokens(file: SourceFile, text_column: str, filters: list[Filter], *, strict: bool) -> rows.RowTokens:
    """Tokens of every row, from `token_count` if every row has it, else from text sizes. Raises SourceInvalid."""
    counts, text_bytes, starts = list[int](), list[int](), list[int]()
    kept, names = list[bool](), set[str]()
    for number, (start, item) in enumerate(_lines(file, text_column, 0, 0)):
        text, count = item[text_column], item.get(rows.COUNT_COLUMN)
        if strict and not isinstance(text, str):
            row = rows.Row(number, text, None, item.get(rows.ID))
            raise rows.bad_document(file, row, rows.no_text(row, text_column))
        if type(count) is int and count >= 0:  # a bool is an int, too
            counts.append(min(count, rows.MOST_TOKENS))
        text_bytes.append(len(text.encode(errors="surrogatepass")) if isinstance(text, str) else 0)
        starts.append(start)
        kept.append(keeps_row(filters, item))
        names.update(item)
    if starts:
        check_columns(filters, sorted(names), file.place)
    counted = len(counts) == len(starts)
    tokens = np.array(counts, np.int64) + rows.EOT_TOKENS if counted else rows.estimated_tokens(np.array(text_bytes))
    tokens = tokens * np.array(kept, bool)
    return rows.RowTokens(tokens, np.array(starts, np.int64), counted, np.arange(len(starts)))


def read_rows(
    file: SourceFile,
    text_column: str,
    others: list[str],  # noqa: ARG001  # a line is read as a whole
    row_from: int,
    row_to: int,
    start_byte: int,
) -> Iterator[dict[str, object]]:
    """Rows `row_from` to `row_to - 1`, fewer if the file ends. Raises SourceInvalid."""
    first = row_from if start_byte else 0
    lines = _lines(file, text_column, first, start_byte)
    return (item for _, item in islice(lines, row_from - first, row_to - first))


def _lines(file: SourceFile, text_column: str, row: int, start_byte: int) -> Iterator[tuple[int, dict[str, object]]]:
    """The first byte and the object of each row, beginning with row number `row` at `start_byte`."""
    source = open_source(file)
    try:
        with source.open("rb") if isinstance(source, Path) else io.BufferedReader(source, BUFFER_BYTES) as body:
            body.seek(start_byte)
            for line in body:
                if not line.isspace():
                    yield start_byte, _parsed(line, file.place, row, text_column)
                    row += 1
                start_byte += len(line)
    except OSError as error:
        raise SourceInvalid(
            f"{file.place}: cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error


def _parsed(line: bytes, place: str, row: int, text_column: str) -> dict[str, object]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceInvalid(
            f"{place}: row {row:,} should be a JSON object, found {line[:60]!r}. Repair or delete that line."
        ) from error
    if isinstance(item, dict) and text_column in item:
        return item
    shown = type(item).__name__
    if isinstance(item, dict):
        shown = ", ".join(item) or "no columns"
    raise SourceInvalid(
        f"{place}: row {row:,} should be a JSON object with column {text_column!r}, found {shown}. "
        f"Repair that line, or set the column with the text: --set data.text_column=…"
    )
