"""Every kind of store that the contract is held against."""

from storage.store import Store
from tests.servers import minio_program

SERVERS = ["seaweedfs", *(["minio"] if minio_program() else [])]
STORES = ["folder", *SERVERS]


def listed(store: Store, prefix: str) -> list[str]:
    return sorted(found.key for found in store.list(prefix))
