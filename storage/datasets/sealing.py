"""Sealing: checks every record, writes the immutable manifest, and swaps the `latest` pointer to it.

The first seal fixes the val shards and the settings of the dataset's name, create-only, for every later version.
"""

import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from storage.datasets.manifest import (
    COUNTS,
    FILE_COLUMNS,
    Manifest,
    ShardId,
    ShardRow,
    ancestors,
    latest_manifest,
    read_pointer,
)
from storage.datasets.recipe import DatasetSpec
from storage.datasets.records import corrupt, finished_shards, read_record
from storage.digests import canonical_json, sha256
from storage.errors import AlreadyExists, Conflict, DatasetMismatch, ObjectMissing, SourceInvalid
from storage.keys import DatasetKeys
from storage.sources.files import Listing
from storage.stores.store import Store, read_as


@dataclass(frozen=True)
class Split:
    """The content of `split.json`: the val shards, and the settings that the dataset's name is bound to."""

    val: list[ShardId]
    bound: dict[str, Any]


def seal(store: Store, spec: DatasetSpec, planned: list[str], listing: Listing) -> Manifest:
    """Write the manifest of these shards and settings, and point `latest` at it. If neither changed, return the parent.

    The first seal pins the first `val_shards` shards as val; they stay in every later version, whatever happens to
    their source. A shard without documents is listed only in `empty`. Raises ObjectMissing if a shard is not done, and
    DatasetMismatch if the name is bound to other settings. Raises SourceInvalid if a split would have no documents,
    Conflict if another builder sealed another version first.
    """
    pinned = check_binding(store, spec)
    pointer = read_pointer(store, spec.name)
    parent = latest_manifest(store, spec.name)
    val = planned[: spec.val_shards] if pinned is None else pinned
    rows = _finished_rows(store, spec.name, planned, val, parent)
    totals = {split: _totals([row for row in rows if row.split == split]) for split in ("train", "val")}
    for split, counts in totals.items():
        if not counts["documents"]:
            raise _empty(store, spec, split, [row.shard_id for row in rows if row.split == split])
    if pinned is None:
        _pin_val(store, spec, val)
    columns = {name: [getattr(row, name) for row in rows if row.tokens] for name in ShardRow._fields}
    if parent is not None and (parent.columns, parent.recipe) == (columns, spec.settings):
        return parent
    manifest = Manifest(
        digest="",
        recipe=spec.settings,
        tokenizer=spec.tokenizer,
        origin=listing.origin,
        totals=totals,
        parent=parent.digest if parent else pointer.parent if pointer else None,  # a lost version gets its old one
        columns=columns,
        source_files={name: [getattr(file, name) for file in listing.files] for name in FILE_COLUMNS},
        empty=tuple(row.shard_id for row in rows if not row.tokens),
    )
    body = canonical_json(manifest.to_json())
    manifest = replace(manifest, digest=sha256(body))
    with suppress(AlreadyExists):  # named by its bytes: another builder sealed the same manifest
        store.put_new(DatasetKeys(spec.name).manifest(manifest.digest), body)
    update_latest(store, spec.name, manifest, pointer.manifest if pointer else None)
    return manifest


def update_latest(store: Store, dataset: str, manifest: Manifest, expected: object) -> None:
    """Swap `latest` from digest `expected` to the manifest, unless `latest` already descends from the manifest.

    Raises Conflict if another builder moved `latest` elsewhere.
    """
    key, digest = DatasetKeys(dataset).latest, manifest.digest
    etag: str | None = None
    with suppress(ObjectMissing):
        etag = store.read(key).etag
    pointer = read_pointer(store, dataset)
    latest = pointer.manifest if pointer else None
    if latest == digest:
        return
    if latest == expected:
        body = {
            "manifest": digest,
            "parent": manifest.parent,
            "sequence": (pointer.sequence if pointer else 0) + 1,
            "commit_id": secrets.token_hex(8),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            store.swap(key, canonical_json(body), etag)
            return
        except Conflict:
            pointer = read_pointer(store, dataset)
            latest = pointer.manifest if pointer else None
    # Another builder sealed the same manifest, or the reply to our swap was lost; others may have sealed after it.
    if not any(version.digest == digest for version in ancestors(store, dataset, latest)):
        raise Conflict(
            f"dataset {dataset!r}: another process sealed manifest {latest} while this process wrote "
            f"manifest {digest}. Run the command again."
        )


def check_rebuilt(store: Store, dataset: str, manifest: Manifest, rebuilt: Collection[str]) -> None:
    """Raise ShardCorrupt if a rebuilt shard's record differs from the manifest that lists it."""
    for row in manifest.rows():
        if row.shard_id not in rebuilt:
            continue
        record = read_record(store, dataset, row.shard_id)
        if record.sha256 != row.sha256:
            wrong = f"manifest {manifest.digest[:12]} lists sha256 {row.sha256}, the rebuilt shard has {record.sha256}."
            cause = "Other package versions can cause this: install those that its sealed version was built with."
            raise corrupt(dataset, row.shard_id, f"{wrong} {cause}")


def check_binding(store: Store, spec: DatasetSpec) -> list[str] | None:
    """Return the val shards that the first seal pinned, or None before the first seal.

    Raises DatasetMismatch if the dataset's name is bound to other settings.
    """
    remedy = "Restore it from a copy of the store, or build another dataset: --set data.dataset=…"
    split = read_as(store, DatasetKeys(spec.name).split, Split, lambda split: split.val, remedy)
    if split is None:
        return None
    bound, binding = split.bound, spec.binding
    names = sorted(name for name in bound.keys() | binding.keys() if bound.get(name) != binding.get(name))

    def shown(settings: dict[str, object], name: str) -> str:
        return repr(settings[name]) if name in settings else "its default"

    if names:
        differences = "; ".join(f"{name} is {shown(bound, name)}, requested {shown(binding, name)}" for name in names)
        raise DatasetMismatch(
            f"dataset {spec.name!r} is bound to the settings of its first build: {differences}. "
            f"Choose another name with --set data.dataset=…, or use the same settings."
        )
    return split.val


def _pin_val(store: Store, spec: DatasetSpec, val: list[str]) -> None:
    try:
        store.put_new(DatasetKeys(spec.name).split, canonical_json({"val": val, "bound": spec.binding}))
    except AlreadyExists as error:
        pinned = check_binding(store, spec)
        if pinned != val:
            raise Conflict(
                f"dataset {spec.name!r}: another process sealed other val shards {pinned}. Run the command again."
            ) from error


def _finished_rows(
    store: Store, dataset: str, planned: list[str], val: list[str], parent: Manifest | None
) -> list[ShardRow]:
    in_plan, in_val = set(planned), set(val)
    listed = [shard_id for shard_id in val if shard_id not in in_plan] + planned
    finished = finished_shards(store, dataset, listed, parent.rows_by_id if parent else {})
    missing = [shard_id for shard_id in listed if shard_id not in finished]
    if missing:
        remedy = "Run the same command again: it builds only the missing shards."
        if missing[0] not in in_plan:
            remedy = "That shard is in the pinned val split, but its source file is gone or changed: restore that file."
        raise ObjectMissing(
            f"dataset {dataset!r}: {len(missing):,} of {len(listed):,} shards are not done; the first is "
            f"{missing[0]!r}. {remedy}"
        )
    return [finished[shard_id]._replace(split="val" if shard_id in in_val else "train") for shard_id in listed]


def _empty(store: Store, spec: DatasetSpec, split: str, shard_ids: list[str]) -> SourceInvalid:
    records = [read_record(store, spec.name, shard_id) for shard_id in shard_ids]
    rows = sum(record.recipe.row_to - record.recipe.row_from for record in records)
    filtered, skipped, in_val = (
        sum(getattr(record, name) for record in records) for name in ("filtered", "skipped", "in_val")
    )
    return SourceInvalid(
        f"dataset {spec.name!r}: split {split} would have no documents. Of its {rows:,} rows, data.filters = "
        f"{list(spec.settings.filters)} dropped {filtered:,}, {skipped:,} could not be tokenised, and {in_val:,} are "
        f"also in val. Relax the filters or add source files, and choose another data.dataset."
    )


def _totals(rows: list[ShardRow]) -> dict[str, int]:
    counts = {name: sum(getattr(row, name) for row in rows) for name in COUNTS}
    return counts | {"shards": sum(row.tokens > 0 for row in rows)}
