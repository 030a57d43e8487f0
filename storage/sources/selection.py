"""Which files of a folder, a bucket or a repository are the corpus, and why the others are not. Opens no file."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from glob import escape
from itertools import islice

from storage.errors import printable

SUFFIXES = (".parquet", ".jsonl")  # in any case; each has its reader in `documents.READERS`
HIDDEN = re.compile(r"[._].*|.*(~|_\$folder\$|\.(tmp|temp|part|partial|crdownload|download|incomplete|swp))", re.I)
DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|notice|copying|changelog|citation)(\.(txt|html))?|dataset_infos?\.json|.*\.(md|rst|cff)"
    r"|.*\.(md5|sha\d+|crc)|(md5|sha\d+)sums?(\.txt)?",
    re.IGNORECASE,
)
SPLITS = {  # the words by which the library `datasets` recognises a split
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
MOST_LISTED = 20


def select(
    setting: str, source: str, root: str, pattern: list[str], names: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """The names below `root` that the pattern's parts match (all, without a pattern), and why each other is ignored.

    A name that ends in "/" is a folder that was not entered. Raises ValueError if a file of another format matches, if
    a folder with files matches, or if the files belong to several splits.
    """
    what, choose = f"{setting} = {source!r}", f"--set {setting}='{escape(root)}"
    files, ignored, other_formats = list[str](), dict[str, str](), list[str]()
    for name in names:
        parts = name.split("/")
        reason = reason_to_ignore(parts) if pattern else ""
        if reason:
            ignored[name] = reason
        elif not pattern or matches(parts, pattern):
            (files if name.lower().endswith(SUFFIXES) else other_formats).append(name)
        elif any(matches(parts[:depth], pattern) for depth in range(1, len(parts))):
            suffix = _suffix([*files, name])
            leave_out = (
                "move them away" if fnmatchcase(parts[0], f"*{suffix}") else f"leave them out: {choose}*{suffix}'"
            )
            raise ValueError(
                f"{what}: {name!r} is in a sub-folder, which is not read. Read sub-folders, too: "
                f"{choose}**/*{suffix}'. Or {leave_out}."
            )
        else:
            ignored[name] = "not matched by the pattern"
    if other_formats:
        suffix = _suffix(files)
        leave_out = f", or leave them out: {choose}{'/'.join([*pattern[:-1], '*' + suffix])}'" if suffix else ""
        raise ValueError(
            f"{what}: {other_formats[0]!r} is not a {' or '.join(SUFFIXES)} file ({len(other_formats):,} such files). "
            f"Convert or move them{leave_out}."
        )
    splits: dict[str, list[str]] = {}
    for name in files:
        if match := _split_word(name):
            splits.setdefault(SPLIT_OF[match[0]], []).append(name)
    if len(splits) > 1:
        examples = ", ".join(f"{split} ({len(members):,}, {members[0]!r})" for split, members in splits.items())
        pattern_of_one = _split_pattern(splits.get("train") or next(iter(splits.values())))
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
    suffixes = {name[name.rfind(".") :] for name in names if name.lower().endswith(SUFFIXES)}
    return suffixes.pop() if len(suffixes) == 1 else ""


def _split_word(name: str) -> re.Match[str] | None:
    return next((word for word in re.finditer("[a-z]+", name.lower()) if word[0] in SPLIT_OF), None)


def _split_pattern(names: list[str]) -> str:
    """A pattern of the files of one split: `train-*.parquet`, `train/**/*.parquet`."""
    match = _split_word(names[0])
    assert match is not None
    head = names[0][: match.end() + (names[0][match.end()] in "-_/")]
    return escape(head) + ("**/*" if head.endswith("/") else "*") + _suffix(names)
