"""Which files of a folder, a bucket or a repository are the corpus, and why the others are not. Opens no file."""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from glob import escape
from itertools import islice
from typing import NamedTuple

from storage.errors import printable

READ_BY_ROWS = (".parquet", ".jsonl")  # the formats with a reader in `documents.READERS`
JSON, TEXT = (".jsonl", ".json"), (".txt", ".md")  # one document is a line or an element; a whole file
FORMATS = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv", *TEXT)
COMPRESSIONS = ("", ".gz", ".zst", ".bz2", ".xz")
READABLE = f"a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, plain or {', '.join(filter(None, COMPRESSIONS))}"
HIDDEN = re.compile(r"[._].*|.*(~|_\$folder\$|\.(tmp|temp|part|partial|crdownload|download|incomplete|swp))", re.I)
DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|notice|copying|changelog|citation)(\.(txt|html|md))?|(dataset_infos?|state)\.json|.*\.(rst|cff)"
    r"|.*\.(md5|sha\d+|crc)|(md5|sha\d+)sums?(\.txt)?",
    re.IGNORECASE,
)
SPLIT_OF = {  # the words by which the library `datasets` recognises a split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WORD = re.compile("[a-z]+")
MOST_LISTED = 20


class Suffix(NamedTuple):
    """The lower-case parts of the end of a file's name: `.json` and `.gz`. Both are empty for another kind of file."""

    format: str
    compression: str


def suffix_of(name: str) -> Suffix:
    """The format and the compression of a file, by its name."""
    lower = name.lower()
    compression = next((ending for ending in COMPRESSIONS if ending and lower.endswith(ending)), "")
    format = next((ending for ending in FORMATS if lower.endswith(ending + compression)), "")
    return Suffix(format, compression) if format else Suffix("", "")


def select(
    setting: str, source: str, root: str, pattern: list[str], names: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """The names below `root` that match the pattern (without one: all), and why each other is ignored.

    A final "/" marks a folder that was not entered. Raises ValueError for other formats, sub-folders, several splits.
    """
    what, choose = f"{setting} = {source!r}", f"--set {setting}='{escape(root)}"
    files, ignored, inner = list[str](), dict[str, str](), list[str]()
    for name in names:
        parts = name.split("/")
        if pattern and (reason := reason_to_ignore(parts)):
            ignored[name] = reason
        elif not pattern or matches(parts, pattern):
            files.append(name)
        elif _is_inside(parts, pattern):
            inner.append(name)
        else:
            ignored[name] = "not matched by the pattern"
    kinds = {name: suffix_of(name).format for name in files}
    unreadable = {name: f"not {READABLE}" for name, kind in kinds.items() if not kind}
    if any(kind and kind not in TEXT for kind in kinds.values()):
        unreadable |= {name: "text beside files of rows" for name, kind in kinds.items() if kind in TEXT}
    files = [name for name in files if name not in unreadable]
    notes = [name for name in unreadable if kinds[name] == ".md"]
    ignored |= {name: f"documentation: {unreadable.pop(name)}" for name in notes}
    suffix = _suffix([*files, *inner])
    *folders, last = pattern or [""]
    start = "**/" if last == "**" else last.rstrip("*")
    kept = [*folders, *(last if last.endswith(suffix) else f"{start}*{suffix}").split("/")]
    is_kept = suffix and not any(_is_inside(name.split("/"), kept) for name in inner)
    leave_out = f"leave them out: {choose}{'/'.join(kept)}'" if is_kept else "move them away"
    if inner:
        deeper = f"**/*{suffix}" if pattern == ["*"] else f"{'/'.join(pattern)}/**"
        remedy = f"Read sub-folders, too: {choose}{deeper}'. Or {leave_out}."
        raise ValueError(f"{what}: {inner[0]!r} is in a sub-folder, which is not read. {remedy}")
    if unreadable:
        name, kind = next(iter(unreadable.items()))
        raise ValueError(f"{what}: {name!r} is {kind} ({len(unreadable):,} such files). Convert them, or {leave_out}.")
    splits: dict[str, list[str]] = {}
    shared = os.path.commonprefix(files).rfind("/") + 1 if len(files) > 1 else 0  # noqa: RUF071  # a key may begin with /
    for name in files:
        words = name[: name.rfind("/") + 1] if suffix_of(name).format in TEXT else name  # a text is named by its title
        if match := _split_word(words, shared):
            splits.setdefault(SPLIT_OF[match[0]], []).append(name)
    if len(splits) > 1:
        examples = ", ".join(f"{split} ({len(members):,}, {members[0]!r})" for split, members in splits.items())
        pattern_of_one = _split_pattern(splits.get("train") or next(iter(splits.values())), shared)
        raise ValueError(f"{what}: files of several splits: {examples}. Choose one: {choose}{pattern_of_one}'.")
    return files, ignored


def reason_to_ignore(parts: list[str]) -> str:
    """Why a file is not part of a corpus wherever it lies; empty if it may be part of one."""
    if any(map(HIDDEN.fullmatch, parts)):
        return "hidden or temporary"
    if not parts[-1]:
        return "a link to a folder that is read elsewhere"
    return "documentation" if DOCUMENTATION.fullmatch(parts[-1]) else ""


def matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path matches a pattern, as in a shell: `*` stays within one level, `**` crosses levels."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return matches(parts, pattern[1:]) or matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def _is_inside(parts: list[str], pattern: list[str]) -> bool:
    """Whether a folder above a path matches a pattern."""
    return any(matches(parts[:depth], pattern) for depth in range(1, len(parts)))


def leads_to_match(parts: list[str], pattern: list[str]) -> bool:
    """Whether a pattern may match a folder, or files below it."""
    if not parts or not pattern or pattern[0] == "**":
        return True
    return fnmatchcase(parts[0], pattern[0]) and leads_to_match(parts[1:], pattern[1:])


def listed(ignored: dict[str, str]) -> tuple[str, ...]:
    """The first of the ignored names with their reasons, and how many follow."""
    lines = [printable(f"{name}: {reason}") for name, reason in islice(ignored.items(), MOST_LISTED)]
    return (*lines, *([f"and {len(ignored) - len(lines):,} more"] if len(ignored) > len(lines) else []))


def _suffix(names: list[str]) -> str:
    """The suffix that all names have; empty if they differ."""
    suffixes = {name[-length:] for name in names if (length := len("".join(suffix_of(name))))}
    return suffixes.pop() if len(suffixes) == 1 else ""


def _split_word(name: str, start: int) -> re.Match[str] | None:
    return next((word for word in WORD.finditer(name.lower(), start) if word[0] in SPLIT_OF), None)


def _split_pattern(names: list[str], start: int) -> str:
    """A pattern of the files of one split: `train-*.parquet`, `train/**/*.parquet`."""
    match = _split_word(names[0], start)
    assert match is not None
    head = names[0][: match.end() + (names[0][match.end()] in "-_/")]
    end = ("**/*" if head.endswith("/") else "*") + _suffix(names)
    if all(matches(name.split("/"), f"{escape(head)}{end}".split("/")) for name in names):
        return escape(head) + end
    return f"**/{head[match.start() :]}{end}" if head.endswith("/") else f"**/*{head[match.start() : match.end()]}{end}"
