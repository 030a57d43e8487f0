"""Finds source files: a path, a folder or a glob, on this host or in a bucket."""

import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING

from storage.sources.files import SUFFIXES

if TYPE_CHECKING:
    from storage.stores.s3 import S3Store

BUCKET = re.compile(r"(s3(?:\+http)?)://([^/]+)/(.+)")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_on_hub(source: str) -> bool:
    """Whether a source names a Hub dataset: it is spelled `owner/name`, and no local file has that path."""
    return bool(HUB_NAME.fullmatch(source)) and Path(source).suffix not in SUFFIXES and not Path(source).exists()


def find_files(source: str) -> list[str]:
    """The places of the source files that a path, a folder or a glob names, sorted.

    Raises ValueError if there are none, or if one has another suffix.
    """
    places = _in_bucket(source) if BUCKET.match(source) else _on_host(source)
    if not places:
        where = "" if BUCKET.match(source) else f" (looked in {Path.cwd()})"
        raise ValueError(
            f"data.source = {source!r}: no such file{where}. "
            f"Give a path, a folder or a quoted glob of {' or '.join(SUFFIXES)} files, or a Hub dataset as owner/name."
        )
    for place in places:
        if not place.endswith(SUFFIXES):
            raise ValueError(
                f"data.source = {source!r}: {place} is neither {' nor '.join(SUFFIXES)}. "
                f"Narrow the glob, or convert the file."
            )
    return places


def bucket_of(place: str) -> tuple["S3Store", str]:
    """The bucket of an `s3://` place, opened for reading, and the key in it."""
    from storage.stores.s3 import S3Store  # boto3 takes 0.3 s to import, and local files do not need it

    match = BUCKET.fullmatch(place)
    assert match is not None
    scheme, bucket, key = match.groups()
    return S3Store(bucket, "", f"{scheme}://{bucket}", plain_http=scheme != "s3", foreign=True), key


def _on_host(source: str) -> list[str]:
    path = Path(source).expanduser()
    if path.is_file():  # before the glob: its name may contain [ or *
        return [str(path)]
    if path.is_dir():
        return sorted(str(child) for child in path.iterdir() if child.suffix in SUFFIXES and child.is_file())
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207  # a pattern may be absolute
    return sorted(match for match in matches if not Path(match).is_dir())


def _in_bucket(source: str) -> list[str]:
    store, pattern = bucket_of(source)
    prefix = re.split(r"[*?\[]", pattern)[0]
    listed_keys = [listed.key for listed in store.list(prefix)]
    if pattern in listed_keys:
        return [f"{store.url}/{pattern}"]
    if prefix == pattern:  # no wildcard: a folder
        folder = re.compile(re.escape(pattern.rstrip("/")) + "/[^/]*")
        matches = [key for key in listed_keys if folder.fullmatch(key) and key.endswith(SUFFIXES)]
    else:
        expression = _glob_expression(pattern)
        matches = [key for key in listed_keys if expression.fullmatch(key)]
    return sorted(f"{store.url}/{key}" for key in matches)


def _glob_expression(pattern: str) -> re.Pattern[str]:
    """The glob as on a file system: `*` and `?` stay within one level, `**/` crosses levels."""
    escaped = re.escape(pattern)
    return re.compile(escaped.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))
