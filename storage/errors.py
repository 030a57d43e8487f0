"""Every error this package raises about what a store or a source file held. It knows no store and no format.

* StorageError
  - ObjectMissing      a key that should be there is not
  - AlreadyExists      a create-only put lost: the key is taken
  - Conflict           a compare-and-swap lost: the object is no longer the one that was read
  - ObjectCorrupt      an object's bytes are not those that were put, or more than can be
  - StoreUnusable      the store itself: not a folder, read-only, full, refusing its user, of a newer layout
  - StoreUnavailable   the store does not answer; it may later
  - SourceUnavailable  where the source files are does not answer; it may later
  - SourceInvalid      a source file: cut, without the text column, null or non-string text
  - ShardCorrupt       a shard's bytes are not those its record promises
  - DatasetMismatch    a dataset or run name is bound to other settings
  - CheckpointInvalid  a checkpoint is damaged, or belongs to another model or dataset

What a user wrote wrongly is a ValueError. Each message says what was asked, what was found and what to do.
"""


class StorageError(Exception):
    """What a store or a source file held is not what the pipeline needs."""


class ObjectMissing(StorageError):
    """A key that should be there is not."""


class AlreadyExists(StorageError):
    """A create-only put found the key taken."""


class Conflict(StorageError):
    """A compare-and-swap found another object than the one that was read."""


class ObjectCorrupt(StorageError):
    """An object's bytes are not those that were put, or larger than such an object can be."""


class StoreUnusable(StorageError):
    """The store cannot be opened, read or written at all."""


class StoreUnavailable(StorageError):
    """The store did not answer for as long as we wait; the same request may succeed later."""


class SourceUnavailable(StorageError):
    """The place of the source files did not answer for as long as we wait; the same request may succeed later."""


class SourceInvalid(StorageError):
    """A source file cannot be read as documents."""


class ShardCorrupt(StorageError):
    """A shard's bytes differ from its record."""


class DatasetMismatch(StorageError):
    """A name in the store is bound to other settings."""


class CheckpointInvalid(StorageError):
    """A checkpoint is damaged or belongs to something else."""
