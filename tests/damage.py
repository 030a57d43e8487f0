"""Damages stored objects."""

from storage.digests import sha256
from storage.stores.store import Store, overwrite


def flip_bit(store: Store, key: str, place: int | None = None) -> tuple[str, str]:
    """Flip a bit of an object, by default in its middle. Returns its sha256 before and after."""
    body = bytearray(store.read(key).body)
    before = sha256(body)
    body[len(body) // 2 if place is None else place] ^= 1
    overwrite(store, key, bytes(body))
    return before, sha256(body)
