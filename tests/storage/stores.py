"""Every kind of store that the contract is held against."""

from collections.abc import Callable
from pathlib import Path

from storage.store import Store


def folder_url(tmp_path: Path) -> str:
    return str(tmp_path / "contract")


STORES: dict[str, Callable[[Path], str]] = {"folder": folder_url}


def listed(store: Store, prefix: str) -> list[str]:
    return [found.key for found in store.list(prefix)]
