"""Sealing: checks every record, writes the immutable manifest, and swaps the `latest` pointer to it.

The first seal fixes the val shards and the settings of the dataset's name, create-only, for every later version.
"""

import json
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from storage.datasets.manifest import COLUMNS, SCHEMA, Manifest, ShardRow, ancestors, latest_manifest
from storage.datasets.recipe import DatasetSpec
from storage.datasets.records import ShardSummary, finished_shards, read_record
from storage.digests import canonical_json, sha256
from storage.errors import AlreadyExists, Conflict, DatasetMismatch, ObjectMissing, ShardCorrupt
from storage.keys import DatasetKeys
from storage.stores.store import Store, read_json


@dataclass(frozen=True)
class Split:
    """The val shards in order, and the settings of the first seal."""

    val: list[str]
    bound: dict[str, Any]


def seal(store: Store, spec: DatasetSpec, planned: list[str], source: dict[str, Any]) -> Manifest:
    """Write the manifest of the planned shards and point `latest` at it. Nothing new gives no new version.

    The first seal pins the first `val_shards` shards as val; they stay in every later version, whatever happens to
    their source. A shard without a document is done, but in no version. Raises ObjectMissing if a shard is not done,
    DatasetMismatch if the name is bound to other settings, Conflict if another builder sealed meanwhile.
    """
    check_binding(store, spec.name, spec.binding)
    pointer = read_json(store, DatasetKeys(spec.name).latest) or {}
    parent = latest_manifest(store, spec.name)
    split = read_split(store, spec.name) or Split(planned[: spec.val_shards], spec.binding)
    in_plan = set(planned)
    listed = [shard_id for shard_id in split.val if shard_id not in in_plan] + planned
    finished = finished_shards(store, spec.name, listed, parent.summaries if parent else {})
    _check_all_done(spec.name, listed, finished, in_plan)
    pin_split(store, spec.name, split)
    summaries = {shard_id: finished[shard_id] for shard_id in listed}
    columns, recipe = _columns(summaries, set(split.val)), spec.settings.recipe()
    if parent is not None and (parent.columns, parent.recipe) == (columns, recipe):
        return parent
    fields: dict[str, Any] = {
        "recipe": recipe,
        "tokenizer": spec.tokenizer,
        "source": source,
        "parent": parent.digest if parent else pointer.get("parent"),  # a lost version is sealed again as it was
        "totals": _totals(summaries, set(split.val)),
    }
    empty = tuple(shard_id for shard_id, summary in summaries.items() if not summary.tokens)
    body = canonical_json(fields | {"schema": SCHEMA, "shards": columns} | ({"empty": empty} if empty else {}))
    manifest = Manifest(digest=sha256(body), columns=columns, empty=empty, **fields)
    with suppress(AlreadyExists):  # named by its bytes: another builder sealed the same
        store.put_new(DatasetKeys(spec.name).manifest(manifest.digest), body)
    update_latest(store, spec.name, manifest, pointer.get("manifest"))
    return manifest


def update_latest(store: Store, dataset: str, manifest: Manifest, expected: object) -> None:
    """Swap `latest` from the digest `expected` to the manifest; succeeds if it already names the manifest.

    Raises Conflict if another builder moved it elsewhere.
    """
    key, digest = DatasetKeys(dataset).latest, manifest.digest
    try:
        current = store.read(key)
        etag: str | None = current.etag
        pointer = json.loads(current.body)
    except ObjectMissing:
        etag, pointer = None, {"manifest": None, "sequence": 0}
    if pointer["manifest"] == digest:
        return
    if pointer["manifest"] == expected:
        body = {
            "manifest": digest,
            "parent": manifest.parent,
            "sequence": pointer["sequence"] + 1,
            "commit_id": secrets.token_hex(8),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            store.swap(key, canonical_json(body), etag)
            return
        except Conflict:
            pointer = read_json(store, key) or pointer
            # Ours, or sealed on top of ours: the reply to our swap was lost.
            if any(version.digest == digest for version in ancestors(store, dataset, str(pointer["manifest"]))):
                return
    raise Conflict(
        f"dataset {dataset!r}: another builder sealed {pointer['manifest']} while this one sealed {digest}. "
        f"Run the command again: it seals on top of that."
    )


def check_rebuilt(store: Store, dataset: str, manifest: Manifest, rebuilt: set[str]) -> None:
    """Raise ShardCorrupt if a rebuilt shard's record differs from the manifest that lists it."""
    for row in manifest.rows():
        if row.shard_id not in rebuilt:
            continue
        record = read_record(store, dataset, row.shard_id)
        if record.sha256 != row.sha256:
            raise ShardCorrupt(
                f"shard {row.shard_id!r} of dataset {dataset!r}: manifest {manifest.digest[:12]} has sha256 "
                f"{row.sha256}, its record {record.sha256}. Rebuild it: gpt2 dataset verify --repair"
            )


def read_split(store: Store, dataset: str) -> Split | None:
    """The dataset's split, or None before its first seal."""
    value: dict[str, Any] | None = read_json(store, DatasetKeys(dataset).split)
    return None if value is None else Split(**value)


def pin_split(store: Store, dataset: str, split: Split) -> None:
    """Fix the split. Raises Conflict or DatasetMismatch if another builder fixed a different one first."""
    try:
        store.put_new(DatasetKeys(dataset).split, canonical_json(asdict(split)))
    except AlreadyExists as error:
        check_binding(store, dataset, split.bound)
        pinned = read_split(store, dataset)
        if pinned is None or pinned.val != split.val:
            val = pinned.val if pinned else []
            raise Conflict(
                f"dataset {dataset!r}: another builder sealed other val shards {val}. Run the command again."
            ) from error


def check_binding(store: Store, dataset: str, binding: dict[str, Any]) -> None:
    """Raise DatasetMismatch if the dataset's name is bound to other settings."""
    split = read_split(store, dataset)
    bound = binding if split is None else split.bound
    if bound == binding:
        return
    names = sorted(name for name in bound.keys() | binding.keys() if bound.get(name) != binding.get(name))

    def shown(settings: dict[str, Any], name: str) -> str:
        return repr(settings[name]) if name in settings else "its default"

    differences = "; ".join(f"{name} is {shown(bound, name)}, requested {shown(binding, name)}" for name in names)
    raise DatasetMismatch(
        f"dataset {dataset!r} is bound to the settings of its first build: {differences}. "
        f"Choose another name with --set data.dataset=…, or use the same settings."
    )


def _check_all_done(dataset: str, listed: list[str], finished: dict[str, ShardSummary], in_plan: set[str]) -> None:
    missing = [shard_id for shard_id in listed if shard_id not in finished]
    if not missing:
        return
    remedy = "Run gpt2 dataset build again: it makes only those."
    if missing[0] not in in_plan:
        remedy = "It belongs to the pinned val split, but its source file is gone: put that file back."
    raise ObjectMissing(
        f"dataset {dataset!r}: {len(missing):,} of {len(listed):,} shards are not done, {missing[0]!r} first. {remedy}"
    )


def _columns(summaries: dict[str, ShardSummary], val: set[str]) -> dict[str, list[Any]]:
    rows = [
        ShardRow(shard_id, *summary, "val" if shard_id in val else "train")
        for shard_id, summary in summaries.items()
        if summary.tokens
    ]
    return {name: [row[index] for row in rows] for index, name in enumerate(COLUMNS)}


def _totals(summaries: dict[str, ShardSummary], val: set[str]) -> dict[str, dict[str, int]]:
    totals = {}
    for split in ("train", "val"):
        members = [summary for shard_id, summary in summaries.items() if (shard_id in val) == (split == "val")]
        counts = {name: sum(getattr(summary, name) for summary in members) for name in ShardSummary._fields[:-1]}
        totals[split] = {"shards": sum(summary.tokens > 0 for summary in members)} | counts
    return totals
