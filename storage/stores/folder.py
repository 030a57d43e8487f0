"""A store in a plain folder: each object is the file at its key. Independent of datasets and runs.

A new object is written to `.store/tmp`, synced and hard-linked to its key, which fails if the name exists: one of
several racing writers wins. A swap holds a kernel lock. A killed process leaves at most a file in `.store/tmp`.
"""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR
from typing import BinaryIO

from storage import keys
from storage.digests import sha256
from storage.errors import Conflict, ObjectCorrupt, ObjectMissing, StoreUnusable
from storage.stores.store import LIMIT_BYTES, Body, Object, Stat, Store, check_conditions, check_size, sha256_of

SLICE_BYTES = 1 << 23  # of a body in memory at once
INTERNAL = ".store"  # no key begins with a dot, so this folder holds no object
NO_LINKS = "Its file system may lack hard links (exFAT, some network drives): choose a folder on another disk."
REMEDIES = {  # each follows the system's own text, as in "Permission denied"
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, then run the same command again to continue."),
    errno.EACCES: "Change the folder's owner or permissions, or choose another store.",
    **dict.fromkeys((errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK), NO_LINKS),
    errno.EROFS: "Mount it writable, or choose another store.",
}


class FolderStore(Store):
    """Objects as files below one folder. An etag is the sha256 of the content."""

    def __init__(self, folder: Path, url: str) -> None:
        with suppress(OSError):  # permission denied: the first read reports it
            if folder.exists() and not folder.is_dir():
                raise StoreUnusable(f"store {url!r}: {folder} is a file. Choose another store_url, or move it away.")
        self.url, self._folder = url, folder

    def read(self, key: str, limit_bytes: int = LIMIT_BYTES) -> Object:
        with self._opened(key) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            check_size(f"object {key!r} of store {self.url!r}", size_bytes, limit_bytes)
            body = file.read(size_bytes)  # read(limit_bytes) would allocate the limit, 64 MiB
        digest = sha256(body)
        return Object(body, digest, digest)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._opened(key) as file:
            file.seek(start)
            return file.read(length)

    def swap(self, key: str, body: Body, etag: str | None) -> str:
        path = self.local_path(key)
        temporary = self._folder / INTERNAL / "tmp" / secrets.token_hex(8)
        with self._reporting(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    for start in range(0, len(body), SLICE_BYTES):
                        file.write(body[start : start + SLICE_BYTES])
                    file.flush()
                    os.fsync(file.fileno())
                self._move(temporary, key, etag)
                _sync_folder(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
        return sha256_of(body)

    def stat(self, key: str) -> Stat:
        with self._opened(key) as file:
            status = os.fstat(file.fileno())
        return Stat(key, status.st_size, status.st_mtime)

    def list(self, prefix: str) -> Iterator[Stat]:
        folder, slash, name_start = prefix.rpartition("/")
        if slash:
            keys.check_key(folder)
        with self._reporting(prefix):
            self._check_present(prefix)
            yield from _walk(self._folder / folder, folder + slash, name_start)

    def delete(self, key: str) -> None:
        with self._reporting(key), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self.local_path(key).unlink()

    def probe(self) -> tuple[str, bool]:
        check_conditions(self, "its file system")
        return "a folder", True  # no network in between

    def unfinished(self, before: float, *, remove: bool = False) -> Iterator[str]:
        with self._reporting(INTERNAL):
            for path in sorted((self._folder / INTERNAL / "tmp").glob("*")):
                with suppress(FileNotFoundError):  # its writer has just finished
                    if path.stat().st_mtime < before:
                        if remove:
                            path.unlink()
                        yield f"temporary file {path.relative_to(self._folder)}"

    def local_path(self, key: str) -> Path:
        return self._folder / keys.check_key(key)

    def link(self, key: str, endpoint: str = "") -> str:  # noqa: ARG002  # only a bucket needs it
        return self.local_path(key).as_uri()

    def _check_present(self, key: str) -> None:
        """Raise StoreUnusable when the folder is missing or empty: nothing in it can be repaired or made again."""
        if key != keys.FORMAT and not (self._folder / keys.FORMAT).exists() and not any(_walk(self._folder, "", "")):
            raise StoreUnusable(f"store {self.url!r}: the folder is missing or empty. Mount or restore {self._folder}.")

    @contextmanager
    def _opened(self, key: str) -> Iterator[BinaryIO]:
        with self._reporting(key):
            try:
                file = self.local_path(key).open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                self._check_present(key)
                raise ObjectMissing(f"store {self.url!r} has no object {key!r}.") from error
            with file:
                yield file

    def _move(self, temporary: Path, key: str, etag: str | None) -> None:
        """Move a file to a key whose object has `etag` (None: is absent). Raises Conflict."""
        path = self.local_path(key)
        conflict = Conflict(f"object {key!r} of store {self.url!r} exists or has changed. Run the command again.")
        if etag is None:
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                if path.is_dir():  # no retry helps
                    raise ObjectCorrupt(f"{path} should be a file, but is a folder. Move it away.") from error
                raise conflict from error
        else:
            with (self._folder / INTERNAL / "swap.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when its holder closes it or dies
                if not path.exists() or sha256(path.read_bytes()) != etag:
                    raise conflict
                temporary.replace(path)

    @contextmanager
    def _reporting(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0, "Check the disk, or choose another place with --set store_url=…")
            raise StoreUnusable(f"store {self.url!r}: object {key!r}: {error.strerror or error}. {remedy}") from error


def _walk(folder: Path, prefix: str, name_start: str) -> Iterator[Stat]:
    """The objects below `folder`, whose keys begin with `prefix` and whose next part begins with `name_start`."""
    try:
        names = os.listdir(folder)  # noqa: PTH208  # a Path takes 1 KB, and a folder may hold 260,000 names
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if not name.startswith(name_start) or not keys.is_key(name):
            continue  # a file that the store did not write
        try:
            status = os.stat(f"{folder}/{name}")  # noqa: PTH116  # as above
        except FileNotFoundError:
            continue  # deleted since the folder was read
        if S_ISDIR(status.st_mode):
            yield from _walk(folder / name, f"{prefix}{name}/", "")
        else:
            yield Stat(prefix + name, status.st_size, status.st_mtime)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)  # syncing a file does not make its name durable
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
