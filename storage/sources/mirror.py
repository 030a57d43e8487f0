"""Source files as a build reads them: listed, and copied or converted into the store where that is needed.

A Hub file is downloaded once, must match its published digest, and is stored as it is or as parquet (`conversion`).
A download goes to a folder on this host first. After a kill it stays there, and the next download resumes it.
"""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from storage import keys
from storage.digests import canonical_json, digest
from storage.errors import ObjectMissing, SourceUnavailable, StoreUnusable
from storage.sources import hub
from storage.sources.conversion import convert, locate_converted, pack, place_of, put_named_by_content
from storage.sources.files import Listing, SourceFile, distinct_names, find_files, hive_columns, is_on_hub
from storage.sources.filters import keeps_row, parse
from storage.sources.reading import REQUEST_BYTES, identify, open_bytes, open_source
from storage.sources.selection import listed
from storage.stores.store import FileBody, Store, overwrite, read_as

HASHING_THREADS = 4
FOLDER = Path.home() / ".cache" / "gpt2-pipeline" / "incoming"


def list_source(
    store: Store, source: str, config: str, revision: str, split: str, setting: str = "data.source",
    filters: Sequence[str] = (),
) -> tuple[Listing, str]:  # fmt: skip
    """The current files of a source, each with its digest, and why the listing may be outdated (usually empty).

    Leaves out files whose Hive partition folders do not pass the filters, and packs small files into larger parts.
    The store keeps the listing of a Hub dataset: for an unchanged commit, and for when the Hub does not respond.
    Raises ValueError, which names the setting, SourceInvalid for an unreadable file, SourceUnavailable.
    """
    listing, outdated = _listed(store, source, config, revision, split, setting)
    conditions = [parse(text) for text in filters]
    files, filtered, copies = dict[str, SourceFile](), dict[str, str](), dict[str, str]()
    for listed_file in listing.files:
        file = replace(listed_file, columns=hive_columns(listed_file.place)) if listing.origin else listed_file
        of_folders = [condition for condition in conditions if condition.column in file.columns]
        if not keeps_row(of_folders, file.columns, file.place, 0):
            filtered[file.name] = f"its folders do not pass data.filters ({', '.join(map(str, of_folders))})"
        elif files.setdefault(file.digest, file) is not file:  # shards are named by content
            copies[file.name] = f"same content as {files[file.digest].name}"
    ignored = listing.ignored + listed(filtered) + listed(copies)
    return replace(listing, files=tuple(pack(list(files.values()))), ignored=ignored), outdated


def _listed(store: Store, source: str, config: str, revision: str, split: str, setting: str) -> tuple[Listing, str]:
    if not is_on_hub(source):
        places, ignored, root = find_files(source, setting)
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            files = list(pool.map(lambda place: replace(identify(place), columns=hive_columns(place, root)), places))
        return Listing(distinct_names(files), {}, ignored), ""
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
    listing = hub.list_files(source, config, commit, split)
    listing = replace(listing, origin=origin | listing.origin)
    for name in {revision, commit}:  # a repair or a run asks for the commit of its version
        overwrite(store, keys.listing(digest([source, config, name, split])), canonical_json(asdict(listing)))
    return listing, ""


def locate(store: Store, file: SourceFile) -> SourceFile:
    """The file with its place changed to its copy in the store, if the store has one."""
    if not file.is_read_by_rows:
        return locate_converted(store, file)
    with suppress(ObjectMissing):
        if file.place.startswith(hub.SCHEME) and store.stat(file.key).size == file.size_bytes:
            return replace(file, place=place_of(store, file.key))
    return file


def mirror(
    store: Store, file: SourceFile, on_progress: Callable[[int], None] = lambda _: None, *, keep: bool = True
) -> SourceFile:
    """Convert the file into the store if rows need it, or copy it if it is on the Hub and `keep`; return it there.

    Raises StoreUnusable, and what `hub.fetch` and `convert` raise.
    """
    located = locate(store, file)
    if not (located.is_read_by_rows or located.is_converted) or (keep and located.place.startswith(hub.SCHEME)):
        try:
            FOLDER.mkdir(parents=True, exist_ok=True)
            if file.is_read_by_rows:
                with _incoming(file) as body:
                    if locate(store, file) is file:  # else another builder on this host held the lock and made the copy
                        hub.fetch(file, body, on_progress)
                        sha256 = "" if hub.COMMIT.fullmatch(file.digest) else file.digest
                        put_named_by_content(store, file.key, FileBody(body, sha256))
            else:
                convert(store, file, partial(_opened, on_progress=on_progress), FOLDER)
        except OSError as error:
            problem = f"{file.place}: cannot write {file.size_bytes:,} bytes to {FOLDER}: {error.strerror}"
            remedy = "Free some space there or change its permissions, then run the same command again to continue."
            raise StoreUnusable(f"{problem}. {remedy}") from error
        located = locate(store, file)
    on_progress(file.size_bytes)
    return located


@contextmanager
def _incoming(file: SourceFile) -> Iterator[BinaryIO]:
    """What has been downloaded of a Hub file, locked against other builders on this host; deleted after the block."""
    path = FOLDER / file.digest
    with path.open("a+b") as body:
        fcntl.flock(body, fcntl.LOCK_EX)
        yield body
        path.unlink(missing_ok=True)


@contextmanager
def _opened(file: SourceFile, on_progress: Callable[[int], None]) -> Iterator[BinaryIO]:
    """The bytes of a file to convert, verified."""
    if file.place.startswith(hub.SCHEME):
        with _incoming(file) as body:
            hub.fetch(file, body, on_progress)
            body.seek(0)
            yield body
    else:
        with open_bytes(file, REQUEST_BYTES) as body:
            yield body
        open_source(file)  # raises if it has changed meanwhile: its rows would stay under this digest
