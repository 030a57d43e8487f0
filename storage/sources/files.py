"""Finds source files by path, folder or glob, on this host or in a bucket. Opens none of them."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from urllib.parse import unquote

from storage import keys
from storage.errors import SourceInvalid
from storage.sources import selection
from storage.sources.selection import HIDDEN, Suffix, leads_to_match, listed, reason_to_ignore, select
from storage.stores.opening import is_in_bucket, open_bucket

WILDCARD = re.compile(r"[*?\[]")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class SourceFile:
    """One file of a dataset as published."""

    name: str
    size_bytes: int
    digest: str  # of the content: a sha256, or git's id for a small file of the Hub
    place: str  # where it can be read: a path, `s3://bucket/key`, or `hf://datasets/{id}@{commit}/{path}`
    columns: dict[str, str | None] = field(default_factory=dict, compare=False)  # of Hive partition folders: `lang=en/`
    members: tuple["SourceFile", ...] = field(default=(), compare=False)  # the small files that this part packs

    @property
    def suffix(self) -> Suffix:
        return selection.suffix_of(self.name)

    @property
    def is_read_by_rows(self) -> bool:
        """Whether any rows can be read without the rows before them. Another file is converted to parquet first."""
        return self.suffix.format in selection.READ_BY_ROWS and not self.suffix.compression and not self.members

    @property
    def read_as(self) -> str:
        """The format that decides its rows; empty for a file read by rows, so that older recipes keep their digest."""
        return "" if self.is_read_by_rows else self.suffix.format

    @property
    def is_converted(self) -> bool:
        """Whether the place is a file of the store that this one was converted to."""
        return f"/{keys.CONVERTED}{self.digest}" in self.place

    @property
    def holds_lines(self) -> bool:
        """Whether it is a converted file whose rows are lines of JSON."""
        return self.is_converted and self.suffix.format in selection.JSON

    @property
    def shown_place(self) -> str:
        """The place to name in an error: of a converted file, the name of its source."""
        return self.name if self.is_converted else self.place

    @property
    def stem(self) -> str:
        """The name without folder and suffix, in the characters that a key may have."""
        name = PurePosixPath(self.name).name
        return keys.as_name(name[: -len("".join(self.suffix)) or None])[:120] or "source"

    @property
    def key(self) -> str:
        return keys.source(self.digest, self.stem + "".join(self.suffix))


@dataclass(frozen=True)
class Listing:
    """The files of a source in order, a Hub dataset's origin, and the first of the ignored files with the reasons."""

    files: tuple[SourceFile, ...]
    origin: dict[str, str]
    ignored: tuple[str, ...] = ()


def hive_columns(place: str, root: str = "") -> dict[str, str | None]:
    """The columns that a file has from Hive partition folders below `root`: `lang=en/` gives lang the value "en"."""
    pairs = (part.partition("=") for part in PurePosixPath(place.removeprefix(root)).parent.parts)
    return {unquote(name): None if value == HIVE_NULL else unquote(value) for name, _, value in pairs if value}


def distinct_names(files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    """The files; if two have the same name, each is named by its path below their common folder."""
    if len({file.name for file in files}) == len(files):
        return tuple(files)
    common = os.path.commonpath([PurePosixPath(file.place).parent for file in files])
    return tuple(replace(file, name=str(PurePosixPath(file.place).relative_to(common))) for file in files)


def is_on_hub(source: str) -> bool:
    """Whether a source names a Hub dataset: it has the form `owner/name`, and no local file has that path."""
    return bool(HUB_NAME.fullmatch(source)) and not selection.suffix_of(source).format and not os.path.lexists(source)


def find_files(source: str, setting: str = "data.source") -> tuple[list[str], tuple[str, ...], str]:
    """The sorted places that a path, a folder or a glob names, why other names are ignored, and the root of all."""
    in_bucket = is_in_bucket(source)
    if "://" in source and not in_bucket:  # not quoted: a URL may contain a secret
        raise ValueError(f"{setting}: only URLs like s3://bucket/… are read. Give a path, or a Hub dataset owner/name.")
    try:
        root, pattern, names = _in_bucket(source) if in_bucket else _on_host(source)
        files, ignored = select(setting, source, root, pattern, names)
        places = sorted(root + name for name in files)
        for place in places:
            if place.encode(errors="replace").decode() != place:
                raise ValueError(f"{setting}: the name of {place!r} is not UTF-8. Rename the file or its folder.")
            if not in_bucket and not S_ISREG(os.stat(place).st_mode):  # noqa: PTH116  # a Path costs more
                raise ValueError(f"{setting}: {place!r} is neither a file nor a folder. Copy its content to a file.")
    except OSError as error:
        problem = f"{error.filename!r} cannot be read: {error.strerror}"
        raise SourceInvalid(f"{setting}: {problem}. Check its permissions; a link may dangle.") from error
    if not places:
        others = f", only {'; '.join(listed(ignored))}" if ignored else ""
        problem = f"{setting} = {source!r}: no such file or folder, or no readable file there{others}"
        remedy = f"as a path, a folder or a quoted glob (the working folder is {Path.cwd()}), or a Hub dataset"
        raise ValueError(f"{problem}. Give {selection.READABLE}, {remedy} as owner/name.")
    return places, listed(ignored), root


# A folder with a final "/", the parts of a pattern, names in the folder. [!…] replaces a shell's [^…] for fnmatch.
Names = tuple[str, list[str], Iterable[str]]


def _on_host(source: str) -> Names:
    path = Path(source).expanduser()
    is_folder, parts = path.is_dir(), path.parts
    if os.path.lexists(path) and not is_folder:  # before the glob: its name may contain [ or *
        return f"{path.parent}/".replace("//", "/"), [], [path.name]
    wildcards = (depth for depth, part in enumerate(parts) if WILDCARD.search(part) and not is_folder)
    fixed = next(wildcards, len(parts))
    root, pattern = Path(*parts[:fixed]), ["*"] if is_folder else [part.replace("[^", "[!") for part in parts[fixed:]]
    return f"{root}/".replace("//", "/"), pattern, _walk(root, pattern) if pattern and root.is_dir() else ()


def _walk(root: Path, pattern: list[str]) -> Iterator[str]:
    """The files below `root` where a pattern leads, and with a final "/" the folders that are not entered."""

    def fail(error: OSError) -> None:
        raise error

    seen = set[str]()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        parts = Path(folder).relative_to(root).parts
        prefix = "".join(f"{part}/" for part in parts)
        resolved = os.path.realpath(folder)
        if resolved in seen:  # a loop of links, or a second path to the same files
            folders.clear()
            yield prefix
            continue
        seen.add(resolved)
        hidden = {name for name in folders if HIDDEN.fullmatch(name)}
        folders[:] = sorted(name for name in {*folders} - hidden if leads_to_match([*parts, name], pattern))
        for name in files:
            if leads_to_match([*parts, name], pattern) and not reason_to_ignore([name]):
                os.stat(f"{folder}/{name}")  # noqa: PTH116  # raises for a dangling link, perhaps to a folder
        yield from sorted([*(f"{prefix}{name}/" for name in hidden), *(prefix + name for name in files)])


def _in_bucket(source: str) -> Names:
    store, pattern = open_bucket(source)
    fixed = WILDCARD.split(pattern)[0]
    keys_in_store = sorted(entry.key for entry in store.list(fixed) if not entry.key.endswith("/"))  # no folder markers
    folder = fixed[: fixed.rfind("/") + 1]
    if pattern in keys_in_store:
        return f"{store.url}/{folder}", [], [pattern.removeprefix(folder)]
    parts, prefix = pattern.removeprefix(folder).replace("[^", "[!").split("/"), f"{pattern.rstrip('/')}/".lstrip("/")
    if fixed == pattern or any(key.startswith(prefix) for key in keys_in_store):  # a name may contain [ or *
        folder, parts = prefix, ["*"]
    return f"{store.url}/{folder}", parts, (key.removeprefix(folder) for key in keys_in_store if key.startswith(folder))
