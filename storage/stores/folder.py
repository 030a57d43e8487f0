"""A store in a plain folder: objects are files, found where their key says. Knows no dataset and no run.

A new object is written beside the objects under `.store/tmp`, synced and then linked to its key: `link` fails when the
name is taken, so of any number of writers one wins, and a process killed at any instruction leaves at most a file in
`.store/tmp`. A swap holds a lock of the kernel's, which a dead holder cannot keep.
"""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR

from storage import keys
from storage.digests import sha256
from storage.errors import AlreadyExists, Conflict, ObjectCorrupt, ObjectMissing, StoreUnusable
from storage.stores.store import LIMIT_BYTES, Body, Capabilities, Object, Stat, check_conditions

OWN = ".store"  # no key begins with a dot, so nothing in here is an object


class FolderStore:
    """Objects as files below one folder. An etag is the sha256 of the content."""

    def __init__(self, folder: Path, url: str) -> None:
        try:
            is_file = folder.exists() and not folder.is_dir()
        except OSError:
            is_file = False  # nobody may look: the first read says so
        if is_file:
            raise StoreUnusable(
                f"store {url!r}: {folder} should be a folder, found a file. "
                f"Choose another place with --set store_url=…, or move the file away."
            )
        self.url = url
        self._folder = folder

    def read(self, key: str, limit_bytes: int = LIMIT_BYTES) -> Object:
        """The whole object. Raises ObjectMissing, and ObjectCorrupt for one of more than `limit_bytes`."""
        with self._reading(key) as path, path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > limit_bytes:
                raise ObjectCorrupt(
                    f"object {key!r} of store {self.url!r}: at most {limit_bytes:,} bytes were expected, found "
                    f"{size:,}. Something else was put there: delete it, then run the command that made it again."
                )
            body = file.read(size)  # a buffer is made for what is asked, 64 MiB if that is the limit
        digest = sha256(body)
        return Object(body, digest, digest)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the object ends. Raises ObjectMissing."""
        with self._reading(key) as path, path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def put_new(self, key: str, body: Body) -> str:
        """Create the object and return its etag. Of any number of racing writers one wins; raises AlreadyExists."""
        with self._writing(key, body) as (path, temporary):
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                raise AlreadyExists(f"object {key!r} of store {self.url!r} is there already.") from error
            _sync_folder(path.parent)
        return sha256(body)

    def swap(self, key: str, body: Body, etag: str | None) -> str:
        """Replace the object that `etag` names (None: there is none yet), return the new etag. Raises Conflict."""
        with self._writing(key, body) as (path, temporary), self._swap_lock():
            found = sha256(path.read_bytes()) if path.exists() else None
            try:
                if found != etag:
                    raise FileExistsError
                if etag is None:  # a put takes no lock: a link fails where one came first
                    os.link(temporary, path)
                else:
                    temporary.replace(path)
            except FileExistsError as error:
                raise Conflict(f"object {key!r} of store {self.url!r} is not the one that was read.") from error
            _sync_folder(path.parent)
        return sha256(body)

    def stat(self, key: str) -> Stat:
        """Size and time of the object. Raises ObjectMissing."""
        with self._reading(key) as path:
            found = path.stat()
            if not path.is_file():
                raise IsADirectoryError
        return Stat(key, found.st_size, found.st_mtime)

    def list(self, prefix: str) -> Iterator[Stat]:
        """Every object whose key begins with `prefix`."""
        folder, slash, start = prefix.rpartition("/")
        if slash:
            keys.check_key(folder)
        with self._explained(prefix):
            yield from _walk(self._folder / folder, folder + slash, start)

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when it is not there."""
        path = self._path(key)
        with self._explained(key), suppress(NotADirectoryError, IsADirectoryError):
            path.unlink(missing_ok=True)

    def probe(self) -> Capabilities:
        """Prove that conditional writes are honoured. Raises StoreUnusable when they are not."""
        check_conditions(self, "its file system")
        return Capabilities("a folder", refuses_damaged=True)  # nothing lies between us and the file

    def unfinished(self, before: float, *, remove: bool = False) -> tuple[str, ...]:
        """Temporary files that were begun before a time (Unix seconds), of writers that were killed."""
        found = []
        with self._explained(OWN):
            for path in sorted((self._folder / OWN / "tmp").glob("*")):
                with suppress(FileNotFoundError):  # its writer has just ended
                    if path.stat().st_mtime < before:
                        found.append(f"temporary file {path.relative_to(self._folder)}")
                        if remove:
                            path.unlink()
        return tuple(found)

    def local_path(self, key: str) -> Path | None:
        """The file that holds the object."""
        return self._path(key)

    def link(self, key: str, endpoint: str = "") -> str:  # noqa: ARG002  # a bucket's
        """The file's address on this host."""
        return self._path(key).as_uri()

    def _path(self, key: str) -> Path:
        return self._folder / keys.check_key(key)

    @contextmanager
    def _reading(self, key: str) -> Iterator[Path]:
        try:
            yield self._path(key)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ObjectMissing(f"store {self.url!r} has no object {key!r}.") from error
        except OSError as error:
            raise self._unusable(key, error) from error

    @contextmanager
    def _writing(self, key: str, body: Body) -> Iterator[tuple[Path, Path]]:
        """The key's path, and a temporary file that holds all of the body, synced; it is gone afterwards."""
        path = self._path(key)
        temporary = self._folder / OWN / "tmp" / secrets.token_hex(8)
        with self._explained(key):
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
        with (self._folder / OWN / "swap.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # freed by the kernel when the file closes or its holder dies
            yield

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unusable(key, error) from error

    def _unusable(self, key: str, error: OSError) -> StoreUnusable:
        remedy = {
            errno.ENOSPC: "The disk is full: free some space and run the same command again, it goes on from here.",
            errno.EDQUOT: "The disk quota is used up: free some space and run the same command again.",
            errno.EACCES: "This user may not: change the folder's owner or mode, or choose another store.",
            errno.EPERM: "This user may not: change the folder's owner or mode, or choose another store.",
            errno.EROFS: "The file system is read-only: mount it writable, or choose another store.",
        }.get(error.errno or 0, "Check the disk, or choose another place with --set store_url=…")
        return StoreUnusable(f"store {self.url!r}: object {key!r}: {error.strerror or error}. {remedy}")


def _walk(folder: Path, prefix: str, start: str) -> Iterator[Stat]:
    """Objects below `folder` whose key is `prefix`, then something that begins with `start`."""
    try:
        names = os.listdir(folder)  # noqa: PTH208  # a Path takes 1 KB, and there may be 260,000
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if not name.startswith(start) or not keys.is_key(name):
            continue  # whatever else lies in the folder is none of our objects
        try:
            found = os.stat(f"{folder}/{name}")  # noqa: PTH116
        except FileNotFoundError:
            continue  # deleted since the folder was read
        if S_ISDIR(found.st_mode):
            yield from _walk(folder / name, f"{prefix}{name}/", "")
        else:
            yield Stat(prefix + name, found.st_size, found.st_mtime)


def _sync_folder(folder: Path) -> None:
    """A name is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
