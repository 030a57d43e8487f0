"""JSON lines: one object a line. Blank lines are not rows. There is no index: a row is found by its first byte."""

import io
import json
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from storage.errors import SourceInvalid
from storage.sources.files import SourceFile
from storage.sources.filters import check_columns, keeps_row
from storage.sources.reading import open_source
from storage.sources.rows import (
    COUNT_COLUMN,
    EOT_TOKENS,
    ID,
    MOST_TOKENS,
    Columns,
    Row,
    RowTokens,
    bad_document,
    estimated_tokens,
    no_text,
)

BUFFER_BYTES = 1 << 20  # over a network each refill is a request


def count_tokens(file: SourceFile, columns: Columns, *, strict: bool) -> RowTokens:
    """Tokens of every row, of its `token_count` if all rows have one, else estimated from the size of its text.

    Raises SourceInvalid for a line that is not an object or lacks the text, and if `strict` for text that is not a
    string.
    """
    counted, estimated, starts = list[int](), list[int](), list[int]()
    kept, names = list[bool](), set[str]()
    for number, (start, item) in enumerate(_lines(file, columns.text, 0, 0)):
        text, count = item[columns.text], item.get(COUNT_COLUMN)
        if strict and not isinstance(text, str):
            row = Row(number, text, None, item.get(ID))
            raise bad_document(file, row, no_text(row, columns.text))
        if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            counted.append(min(count, MOST_TOKENS) + EOT_TOKENS)
        estimated.append(estimated_tokens(len(text.encode(errors="surrogatepass")) if isinstance(text, str) else 0))
        starts.append(start)
        kept.append(keeps_row(columns.filters, item))
        names.update(item)
    if starts:
        check_columns(columns.filters, sorted(names), file.place)
    tokens = counted if len(counted) == len(estimated) else estimated
    return RowTokens(np.array(tokens, np.int64) * np.array(kept, bool), np.array(starts, np.int64))


def read_rows(
    file: SourceFile, columns: Columns, row_from: int, row_to: int, start_byte: int
) -> Iterator[dict[str, Any]]:
    """Rows `row_from` to `row_to - 1`, fewer if the file ends, with all their columns. Raises SourceInvalid.

    `start_byte` is where `row_from` starts; with 0 the file is read from its first line.
    """
    first = row_from if start_byte else 0
    lines = _lines(file, columns.text, first, start_byte)
    return (item for _, item in islice(lines, row_from - first, row_to - first))


def _lines(file: SourceFile, text_column: str, row: int, start_byte: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """First byte and object of each row from number `row` on, which starts at `start_byte`. Raises SourceInvalid."""
    source = open_source(file)
    try:
        with _opened(source) as body:
            body.seek(start_byte)
            for line in body:
                if not line.isspace():
                    yield start_byte, _parsed(line, file.place, row, text_column)
                    row += 1
                start_byte += len(line)
    except OSError as error:
        raise SourceInvalid(f"{file.place}: cannot be read: {error.strerror}. Check the path and its mode.") from error


def _opened(source: Path | io.RawIOBase) -> BinaryIO | closing[io.BufferedReader]:
    return source.open("rb") if isinstance(source, Path) else closing(io.BufferedReader(source, BUFFER_BYTES))


def _parsed(line: bytes, place: str, row: int, text_column: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceInvalid(
            f"{place}: row {row:,} should be a JSON object, found {line[:60]!r}. Repair or delete that line."
        ) from error
    if not isinstance(item, dict):
        raise SourceInvalid(
            f"{place}: row {row:,} should be a JSON object with column {text_column!r}, found {type(item).__name__}. "
            f"Repair or delete that line."
        )
    if text_column not in item:
        raise SourceInvalid(
            f"{place}: row {row:,}: no column {text_column!r}, found {', '.join(item) or 'no columns'}. "
            f"Set the column with the text: --set data.text_column=…"
        )
    return item
