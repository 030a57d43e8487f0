"""The plan: which rows of a file become which shard, a pure function of file and settings. Tokenises only a sample."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np

from storage.datasets.manifest import Count
from storage.datasets.recipe import FORMAT, DatasetSettings, ShardRecipe
from storage.digests import canonical_json, digest
from storage.keys import DatasetKeys
from storage.sources import documents
from storage.sources.files import SourceFile
from storage.sources.filters import LENGTH, keeps_row, parse
from storage.sources.mirror import mirror
from storage.sources.rows import EOT_TOKENS, Row, RowTokens, estimated_tokens
from storage.stores.store import Store, put_once, read_as

PlanFile = Callable[[SourceFile, int], "FilePlan"]
Encode = Callable[[str], np.ndarray]
OF_EACH_SHARD = ("tokenizer", "text_column", "filters", "on_bad_document")  # settings that a shard's recipe repeats
CHECK_ROWS = 32  # whose published counts are checked
SAMPLE_ROWS = 256  # to estimate tokens from: of web text about 250,000 tokens, 0.1 s
SAMPLE_PLACES = 8
COUNT_TOLERANCE = 0.02  # by which published counts may differ from the sample's
ESTIMATED_SHARE = 0.95  # of a shard to fill with estimated tokens, so that few shards exceed their limit


class ValSplit(NamedTuple):
    """The val shards. `documents` names their documents, which train shards leave out; empty if train keeps them."""

    shard_ids: frozenset[str]
    documents: str


@dataclass(frozen=True)
class ShardJob:
    """One shard to build: its recipe and its source file. In JSON lines, the first row starts at `start_byte`."""

    shard_id: str
    recipe: ShardRecipe
    source: SourceFile
    start_byte: int = 0

    @property
    def name(self) -> str:
        """The shard's name for people: that of its file instead of the digest."""
        return f"{self.source.stem}-{self.shard_id.partition('-')[2]}"


@dataclass(frozen=True)
class Cut:
    """The part of a plan that the store holds."""

    row_ends: tuple[Count, ...]  # the row after the last row of each shard
    start_bytes: tuple[Count, ...] | None  # each shard's start in JSON lines
    tokens: Count
    limited: bool  # by `max_tokens`
    estimated: bool = False  # `tokens`, from a sample

    def is_valid(self) -> bool:
        starts = self.start_bytes or range(len(self.row_ends))  # each increases
        pairs = chain(pairwise(starts), pairwise((0, *self.row_ends)))
        return len(starts) == len(self.row_ends) and all(first < second for first, second in pairs)


@dataclass(frozen=True, kw_only=True)
class FilePlan(Cut):
    """The shards of one source file."""

    file: SourceFile
    settings: DatasetSettings

    def jobs(self, split: ValSplit | None = None) -> Iterator[ShardJob]:
        """The shards in order. Without a split, all as val shards, which leave out nothing."""
        how = {name: getattr(self.settings, name) for name in OF_EACH_SHARD}
        for index, (row_from, row_to) in enumerate(pairwise((0, *self.row_ends))):
            recipe = ShardRecipe(self.file.digest, row_from, row_to, read_as=self.file.read_as, **how)
            job = self._job(index, recipe)
            if split and job.shard_id not in split.shard_ids:
                job = self._job(index, replace(recipe, leave_out=split.documents))
            yield job

    def _job(self, index: int, recipe: ShardRecipe) -> ShardJob:
        shard_id = f"{recipe.source[:12]}-{index:05d}-{digest(recipe.to_json())[:12]}"
        return ShardJob(shard_id, recipe, self.file, self.start_bytes[index] if self.start_bytes else 0)


def plan_file(
    file: SourceFile, settings: DatasetSettings, encode: Encode, limit_tokens: int = 0, copy: SourceFile | None = None
) -> FilePlan:
    """Cut a file, or its first rows within a limit, into shards. Reads its `copy`, if given. Raises SourceInvalid."""
    copy = copy or file
    rows = documents.rows(copy, settings.text_column, settings.filters, strict=settings.on_bad_document == "fail")
    tokens, estimated = _calibrate(copy, settings, rows, encode)
    if limit_tokens:
        tokens = tokens[: int(np.searchsorted(np.cumsum(tokens), limit_tokens, side="right"))]
    row_ends = tuple(cut(tokens, int(settings.shard_tokens * ESTIMATED_SHARE) if estimated else settings.shard_tokens))
    start_bytes = None if rows.starts is None else tuple(int(rows.starts[row]) for row in (0, *row_ends)[:-1])
    limited = len(tokens) < len(rows.tokens)
    file = replace(file, members=())
    return FilePlan(row_ends, start_bytes, int(tokens.sum()), limited, estimated, file=file, settings=settings)


def _calibrate(file: SourceFile, settings: DatasetSettings, rows: RowTokens, encode: Encode) -> tuple[np.ndarray, bool]:
    """The tokens of each row, and whether most are estimates. Published counts stand if they agree with a sample."""
    for sample_rows in (CHECK_ROWS, SAMPLE_ROWS):
        counts, sampled, ratio = _compared(file, settings, rows, encode, sample_rows)
        if rows.counted and abs(ratio - 1) <= COUNT_TOLERANCE:
            return rows.tokens, False
    scaled = np.maximum(np.rint(rows.tokens * ratio), rows.tokens > 0).astype(np.int64)
    if rows.counted and np.abs(scaled - counts)[sampled].sum() > counts.sum() / 2:  # bad counts: use the mean
        return _calibrate(file, settings, rows._replace(tokens=np.minimum(rows.tokens, 1), counted=False), encode)
    return np.where(sampled, counts, scaled), not sampled.all()


def _compared(
    file: SourceFile, settings: DatasetSettings, rows: RowTokens, encode: Encode, sample_rows: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """The real tokens of the rows in a sample, which rows these are, and the ratio of real to expected tokens."""
    by_length = [condition for condition in map(parse, settings.filters) if condition.column == LENGTH]
    counts = np.zeros_like(rows.tokens)
    sampled = np.zeros(len(counts), bool)
    text_bytes: list[int] = []
    for row in _sample(file, settings.text_column, rows, sample_rows):
        sampled[row.number] = True
        if not rows.tokens[row.number]:
            continue
        counts[row.number] = EOT_TOKENS  # of a document that cannot be tokenised: its job fails or counts it
        if isinstance(row.text, str):
            text_bytes.append(len(row.text.encode()))
            with suppress(ValueError):
                kept = keeps_row(by_length, {LENGTH: len(row.text)}, file.place, row.number)
                counts[row.number] = len(encode(row.text)) + EOT_TOKENS if kept else 0
    expected, by_size = int(rows.tokens[sampled].sum()), int(estimated_tokens(np.array(text_bytes)).sum())
    if not rows.counted and expected / 2 < by_size < expected * 2:  # else repeated texts hide behind a dictionary
        expected = by_size  # more precise: the footer has only the mean size of a row group
    return counts, sampled, counts.sum() / max(expected, 1)


def _sample(file: SourceFile, text_column: str, rows: RowTokens, sample_rows: int) -> Iterator[Row]:
    """Up to `sample_rows` rows of a file, from up to SAMPLE_PLACES places that are spread over it."""
    entries = rows.entries[:: -(-len(rows.entries) // SAMPLE_PLACES) or 1]
    for entry, end in zip(entries, [*entries[1:], len(rows.tokens)], strict=False):
        stop = min(int(entry) + sample_rows // len(entries), int(end))
        start_byte = 0 if rows.starts is None else int(rows.starts[entry])
        yield from documents.documents(file, text_column, int(entry), stop, start_byte)


def cut(tokens: np.ndarray, shard_tokens: int) -> Iterator[int]:
    """The ends of greedy row ranges of at most `shard_tokens`; longer rows are alone. Filtered rows (0) join one."""
    ends = np.cumsum(tokens, dtype=np.int64)
    used = 0
    while used < (ends[-1] if len(ends) else 0):
        first = int(np.searchsorted(ends, used, side="right"))
        last = max(int(np.searchsorted(ends, used + shard_tokens, side="right")), first + 1)
        row = int(np.searchsorted(ends, ends[last - 1], side="right"))
        used = int(ends[row - 1])
        yield row


def plan_files(
    store: Store, dataset: str, files: Sequence[SourceFile], settings: DatasetSettings, make_plan: PlanFile
) -> Iterator[FilePlan]:
    """The plans of a dataset's files in order, until they hold `max_tokens`. `make_plan` makes those not yet stored."""
    remaining = settings.max_tokens
    for file in files:
        plan = read_plan(store, dataset, file, settings, remaining) or make_plan(file, remaining)
        yield plan
        if settings.max_tokens:
            remaining -= plan.tokens
            if plan.limited or not remaining:
                return


def planner(store: Store, settings: DatasetSettings, encode: Encode) -> PlanFile:
    """A function that plans a file here, from its copy in the store if there is one or rows need one."""
    return lambda file, limit_tokens: plan_file(file, settings, encode, limit_tokens, mirror(store, file, keep=False))


def read_plan(
    store: Store, dataset: str, file: SourceFile, settings: DatasetSettings, limit_tokens: int = 0
) -> FilePlan | None:
    """The file's plan if an earlier build stored it. Raises ObjectCorrupt."""
    stored = read_as(store, _key(dataset, file, settings, limit_tokens), Cut, Cut.is_valid)
    return FilePlan(**vars(stored), file=replace(file, members=()), settings=settings) if stored else None


def put_plan(store: Store, dataset: str, plan: FilePlan, limit_tokens: int = 0) -> None:
    """Store the plan for the next build."""
    key = _key(dataset, plan.file, plan.settings, limit_tokens)
    value = {field.name: getattr(plan, field.name) for field in fields(Cut)}
    put_once(store, key, canonical_json(value | {"file": plan.file.name}))  # the key names all that decides the plan


def _key(dataset: str, file: SourceFile, settings: DatasetSettings, limit_tokens: int) -> str:
    recipe = {"format": FORMAT, "source": file.digest, "shape": settings.to_json(), "limit_tokens": limit_tokens}
    recipe |= {"read_as": file.read_as} if file.read_as else {}
    return DatasetKeys(dataset).plan(digest(recipe))
