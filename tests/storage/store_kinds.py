"""The kinds of stores that the contract tests run on."""

from typing import Any

import pytest

from storage.stores.store import Store
from tests.servers import minio_program

SERVERS = ["seaweedfs", *(["minio"] if minio_program() else [])]
STORES = ["folder", *SERVERS]


def each(kinds: list[str]) -> list[Any]:
    """The kinds as fixture parameters. MinIO, which must be built, runs only in make test-full and CI."""
    return [pytest.param(kind, marks=[pytest.mark.full] * (kind == "minio")) for kind in kinds]


def listed(store: Store, prefix: str) -> list[str]:
    return sorted(entry.key for entry in store.list(prefix))
