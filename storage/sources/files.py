"""Finds source files by path, folder or glob, on this host or in a bucket. Opens none of them."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from storage import keys
from storage.errors import SourceInvalid
from storage.stores.opening import is_in_bucket, open_bucket

SUFFIXES = (".parquet", ".jsonl")  # each has its reader in `documents.READERS`
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


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
        """The name without folder and suffix, in the characters that a key may have."""
        return keys.as_name(PurePosixPath(self.name).stem)[:120] or "source"

    @property
    def key(self) -> str:
        return keys.source(self.digest, self.stem + PurePosixPath(self.name).suffix)


@dataclass(frozen=True)
class Listing:
    """The files of a source in order, and their origin: dataset, config, commit and licence; empty for local files."""

    files: tuple[SourceFile, ...]
    origin: dict[str, str]


def with_distinct_names(files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    """The files; if two have the same name, each is named by its path below their common folder."""
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
                f"{other.place}: the same file (name and content) as {file.place}. Narrow data.source or delete a copy."
            )


def is_on_hub(source: str) -> bool:
    """Whether a source names a Hub dataset: it has the form `owner/name`, and no local file has that path."""
    return bool(HUB_NAME.fullmatch(source)) and Path(source).suffix not in SUFFIXES and not Path(source).exists()


def find_files(source: str) -> list[str]:
    """The places of the source files that a path, a folder or a glob names, sorted.

    Raises ValueError if no file matches, or if a file has another suffix.
    """
    places = _in_bucket(source) if is_in_bucket(source) else _on_host(source)
    if not places:
        where = "" if is_in_bucket(source) else f" (looked in {Path.cwd()})"
        raise ValueError(
            f"source {source!r}: no {' or '.join(SUFFIXES)} file found{where}. "
            f"Give a path, a folder or a quoted glob, or a Hub dataset as owner/name."
        )
    for place in places:
        if not place.endswith(SUFFIXES):
            raise ValueError(
                f"source {source!r}: {place} is not a {' or '.join(SUFFIXES)} file. "
                f"Narrow the glob, or convert the file."
            )
    return places


def _on_host(source: str) -> list[str]:
    path = Path(source).expanduser()
    if path.is_file():  # before the glob: its name may contain [ or *
        return [str(path)]
    if path.is_dir():
        return sorted(str(child) for child in path.iterdir() if child.suffix in SUFFIXES and child.is_file())
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207  # a pattern may be absolute
    return sorted(match for match in matches if not Path(match).is_dir())


def _in_bucket(source: str) -> list[str]:
    store, pattern = open_bucket(source)
    prefix = re.split(r"[*?\[]", pattern)[0]
    listed_keys = [listed.key for listed in store.list(prefix)]
    if pattern in listed_keys:
        return [f"{store.url}/{pattern}"]
    is_folder = prefix == pattern  # no wildcard
    escaped = re.escape(pattern.rstrip("/") + "/*" if is_folder else pattern)
    # As on a file system: `*` and `?` stay within one level, `**/` crosses levels.
    expression = escaped.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    matches = [key for key in listed_keys if re.fullmatch(expression, key)]
    return sorted(f"{store.url}/{key}" for key in matches if not is_folder or key.endswith(SUFFIXES))
