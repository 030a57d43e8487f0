"""Checks of what a run needs, each a verdict with its remedy. Changes nothing but a probe object in the store."""

import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flows.server import served_port
from model import tokenizer
from storage.errors import StorageError
from storage.layout import open_store

PACKAGES = ("torch", "prefect", "tiktoken", "numpy", "pyarrow", "fastapi", "sqlalchemy")
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
    yield _tried("store", lambda: _store(store_url))
    yield _disk()
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


def _store(url: str) -> str:
    open_store(url, create=True).probe()
    return f"{url}: reads, writes and honours conditional writes"


def _disk() -> Verdict:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 1e9:,.1f} GB free here"
    return Verdict(
        "disk",
        free > FREE_BYTES,
        found if free > FREE_BYTES else f"{found}; a full run wants {FREE_BYTES / 1e9:.0f} GB",
    )
