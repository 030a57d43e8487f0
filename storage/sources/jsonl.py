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

LINE_BYTES = 1 << 28  # 256 MiB: a file without line feeds must not fill the memory
BUFFER_BYTES = 1 << 20  # over a network each refill is a request


def count_tokens(file: SourceFile, text_column: str, filters: list[Filter], *, strict: bool) -> rows.RowTokens:
    """Tokens of every row, from `token_count` if every row has it, else from text sizes. Raises SourceInvalid."""
    counts, text_bytes, starts = list[int](), list[int](), list[int]()
    kept, names = list[bool](), set[str]()
    for number, (start, item) in enumerate(_lines(file, text_column, 0)):
        text, count = item[text_column], item.get(rows.COUNT_COLUMN)
        is_unreadable = isinstance(text, ValueError)
        if strict and (is_unreadable or not (filters or isinstance(text, str))):
            row = rows.Row(number, text, None, item.get(rows.ID))
            raise rows.bad_document(file, row, rows.no_text(row, text_column))
        if type(count) is int and count >= 0:  # a bool is an int, too
            counts.append(min(count, rows.MOST_TOKENS))
        elif is_unreadable:
            counts.append(0)
        text_bytes.append(len(text.encode()) if isinstance(text, str) else 0)
        starts.append(start)
        kept.append(is_unreadable or keeps_row(filters, item, file.place, number))
        names.update(item.keys() - {text_column} if is_unreadable else item)
    if names:
        if text_column not in names:
            problem = f"no row has column {text_column!r}, found {', '.join(sorted(names))}"
            raise SourceInvalid(f"{file.place}: {problem}. Set the column with the text: --set data.text_column=…")
        check_columns(filters, sorted(names), file.place)
    counted = len(counts) == len(starts)
    tokens = np.array(counts, np.int64) + rows.EOT_TOKENS if counted else rows.estimated_tokens(np.array(text_bytes))
    tokens = tokens * np.array(kept, bool)
    return rows.RowTokens(tokens, np.array(starts, np.int64), counted, np.arange(len(starts)))


def read_rows(
    file: SourceFile, text_column: str, _others: list[str], row_from: int, row_to: int, start_byte: int
) -> Iterator[dict[str, object]]:
    """Rows `row_from` to `row_to - 1`, fewer if the file ends, each with all of its columns. Raises SourceInvalid."""
    first = row_from if start_byte else 0
    lines = _lines(file, text_column, start_byte)
    return (item for _, item in islice(lines, row_from - first, row_to - first))


def _lines(file: SourceFile, text_column: str, start_byte: int) -> Iterator[tuple[int, dict[str, object]]]:
    """The first byte and the object of each row from `start_byte` on."""
    source = open_source(file)
    try:
        with source.open("rb") if isinstance(source, Path) else io.BufferedReader(source, BUFFER_BYTES) as body:
            body.seek(start_byte)
            while line := body.readline(LINE_BYTES):
                if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                    raise SourceInvalid(
                        f"{file.place}: the line that starts at byte {start_byte:,} is longer than {LINE_BYTES:,} "
                        f"bytes. A file of JSON lines has one document in each line: split or delete it."
                    )
                if not line.isspace():
                    item = _parsed(line, text_column)
                    if isinstance(text := item[text_column], str):  # a lone surrogate becomes U+FFFD, as in tiktoken
                        item[text_column] = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                    for name in (rows.DUMP, rows.ID, rows.URL):
                        if isinstance(value := item.get(name), str):
                            item[name] = value.encode(errors="backslashreplace").decode()  # lone surrogates
                    yield start_byte, item
                start_byte += len(line)
    except OSError as error:
        remedy = "Check the path and its permissions."
        raise SourceInvalid(f"{file.place}: cannot be read: {error.strerror}. {remedy}") from error


def _parsed(line: bytes, text_column: str) -> dict[str, object]:
    """The line's object. If it has no text, or the line is not an object, the text is a ValueError that says so."""
    columns: dict[str, object] = {}
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        shown = repr(line[:60])
    else:
        shown = type(item).__name__
        if isinstance(item, dict):
            if text_column in item:
                return item
            columns, shown = item, ", ".join(item) or "no columns"
    reason = f"should be a JSON object with column {text_column!r} (data.text_column), found {shown}"
    return columns | {text_column: ValueError(reason)}
