"""The plan: which rows of which source file become which shard. Tokenises nothing.

A shard never spans two files, so a new or changed file affects only its own shards. A file's plan is a pure function
of the file and the settings, and is kept in the store, so the next build does not read an unchanged file again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from pydantic import TypeAdapter

from storage.datasets.recipe import FORMAT, DatasetSettings, ShardRecipe
from storage.digests import canonical_json, digest
from storage.errors import AlreadyExists, ObjectCorrupt
from storage.keys import DatasetKeys
from storage.sources import documents
from storage.sources.files import SourceFile, check_distinct
from storage.sources.mirror import locate
from storage.stores.store import Store, read_json

PlanFile = Callable[[SourceFile, int], "FilePlan"]


@dataclass(frozen=True)
class ShardJob:
    """One shard to build: its recipe and its source file. In JSON lines, the first row starts at `start_byte`."""

    shard_id: str
    recipe: ShardRecipe
    source: SourceFile
    start_byte: int = 0


@dataclass(frozen=True)
class FilePlan:
    """The shards of one source file. `row_ends` holds the row after the last row of each shard.

    `start_bytes` is where each shard begins in a JSON lines file. `limited` is true if `max_tokens` cut the file short.
    """

    file: SourceFile
    settings: DatasetSettings
    row_ends: tuple[int, ...]
    start_bytes: tuple[int, ...] | None
    tokens: int
    limited: bool

    @cached_property
    def shard_ids(self) -> tuple[str, ...]:
        return tuple(job.shard_id for job in self.jobs())

    def jobs(self) -> Iterator[ShardJob]:
        row_from = 0
        for index, row_to in enumerate(self.row_ends):
            recipe = ShardRecipe(
                source=self.file.digest,
                row_from=row_from,
                row_to=row_to,
                tokenizer=self.settings.tokenizer,
                text_column=self.settings.text_column,
                filters=self.settings.filters,
                on_bad_document=self.settings.on_bad_document,
            )
            shard_id = f"{self.file.stem}-{index:05d}-{digest(recipe.to_json())[:12]}"
            yield ShardJob(shard_id, recipe, self.file, self.start_bytes[index] if self.start_bytes else 0)
            row_from = row_to


_PLAN = TypeAdapter(FilePlan)


def plan_file(file: SourceFile, settings: DatasetSettings, limit_tokens: int = 0) -> FilePlan:
    """Cut one file into shards; with a limit, only the first rows that fit into it. Raises SourceInvalid."""
    rows = documents.rows(file, settings.text_column, settings.filters, strict=settings.on_bad_document == "fail")
    tokens = rows.tokens
    if limit_tokens:
        tokens = tokens[: int(np.searchsorted(np.cumsum(tokens), limit_tokens, side="right"))]
    row_ends = tuple(cut(tokens, settings.shard_tokens))
    start_bytes = None
    if rows.starts is not None:
        start_bytes = tuple(int(rows.starts[row]) for row in (0, *row_ends[:-1])) if row_ends else ()
    return FilePlan(file, settings, row_ends, start_bytes, int(tokens.sum()), len(tokens) < len(rows.tokens))


def cut(tokens: np.ndarray, shard_tokens: int) -> Iterator[int]:
    """The ends of greedy row ranges of at most `shard_tokens` tokens; a longer row is a range by itself.

    Filtered rows have 0 tokens and join the range before them, or the first range, so no range has only filtered rows.
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
    settings: DatasetSettings,
    make_plan: PlanFile | None = None,
) -> Iterator[FilePlan]:
    """The plans of a dataset's files in order; with `max_tokens`, only until they hold that many tokens.

    Plans that an earlier build stored are read. `make_plan(file, limit_tokens)` makes the others.
    """

    def plan_here(file: SourceFile, limit_tokens: int) -> FilePlan:
        return replace(plan_file(locate(store, file), settings, limit_tokens), file=file)

    make_plan = make_plan or plan_here
    check_distinct(files)
    remaining = settings.max_tokens
    for file in files:
        plan = read_plan(store, dataset, file, settings, remaining) or make_plan(file, remaining)
        yield plan
        if settings.max_tokens:
            remaining -= plan.tokens
            if plan.limited or not remaining:
                return


def read_plan(
    store: Store, dataset: str, file: SourceFile, settings: DatasetSettings, limit_tokens: int = 0
) -> FilePlan | None:
    """The file's plan if an earlier build stored it. Raises ObjectCorrupt."""
    key = _key(dataset, file, settings, limit_tokens)
    value = read_json(store, key)
    if value is None:
        return None
    try:
        return _PLAN.validate_python(value | {"file": file, "settings": settings})
    except ValueError as error:
        raise ObjectCorrupt(
            f"object {key!r} of store {store.url!r} is not a plan of {file.name!r}. Delete it, then repeat the command."
        ) from error


def put_plan(store: Store, dataset: str, plan: FilePlan, limit_tokens: int = 0) -> None:
    """Store the plan for the next build."""
    key = _key(dataset, plan.file, plan.settings, limit_tokens)
    value = {name: getattr(plan, name) for name in ("row_ends", "start_bytes", "tokens", "limited")}
    with suppress(AlreadyExists):  # the key is a digest of everything that decides the plan
        store.put_new(key, canonical_json(value | {"file": plan.file.name}))


def _key(dataset: str, file: SourceFile, settings: DatasetSettings, limit_tokens: int) -> str:
    recipe = {"format": FORMAT, "source": file.digest, "shape": settings.to_json(), "limit_tokens": limit_tokens}
    return DatasetKeys(dataset).plan(digest(recipe))
