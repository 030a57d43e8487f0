"""The versions of a dataset: the line of them, and what one holds that another does not. Opens no shard."""

from collections.abc import Iterator
from typing import Any

from storage.datasets.manifest import Manifest, latest_manifest, read_manifest
from storage.errors import ObjectMissing
from storage.keys import DatasetKeys
from storage.stores.store import Store


def newest_version(store: Store, dataset: str) -> Manifest:
    """The newest version. Raises ObjectMissing when the dataset was never sealed."""
    found = latest_manifest(store, dataset)
    if found is None:
        raise ObjectMissing(f"dataset {dataset!r} was never sealed in {store.url!r}. Run gpt2 dataset build.")
    return found


def history(store: Store, dataset: str) -> Iterator[Manifest]:
    """The newest version and its ancestors, newest first. Raises ObjectMissing when the dataset was never sealed."""
    version: Manifest | None = newest_version(store, dataset)
    while version is not None:
        yield version
        version = read_manifest(store, dataset, version.parent) if version.parent else None


def history_with_times(store: Store, dataset: str) -> Iterator[tuple[Manifest, float]]:
    """The same, each with the time (Unix seconds) when it was sealed."""
    for version in history(store, dataset):
        yield version, store.stat(DatasetKeys(dataset).manifest(version.digest)).modified


def version_digests(store: Store, dataset: str) -> list[str]:
    """Every version that lies in the store, of whatever line, in no order."""
    prefix = DatasetKeys(dataset).manifests
    return [found.key.removeprefix(prefix).removesuffix(".json") for found in store.list(prefix)]


def find_version(store: Store, dataset: str, named: str) -> Manifest:
    """The version whose digest begins so; `latest` is the newest. Raises ObjectMissing, and ValueError for several."""
    if named == "latest":
        return newest_version(store, dataset)
    there = version_digests(store, dataset)
    matching = [digest for digest in there if digest.startswith(named)]
    if not matching:
        known = ", ".join(sorted(digest[:12] for digest in there)) or "none"
        raise ObjectMissing(f"dataset {dataset!r} has no version {named!r}, found {known}. See gpt2 dataset log.")
    if len(matching) > 1:
        several = ", ".join(sorted(digest[:12] for digest in matching))
        raise ValueError(f"version {named!r} of dataset {dataset!r} may be {several}. Give more of its digest.")
    return read_manifest(store, dataset, matching[0])


def difference(old: Manifest, new: Manifest) -> dict[str, Any]:
    """What the new version adds to the old one and what it takes away: files, shards, documents, tokens, settings."""
    was, now = old.files, new.files
    before, after = old.made, new.made
    added = [made for shard_id, made in after.items() if before.get(shard_id) != made]
    removed = [made for shard_id, made in before.items() if after.get(shard_id) != made]
    return {
        "files": {
            "added": sorted(now.keys() - was.keys()),
            "changed": sorted(name for name in now.keys() & was.keys() if now[name] != was[name]),
            "removed": sorted(was.keys() - now.keys()),
        },
        **{
            name: {"added": sum(count(made) for made in added), "removed": sum(count(made) for made in removed)}
            for name, count in (
                ("shards", lambda _: 1),
                ("documents", lambda made: made.documents),
                ("tokens", lambda made: made.tokens),
            )
        },
        "settings": sorted(
            name for name in old.recipe.keys() | new.recipe.keys() if old.recipe.get(name) != new.recipe.get(name)
        ),
    }
