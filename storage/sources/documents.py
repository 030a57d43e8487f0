"""The documents of a source file in any format: tokens of all rows for a plan, text of some rows for a shard."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from storage.errors import SourceInvalid
from storage.sources import jsonl, parquet
from storage.sources.files import SourceFile
from storage.sources.filters import LENGTH, Filter, keeps_row, parse
from storage.sources.rows import DUMP, ID, PACKED_FILE, PACKED_ROW, URL, Row, RowTokens


class Reader(Protocol):
    """A module that reads one format. An unreadable row counts; its text is a ValueError. Both raise SourceInvalid."""

    def count_tokens(self, file: SourceFile, text_column: str, filters: list[Filter], *, strict: bool) -> RowTokens:
        """Tokens of each row, as `rows` returns them. No filter is on the text's length."""

    def read_rows(
        self, file: SourceFile, text_column: str, others: list[str], row_from: int, row_to: int, start_byte: int, /
    ) -> Iterator[dict[str, object]]:
        """Rows `row_from` (at `start_byte`, if above 0) to `row_to - 1`, fewer if the file ends: the columns it has."""


READERS: dict[str, Reader] = {".parquet": parquet, ".jsonl": jsonl}  # the formats are `selection.READ_BY_ROWS`


def rows(file: SourceFile, text_column: str, filters: Sequence[str] = (), *, strict: bool = True) -> RowTokens:
    """Tokens of each row, to choose where shards end. Raises SourceInvalid, if `strict` also for bad or null text."""
    known = {LENGTH, *file.columns}  # `mirror.list_source` has left out the files whose folders do not pass
    by_column = [condition for condition in map(parse, filters) if condition.column not in known]
    return _reader(file).count_tokens(file, text_column, by_column, strict=strict)


def documents(
    file: SourceFile,
    text_column: str,
    row_from: int,
    row_to: int,
    start_byte: int = 0,  # of `row_from` in JSON lines, if known
    filters: Sequence[str] = (),
    names: tuple[str, ...] = (DUMP, ID),  # columns that the rows hold
) -> Iterator[Row]:
    """The rows `row_from` to `row_to - 1` that pass the filters. Raises SourceInvalid, also for missing rows."""
    conditions = [parse(text) for text in filters]
    others = [*names, PACKED_FILE, PACKED_ROW, *(condition.column for condition in conditions)]
    number = row_from - 1
    items = _reader(file).read_rows(file, text_column, others, row_from, row_to, start_byte)
    for number, item in enumerate(items, row_from):
        text = item[text_column]
        columns = item | file.columns | {LENGTH: len(text) if isinstance(text, str) else None}
        if isinstance(text, ValueError) or keeps_row(conditions, columns, file.shown_place, number):
            yield Row(number, text, *(columns.get(name) for name in (DUMP, ID, URL, PACKED_FILE, PACKED_ROW)))
    if number + 1 != row_to:
        problem = f"the plan has {row_to:,} rows, found {number + 1:,}"
        raise SourceInvalid(f"{file.shown_place}: {problem}. Run the command again.")


def _reader(file: SourceFile) -> Reader:
    if file.is_converted:
        return jsonl if file.holds_lines else parquet
    if not file.is_read_by_rows:
        raise SourceInvalid(f"{file.place}: not yet converted to parquet in the store. Run gpt2 dataset build.")
    return READERS[file.suffix.format]
