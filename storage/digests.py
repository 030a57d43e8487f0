"""Canonical JSON and SHA-256 digests, which name recipes and objects."""

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """The value as JSON with sorted keys, no spaces and no NaN: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")  # a lone surrogate becomes its JSON escape


def sha256(body: bytes | bytearray | memoryview) -> str:
    """The sha256 of some bytes, in hex."""
    return hashlib.sha256(body).hexdigest()


def digest(value: Any) -> str:
    """The sha256 of the value's canonical JSON, in hex: the name of the output that the value decides."""
    return sha256(canonical_json(value))
