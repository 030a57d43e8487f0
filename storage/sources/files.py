"""Source files: where documents come from, and what tells them apart. Reads no document.

A source file is known by the digest of its content, never by where it lies: its sha256, or for a small file of the Hub
git's id of it. Hashing a file that has not changed since it was hashed last (same path, size, times and inode; in a
bucket: same key, size and time) is remembered, so that a second run reads no file again.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from storage import keys
from storage.digests import digest
from storage.errors import ObjectMissing, SourceInvalid

if TYPE_CHECKING:
    from storage.stores.s3 import S3Store

SUFFIXES = (".parquet", ".jsonl")
REMEMBERED = Path.home() / ".cache" / "gpt2-pipeline" / "digests"
BUCKET = re.compile(r"(s3(?:\+http)?)://([^/]+)/(.+)")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PIECE_BYTES = 1 << 20  # of a file of this host
READ_BYTES = 1 << 25  # a request of a bucket: 32 MiB


@dataclass(frozen=True)
class SourceFile:
    """One file of the dataset as published: name, size, digest, and the place where it can be read.

    A place is a path on this host, `s3://bucket/key`, or `hf://datasets/{id}@{commit}/{path}`.
    """

    name: str
    size_bytes: int
    digest: str
    place: str

    @property
    def stem(self) -> str:
        """Its name without folder and suffix, as it can stand in a key."""
        return keys.as_name(PurePosixPath(self.name).stem)[:120] or "source"

    @property
    def key(self) -> str:
        """Where a copy of it lies in a store."""
        return keys.source(self.digest, self.stem + PurePosixPath(self.name).suffix)


@dataclass(frozen=True)
class Listing:
    """The files of a source in order, and what is known of where they come from: nothing for local ones."""

    files: tuple[SourceFile, ...]
    origin: dict[str, str]

    def described(self) -> dict[str, Any]:
        """What a manifest says of where its text came from: nothing of it depends on where the files lie."""
        columns = {name: [getattr(file, name) for file in self.files] for name in ("name", "digest", "size_bytes")}
        return self.origin | {"files": columns}


def is_on_hub(source: str) -> bool:
    """Whether a source names a Hub dataset: `owner/name`, and nothing on this host is called so."""
    return bool(HUB_NAME.fullmatch(source)) and Path(source).suffix not in SUFFIXES and not Path(source).exists()


def find_files(source: str) -> list[str]:
    """The places of the source files that a path, a folder or a glob names, sorted. Raises ValueError for none."""
    found = _in_bucket(source) if BUCKET.match(source) else _on_host(source)
    if not found:
        where = "" if BUCKET.match(source) else f" (looked in {Path.cwd()})"
        raise ValueError(
            f"data.source = {source!r}: no such file was found{where}. "
            f"Give a path, a folder or a quoted glob of {' or '.join(SUFFIXES)} files, or a Hub dataset as owner/name."
        )
    for place in found:
        if not place.endswith(SUFFIXES):
            raise ValueError(
                f"data.source = {source!r}: {place} is neither {' nor '.join(SUFFIXES)}. "
                f"Narrow the glob, or convert the file."
            )
    return found


def identify(place: str | Path) -> SourceFile:
    """The file's name, size and sha256; read only when it has changed since it was identified last."""
    return _identify_object(str(place)) if BUCKET.match(str(place)) else _identify_path(Path(place).absolute())


def with_distinct_names(files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    """The files, each named from the folder that holds them all: two called the same can be told apart."""
    if len({file.name for file in files}) == len(files):
        return tuple(files)
    common = os.path.commonpath([PurePosixPath(file.place).parent for file in files])
    return tuple(replace(file, name=str(PurePosixPath(file.place).relative_to(common))) for file in files)


def check_distinct(files: Sequence[SourceFile]) -> None:
    """Raise SourceInvalid for the same file twice: its shards would have the same names."""
    found: dict[tuple[str, str], SourceFile] = {}
    for file in files:
        other = found.setdefault((file.stem, file.digest), file)
        if other is not file:
            raise SourceInvalid(
                f"{other.place}: the same file (name and content) was found twice, as {file.place} too. "
                f"Leave one out of data.source."
            )


def bucket_of(place: str) -> tuple["S3Store", str]:
    """The bucket of an `s3://` place, opened for reading, and the key in it."""
    from storage.stores.s3 import S3Store  # boto3 takes 0.3 s to import, which a folder does not need

    found = BUCKET.fullmatch(place)
    assert found is not None
    scheme, bucket, key = found.groups()
    return S3Store(bucket, "", f"{scheme}://{bucket}", plain_http=scheme != "s3", foreign=True), key


def _on_host(source: str) -> list[str]:
    place = Path(source).expanduser()
    if place.is_file():  # its name may hold what a glob would not take literally
        return [str(place)]
    if place.is_dir():
        return sorted(str(path) for path in place.iterdir() if path.suffix in SUFFIXES and path.is_file())
    matches = glob.glob(str(place), recursive=True)  # noqa: PTH207  # a pattern may be absolute
    return sorted(name for name in matches if not Path(name).is_dir())


def _in_bucket(source: str) -> list[str]:
    store, pattern = bucket_of(source)
    fixed = re.split(r"[*?\[]", pattern)[0]
    names = [found.key for found in store.list(fixed)]
    if pattern in names:
        return [f"{store.url}/{pattern}"]
    if fixed == pattern:  # a folder
        folder = pattern.rstrip("/") + "/"
        inside = [name for name in names if name.startswith(folder) and "/" not in name.removeprefix(folder)]
        return sorted(f"{store.url}/{name}" for name in inside if name.endswith(SUFFIXES))
    # As in a folder's glob: * and ? stay within one level, ** crosses them.
    spelled = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return sorted(f"{store.url}/{name}" for name in names if re.fullmatch(spelled, name))


def _identify_path(path: Path) -> SourceFile:
    try:
        found = path.stat()
        facts = [str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        sha256 = _hashed(facts, _pieces(path))
    except OSError as error:
        raise SourceInvalid(f"{path}: cannot be read: {error.strerror}. Check the path and its mode.") from error
    return SourceFile(path.name, found.st_size, sha256, str(path))


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _identify_object(place: str) -> SourceFile:
    store, key = bucket_of(place)
    try:
        found = store.stat(key)
    except ObjectMissing as error:
        raise SourceInvalid(f"{place}: was listed, is gone now. Put it back, or run the command again.") from error
    starts = range(0, found.size, READ_BYTES)
    sha256 = found.sha256 or _hashed(
        [place, found.size, found.modified], (store.read_range(key, start, READ_BYTES) for start in starts)
    )
    return SourceFile(PurePosixPath(key).name, found.size, sha256, place)


def _hashed(facts: list[object], pieces: Iterator[bytes]) -> str:
    """The sha256 of the pieces, remembered under the facts that tell whether they are still the same."""
    sign = digest(facts)
    note = REMEMBERED / sign[:2] / sign
    remembered = _remembered(note, sign)
    if remembered is not None:
        return remembered
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece)
    _remember(note, f"{hasher.hexdigest()} {digest([sign, hasher.hexdigest()])}")
    return hasher.hexdigest()


def _remembered(note: Path, sign: str) -> str | None:
    """What the note says, when all of it is there: a power cut may have left an empty file."""
    try:
        sha256, _, check = note.read_text().partition(" ")
    except (OSError, ValueError):
        return None
    return sha256 if check == digest([sign, sha256]) else None


def _remember(note: Path, text: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(note)
    except OSError:
        pass  # a home that cannot be written costs time, never correctness
