"""Copies of the Hub's files in the store: each is fetched once, under the digest that the Hub publishes of it.

A file comes into a folder of this host first, where a killed fetch leaves what had come: the next one goes on from
there. What is in the store was compared with its published digest, so nobody asks the Hub again.
"""

import fcntl
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from storage import keys
from storage.digests import canonical_json, digest
from storage.errors import AlreadyExists, ObjectMissing, SourceUnavailable, StoreUnusable
from storage.sources import hub
from storage.sources.files import Listing, SourceFile, with_distinct_names
from storage.sources.finding import find_files, is_on_hub
from storage.sources.identity import identify
from storage.stores.store import Store, overwrite, read_json

HASHED_AT_ONCE = 4
FOLDER = Path.home() / ".cache" / "gpt2-pipeline" / "incoming"


def list_source(store: Store, source: str, config: str, revision: str, split: str) -> tuple[Listing, str]:
    """What a source holds now: files of this host or a bucket, each with its digest, or of a Hub dataset.

    A Hub dataset costs one request while its revision is the same commit: the files of a commit are remembered in the
    store. When the Hub does not answer, that is what is returned, and why. Raises ValueError for what is not there,
    SourceUnavailable when the Hub does not answer and never did.
    """
    if not is_on_hub(source):
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            return Listing(with_distinct_names(list(pool.map(identify, find_files(source)))), {}), ""
    key = keys.listing(digest([source, config, revision, split]))
    known = _remembered(read_json(store, key))
    if known and known.origin["commit"] == revision:
        return known, ""
    try:
        commit, licence = hub.resolve(source, revision)
    except SourceUnavailable as error:
        if known is None:
            raise
        return known, str(error)
    if known and known.origin["commit"] == commit:
        return known, ""
    origin = {"dataset": source, "config": config, "commit": commit, "licence": licence}
    found = Listing(hub.list_files(source, config, commit, split), origin)
    overwrite(store, key, canonical_json({"files": [asdict(file) for file in found.files], "origin": origin}))
    return found, ""


def locate(store: Store, file: SourceFile) -> SourceFile:
    """The file with the place where it is read best: its copy in the store when there is one."""
    if not file.place.startswith(hub.SCHEME):
        return file
    try:
        if store.stat(file.key).size != file.size_bytes:
            return file
    except ObjectMissing:
        return file
    path = store.local_path(file.key)
    return replace(file, place=f"{store.url.rstrip('/')}/{file.key}" if path is None else str(path))


def mirror(store: Store, file: SourceFile, come: Callable[[int], None] = lambda _: None) -> SourceFile:
    """Bring a Hub file into the store, unless it is there. Returns it with its new place."""
    located = locate(store, file)
    if located is not file or not file.place.startswith(hub.SCHEME):
        come(file.size_bytes)
        return located
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        path = FOLDER / file.digest
        with path.open("a+b") as body:
            fcntl.flock(body, fcntl.LOCK_EX)  # two builders of one host: the second finds it fetched
            if locate(store, file) is file:  # or already put, and what it was fetched into gone
                hub.fetch(file, body, come)
                body.flush()
                if file.size_bytes:
                    with mmap.mmap(body.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as whole:
                        _put(store, file, whole)
                else:
                    _put(store, file, b"")
            else:
                come(file.size_bytes)
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreUnusable(
            f"{file.place}: {file.size_bytes:,} bytes were to be fetched into {FOLDER}, found {error.strerror}. Free "
            f"some space there or mend its mode, then run the same command again: it goes on."
        ) from error
    return locate(store, file)


def _put(store: Store, file: SourceFile, body: Any) -> None:
    try:
        store.put_new(file.key, body)
    except AlreadyExists:
        if store.stat(file.key).size != file.size_bytes:  # named by its content, which this is not
            store.delete(file.key)
            with suppress(AlreadyExists):  # somebody else mends it, too
                store.put_new(file.key, body)


def _remembered(found: dict[str, Any] | None) -> Listing | None:
    if found is None:
        return None
    return Listing(tuple(SourceFile(**file) for file in found["files"]), found["origin"])
