"""Opens a source file wherever it lies: a path of this host, a bucket, or the Hub, by ranges. Knows no format."""

import io
from collections.abc import Callable
from pathlib import Path

from storage.errors import SourceInvalid
from storage.sources import hub
from storage.sources.files import SourceFile
from storage.sources.finding import BUCKET, bucket_of
from storage.sources.identity import identify


class RangeFile(io.RawIOBase):
    """A file of known size that is read by ranges: `read_range(start, length)` gives its bytes."""

    def __init__(self, size_bytes: int, read_range: Callable[[int, int], bytes]) -> None:
        self._size_bytes, self._read_range, self._at = size_bytes, read_range, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Stand at the offset; reads nothing."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        return self._at

    def tell(self) -> int:
        """Where it stands."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's name for it is private
        """Fill the buffer with one request."""
        length = min(len(buffer), self._size_bytes - self._at)
        if length <= 0:
            return 0
        body = self._read_range(self._at, length)
        buffer[: len(body)] = body
        self._at += len(body)
        return len(body)


def open_source(file: SourceFile) -> Path | RangeFile:
    """The path of a source file that lies on this host, else the file opened for reading.

    Raises SourceInvalid when the place no longer holds what was planned with. A commit of the Hub cannot change, nor
    can an object that is named by its digest.
    """
    if file.place.startswith(hub.SCHEME):
        return RangeFile(file.size_bytes, lambda start, length: hub.read_range(file.place, start, length))
    # What was copied into a store is named by its digest; git's, of a small file, is no sha256 to compare with.
    named = BUCKET.match(file.place) or hub.COMMIT.fullmatch(file.digest)
    if not (named and file.place.endswith(file.key)):
        found = identify(file.place).digest
        if found != file.digest:
            raise SourceInvalid(
                f"{file.place}: planned with sha256 {file.digest[:12]}…, it has changed since. "
                + ("Delete that copy. " if file.place.endswith(file.key) else "")
                + "Run the command again."
            )
    if not BUCKET.match(file.place):
        return Path(file.place)
    store, key = bucket_of(file.place)
    return RangeFile(file.size_bytes, lambda start, length: store.read_range(key, start, length))
