"""The versions of a dataset: their history, `latest`, and how two versions differ. Opens no shard."""

import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime
from typing import Generic, TypeVar

from pydantic import BaseModel

from storage.datasets.manifest import Manifest, ancestors, latest_manifest, read_manifest, read_pointer
from storage.datasets.recipe import DatasetSettings
from storage.digests import canonical_json
from storage.errors import Conflict, ObjectMissing
from storage.keys import DatasetKeys
from storage.stores.store import ReadableStore, Store

T = TypeVar("T")


class Change(BaseModel, Generic[T], frozen=True):
    """What was added and removed: a count, or names."""

    added: T
    removed: T


class FileChanges(Change[list[str]], frozen=True):
    """Names of source files."""

    changed: list[str]


class Difference(BaseModel, frozen=True):
    """What a version adds to an older version and removes, and the settings that differ: gpt2 dataset diff --json."""

    files: FileChanges
    configs: Change[list[str]]  # of a Hub dataset, where a pattern chose them
    shards: Change[int]
    documents: Change[int]
    tokens: Change[int]
    settings: list[str]


def newest_version(store: ReadableStore, dataset: str) -> Manifest:
    """The newest version. Raises ObjectMissing if the dataset was never sealed or its newest manifest was deleted."""
    if (manifest := latest_manifest(store, dataset)) is None:
        remedy = f"Build it from its source: gpt2 dataset build --set data.dataset={dataset} --set data.source=…"
        raise ObjectMissing(f"dataset {dataset!r}: no sealed version in {store.url!r}. {remedy}")
    return manifest


def history(store: ReadableStore, dataset: str) -> Iterator[Manifest]:
    """All versions, newest first. Raises ObjectMissing if the dataset was never sealed."""
    return ancestors(store, dataset, newest_version(store, dataset))


def version_digests(store: Store, dataset: str) -> list[str]:
    """The digests of all stored versions, unordered, including those that `latest` does not descend from."""
    prefix = DatasetKeys(dataset).manifests
    return [listed.key.removeprefix(prefix).removesuffix(".json") for listed in store.list(prefix)]


def find_version(store: Store, dataset: str, name: str) -> Manifest:
    """The version whose digest starts with `name`, or the newest for "latest". Raises ObjectMissing, ValueError."""
    if name == "latest":
        return newest_version(store, dataset)
    digests = sorted(version_digests(store, dataset))
    matching = [digest for digest in digests if digest.startswith(name)]
    shown = ", ".join(digest[:12] for digest in matching or digests) or "none"
    if not matching:
        raise ObjectMissing(f"dataset {dataset!r} has no version {name!r}. Versions: {shown}. See gpt2 dataset log.")
    if len(matching) > 1:
        raise ValueError(f"version {name!r} of dataset {dataset!r} is ambiguous: {shown}. Give more of the digest.")
    return read_manifest(store, dataset, matching[0])


def update_latest(store: Store, dataset: str, manifest: Manifest, expected: object) -> None:
    """Swap `latest` from digest `expected` to the manifest unless `latest` descends from it. Raises Conflict."""
    key, digest = DatasetKeys(dataset).latest, manifest.digest
    etag: str | None = None
    with suppress(ObjectMissing):
        etag = store.read(key).etag
    pointer = read_pointer(store, dataset)
    if pointer.manifest == expected != digest:
        body = {"manifest": digest, "parent": manifest.parent, "sequence": pointer.sequence + 1}
        body |= {"commit_id": secrets.token_hex(8), "at": datetime.now(UTC).isoformat(timespec="seconds")}
        with suppress(Conflict):
            store.swap(key, canonical_json(body), etag)
            return
        pointer = read_pointer(store, dataset)
    # Another builder sealed the same manifest, or the reply to our swap was lost; others may have sealed after it.
    newest = read_manifest(store, dataset, pointer.manifest) if pointer.manifest else None
    if not any(version.digest == digest for version in ancestors(store, dataset, newest)):
        problem = f"another process sealed manifest {pointer.manifest} while this process wrote manifest {digest}"
        raise Conflict(f"dataset {dataset!r}: {problem}. Run the command again.")


def difference(old: Manifest, new: Manifest) -> Difference:
    """What the new version adds to the old version and removes from it."""
    old_rows, new_rows = set(old.rows()), set(new.rows())
    added, removed = new_rows - old_rows, old_rows - new_rows
    old_configs, new_configs = (set(version.origin.get("configs", "").split(", ")) - {""} for version in (old, new))
    settings = (field.name for field in fields(DatasetSettings))
    return Difference(
        files=FileChanges(
            added=sorted(new.files.keys() - old.files.keys()),
            changed=sorted(name for name, digest in new.files.items() if old.files.get(name, digest) != digest),
            removed=sorted(old.files.keys() - new.files.keys()),
        ),
        configs=Change(added=sorted(new_configs - old_configs), removed=sorted(old_configs - new_configs)),
        shards=Change(added=len(added), removed=len(removed)),
        documents=Change(added=sum(row.documents for row in added), removed=sum(row.documents for row in removed)),
        tokens=Change(added=sum(row.tokens for row in added), removed=sum(row.tokens for row in removed)),
        settings=sorted(name for name in settings if getattr(old.recipe, name) != getattr(new.recipe, name)),
    )
