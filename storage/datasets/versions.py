"""The versions of a dataset: their history, and how two of them differ. Opens no shard."""

from collections.abc import Iterator
from dataclasses import fields

from pydantic import BaseModel

from storage.datasets.manifest import Manifest, ancestors, latest_manifest, read_manifest
from storage.datasets.recipe import DatasetSettings
from storage.errors import ObjectMissing
from storage.keys import DatasetKeys
from storage.stores.store import Store


class Change(BaseModel, frozen=True):
    """How many were added and removed."""

    added: int
    removed: int


class FileChanges(BaseModel, frozen=True):
    """Names of source files."""

    added: list[str]
    changed: list[str]
    removed: list[str]


class Difference(BaseModel, frozen=True):
    """What a version adds to an older version and removes from it, as `gpt2 dataset diff --json` prints it.

    `settings` lists the names of settings that differ.
    """

    files: FileChanges
    shards: Change
    documents: Change
    tokens: Change
    settings: list[str]


def newest_version(store: Store, dataset: str) -> Manifest:
    """The newest version. Raises ObjectMissing if the dataset was never sealed or its newest manifest was deleted."""
    manifest = latest_manifest(store, dataset)
    if manifest is None:
        raise ObjectMissing(
            f"dataset {dataset!r}: no sealed version in store {store.url!r}. Build it first: gpt2 dataset build"
        )
    return manifest


def history(store: Store, dataset: str) -> Iterator[Manifest]:
    """All versions, newest first. Raises ObjectMissing if the dataset was never sealed."""
    return ancestors(store, dataset, newest_version(store, dataset).digest)


def sealed_at(store: Store, dataset: str, version: Manifest) -> float:
    """When the version was sealed, in Unix seconds by the store's clock."""
    return store.stat(DatasetKeys(dataset).manifest(version.digest)).modified


def version_digests(store: Store, dataset: str) -> list[str]:
    """The digests of all stored versions, unordered, including those that `latest` does not descend from."""
    prefix = DatasetKeys(dataset).manifests
    return [listed.key.removeprefix(prefix).removesuffix(".json") for listed in store.list(prefix)]


def find_version(store: Store, dataset: str, name: str) -> Manifest:
    """The version whose digest starts with `name`, or the newest for "latest".

    Raises ObjectMissing if no version matches, ValueError if several match.
    """
    if name == "latest":
        return newest_version(store, dataset)
    digests = sorted(version_digests(store, dataset))
    matching = [digest for digest in digests if digest.startswith(name)]
    if not matching:
        known = ", ".join(digest[:12] for digest in digests) or "none"
        raise ObjectMissing(
            f"dataset {dataset!r} has no version {name!r}. Its versions: {known}. See gpt2 dataset log."
        )
    if len(matching) > 1:
        shown = ", ".join(digest[:12] for digest in matching)
        raise ValueError(f"version {name!r} of dataset {dataset!r} is ambiguous: {shown}. Give more of the digest.")
    return read_manifest(store, dataset, matching[0])


def difference(old: Manifest, new: Manifest) -> Difference:
    """What the new version adds to the old version and removes from it."""
    old_rows, new_rows = old.rows_by_id, new.rows_by_id
    added = [row for shard_id, row in new_rows.items() if old_rows.get(shard_id) != row]
    removed = [row for shard_id, row in old_rows.items() if new_rows.get(shard_id) != row]
    settings = (field.name for field in fields(DatasetSettings))
    return Difference(
        files=FileChanges(
            added=sorted(new.files.keys() - old.files.keys()),
            changed=sorted(name for name, digest in new.files.items() if old.files.get(name, digest) != digest),
            removed=sorted(old.files.keys() - new.files.keys()),
        ),
        shards=Change(added=len(added), removed=len(removed)),
        documents=Change(added=sum(row.documents for row in added), removed=sum(row.documents for row in removed)),
        tokens=Change(added=sum(row.tokens for row in added), removed=sum(row.tokens for row in removed)),
        settings=sorted(name for name in settings if getattr(old.recipe, name) != getattr(new.recipe, name)),
    )
