"""From tokens back to text: which row of which source file a document of a shard is. Knows no tokenizer."""

from collections.abc import Collection, Iterator
from itertools import islice

from storage import documents
from storage.documents import Row
from storage.filters import parse
from storage.shards import Record
from storage.sources import SourceFile


def source_rows(file: SourceFile, record: Record, wanted: Collection[int]) -> Iterator[tuple[int, Row]]:
    """The rows that some documents of a shard were made of, in order: `wanted` are their numbers in the shard.

    Raises SourceInvalid when the file is not what the shard was made of.
    """
    column = str(record.recipe.get("text_column", "text"))
    row_from, row_to = record.recipe["row_from"], record.recipe["row_to"]
    if not wanted:
        return
    if record.filtered or record.skipped_rows or file.place.endswith(".jsonl"):
        # JSON lines have no index: those before are read, too.
        first = 0 if file.place.endswith(".jsonl") else row_from
        asked = tuple(parse(text) for text in record.recipe.get("filters", []))
        left_out = set(record.skipped_rows)
        rows = documents.documents(file, column, first, row_to, filters=asked)
        made = (row for row in rows if row.number >= row_from and row.number not in left_out)
        for number, row in enumerate(islice(made, max(wanted) + 1)):
            if number in wanted:
                yield number, row
    else:
        for number in sorted(wanted):
            row = row_from + number
            yield from ((number, found) for found in documents.documents(file, column, row, row + 1))
