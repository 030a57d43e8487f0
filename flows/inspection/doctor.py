"""Checks the installation, the store and this host. Writes only probe objects, and FORMAT in a new store."""

import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from flows.platform.server import running_port
from model import tokenizer
from storage.cache import host
from storage.cache import shards as shard_cache
from storage.errors import StorageError
from storage.stores.opening import open_store
from storage.stores.store import clock

SKEW_SECONDS = 60  # S3 refuses requests that are 15 minutes off
FREE_BYTES = 5 * 10**9  # three checkpoints of GPT-2 124M are 4.5 GB


class Verdict(NamedTuple):
    """What was checked, whether it passed, and the facts or the remedy."""

    check: str
    ok: bool
    detail: str


def examine(store_url: str) -> Iterator[Verdict]:
    """Yield a verdict for each check."""
    yield Verdict("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}")
    packages = ("torch", "prefect", "datasets")
    yield _attempt("packages", lambda: ", ".join(f"{name} {version(name)}" for name in packages))
    yield _attempt("tokenizer", lambda: f"gpt2, {len(tokenizer.encode('hello world'))} tokens in 'hello world'")
    yield from _store(store_url)
    free_bytes = shutil.disk_usage(Path.cwd()).free
    needed = "" if free_bytes > FREE_BYTES else f"; free some space: a full run needs {FREE_BYTES / 1e9:.0f} GB"
    yield Verdict("disk", not needed, f"{free_bytes / 1e9:,.1f} GB free here{needed}")
    yield _attempt("cache", _cache)
    port = running_port()
    other = "no Prefect server runs in this folder; commands use PREFECT_API_URL or start their own server"
    yield Verdict("server", True, f"this folder's Prefect server runs on port {port}" if port else other)


def _attempt(check: str, detail: Callable[[], str]) -> Verdict:
    try:
        return Verdict(check, True, detail())
    except (ValueError, OSError, ImportError, StorageError) as error:
        return Verdict(check, False, str(error))


def _store(url: str) -> Iterator[Verdict]:
    """Access, conditional writes, checksums and clock. Stops at the first failure."""
    try:
        store = open_store(url, create=True)
        yield Verdict("store", True, f"{url}: opened with these credentials")
        server, refuses_damaged = store.probe()
        yield Verdict("conditions", True, f"{server}: create-only put and compare-and-swap are honoured")
        damaged = "refused" if refuses_damaged else "stored, and only detected when it is read: update the server"
        yield Verdict("checksums", refuses_damaged, f"a body damaged in transit is {damaged}")
        skew_seconds = abs(clock(store) - time.time())
        remedy = "" if skew_seconds < SKEW_SECONDS else "; synchronise this host: S3 refuses a difference of 900 s"
        yield Verdict("clock", not remedy, f"{skew_seconds:.0f} s from the store's{remedy}")
    except (ValueError, OSError, StorageError) as error:
        yield Verdict("store", False, str(error))


def _cache() -> str:
    cache = host.HostCache(host.FOLDER, shard_cache.LIMIT_BYTES)
    usage = f"{host.FOLDER}: {cache.used_bytes() / 1e9:.1f} GB of shards"
    if quarantined := cache.quarantined():
        usage += f", {len(quarantined)} damaged files in quarantine: check this disk, then gpt2 gc --delete"
    return usage
