"""The plan: which rows of which source file become which shard. A pure function of the source; tokenises nothing.

Each source file is cut greedily into consecutive ranges of whole documents of about `shard_tokens` tokens. Nothing
crosses the border of a file, so a changed or new file touches only its own shards. A file's plan is kept in the store:
the next build of the same dataset reads nothing of a file that has not changed.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from storage.digests import canonical_json, digest
from storage.errors import AlreadyExists, ObjectCorrupt, ObjectMissing
from storage.keys import DatasetKeys
from storage.sources import documents, filters
from storage.sources.files import SourceFile, check_distinct
from storage.sources.filters import Filter
from storage.sources.mirror import locate
from storage.stores.store import Store

FORMAT = 1  # raised by hand when the same recipe would give other bytes


@dataclass(frozen=True)
class DatasetSettings:
    """What a dataset asks of its source files; with their content it decides every byte."""

    shard_tokens: int
    tokenizer: str
    text_column: str = "text"
    filters: tuple[str, ...] = ()
    on_bad_document: str = "fail"
    max_tokens: int = 0
    drop_val_leaks: bool = False

    def recipe(self) -> dict[str, Any]:
        """The settings that have no default or differ from it: adding a setting renames no old work."""
        asked = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}  # as JSON


@dataclass(frozen=True)
class ShardJob:
    """One shard to be made: its recipe (all that decides its bytes) and where its rows are found."""

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

    @property
    def filters(self) -> tuple[Filter, ...]:
        """Which of the rows count."""
        return tuple(filters.parse(text) for text in self.recipe.get("filters", []))

    @property
    def left_out(self) -> frozenset[int]:
        """Rows that no shard may hold: documents of val that occur in train."""
        return frozenset(self.recipe.get("left_out", ()))

    @property
    def skips_bad_documents(self) -> bool:
        """Whether what cannot be tokenised is left out and counted, instead of an error."""
        return self.recipe.get("on_bad_document") == "skip"


@dataclass(frozen=True)
class FilePlan:
    """The shards of one source file: the row after the last of each, and for JSON lines where each begins.

    `limited` says that a limit left rows of the file out; `left_out` names rows that a shard must not hold, by the
    shard_id that it would have with them.
    """

    file: SourceFile
    shape: DatasetSettings
    row_ends: tuple[int, ...]
    start_bytes: tuple[int, ...] | None
    tokens: int
    limited: bool
    left_out: Mapping[str, list[int]] = field(default_factory=dict)

    @cached_property
    def shard_ids(self) -> tuple[str, ...]:
        """The shards in order."""
        return tuple(job.shard_id for job in self.jobs())

    def jobs(self) -> Iterator[ShardJob]:
        """The shard jobs in order."""
        asked = self.shape.recipe()
        shared: dict[str, Any] = {
            name: asked[name] for name in ("text_column", "filters", "on_bad_document") if name in asked
        }
        row_from = 0
        for index, row_to in enumerate(self.row_ends):
            recipe: dict[str, Any] = {
                "format": FORMAT,
                "source": self.file.digest,
                "row_from": row_from,
                "row_to": row_to,
                "tokenizer": self.shape.tokenizer,
                "eot": "before",
                "dtype": "<u2",
            }
            recipe |= shared
            name = f"{self.file.stem}-{index:05d}"
            shard_id = f"{name}-{digest(recipe)[:12]}"
            if shard_id in self.left_out:
                recipe["left_out"] = self.left_out[shard_id]
                shard_id = f"{name}-{digest(recipe)[:12]}"
            yield ShardJob(shard_id, recipe, self.file, self.start_bytes[index] if self.start_bytes else 0)
            row_from = row_to


def plan_file(file: SourceFile, shape: DatasetSettings, limit_tokens: int = 0) -> FilePlan:
    """Cut one file, or, with a limit, its first rows of so many tokens. Raises SourceInvalid."""
    asked = tuple(filters.parse(text) for text in shape.filters)
    found = documents.rows(file, shape.text_column, asked, strict=shape.on_bad_document == "fail")
    tokens = found.tokens
    if limit_tokens:
        tokens = tokens[: int(np.searchsorted(np.cumsum(tokens), limit_tokens, side="right"))]
    row_ends = tuple(cut(tokens, shape.shard_tokens))
    starts = None
    if found.starts is not None:
        starts = tuple(int(found.starts[row]) for row in (0, *row_ends[:-1])) if row_ends else ()
    return FilePlan(file, shape, row_ends, starts, int(tokens.sum()), len(tokens) < len(found.tokens))


def cut(tokens: np.ndarray, shard_tokens: int) -> Iterator[int]:
    """Ends of greedy ranges of rows whose tokens add up to `shard_tokens` at most; a longer row stands alone.

    Rows of 0 tokens, which a filter leaves out, belong to a range beside them: none is made of such rows only.
    """
    ends = np.cumsum(tokens, dtype=np.int64)
    used = 0
    while used < (ends[-1] if len(ends) else 0):
        first = int(np.searchsorted(ends, used, side="right"))
        last = max(int(np.searchsorted(ends, used + shard_tokens, side="right")), first + 1)
        row = int(np.searchsorted(ends, ends[last - 1], side="right"))
        used = int(ends[row - 1])
        yield row


def plan_files(
    store: Store,
    dataset: str,
    files: Sequence[SourceFile],
    shape: DatasetSettings,
    make: Callable[[SourceFile, int], FilePlan] | None = None,
    left_out: Mapping[str, list[int]] | None = None,
) -> Iterator[FilePlan]:
    """The plans of a dataset's files in order, those of an earlier build read; with `max_tokens` only of the first.

    `make` plans a file that has no plan yet, or its first tokens; `left_out` is what no shard may hold.
    """
    check_distinct(files)
    left = shape.max_tokens
    for file in files:
        planned = read_plan(store, dataset, file, shape, left)
        if planned is None:
            planned = make(file, left) if make else replace(plan_file(locate(store, file), shape, left), file=file)
        yield replace(planned, left_out=left_out or {})
        if shape.max_tokens:
            left -= planned.tokens
            if planned.limited or not left:
                return


def read_plan(
    store: Store, dataset: str, file: SourceFile, shape: DatasetSettings, limit_tokens: int = 0
) -> FilePlan | None:
    """The plan that an earlier build kept of this file, or None."""
    key = _key(dataset, file, shape, limit_tokens)
    try:
        body = store.read(key).body
    except ObjectMissing:
        return None
    try:
        found = json.loads(body)
        starts = found["start_bytes"]
        starts = None if starts is None else tuple(starts)
        return FilePlan(file, shape, tuple(found["row_ends"]), starts, int(found["tokens"]), bool(found["limited"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ObjectCorrupt(
            f"object {key!r} of store {store.url!r} should be a plan, found {body[:40]!r}. Delete it and run again."
        ) from error


def put_plan(store: Store, dataset: str, planned: FilePlan, limit_tokens: int = 0) -> None:
    """Put the plan where `read_plan` finds it."""
    names = ("row_ends", "start_bytes", "tokens", "limited")
    found = {name: getattr(planned, name) for name in names}
    with suppress(AlreadyExists):  # a pure function of what its key names
        store.put_new(
            _key(dataset, planned.file, planned.shape, limit_tokens),
            canonical_json(found | {"file": planned.file.name}),
        )


def _key(dataset: str, file: SourceFile, shape: DatasetSettings, limit_tokens: int) -> str:
    recipe = {"format": FORMAT, "source": file.digest, "shape": shape.recipe(), "limit_tokens": limit_tokens}
    return DatasetKeys(dataset).plan(digest(recipe))
