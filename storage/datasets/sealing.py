"""Seals a version: checks the records, writes the manifest, swaps `latest`. The first seal pins val and settings."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

from storage.datasets.manifest import COUNTS, FILE_COLUMNS, Manifest, ShardId, ShardRow, latest_manifest, read_pointer
from storage.datasets.recipe import DatasetSettings, DatasetSpec
from storage.datasets.records import corrupt, finished_shards, read_record
from storage.datasets.versions import update_latest
from storage.digests import canonical_json, sha256
from storage.errors import Conflict, DatasetMismatch, ObjectMissing, SourceInvalid
from storage.keys import DatasetKeys
from storage.sources.files import Listing
from storage.stores.store import Store, put_once, read_as


@dataclass(frozen=True)
class Split:
    """The content of `split.json`: the val shards, and the settings that the dataset's name is bound to."""

    val: list[ShardId]
    bound: dict[str, Any]


def seal(store: Store, spec: DatasetSpec, planned: list[str], listing: Listing) -> Manifest:
    """Write the manifest of these shards and settings, and point `latest` at it. If neither changed, return the parent.

    The first seal pins the val shards for good. Raises ObjectMissing if a shard is not done, DatasetMismatch for other
    settings, SourceInvalid for a split without documents, Conflict if another builder sealed another version first.
    """
    pinned = check_binding(store, spec)
    pointer = read_pointer(store, spec.name)
    parent = latest_manifest(store, spec.name)
    val = spec.val_shards_of(planned) if pinned is None else pinned
    rows = _finished_rows(store, spec.name, planned, val, parent)
    totals: dict[str, dict[str, int]] = {}
    for split in ("train", "val"):
        of_split = [row for row in rows if row.split == split]
        totals[split] = {name: sum(getattr(row, name) for row in of_split) for name in COUNTS}
        totals[split]["shards"] = sum(row.tokens > 0 for row in of_split)
        if not totals[split]["documents"]:
            raise _empty(store, spec, split, [row.shard_id for row in of_split])
    if pinned is None:
        try:
            store.put_new(DatasetKeys(spec.name).split, canonical_json({"val": val, "bound": spec.binding}))
        except Conflict as error:
            if (pinned := check_binding(store, spec)) != val:
                problem = f"another process sealed other val shards {pinned}"
                raise Conflict(f"dataset {spec.name!r}: {problem}. Run the command again.") from error
    columns = {name: [getattr(row, name) for row in rows if row.tokens] for name in ShardRow._fields}
    if parent is not None and (parent.columns, parent.recipe) == (columns, spec.settings):
        return parent
    before = parent.digest if parent else pointer.parent  # a lost version gets its old one
    files = {name: [getattr(file, name) for file in listing.files] for name in FILE_COLUMNS}
    empty = tuple(row.shard_id for row in rows if not row.tokens)
    manifest = Manifest("", spec.settings, spec.tokenizer, listing.origin, totals, before, columns, files, empty)
    body = canonical_json(manifest.to_json())
    manifest = replace(manifest, digest=sha256(body))
    put_once(store, DatasetKeys(spec.name).manifest(manifest.digest), body)  # named by its bytes
    update_latest(store, spec.name, manifest, pointer.manifest)
    return manifest


def check_rebuilt(store: Store, dataset: str, manifest: Manifest, rebuilt: Collection[str]) -> None:
    """Raise ShardCorrupt if a rebuilt shard's record differs from the manifest that lists it."""
    for row in manifest.rows():
        if row.shard_id in rebuilt and (stored := read_record(store, dataset, row.shard_id)).sha256 != row.sha256:
            wrong = f"manifest {manifest.digest[:12]} lists sha256 {row.sha256}, the rebuilt shard has {stored.sha256}."
            cause = "Other package versions can cause this: install those that its sealed version was built with."
            raise corrupt(dataset, row.shard_id, f"{wrong} {cause}")


def check_binding(store: Store, spec: DatasetSpec) -> list[str] | None:
    """The pinned val shards; None before the first seal. Raises DatasetMismatch, or ObjectMissing if they are lost."""
    remedy = "Restore it from a copy of the store, or build another dataset: --set data.dataset=…"
    if (split := read_as(store, DatasetKeys(spec.name).split, Split, lambda split: split.val, remedy)) is None:
        if read_pointer(store, spec.name).manifest:  # written after the split
            key = DatasetKeys(spec.name).split
            raise ObjectMissing(f"dataset {spec.name!r} has versions, but {key!r}, its val split, is missing. {remedy}")
        return None
    unset = dict.fromkeys(split.bound | spec.binding) | {field.name: field.default for field in fields(DatasetSettings)}
    bound, binding = unset | split.bound, unset | spec.binding
    if names := sorted(name for name in unset if bound[name] != binding[name]):
        differences = "; ".join(f"{name} is {bound[name]!r}, requested {binding[name]!r}" for name in names)
        problem = f"dataset {spec.name!r} is bound to the settings of its first build: {differences}"
        raise DatasetMismatch(f"{problem}. Choose another name with --set data.dataset=…, or use the same settings.")
    return split.val


def _finished_rows(
    store: Store, dataset: str, planned: list[str], val: list[str], parent: Manifest | None
) -> list[ShardRow]:
    in_plan, in_val = set(planned), set(val)
    listed = [shard_id for shard_id in val if shard_id not in in_plan] + planned
    finished = finished_shards(store, dataset, listed, parent.rows_by_id if parent else {})
    if missing := [shard_id for shard_id in listed if shard_id not in finished]:
        remedy = "Run the same command again: it builds only the missing shards."
        if missing[0] not in in_plan:
            remedy = "That shard is in the pinned val split, but its source file is gone or changed: restore that file."
        problem = f"{len(missing):,} of {len(listed):,} shards are not done; the first is {missing[0]!r}"
        raise ObjectMissing(f"dataset {dataset!r}: {problem}. {remedy}")
    return [finished[shard_id]._replace(split="val" if shard_id in in_val else "train") for shard_id in listed]


def _empty(store: Store, spec: DatasetSpec, split: str, shard_ids: list[str]) -> SourceInvalid:
    records = [read_record(store, spec.name, shard_id) for shard_id in shard_ids]
    lost = {name: sum(getattr(record, name) for record in records) for name in ("filtered", "skipped", "in_val")}
    return SourceInvalid(
        f"dataset {spec.name!r}: split {split} would have no documents. Of {sum(lost.values()):,} rows, data.filters = "
        f"{list(spec.settings.filters)} dropped {lost['filtered']:,}, {lost['skipped']:,} could not be tokenised, and "
        f"{lost['in_val']:,} are also in val. Relax the filters, add source files, or reduce data.shard_tokens or "
        f"data.val_shards; and choose another data.dataset."
    )
