"""The plan: which rows of which source file become which shard. A pure function of the sources; tokenises nothing.

Each source file is cut greedily into consecutive ranges of whole documents of about `shard_tokens` tokens. Nothing
crosses the border of a file, so a changed or new file touches only its own shards.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage import keys, sources
from storage.canonical import digest
from storage.errors import SourceInvalid
from storage.sources import SourceFile

FORMAT = 1  # raised by hand when the same recipe would give other bytes


@dataclass(frozen=True)
class ShardJob:
    """One shard to be made: its recipe (all that decides its bytes) and where its rows are found on this host."""

    shard_id: str
    recipe: dict[str, Any]
    source: SourceFile
    start_byte: int

    @property
    def rows(self) -> tuple[int, int]:
        """First row, and the row after the last."""
        return self.recipe["row_from"], self.recipe["row_to"]

    @property
    def text_column(self) -> str:
        """The column that holds the documents."""
        return str(self.recipe.get("text_column", "text"))


def plan(files: list[SourceFile], *, shard_tokens: int, text_column: str, tokenizer_digest: str) -> Iterator[ShardJob]:
    """The shard jobs of a dataset in order. Raises SourceInvalid for unreadable files and for the same file twice."""
    stems = Counter((_stem(file), file.sha256) for file in files)
    for file in files:
        if stems[_stem(file), file.sha256] > 1:
            raise SourceInvalid(
                f"{file.path}: the same file (name and content) was found twice. Leave one out of data.source."
            )
        rows = sources.rows(Path(file.path), text_column)
        for index, (row_from, row_to) in enumerate(cut(rows.tokens, shard_tokens)):
            recipe: dict[str, Any] = {
                "format": FORMAT,
                "source": file.sha256,
                "row_from": row_from,
                "row_to": row_to,
                "tokenizer": tokenizer_digest,
                "eot": "before",
                "dtype": "<u2",
            }
            if text_column != "text":  # a default never enters a recipe: adding a setting renames no old work
                recipe["text_column"] = text_column
            shard_id = f"{_stem(file)}-{index:05d}-{digest(recipe)[:12]}"
            start_byte = 0 if rows.starts is None else int(rows.starts[row_from])
            yield ShardJob(shard_id, recipe, file, start_byte)


def cut(tokens: np.ndarray, shard_tokens: int) -> Iterator[tuple[int, int]]:
    """Greedy ranges of consecutive rows whose tokens add up to `shard_tokens` at most; a longer row stands alone."""
    ends = np.cumsum(tokens, dtype=np.int64)
    row, used = 0, 0
    while row < len(tokens):
        end = max(int(np.searchsorted(ends, used + shard_tokens, side="right")), row + 1)
        yield row, end
        row, used = end, int(ends[end - 1])


def _stem(file: SourceFile) -> str:
    """The file's name without its suffix, as it can stand in a key."""
    return keys.as_name(Path(file.name).stem)[:120] or "source"
