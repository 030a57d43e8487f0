"""A manifest: one immutable version of a dataset, named by its sha256. Settings, files, records, parent decide it."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from pydantic import Field, TypeAdapter
from pydantic_core import from_json

from storage.datasets.recipe import DatasetSettings, TokenizerIdentity
from storage.errors import ObjectCorrupt, ObjectMissing, StoreUnusable
from storage.keys import NAME, DatasetKeys
from storage.stores.store import ReadableStore, first_problem, read_as

SCHEMA = 1
LARGEST_SHARD_TOKENS = 1 << 31  # 4 GiB
COUNTS = ("tokens", "documents", "skipped", "text_bytes", "in_val")  # of a shard, added up per split
FILE_COLUMNS = ("name", "digest", "size_bytes")  # of source files
# These values become keys, file names and sizes, so whatever reads them from the store checks them.
ShardId = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Tokens = Annotated[int, Field(ge=0, le=LARGEST_SHARD_TOKENS)]
Count = Annotated[int, Field(ge=0, le=1 << 48)]


class ShardRow(NamedTuple):
    """One shard as a manifest lists it. A shard that is in no manifest yet counts as train."""

    shard_id: ShardId
    tokens: Annotated[Tokens, Field(gt=0)]
    documents: Count
    skipped: Count
    text_bytes: Count
    sha256: Digest
    split: Literal["train", "val"] = "train"
    in_val: Count = 0


@dataclass(frozen=True)
class Pointer:
    """The content of `latest`: the newest manifest if any, its parent, and how often `latest` was swapped."""

    manifest: Digest | None = None
    parent: Digest | None = None
    sequence: Count = 0


@dataclass(frozen=True)
class Manifest:
    """One version of a dataset. `origin` describes a Hub dataset, `empty` lists the shards without documents."""

    digest: str
    recipe: DatasetSettings
    tokenizer: TokenizerIdentity
    origin: dict[str, str]
    totals: dict[str, dict[str, int]]
    parent: Digest | None
    columns: dict[str, list[Any]]
    source_files: dict[str, list[Any]] = field(default_factory=dict)
    empty: tuple[ShardId, ...] = ()

    @property
    def shard_ids(self) -> list[str]:
        return self.columns["shard_id"]

    @property
    def files(self) -> dict[str, str]:
        return dict(zip(self.source_files["name"], self.source_files["digest"], strict=True))

    @property
    def tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.totals.values())

    @property
    def rows_by_id(self) -> dict[str, ShardRow]:
        return {row.shard_id: row for row in self.rows()}

    def rows(self, split: str | None = None) -> Iterator[ShardRow]:
        """The shards in order, of both splits or of one."""
        rows = map(ShardRow._make, zip(*(self.columns[name] for name in ShardRow._fields), strict=True))
        return (row for row in rows if split in (None, row.split))

    def to_json(self) -> dict[str, object]:
        value = {"schema": SCHEMA, "recipe": self.recipe.to_json(), "tokenizer": self.tokenizer, "parent": self.parent}
        value |= {"source": self.origin | {"files": self.source_files}, "totals": self.totals, "shards": self.columns}
        return value | ({"empty": self.empty} if self.empty else {})


_MANIFEST = TypeAdapter(Manifest)
_COLUMNS = {name: TypeAdapter(list[kind]) for name, kind in get_type_hints(ShardRow, include_extras=True).items()}  # type: ignore[valid-type]  # read at run time


def read_manifest(store: ReadableStore, dataset: str, digest: str) -> Manifest:
    """The manifest with that digest. Raises ObjectMissing, ObjectCorrupt, and StoreUnusable for a newer schema."""
    key = DatasetKeys(dataset).manifest(digest)
    place = f"object {key!r} of store {store.url!r}"
    remedy = "Delete it, then run gpt2 dataset build; if it is an older version, copy it back with gpt2 dataset copy."
    try:
        body, _, sha256 = store.read(key)
    except ObjectMissing as error:
        other = "Copy it back with gpt2 dataset copy, or build another dataset: --set data.dataset=…"
        raise ObjectMissing(f"{place} is missing: that version of dataset {dataset!r} is lost. {other}") from error
    if sha256 != digest:
        raise ObjectCorrupt(f"{place} is damaged: it has sha256 {sha256}. {remedy}")
    try:
        value = from_json(body)
        if value["schema"] > SCHEMA:  # before the columns, which may differ in a newer schema
            newer = f"schema {value['schema']}, but this version reads up to {SCHEMA}"
            raise StoreUnusable(f"{place} has {newer}. Update gpt2-pipeline.")
        shards = {"in_val": [0] * len(value["shards"]["shard_id"])} | value["shards"]  # absent from older versions
        columns = {name: kind.validate_python(shards[name], strict=True) for name, kind in _COLUMNS.items()}
        origin = dict(value["source"])
        files = origin.pop("files")
        if len({*map(len, columns.values())}) > 1 or len({len(files[name]) for name in FILE_COLUMNS}) > 1:
            raise ValueError("columns of different lengths")
        if any(value["totals"][split].keys() < {*COUNTS[:2], "shards"} for split in ("train", "val")):
            raise ValueError("incomplete totals")
        fields = {"digest": digest, "columns": columns, "origin": origin, "source_files": files}
        return _MANIFEST.validate_python(value | fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ObjectCorrupt(f"{place} is not a valid manifest ({first_problem(error)}). {remedy}") from error


def latest_manifest(store: ReadableStore, dataset: str) -> Manifest | None:
    """The dataset's newest version, or None if it was never sealed or its manifest was deleted."""
    digest = read_pointer(store, dataset).manifest
    with suppress(ObjectMissing):  # damaged and deleted, as its error advised: the next build seals it again
        return read_manifest(store, dataset, digest) if digest else None
    return None


def read_pointer(store: ReadableStore, dataset: str) -> Pointer:
    """What `latest` holds; an empty Pointer if the dataset was never sealed. Raises ObjectCorrupt."""
    key, remedy = DatasetKeys(dataset).latest, "Delete it, then run gpt2 dataset build."
    return read_as(store, key, Pointer, lambda pointer: pointer.manifest, remedy) or Pointer()


def ancestors(store: ReadableStore, dataset: str, version: Manifest | None) -> Iterator[Manifest]:
    """A version and all versions before it, newest first. Raises as `read_manifest`."""
    while version:
        yield version
        version = read_manifest(store, dataset, version.parent) if version.parent else None
