"""JSON lines: where each row of a source file begins, and the object it holds. Blank lines are no rows."""

import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from storage.errors import SourceInvalid
from storage.sources.files import SourceFile
from storage.sources.reading import open_source

BUFFER_BYTES = 1 << 20  # over a network each filling of it is a request


def lines(
    file: SourceFile, text_column: str, row: int = 0, start_byte: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Start and object of each row from number `row` on, which begins at `start_byte`.

    Raises SourceInvalid, naming the row, for what is no object or lacks the text column.
    """
    place = file.place
    try:
        opened = open_source(file)
        with (
            opened.open("rb") if isinstance(opened, Path) else closing(io.BufferedReader(opened, BUFFER_BYTES)) as body
        ):
            body.seek(start_byte)
            for line in body:
                start, start_byte = start_byte, start_byte + len(line)
                if line.isspace():
                    continue
                try:
                    item = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SourceInvalid(
                        f"{place}: row {row:,} should be a JSON object, found {line[:60]!r}. Mend or drop that line."
                    ) from error
                if not isinstance(item, dict) or text_column not in item:
                    found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
                    raise SourceInvalid(
                        f"{place}: row {row:,}: column {text_column!r} was asked for, found {found or 'nothing'}. "
                        f"Name the right one: --set data.text_column=…"
                    )
                yield start, item
                row += 1
    except OSError as error:
        raise SourceInvalid(f"{place}: cannot be read: {error.strerror}. Check the path and its mode.") from error
