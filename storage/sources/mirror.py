"""Copies of Hub files in the store, each downloaded once and stored under its published digest, which it must match.

A download goes to a folder on this host first. After a kill it stays there, and the next download resumes it.
"""

import fcntl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from storage import keys
from storage.digests import canonical_json, digest
from storage.errors import AlreadyExists, ObjectMissing, SourceUnavailable, StoreUnusable
from storage.sources import hub
from storage.sources.files import Listing, SourceFile, find_files, is_on_hub, with_distinct_names, without_copies
from storage.sources.reading import identify
from storage.stores.store import Store, overwrite, read_as

HASHING_THREADS = 4
FOLDER = Path.home() / ".cache" / "gpt2-pipeline" / "incoming"


def list_source(
    store: Store, source: str, config: str, revision: str, split: str, setting: str = "data.source"
) -> tuple[Listing, str]:
    """The current files of a source, each with its digest, and why the listing may be outdated (usually empty).

    The store keeps the listing of a Hub dataset, to ask the Hub only for the commit, and for when it does not respond.
    Raises ValueError, which names the setting, if the source does not exist. Raises SourceInvalid for an unreadable
    file, SourceUnavailable if the Hub does not respond and no listing is stored.
    """
    if not is_on_hub(source):
        places, ignored = find_files(source, setting)
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            files = list(pool.map(identify, places))
        return without_copies(Listing(with_distinct_names(files), {}, ignored)), ""
    key = keys.listing(digest([source, config, revision, split]))
    known = read_as(store, key, Listing, lambda known: "commit" in known.origin and [file.key for file in known.files])
    if known and known.origin["commit"] == revision:
        return known, ""
    try:
        commit, licence = hub.resolve(source, revision)
    except SourceUnavailable as error:
        if known is None:
            problem = f"no local file or folder; as a Hub dataset, {error}"
            raise SourceUnavailable(f"{setting} = {source!r}: {problem}") from error
        return known, str(error)
    if known and known.origin["commit"] == commit:
        return known, ""
    origin = {"dataset": source, "config": config, "commit": commit, "licence": licence}
    listing = replace(without_copies(hub.list_files(source, config, commit, split)), origin=origin)
    overwrite(store, key, canonical_json(asdict(listing)))
    return listing, ""


def locate(store: Store, file: SourceFile) -> SourceFile:
    """The file with its place changed to its copy in the store, if the store has one."""
    with suppress(ObjectMissing):
        if file.place.startswith(hub.SCHEME) and store.stat(file.key).size == file.size_bytes:
            path = store.local_path(file.key)
            return replace(file, place=f"{store.url.rstrip('/')}/{file.key}" if path is None else str(path))
    return file


def mirror(store: Store, file: SourceFile, on_progress: Callable[[int], None] = lambda _: None) -> SourceFile:
    """Copy a Hub file into the store if missing; return it there. Raises StoreUnusable, and what `hub.fetch` raises."""
    located = locate(store, file)
    if located.place.startswith(hub.SCHEME):
        try:
            _download_and_put(store, file, on_progress)
        except OSError as error:
            raise StoreUnusable(
                f"{file.place}: cannot download {file.size_bytes:,} bytes into {FOLDER}: {error.strerror}. Free some "
                f"space there or change its permissions, then run the same command again to continue."
            ) from error
        located = locate(store, file)
    on_progress(file.size_bytes)
    return located


def _download_and_put(store: Store, file: SourceFile, on_progress: Callable[[int], None]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / file.digest
    with path.open("a+b") as body:
        fcntl.flock(body, fcntl.LOCK_EX)
        if locate(store, file) is file:  # else another builder on this host held the lock and made the copy
            hub.fetch(file, body, on_progress)
            body.flush()
            with suppress(ObjectMissing):
                if store.stat(file.key).size != file.size_bytes:  # the key names the content: the object is damaged
                    store.delete(file.key)
            with suppress(AlreadyExists):  # a builder on another host stored it first
                store.put_new(file.key, np.memmap(path, np.uint8, "r").data if file.size_bytes else b"")
        path.unlink(missing_ok=True)
