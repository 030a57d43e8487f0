"""Every error that storage raises about a store or a source file.

Invalid user input is a ValueError. Each message says what is wrong, what was found where, and what to do.
"""


class StorageError(Exception):
    """The base class: a store or a source file is missing, damaged, changed, unusable or unreachable."""


class ObjectMissing(StorageError):
    """The key does not exist."""


class AlreadyExists(StorageError):
    """A create-only put failed because the key exists."""


class Conflict(StorageError):
    """The object has changed since it was read, or another process holds the dataset's lease."""


class ObjectCorrupt(StorageError):
    """The bytes of an object are damaged, or exceed its size limit."""


class StoreUnusable(StorageError):
    """The store cannot be opened, read or written at all."""


class StoreUnavailable(StorageError):
    """The store did not respond before the deadline; the same request may succeed later."""


class SourceUnavailable(StorageError):
    """The Hub did not respond before the deadline, or HF_HUB_OFFLINE is set; the same request may succeed later."""


class SourceInvalid(StorageError):
    """A source file cannot be read as documents."""


class ShardCorrupt(StorageError):
    """The bytes of a shard do not match its record."""


class DatasetMismatch(StorageError):
    """A name in the store is bound to other settings."""


class CheckpointInvalid(StorageError):
    """A checkpoint is damaged, or belongs to another model or dataset."""
