"""Checks of what a run needs, each a verdict with its remedy. Changes nothing but a probe object in the store."""

import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flows.platform.server import served_port
from model import tokenizer
from storage.cache import host as host_cache
from storage.cache import shards as shard_cache
from storage.cache.host import HostCache
from storage.errors import StorageError
from storage.stores.opening import open_store
from storage.stores.store import clock

PACKAGES = ("torch", "prefect", "tiktoken", "numpy", "pyarrow", "boto3", "fastapi", "sqlalchemy")
SKEW_SECONDS = 60  # S3 refuses requests of 15 minutes
FREE_BYTES = 5 * 10**9  # three checkpoints of GPT-2 124M are 4.5 GB


@dataclass(frozen=True)
class Verdict:
    """What was looked at, whether it is well, and what was found or what to do."""

    what: str
    well: bool
    found: str


def examine(store_url: str) -> Iterator[Verdict]:
    """Every verdict, one after the other."""
    yield Verdict("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        yield _package(package)
    yield _tried("tokenizer", lambda: f"gpt2, {len(tokenizer.encode('hello world'))} tokens in 'hello world'")
    yield from _store(store_url)
    yield _disk()
    yield _tried("cache", _cache)
    port = served_port()
    yield Verdict(
        "server", True, f"gpt2 serve answers on port {port}" if port else "none runs here; a verb starts its own"
    )


def _package(name: str) -> Verdict:
    try:
        return Verdict(name, True, version(name))
    except PackageNotFoundError:
        return Verdict(name, False, "not installed: run make demo, or pip install -e . in this environment")


def _tried(what: str, look: Callable[[], str]) -> Verdict:
    try:
        return Verdict(what, True, look())
    except (ValueError, OSError, StorageError) as error:
        return Verdict(what, False, str(error))


def _store(url: str) -> Iterator[Verdict]:
    """Reachability and credentials, conditional writes, checksums, clocks: as far as one comes."""
    try:
        store = open_store(url, create=True)
        yield Verdict("store", True, f"{url}: reads and writes with these credentials")
        found = store.probe()
        yield Verdict("conditions", True, f"{found.server}: create-only put and compare-and-swap are honoured")
        refused = "a body that was damaged on its way is refused"
        stored = "a damaged body is stored; reads find it by its sha256, but later: update the server"
        yield Verdict("checksums", found.refuses_damaged, refused if found.refuses_damaged else stored)
        skew = abs(clock(store) - time.time())
        well = skew < SKEW_SECONDS
        yield Verdict("clock", well, f"{skew:.0f} s from the store's" + ("" if well else "; set it, S3 refuses 900 s"))
    except (ValueError, OSError, StorageError) as error:
        yield Verdict("store", False, str(error))


def _cache() -> str:
    host = HostCache(host_cache.FOLDER, shard_cache.LIMIT_BYTES)
    aside = len(host.quarantined())
    return f"{host_cache.FOLDER}: {host.used_bytes() / 1e9:.1f} GB of shards" + (
        f", {aside} damaged files set aside: check this disk, then gpt2 gc --delete" if aside else ""
    )


def _disk() -> Verdict:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 1e9:,.1f} GB free here"
    return Verdict(
        "disk",
        free > FREE_BYTES,
        found if free > FREE_BYTES else f"{found}; a full run wants {FREE_BYTES / 1e9:.0f} GB",
    )
