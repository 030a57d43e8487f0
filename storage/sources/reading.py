"""Opens a source file on this host, in a bucket or on the Hub. Independent of the format."""

import io
from collections.abc import Callable
from pathlib import Path

from storage.errors import SourceInvalid
from storage.sources import hub
from storage.sources.files import SourceFile
from storage.sources.identity import identify
from storage.stores.opening import is_in_bucket, open_bucket


class RangeFile(io.RawIOBase):
    """A seekable file of known size that is read through `read_range(start, length)`."""

    def __init__(self, size_bytes: int, read_range: Callable[[int, int], bytes]) -> None:
        self._size_bytes, self._read_range, self._position = size_bytes, read_range, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's name for it is private
        length = min(len(buffer), self._size_bytes - self._position)
        if length <= 0:
            return 0
        body = self._read_range(self._position, length)
        buffer[: len(body)] = body
        self._position += len(body)
        return len(body)


def open_source(file: SourceFile) -> Path | RangeFile:
    """The path of a source file on this host, or the file opened for reading by ranges.

    Raises SourceInvalid if the file has changed since it was planned. A Hub commit cannot change, and neither can an
    object named by its digest.
    """
    if file.place.startswith(hub.SCHEME):
        return RangeFile(file.size_bytes, lambda start, length: hub.read_range(file.place, start, length))
    in_bucket = is_in_bucket(file.place)
    is_copy = file.place.endswith(file.key)
    # Rehashing is skipped for copies in a bucket, and for small Hub files, whose git id is not a sha256.
    is_trusted = is_copy and (in_bucket or hub.COMMIT.fullmatch(file.digest))
    if not is_trusted and (digest := identify(file.place).digest) != file.digest:
        remedy = "Delete this damaged copy, then run the command again." if is_copy else "Run the command again."
        raise SourceInvalid(
            f"{file.place}: the file has changed since the plan: expected sha256 {file.digest[:12]}, "
            f"found {digest[:12]}. {remedy}"
        )
    if not in_bucket:
        return Path(file.place)
    store, key = open_bucket(file.place)
    return RangeFile(file.size_bytes, lambda start, length: store.read_range(key, start, length))
