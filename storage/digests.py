"""Canonical JSON and SHA-256 digests, which name recipes and objects."""

import hashlib
import json
from typing import Any, Protocol

SLICE_BYTES = 1 << 23  # of a body in memory at once


def canonical_json(value: Any) -> bytes:
    """The value as JSON with sorted keys, no spaces and no NaN: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")  # a lone surrogate becomes its JSON escape


class Sliceable(Protocol):
    """Bytes, or what gives them in slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes | bytearray | memoryview: ...


def sha256(body: Sliceable) -> str:
    """The sha256 of some bytes, in hex."""
    hasher = hashlib.sha256()
    for start in range(0, len(body), SLICE_BYTES):
        hasher.update(body[start : start + SLICE_BYTES])
    return hasher.hexdigest()


def digest(value: Any) -> str:
    """The sha256 of the value's canonical JSON, in hex: the name of the output that the value decides."""
    return sha256(canonical_json(value))
