"""Rows of a source file, whatever its format: what a plan counts, what a shard reads, and why a row is refused."""

from typing import Any, NamedTuple

import numpy as np

from storage.errors import SourceInvalid
from storage.sources.files import SourceFile

COUNT_COLUMN = "token_count"  # the column with the gpt2 tokens of each document, where a dataset has one
DUMP, ID, URL = "dump", "id", "url"  # columns with a document's crawl, its name, and where it was published
BYTES_PER_TOKEN = 4  # English web text has about 4.4; with 4, estimated shards stay just below their limit
MOST_TOKENS = 1 << 31  # the largest token_count accepted; a larger value is bad data and would overflow sums
EOT_TOKENS = 1  # each document costs one more token than its text


class RowTokens(NamedTuple):
    """Tokens of each row, EOT included, 0 if a filter drops it, and for JSON lines the byte where each row starts.

    The tokens are `counted` by the source or estimated. Reading can begin at each of the ascending `entries`.
    """

    tokens: np.ndarray
    starts: np.ndarray | None
    counted: bool
    entries: np.ndarray


class Row(NamedTuple):
    """A row that passed the filters: its number in the file, its text, and the columns that name the document.

    `text` is whatever the column holds, or a ValueError for an unreadable row. Only a string can be tokenised.
    """

    number: int
    text: Any
    dump: Any
    id: Any
    url: Any = None


def estimated_tokens(text_bytes: np.ndarray) -> np.ndarray:
    """Tokens of documents of these sizes, EOT included, rounded up."""
    tokens: np.ndarray = -(-text_bytes.clip(0, MOST_TOKENS) // BYTES_PER_TOKEN) + EOT_TOKENS
    return tokens


def bad_document(file: SourceFile, row: Row, reason: str) -> SourceInvalid:
    """The error for a document that cannot be tokenised."""
    name = f"row {row.number:,}" + ("" if row.id is None else f" (id {row.id})")
    return SourceInvalid(
        f"{file.place}: {name}: {reason}. Repair or delete that row, or skip such rows: --set data.on_bad_document=skip"
    )


def no_text(row: Row, text_column: str) -> str:
    """Why a row whose text is not a string cannot be tokenised."""
    if isinstance(row.text, ValueError):
        return str(row.text)
    kind = "bytes that are not UTF-8" if isinstance(row.text, bytes) else type(row.text).__name__
    value = "null" if row.text is None else f"{kind} {str(row.text)[:40]!r}"
    return f"column {text_column!r} should hold text, found {value}"
