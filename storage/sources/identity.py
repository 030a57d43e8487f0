"""Identifies source files by the sha256 of their content, wherever they are.

A digest is cached with a fingerprint of the file (path, size, times and inode; in a bucket: key, size and time), so
an unchanged file is hashed once.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from storage.digests import digest
from storage.errors import ObjectMissing, SourceInvalid
from storage.sources.files import SourceFile
from storage.stores.opening import is_in_bucket, open_bucket

REMEMBERED = Path.home() / ".cache" / "gpt2-pipeline" / "digests"
FILE_PIECE_BYTES = 1 << 20
REQUEST_BYTES = 1 << 25  # per request to a bucket


def identify(place: str | Path) -> SourceFile:
    """The file's name, size and sha256; unchanged content is not read again. Raises SourceInvalid."""
    return _identify_object(str(place)) if is_in_bucket(str(place)) else _identify_path(Path(place).absolute())


def _identify_path(path: Path) -> SourceFile:
    try:
        status = path.stat()
        fingerprint = digest([str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
        return SourceFile(path.name, status.st_size, _sha256(fingerprint, _pieces(path)), str(path))
    except OSError as error:
        raise SourceInvalid(f"{path}: cannot be read: {error.strerror}. Check the path and its permissions.") from error


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(FILE_PIECE_BYTES):
            yield piece


def _identify_object(place: str) -> SourceFile:
    store, key = open_bucket(place)
    try:
        status = store.stat(key)
    except ObjectMissing as error:
        raise SourceInvalid(f"{place}: deleted since it was listed. Put it back, or run the command again.") from error
    pieces = (store.read_range(key, start, REQUEST_BYTES) for start in range(0, status.size, REQUEST_BYTES))
    sha256 = status.sha256 or _sha256(digest([place, status.size, status.modified]), pieces)
    return SourceFile(PurePosixPath(key).name, status.size, sha256, place)


def _sha256(fingerprint: str, pieces: Iterator[bytes]) -> str:
    """The sha256 cached under the fingerprint. If it is missing, hash the pieces and cache the result."""
    note = REMEMBERED / fingerprint[:2] / fingerprint
    with suppress(OSError, ValueError):
        sha256, _, checksum = note.read_text().partition(" ")
        if checksum == digest([fingerprint, sha256]):  # a power cut may leave a partial note
            return sha256
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece)
    sha256 = hasher.hexdigest()
    with suppress(OSError):  # with a read-only home, every build hashes again
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{sha256} {digest([fingerprint, sha256])}")
    return sha256
