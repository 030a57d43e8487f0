"""A store in a plain folder: each object is the file at its key. Knows no dataset and no run.

A new object is first written to `.store/tmp`, synced and then hard-linked to its key. `link` fails if the name exists,
so exactly one of several racing writers wins, and a killed process leaves at most a file in `.store/tmp`.
A swap holds a kernel lock, which is released when its holder dies.
"""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from storage import keys
from storage.digests import sha256
from storage.errors import AlreadyExists, Conflict, ObjectCorrupt, ObjectMissing, StorageError, StoreUnusable
from storage.stores.store import LIMIT_BYTES, Body, Capabilities, Object, Stat, check_conditions

INTERNAL = ".store"  # no key begins with a dot, so this folder holds no object
DENIED = "Permission denied: change the folder's owner or mode, or choose another store."
REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space, then run the same command again to continue.",
    errno.EDQUOT: "The disk quota is used up: free some space, then run the same command again to continue.",
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EROFS: "The file system is read-only: mount it writable, or choose another store.",
}


class FolderStore:
    """Objects as files below one folder. An etag is the sha256 of the content."""

    def __init__(self, folder: Path, url: str) -> None:
        try:
            is_file = folder.exists() and not folder.is_dir()
        except OSError:
            is_file = False  # permission denied: the first read reports it
        if is_file:
            raise StoreUnusable(
                f"store {url!r}: {folder} is a file, not a folder. "
                f"Choose another place with --set store_url=…, or move the file away."
            )
        self.url = url
        self._folder = folder

    def read(self, key: str, limit_bytes: int = LIMIT_BYTES) -> Object:
        with self._reading(key) as path, path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > limit_bytes:
                raise ObjectCorrupt(
                    f"object {key!r} of store {self.url!r} has {size_bytes:,} bytes, at most {limit_bytes:,} were "
                    f"expected. Delete it, then run the command that made it again."
                )
            body = file.read(size_bytes)  # read(limit_bytes) would allocate the limit, 64 MiB
        digest = sha256(body)
        return Object(body, digest, digest)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._reading(key) as path, path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def put_new(self, key: str, body: Body) -> str:
        return self._create(key, body, AlreadyExists(f"object {key!r} of store {self.url!r} already exists."))

    def swap(self, key: str, body: Body, etag: str | None) -> str:
        conflict = Conflict(f"object {key!r} of store {self.url!r} has changed since it was read.")
        if etag is None:
            return self._create(key, body, conflict)
        with self._writing(key, body) as (path, temporary), self._swap_lock():
            if not path.exists() or sha256(path.read_bytes()) != etag:
                raise conflict
            temporary.replace(path)
            _sync_folder(path.parent)
        return sha256(body)

    def stat(self, key: str) -> Stat:
        with self._reading(key) as path:
            status = path.stat()
        if not S_ISREG(status.st_mode):
            raise self._missing(key)
        return Stat(key, status.st_size, status.st_mtime)

    def list(self, prefix: str) -> Iterator[Stat]:
        folder, slash, name_start = prefix.rpartition("/")
        if slash:
            keys.check_key(folder)
        with self._reporting(prefix):
            yield from _walk(self._folder / folder, folder + slash, name_start)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._reporting(key), suppress(NotADirectoryError, IsADirectoryError):
            path.unlink(missing_ok=True)

    def probe(self) -> Capabilities:
        check_conditions(self, "its file system")
        return Capabilities("a folder", refuses_damaged=True)  # no network in between

    def unfinished(self, before: float, *, remove: bool = False) -> tuple[str, ...]:
        leftovers = []
        with self._reporting(INTERNAL):
            for path in sorted((self._folder / INTERNAL / "tmp").glob("*")):
                with suppress(FileNotFoundError):  # its writer has just finished
                    if path.stat().st_mtime < before:
                        leftovers.append(f"temporary file {path.relative_to(self._folder)}")
                        if remove:
                            path.unlink()
        return tuple(leftovers)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def link(self, key: str, endpoint: str = "") -> str:  # noqa: ARG002  # a bucket needs it
        return self._path(key).as_uri()

    def _path(self, key: str) -> Path:
        return self._folder / keys.check_key(key)

    def _create(self, key: str, body: Body, exists: StorageError) -> str:
        """Write the object and return its etag; raise `exists` if the key exists."""
        with self._writing(key, body) as (path, temporary):
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                raise exists from error
            _sync_folder(path.parent)
        return sha256(body)

    @contextmanager
    def _reading(self, key: str) -> Iterator[Path]:
        with self._reporting(key):
            try:
                yield self._path(key)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise self._missing(key) from error

    @contextmanager
    def _writing(self, key: str, body: Body) -> Iterator[tuple[Path, Path]]:
        """The key's path and a synced temporary file with the body, which is removed afterwards."""
        path = self._path(key)
        temporary = self._folder / INTERNAL / "tmp" / secrets.token_hex(8)
        with self._reporting(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
                yield path, temporary
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _swap_lock(self) -> Iterator[None]:
        with (self._folder / INTERNAL / "swap.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel when the file closes or its holder dies
            yield

    @contextmanager
    def _reporting(self, key: str) -> Iterator[None]:
        """Turn an OSError into StoreUnusable with a remedy."""
        try:
            yield
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0, "Check the disk, or choose another place with --set store_url=…")
            raise StoreUnusable(f"store {self.url!r}: object {key!r}: {error.strerror or error}. {remedy}") from error

    def _missing(self, key: str) -> ObjectMissing:
        return ObjectMissing(f"store {self.url!r} has no object {key!r}.")


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
            status = os.stat(f"{folder}/{name}")  # noqa: PTH116
        except FileNotFoundError:
            continue  # deleted since the folder was read
        if S_ISDIR(status.st_mode):
            yield from _walk(folder / name, f"{prefix}{name}/", "")
        else:
            yield Stat(prefix + name, status.st_size, status.st_mtime)


def _sync_folder(folder: Path) -> None:
    """Make new names in the folder durable: syncing the file alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
