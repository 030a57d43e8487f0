"""Rows of a source file, whatever its format: what a plan counts, what a shard reads, and why a row is refused."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from storage.errors import SourceInvalid
from storage.sources.files import SourceFile
from storage.sources.filters import columns_like

COUNT_COLUMN = "token_count"  # the column with the gpt2 tokens of each document, where a dataset has one
DOCUMENT_BYTES = 1 << 28  # 256 MiB: a file without line feeds must not fill the memory
LINE = "json"  # the only column of a file of JSON that was converted to parquet
PACKED_FILE, PACKED_ROW = "packed_file", "packed_row"  # in a packed part: the small file, and the row in it
DUMP, ID, URL = "dump", "id", "url"  # columns with a document's crawl, its name, and where it was published
TEXT_COLUMNS = ("text", "content", "raw_content", "body", "article", "document")  # names that corpora use
BYTES_PER_TOKEN = 4  # English web text has about 4.4; with 4, estimated shards stay just below their limit
MOST_TOKENS = 1 << 31  # the largest token_count accepted; a larger value is bad data and would overflow sums
EOT_TOKENS = 1  # each document costs one more token than its text


class RowTokens(NamedTuple):
    """The tokens of each row of a file."""

    tokens: np.ndarray  # EOT included; 0 if a filter drops the row
    starts: np.ndarray | None  # in JSON lines: the byte where each row starts
    counted: bool  # by the source, else estimated
    entries: np.ndarray  # rows, ascending, at which reading can begin


class Row(NamedTuple):
    """A row that passed the filters, and the columns that name the document."""

    number: int  # in the file
    text: Any  # whatever the column holds, or a ValueError for an unreadable row; only a string can be tokenised
    dump: Any
    id: Any
    url: Any = None
    packed_file: Any = None  # of a row of a packed part: the small file
    packed_row: Any = None  # and its number there


def estimated_tokens(text_bytes: np.ndarray) -> np.ndarray:
    """Tokens of documents of these sizes, EOT included, rounded up."""
    tokens: np.ndarray = -(-text_bytes.clip(0, MOST_TOKENS) // BYTES_PER_TOKEN) + EOT_TOKENS
    return tokens


def bad_document(file: SourceFile, row: Row, reason: str) -> SourceInvalid:
    """The error for a document that cannot be tokenised."""
    is_packed = isinstance(row.packed_row, int)  # else a column of the source has this name
    place, number = (row.packed_file, row.packed_row) if is_packed else (file.shown_place, row.number)
    name = f"row {number:,}" + ("" if row.id is None else f" (id {row.id})")
    return SourceInvalid(
        f"{place}: {name}: {reason}. Repair or delete that row, or skip such rows: --set data.on_bad_document=skip"
    )


def no_column(file: SourceFile, text_column: str, names: Sequence[str], kind: object = "no such column") -> str:
    """The error for a file whose text is in another column."""
    found = f"{kind}; the file has {columns_like(text_column, names, TEXT_COLUMNS)}"
    problem = f"column {text_column!r} should hold strings, found {found}"
    return f"{file.shown_place}: {problem}. Set the column with the text: --set data.text_column=…"


def no_text(row: Row, text_column: str) -> str:
    """Why a row whose text is not a string cannot be tokenised."""
    if isinstance(row.text, ValueError):
        return str(row.text)
    kind = "bytes that are not UTF-8" if isinstance(row.text, bytes) else type(row.text).__name__
    value = "null" if row.text is None else f"{kind} {str(row.text)[:40]!r}"
    return f"column {text_column!r} should hold text, found {value}"
