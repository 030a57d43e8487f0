"""Errors about a store, its contents or a source file: each says what is wrong, what was found, and what to do."""

import re

# Terminal controls (C0 and C1) except tab and line feed, bidi overrides, invisible characters, lone surrogates.
CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    r"\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str, *, lines: bool = False) -> str:
    """The text with control characters as escapes, such as \\x1b, for terminals and logs. `lines` keeps line feeds."""
    text = text if lines else text.replace("\n", "\\n")
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class StorageError(Exception):
    """The base class of these errors. A message quotes names and contents of files, so it is made printable."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ObjectMissing(StorageError):
    """An object, store, dataset version, run or checkpoint does not exist."""


class Conflict(StorageError):
    """The object exists or has changed since it was read, or another process is working on the same dataset."""


class ObjectCorrupt(StorageError):
    """The bytes of an object are damaged, or exceed its size limit."""


class StoreUnusable(StorageError):
    """A store, or a folder on this host, cannot be opened, read or written, and a retry cannot help."""


class StoreUnavailable(StorageError):
    """The store did not respond before the deadline; the same request may succeed later."""


class SourceUnavailable(StorageError):
    """The Hub did not respond before the deadline, or HF_HUB_OFFLINE is set; the same request may succeed later."""


class SourceInvalid(StorageError):
    """A source file cannot be read, has changed, or has the wrong content."""


class ShardCorrupt(StorageError):
    """The bytes of a shard do not match its record."""


class DatasetMismatch(StorageError):
    """A dataset or run in the store does not match the settings, the source files or another copy."""


class CheckpointInvalid(StorageError):
    """A checkpoint is damaged, or belongs to another run, model or process."""
