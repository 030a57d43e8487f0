"""A manifest: one immutable version of a dataset, named by the sha256 of its bytes. Opens no shard.

It is a pure function of the records (and, in a refresh, of the manifest before it), so any number of workers, in any
order, with any retries, seal the same one. `latest` names the newest and is swapped.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from storage import keys
from storage.datasets import shards
from storage.datasets.shards import ShardSummary
from storage.digests import canonical_json, sha256
from storage.errors import (
    AlreadyExists,
    Conflict,
    DatasetMismatch,
    ObjectCorrupt,
    ObjectMissing,
    ShardCorrupt,
    StoreUnusable,
)
from storage.keys import DatasetKeys
from storage.stores.store import Store, read_json

SCHEMA = 1
COLUMNS = ("shard_id", *ShardSummary._fields, "split")
MOST_TOKENS = 1 << 31  # of one shard: 4 GiB
SHA256 = re.compile(r"[0-9a-f]{64}")


class ShardRow(NamedTuple):
    """One shard as the manifest lists it."""

    shard_id: str
    tokens: int
    documents: int
    skipped: int
    text_bytes: int
    sha256: str
    split: str

    @property
    def made(self) -> ShardSummary:
        """The row without name and split."""
        return ShardSummary(*self[1:-1])


@dataclass(frozen=True)
class Manifest:
    """A dataset's version: its digest, what made it, where its text came from, and its shards in order as columns.

    `source` holds the source files as columns (name, digest, size_bytes) and what the Hub says of their dataset;
    `empty` are shards of which every document was left out: their records count for the card.
    """

    digest: str
    recipe: dict[str, Any]
    tokenizer: dict[str, Any]
    source: dict[str, Any]
    totals: dict[str, Any]
    parent: str | None
    columns: dict[str, list[Any]]
    empty: tuple[str, ...] = ()

    @property
    def shard_ids(self) -> list[str]:
        """The shards in order."""
        return self.columns["shard_id"]

    @property
    def files(self) -> dict[str, str]:
        """Digests of the source files by name."""
        return dict(zip(self.source["files"]["name"], self.source["files"]["digest"], strict=True))

    @property
    def made(self) -> dict[str, ShardSummary]:
        """What it says of each shard, by shard_id."""
        return {row.shard_id: row.made for row in self.rows()}

    def rows(self, split: str | None = None) -> Iterator[ShardRow]:
        """The shards in order, all of them or one split's."""
        for values in zip(*(self.columns[name] for name in COLUMNS), strict=True):
            row = ShardRow(*values)
            if split in (None, row.split):
                yield row


def read_manifest(store: Store, dataset: str, digest: str) -> Manifest:
    """The manifest of that digest. Raises ObjectMissing, and ObjectCorrupt when its bytes are not its name's."""
    body, _, found = store.read(DatasetKeys(dataset).manifest(digest))
    if found != digest:
        raise ObjectCorrupt(
            f"manifest {digest} of dataset {dataset!r}: its bytes have sha256 {found}. "
            f"Delete it and run gpt2 dataset build, which seals the newest version again; an older one comes back only "
            f"from another store: gpt2 dataset copy"
        )
    try:
        value = json.loads(body)
        if value["schema"] > SCHEMA:  # asked first: its columns may be others
            raise StoreUnusable(
                f"manifest {digest} of dataset {dataset!r} has schema {value['schema']}, this version reads up to "
                f"{SCHEMA}. Update gpt2-pipeline."
            )
        wrong = _wrong(value["shards"])
        fields = {name: value[name] for name in ("recipe", "tokenizer", "source", "totals", "parent")}
    except (ValueError, KeyError, TypeError) as error:
        wrong = [error]
    if wrong:
        raise ObjectCorrupt(
            f"manifest {digest} of dataset {dataset!r}: columns of shard names, digests and sizes were expected, found "
            f"{str(wrong[0])[:80]!r}. Do not use it: gpt2 dataset build seals another."
        )
    return Manifest(digest=digest, columns=value["shards"], empty=tuple(value.get("empty", ())), **fields)


def _wrong(columns: dict[str, list[Any]]) -> list[Any]:
    """The values that cannot be what they stand for: they become keys, file names and sizes."""
    names, tokens = columns["shard_id"], columns["tokens"]
    wrong: list[Any] = [name for name in COLUMNS if len(columns[name]) != len(names)]
    wrong += [name for name in names if not keys.NAME.fullmatch(name)]
    wrong += [found for found in columns["sha256"] if not SHA256.fullmatch(found)]
    wrong += [count for count in tokens if not (isinstance(count, int) and 0 < count <= MOST_TOKENS)]
    return wrong + [split for split in columns["split"] if split not in ("train", "val")]


def latest_manifest(store: Store, dataset: str) -> Manifest | None:
    """The dataset's newest version, or None when it was never sealed."""
    pointer = read_json(store, DatasetKeys(dataset).latest)
    if pointer is None:
        return None
    if "manifest" not in pointer:
        raise ObjectCorrupt(
            f"object {DatasetKeys(dataset).latest!r} of store {store.url!r} names no manifest. Delete it, run again."
        )
    try:
        return read_manifest(store, dataset, str(pointer["manifest"]))
    except ObjectMissing:  # damaged and deleted, as its error said: it is sealed anew from the records
        return None


def check_binding(store: Store, dataset: str, binding: dict[str, Any]) -> None:
    """Raise DatasetMismatch when the dataset's name was bound to other settings at its first seal."""
    split = read_json(store, DatasetKeys(dataset).split)
    bound = None if split is None else split["bound"]
    if bound is None or bound == binding:
        return
    assert isinstance(bound, dict)
    names = sorted(name for name in bound.keys() | binding.keys() if bound.get(name) != binding.get(name))
    shown = [{name: repr(values[name]) for name in values} for values in (bound, binding)]
    was, asked = ({name: values.get(name, "its default") for name in names} for values in shown)
    differences = "; ".join(f"{name} is {was[name]}, asked for {asked[name]}" for name in names)
    raise DatasetMismatch(
        f"dataset {dataset!r} is bound to the settings it was first built with: {differences}. "
        f"Choose another name with --set data.dataset=…, or ask for the same settings."
    )


def check_rebuilt(store: Store, dataset: str, manifest: Manifest, rebuilt: set[str]) -> None:
    """Raise ShardCorrupt when a rebuilt shard's record says other bytes than the manifest that lists it."""
    for row in manifest.rows():
        if row.shard_id not in rebuilt:
            continue
        found = shards.read_record(store, dataset, row.shard_id).sha256
        if found != row.sha256:
            raise ShardCorrupt(
                f"shard {row.shard_id!r} of dataset {dataset!r}: manifest {manifest.digest[:12]} says sha256 "
                f"{row.sha256}, its record {found}. Rebuild it: gpt2 dataset verify --repair"
            )


def seal(
    store: Store,
    dataset: str,
    planned: list[str],
    *,
    recipe: dict[str, Any],
    tokenizer: dict[str, Any],
    source: dict[str, Any],
    binding: dict[str, Any],
    val_shards: int,
    left_out: Mapping[str, list[int]] | None = None,
) -> Manifest:
    """Write the manifest of the planned shards and point `latest` at it; nothing new gives no new version.

    The first seal pins the first `val_shards` shards as val; they stay in every later version, whatever becomes of
    their source. A shard of which every document was left out is done, and in no version. Raises ObjectMissing when a
    shard is not done, DatasetMismatch when the name is bound otherwise.
    """
    check_binding(store, dataset, binding)
    pointer: dict[str, Any] = read_json(store, DatasetKeys(dataset).latest) or {}
    parent = latest_manifest(store, dataset)
    val = _pinned_val(store, dataset)
    if val is None:
        val = planned[:val_shards]
    elif pinned_left_out(store, dataset) != (left_out or {}):  # a shard as this builder made it would be of train
        raise Conflict(
            f"dataset {dataset!r}: another builder sealed a val split that lacks other rows. Run the command again."
        )
    asked = set(planned)
    listed = [shard_id for shard_id in val if shard_id not in asked] + planned
    finished = shards.finished_shards(store, dataset, listed, parent.made if parent else {})
    if missing := [shard_id for shard_id in listed if shard_id not in finished]:
        raise ObjectMissing(
            f"dataset {dataset!r}: {len(listed):,} shards were asked for, {len(missing):,} are not done, "
            f"{missing[0]!r} first. "
            + (
                "Run gpt2 dataset build again: it makes just those."
                if missing[0] in asked
                else "It is of the pinned val split and the source no longer gives it: put its source file back."
            )
        )
    if (pinned := _pin_split(store, dataset, val, binding, left_out or {})) != val:
        raise Conflict(f"dataset {dataset!r}: another builder sealed other val shards {pinned}. Run the command again.")
    made = {shard_id: finished[shard_id] for shard_id in listed}
    columns = _columns(made, set(val))
    if parent is not None and (parent.columns, parent.recipe) == (columns, recipe):
        return parent
    facts: dict[str, Any] = {
        "recipe": recipe,
        "tokenizer": tokenizer,
        "source": source,
        "parent": pointer.get("parent") if parent is None else parent.digest,  # a lost one is sealed as it was
        "totals": _totals(made, set(val)),
    }
    empty = tuple(shard_id for shard_id, found in made.items() if not found.tokens)
    body = canonical_json(facts | {"schema": SCHEMA, "shards": columns} | ({"empty": empty} if empty else {}))
    digest = sha256(body)
    with suppress(AlreadyExists):  # named by its bytes: another builder sealed the same
        store.put_new(DatasetKeys(dataset).manifest(digest), body)
    sealed = Manifest(digest=digest, columns=columns, empty=empty, **facts)
    update_latest(store, dataset, sealed, pointer.get("manifest"))
    return sealed


def _pinned_val(store: Store, dataset: str) -> list[str] | None:
    pinned: dict[str, Any] | None = read_json(store, DatasetKeys(dataset).split)
    return None if pinned is None else [str(shard_id) for shard_id in pinned["val"]]


def pinned_left_out(store: Store, dataset: str) -> dict[str, list[int]] | None:
    """Rows that the val shards lack since they are in train, by the shard_id of a shard that held them; None when the
    split is not pinned yet.
    """
    pinned: dict[str, Any] | None = read_json(store, DatasetKeys(dataset).split)
    return None if pinned is None else dict(pinned.get("left_out", {}))


def _pin_split(
    store: Store, dataset: str, val: list[str], binding: dict[str, Any], left_out: Mapping[str, list[int]]
) -> list[str]:
    pinned: dict[str, Any] = {"val": val, "bound": binding}
    try:
        store.put_new(
            DatasetKeys(dataset).split, canonical_json(pinned | ({"left_out": dict(left_out)} if left_out else {}))
        )
    except AlreadyExists:
        check_binding(store, dataset, binding)
    found = _pinned_val(store, dataset)
    assert found is not None
    return found


def _columns(made: dict[str, ShardSummary], val: set[str]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for shard_id, found in made.items():
        if found.tokens:
            row = ShardRow(shard_id, *found, "val" if shard_id in val else "train")
            for name, value in zip(COLUMNS, row, strict=True):
                columns[name].append(value)
    return columns


def _totals(made: dict[str, ShardSummary], val: set[str]) -> dict[str, dict[str, int]]:
    totals = {}
    for split in ("train", "val"):
        found = [one for shard_id, one in made.items() if (shard_id in val) == (split == "val")]
        counts = {name: sum(getattr(one, name) for one in found) for name in ShardSummary._fields[:-1]}
        totals[split] = {"shards": sum(one.tokens > 0 for one in found)} | counts
    return totals


def _lineage(store: Store, dataset: str, digest: str | None) -> Iterator[str]:
    """A version and its ancestors, newest first."""
    while digest is not None:
        yield digest
        digest = read_manifest(store, dataset, digest).parent


def update_latest(store: Store, dataset: str, manifest: Manifest, pointed: str | None) -> None:
    """Swap `latest`, which names the digest `pointed`, to the manifest. There already is success: another builder's."""
    key, digest = DatasetKeys(dataset).latest, manifest.digest
    try:
        current = store.read(key)
        etag: str | None = current.etag
        pointer = json.loads(current.body)
    except ObjectMissing:
        etag, pointer = None, {"manifest": None, "sequence": 0}
    if pointer["manifest"] == digest:
        return
    if pointer["manifest"] == pointed:
        body = canonical_json(
            {
                "manifest": digest,
                "parent": manifest.parent,
                "sequence": pointer["sequence"] + 1,
                "commit_id": secrets.token_hex(8),
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        try:
            store.swap(key, body, etag)
            return
        except Conflict:
            pointer = read_json(store, key) or pointer
            if digest in _lineage(store, dataset, str(pointer["manifest"])):
                return  # ours, or a builder's that has sealed on top of ours since: the answer of our swap was lost
    raise Conflict(
        f"dataset {dataset!r}: another builder sealed {pointer['manifest']} while this one sealed {digest}. "
        f"Run the command again: it seals on top of that."
    )
