"""Source files: what a file is, and what a listing of them is. Finds no file and reads none."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from storage import keys
from storage.errors import SourceInvalid

SUFFIXES = (".parquet", ".jsonl")  # each has its reader in `documents.READERS`


@dataclass(frozen=True)
class SourceFile:
    """One file of a dataset as published: name, size, digest, and the place where it can be read.

    A place is a path on this host, `s3://bucket/key`, or `hf://datasets/{id}@{commit}/{path}`. The digest is of the
    content: a sha256, or git's id for a small file of the Hub.
    """

    name: str
    size_bytes: int
    digest: str
    place: str

    @property
    def stem(self) -> str:
        """The name without folder and suffix, as it can be part of a key."""
        return keys.as_name(PurePosixPath(self.name).stem)[:120] or "source"

    @property
    def key(self) -> str:
        """The key of its copy in a store."""
        return keys.source(self.digest, self.stem + PurePosixPath(self.name).suffix)


@dataclass(frozen=True)
class Listing:
    """The files of a source in order, and their origin: dataset, config, commit and licence; empty for local files."""

    files: tuple[SourceFile, ...]
    origin: dict[str, str]

    def described(self) -> dict[str, Any]:
        """The source as a manifest holds it. It does not depend on where the files are read."""
        columns = {name: [getattr(file, name) for file in self.files] for name in ("name", "digest", "size_bytes")}
        return self.origin | {"files": columns}


def with_distinct_names(files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    """The files; if two have the same name, each is named by its path below the folder that holds them all."""
    if len({file.name for file in files}) == len(files):
        return tuple(files)
    common = os.path.commonpath([PurePosixPath(file.place).parent for file in files])
    return tuple(replace(file, name=str(PurePosixPath(file.place).relative_to(common))) for file in files)


def check_distinct(files: Sequence[SourceFile]) -> None:
    """Raise SourceInvalid if a file is listed twice: its shards would have the same names."""
    seen: dict[tuple[str, str], SourceFile] = {}
    for file in files:
        other = seen.setdefault((file.stem, file.digest), file)
        if other is not file:
            raise SourceInvalid(
                f"{other.place}: the same file (name and content) as {file.place}. Remove one of them from data.source."
            )
