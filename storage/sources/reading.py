"""Reads source files wherever they are: opens them, and identifies them by their sha256, cached while unchanged."""

import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from storage.digests import digest
from storage.errors import ObjectMissing, SourceInvalid
from storage.sources import hub
from storage.sources.files import SourceFile
from storage.stores.opening import is_in_bucket, open_bucket

REMEMBERED = Path.home() / ".cache" / "gpt2-pipeline" / "digests"
REQUEST_BYTES = 1 << 25  # per request to a bucket, to hash an object


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
        if (length := min(len(buffer), self._size_bytes - self._position)) <= 0:
            return 0
        body = self._read_range(self._position, length)
        buffer[: len(body)] = body
        self._position += len(body)
        return len(body)


def open_source(file: SourceFile) -> Path | RangeFile:
    """The file's path on this host, or the file opened by ranges. Raises SourceInvalid if it changed since the plan."""
    if file.place.startswith(hub.SCHEME):
        return RangeFile(file.size_bytes, partial(hub.read_range, file.place))
    in_bucket = is_in_bucket(file.place)
    is_copy = file.is_converted or file.place.endswith(file.key)
    # Rehashing is skipped for copies in a bucket, and for small Hub files, whose git id is not a sha256.
    is_trusted = is_copy and (in_bucket or hub.COMMIT.fullmatch(file.digest))
    if not is_trusted and (sha256 := identify(file.place).digest) != file.digest:
        remedy = "Delete this damaged copy, then run the command again." if is_copy else "Run the command again."
        problem = f"changed since the plan: expected sha256 {file.digest[:12]}, found {sha256[:12]}"
        raise SourceInvalid(f"{file.place}: {problem}. {remedy}")
    if not in_bucket:
        return Path(file.place)
    store, key = open_bucket(file.place)
    return RangeFile(file.size_bytes, partial(store.read_range, key))


def open_bytes(file: SourceFile, buffer_bytes: int) -> BinaryIO:
    """The source file opened for reading. Raises as `open_source`, and OSError."""
    source = open_source(file)
    return source.open("rb") if isinstance(source, Path) else io.BufferedReader(source, buffer_bytes)


def identify(place: str | Path) -> SourceFile:
    """The file's name, size and sha256; unchanged content is not read again. Raises SourceInvalid."""
    if is_in_bucket(str(place)):
        return _identify_object(str(place))
    path = Path(place).absolute()
    try:
        status = path.stat()
        fingerprint = digest([str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
        return SourceFile(path.name, status.st_size, _sha256(fingerprint, lambda: path.open("rb")), str(path))
    except OSError as error:
        raise SourceInvalid(f"{path}: cannot be read: {error.strerror}. Check the path and its permissions.") from error


def _identify_object(place: str) -> SourceFile:
    store, key = open_bucket(place)
    try:
        status = store.stat(key)
    except ObjectMissing as error:
        raise SourceInvalid(f"{place}: deleted since it was listed. Put it back, or run the command again.") from error
    body: io.BufferedReader = io.BufferedReader(RangeFile(status.size, partial(store.read_range, key)), REQUEST_BYTES)
    sha256 = status.sha256 or _sha256(digest([place, status.size, status.modified]), lambda: body)
    return SourceFile(PurePosixPath(key).name, status.size, sha256, place)


def _sha256(fingerprint: str, opened: Callable[[], io.BufferedReader]) -> str:
    """The sha256 cached under the fingerprint. If it is missing, hash the file and cache the result."""
    note = REMEMBERED / fingerprint[:2] / fingerprint
    with suppress(OSError, ValueError):
        sha256, _, checksum = note.read_text().partition(" ")
        if checksum == digest([fingerprint, sha256]):  # a power cut may leave a partial note
            return sha256
    with opened() as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # with a read-only home, every build hashes again
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{sha256} {digest([fingerprint, sha256])}")
    return sha256
