"""Files that every process of this host shares, named by their sha256: one download for all, bounded, safe to kill.

    open ─▶ there? ─▶ locked (shared) against eviction ─▶ the caller's
             │ no
             └─▶ folder lock ─▶ still not there? ─▶ make room ─▶ part ─▶ fsync ─▶ rename

All locks are the kernel's (`flock`) and end with their holder, so a dead process blocks nobody. Knows no shard.
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
from storage.stores.store import Body

FOLDER = Path.home() / ".cache" / "gpt2-pipeline" / "shards"
QUARANTINE = "quarantine"
FULL = (errno.ENOSPC, errno.EDQUOT)


class HostCache:
    """A folder of at most `limit_bytes`, the least recently used files of which go first; none that is in use."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def has(self, sha256: str) -> bool:
        """Whether the file is there, whatever it holds."""
        return self._path(sha256).exists()

    def open(self, sha256: str, fetch: Callable[[], Body]) -> BinaryIO:
        """The file of that sha256, fetched where it is not there; it stays as long as this or a map of it is open.

        Raises StoreUnusable where the folder cannot be written, and what `fetch` raises. The bytes are the caller's to
        check: they may have been damaged since.
        """
        path = self._path(sha256)
        try:
            while True:
                with suppress(FileNotFoundError):
                    file = path.open("rb")
                    fcntl.flock(file, fcntl.LOCK_SH)
                    if os.fstat(file.fileno()).st_nlink:  # else it was evicted between the two lines above
                        os.utime(path)  # used last: now
                        return file
                    file.close()
                if (fetched := self._fetch(path, fetch)) is not None:
                    return fetched
        except OSError as error:
            raise StoreUnusable(
                f"cache {self._folder}: {error.strerror or error}. Free some space, set a smaller "
                f"resources.cache_bytes, or let HOME be a folder that can be written."
            ) from error

    def set_aside(self, sha256: str) -> None:
        """Move a damaged file to the quarantine, where it can be looked at until `gpt2 gc` removes it."""
        place = self._folder / QUARANTINE / f"{sha256}-{secrets.token_hex(4)}"
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process was faster
            self._path(sha256).rename(place)

    def quarantined(self) -> list[Path]:
        """The files that were set aside."""
        return sorted((self._folder / QUARANTINE).glob("*"))

    def used_bytes(self) -> int:
        """Size of all files but those in the quarantine."""
        return sum(size for _, size, _ in self._files())

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256

    def _fetch(self, path: Path, fetch: Callable[[], Body]) -> BinaryIO | None:
        """The file, fetched; None when another process has done so meanwhile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):  # the others wait here for the one that fetches
            if path.exists():
                return None
            body = fetch()
            self._make_room(len(body), self._limit_bytes)
            try:
                return _write(path, body)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                self._make_room(len(body), self.used_bytes())  # others fill the disk: give back as much as we need
                return _write(path, body)

    def _make_room(self, wanted_bytes: int, limit_bytes: int) -> None:
        with _locked(self._folder):
            files = sorted(self._files())
            used = sum(size for _, size, _ in files)
            for _, size, path in files:
                if used + wanted_bytes <= limit_bytes:
                    return
                used -= size if _evict(path) else 0

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each file was used last, its size and its path."""
        for path in self._folder.glob(f"[0-9a-f][0-9a-f]/{64 * '?'}"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime, found.st_size, path


def _write(path: Path, body: Body) -> BinaryIO:
    """The new file, open and locked before it has its name, so that nobody can evict it in between."""
    part = path.with_name("part")  # one writer a folder: what a killed one left is written over
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
        file.close()
        part.unlink(missing_ok=True)
        raise


def _evict(path: Path) -> bool:
    """Remove the file unless a process has it open."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
    except (BlockingIOError, FileNotFoundError):
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
