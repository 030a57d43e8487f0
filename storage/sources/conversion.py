"""Converts files that cannot be read by rows to parquet in the store, once. Packs small files into larger parts.

A record, named by what decides the rows, names the parquet file by its sha256. It is written before the file, so that
gpt2 gc never deletes a file that a conversion reuses. A record without its file does not count.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from storage import keys
from storage.digests import canonical_json, digest
from storage.errors import ObjectMissing
from storage.sources.files import SourceFile
from storage.sources.formats import Opened, write_parquet
from storage.sources.selection import JSON, TEXT
from storage.stores.store import Body, FileBody, Store, overwrite, put_once, read_as

FORMAT = 1  # raise it when the same file would give other rows
SMALL_BYTES, PACK_BYTES = 4_000_000, 64_000_000


@dataclass(frozen=True)
class Conversion:
    """The record of a conversion: the parquet file's sha256 and size."""

    digest: str
    size_bytes: int

    @property
    def key(self) -> str:
        return keys.converted(self.digest, ".parquet")


def pack(files: Sequence[SourceFile]) -> Iterator[SourceFile]:
    """The files, with neighbouring small files of JSON or of text as parts of about PACK_BYTES."""

    def kind(file: SourceFile) -> tuple[tuple[str, ...], dict[str, str | None]]:
        is_packed = file.size_bytes < SMALL_BYTES and not file.is_read_by_rows
        formats = next((formats for formats in (JSON, TEXT) if file.suffix.format in formats), ())
        return formats if is_packed else (), file.columns

    for (formats, _), group in groupby(files, kind):
        part: list[SourceFile] = []
        for file in group:
            part.append(file)
            # A file's own digest decides whether a part ends after it, so one more file changes at most two parts.
            if not formats or int(file.digest[:15], 16) / 16**15 < file.size_bytes / PACK_BYTES:
                yield _as_one(part)
                part = []
        if part:
            yield _as_one(part)


def _as_one(part: list[SourceFile]) -> SourceFile:
    if len(part) == 1:
        return part[0]
    name, size_bytes = f"{part[0].name}..{part[-1].name.rpartition('/')[2]}", sum(file.size_bytes for file in part)
    named = digest([[file.digest, file.suffix.format] for file in part])
    return replace(part[0], name=name, size_bytes=size_bytes, digest=named, members=tuple(part))


def locate_converted(store: Store, file: SourceFile) -> SourceFile:
    """The file with its place, digest and size changed to those of its parquet file, if the store has one."""
    conversion = read_as(store, _record_key(file), Conversion)
    with suppress(ObjectMissing):
        if conversion and store.stat(conversion.key).size == conversion.size_bytes:
            place = place_of(store, conversion.key)
            return replace(file, place=place, digest=conversion.digest, size_bytes=conversion.size_bytes, members=())
    return file


def convert(store: Store, file: SourceFile, opened: Opened, folder: Path) -> None:
    """Write the record, and the rows as parquet, which grows in `folder`. Raises as `write_parquet`, and OSError."""
    with tempfile.TemporaryFile(dir=folder) as output:  # without a name: a killed process leaves nothing
        write_parquet(file.members or (file,), opened, output)
        body = FileBody(output)
        conversion = Conversion(body.sha256, len(body))
        overwrite(store, _record_key(file), canonical_json(asdict(conversion)))
        put_named_by_content(store, conversion.key, body)


def place_of(store: Store, key: str) -> str:
    """The place of an object of the store, to read it as a source file."""
    path = store.local_path(key)
    return f"{store.url.rstrip('/')}/{key}" if path is None else str(path)


def put_named_by_content(store: Store, key: str, body: Body) -> None:
    """Put an object whose key names its content. A stored object of another size is damaged, and is replaced."""
    with suppress(ObjectMissing):
        if store.stat(key).size != len(body):
            store.delete(key)
    put_once(store, key, body)


def _record_key(file: SourceFile) -> str:
    return keys.converted(digest({"format": FORMAT, "source": file.digest, "suffix": "".join(file.suffix)}), ".json")
