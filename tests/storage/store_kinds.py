"""Every kind of store that the contract is held against."""

from typing import Any

import pytest

from storage.stores.store import Store
from tests.servers import minio_program

SERVERS = ["seaweedfs", *(["minio"] if minio_program() else [])]
STORES = ["folder", *SERVERS]


def each(kinds: list[str]) -> list[Any]:
    """The kinds as parameters of a fixture; MinIO, which few have built, is for make test-full and CI."""
    return [pytest.param(kind, marks=[pytest.mark.full] * (kind == "minio")) for kind in kinds]


def listed(store: Store, prefix: str) -> list[str]:
    return sorted(found.key for found in store.list(prefix))
