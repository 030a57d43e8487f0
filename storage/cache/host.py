"""A cache of files that all processes on this host share. Each file is named by its sha256 and downloaded once.

A file is written as `part` under its folder's lock, synced and renamed. A shared lock keeps an open file from eviction.
Locks are `flock`: the kernel releases them when their holder ends, so a dead process blocks nobody.
"""

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from storage.errors import StoreUnusable

FOLDER = Path.home() / ".cache" / "gpt2-pipeline" / "shards"
QUARANTINE = "quarantine"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class HostCache:
    """A folder of at most `limit_bytes`, evicted by LRU. Files in use are never evicted, even beyond the limit."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes

    def has(self, sha256: str) -> bool:
        return self._path(sha256).exists()

    def open(self, sha256: str, fetch: Callable[[], bytes | bytearray]) -> BinaryIO:
        """The cached or fetched file, unverified. While open or mapped, it is not evicted. Raises StoreUnusable."""
        path = self._path(sha256)
        try:
            return _open_locked(path) or self._fetch(path, fetch)
        except OSError as error:
            remedy = "Free some space, make the folder writable, or set HOME to another folder."
            raise StoreUnusable(f"cache {self._folder}: {error.strerror or error}. {remedy}") from error

    def quarantine(self, sha256: str) -> None:
        """Move a damaged file out of the way. It is kept for inspection until `gpt2 gc` deletes it."""
        place = self._folder / QUARANTINE / f"{sha256}-{secrets.token_hex(4)}"
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process moved it first
            self._path(sha256).rename(place)

    def quarantined(self) -> list[Path]:
        return sorted((self._folder / QUARANTINE).glob("*"))

    def used_bytes(self) -> int:
        """Size of all cached files, without those in quarantine."""
        return sum(size for _, size, _ in self._files())

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256

    def _fetch(self, path: Path, fetch: Callable[[], bytes | bytearray]) -> BinaryIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):  # other processes wait here for the download
            if file := _open_locked(path):
                return file
            body = fetch()
            self._make_room(len(body), self._limit_bytes)
            try:
                return _write(path, body)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                self._make_room(len(body), self.used_bytes())  # other files filled the disk: free the size of this one
                return _write(path, body)

    def _make_room(self, needed_bytes: int, limit_bytes: int) -> None:
        with _locked(self._folder):
            files = sorted(self._files())
            used_bytes = sum(size for _, size, _ in files)
            for _, size, path in files:
                if used_bytes + needed_bytes <= limit_bytes:
                    return
                if _evict(path):
                    used_bytes -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of each cached file."""
        for path in self._folder.glob(f"[0-9a-f][0-9a-f]/{64 * '?'}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_mtime, status.st_size, path


def _open_locked(path: Path) -> BinaryIO | None:
    """The cached file with a shared lock, which keeps it from being evicted; None if it is missing."""
    with suppress(FileNotFoundError):
        file = path.open("rb")
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink:
            os.utime(path)  # last used: now
            return file
        file.close()  # evicted between open and lock
    return None


def _write(path: Path, body: bytes | bytearray) -> BinaryIO:
    """The new file, open and locked before it is renamed, so that it cannot be evicted in between."""
    part = path.with_name("part")  # one writer per folder, which overwrites the part of a killed writer
    file = part.open("w+b")
    try:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
        fcntl.flock(file, fcntl.LOCK_SH)
        part.rename(path)
        file.seek(0)
        return file
    except OSError:
        part.unlink(missing_ok=True)
        file.close()  # raises too when the disk is full and bytes are still buffered
        raise


def _evict(path: Path) -> bool:
    with suppress(BlockingIOError, FileNotFoundError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may have the descriptor, too: closing is not enough
        os.close(descriptor)
