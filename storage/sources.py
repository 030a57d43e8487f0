"""Source files: where documents come from. Finds, identifies and reads parquet and JSON lines; knows no tokenizer.

A source file is known by its sha256, never by its path. Hashing a file that has not changed since it was hashed last
(same path, size, time and inode) is remembered, so that a second run reads no file again.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.canonical import digest
from storage.errors import SourceInvalid

SUFFIXES = (".parquet", ".jsonl")
REMEMBERED = Path.home() / ".cache" / "gpt2-pipeline" / "digests"
BYTES_PER_TOKEN = (
    4  # English web text holds about 4.4 bytes a gpt2 token; 4 keeps estimated shards just below the limit
)
EOT_TOKENS = 1  # each document costs one more token than its text


@dataclass(frozen=True)
class SourceFile:
    """One file of the dataset as published: its name, its size and what it holds (sha256), and where it lies now."""

    name: str
    size_bytes: int
    sha256: str
    path: str


class Rows(NamedTuple):
    """What a plan needs of a source file's rows: tokens of each, EOT counted, and for JSON lines where each begins."""

    tokens: np.ndarray
    starts: np.ndarray | None


def find(source: str) -> list[Path]:
    """The source files that a path, a folder or a glob names, sorted. Raises ValueError when there are none."""
    place = Path(source).expanduser()
    if place.is_file():  # its name may hold what a glob would not take literally
        found = [place]
    elif place.is_dir():
        found = sorted(path for path in place.iterdir() if path.suffix in SUFFIXES and path.is_file())
    else:
        matches = glob.glob(str(place), recursive=True)  # noqa: PTH207  # a pattern may be absolute
        found = sorted(Path(name) for name in matches if not Path(name).is_dir())
    if not found:
        raise ValueError(
            f"data.source = {source!r}: no such file was found (looked in {Path.cwd()}). "
            f"Give a path, a folder or a quoted glob of {' or '.join(SUFFIXES)} files."
        )
    for path in found:
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"data.source = {source!r}: {path} is neither {' nor '.join(SUFFIXES)}. "
                f"Narrow the glob, or convert the file."
            )
    return found


def identify(path: Path) -> SourceFile:
    """The file's name, size and sha256; read only when it has changed since it was identified last."""
    path = path.absolute()
    try:
        found = path.stat()
        sign = digest([str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])
        note = REMEMBERED / sign[:2] / sign
        sha256 = _remembered(note, sign)
        if sha256 is None:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            _remember(note, f"{sha256} {digest([sign, sha256])}")
    except OSError as error:
        raise SourceInvalid(f"{path}: cannot be read: {error.strerror}. Check the path and its mode.") from error
    return SourceFile(path.name, found.st_size, sha256, str(path))


def _remembered(note: Path, sign: str) -> str | None:
    """What the note says, when all of it is there: a power cut may have left an empty file."""
    try:
        sha256, _, check = note.read_text().partition(" ")
    except (OSError, ValueError):
        return None
    return sha256 if check == digest([sign, sha256]) else None


def _remember(note: Path, sha256: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}")
        temporary.write_text(sha256)
        temporary.replace(note)
    except OSError:
        pass  # a home that cannot be written costs time, never correctness


def check(path: Path, text_column: str) -> None:
    """Raise SourceInvalid when a parquet file's footer shows that its documents cannot be read."""
    if path.suffix == ".jsonl":
        return  # has no footer: `rows` reads every line before any job is started
    with _parquet(path) as file:
        _text_type(file, path, text_column)
        column = _leaf(file, text_column)
        for group in range(file.num_row_groups):
            statistics = file.metadata.row_group(group).column(column).statistics
            if statistics is not None and statistics.has_null_count and statistics.null_count:
                raise SourceInvalid(
                    f"{path}: column {text_column!r} should hold text in every row, found {statistics.null_count} "
                    f"null in row group {group}. Drop those rows from the file."
                )


def rows(path: Path, text_column: str) -> Rows:
    """Tokens of each row as the `token_count` column says, else estimated from sizes: they only steer the cut."""
    return _jsonl_rows(path, text_column) if path.suffix == ".jsonl" else Rows(_parquet_tokens(path, text_column), None)


def documents(path: Path, text_column: str, row_from: int, row_to: int, start_byte: int = 0) -> Iterator[str]:
    """The text of rows `row_from` up to `row_to`. Raises SourceInvalid, naming file and row, for what is no text."""
    found = (
        _jsonl_texts(path, text_column, row_from, row_to, start_byte)
        if path.suffix == ".jsonl"
        else _parquet_texts(path, text_column, row_from, row_to)
    )
    end = row_from
    for text in found:
        yield text
        end += 1
    if end != row_to:
        raise SourceInvalid(f"{path}: rows up to {row_to:,} were asked for, it ends at {end:,}. Run the command again.")


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceInvalid(
            f"{path}: a parquet file was asked for, found {str(error).splitlines()[0]} "
            f"It is cut or damaged: fetch it again, or leave it out of data.source."
        ) from error


def _leaf(file: pq.ParquetFile, name: str) -> int:
    """Where a column of no nested type stands in a row group, which counts the leaves of nested ones."""
    return next(index for index in range(len(file.schema)) if file.schema.column(index).path == name)


def _text_type(file: pq.ParquetFile, path: Path, text_column: str) -> None:
    names = file.schema_arrow.names
    if text_column not in names:
        raise SourceInvalid(
            f"{path}: column {text_column!r} was asked for, found {', '.join(names) or 'no columns'}. "
            f"Name the right one: --set data.text_column=…"
        )
    found = file.schema_arrow.field(text_column).type
    if not (pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise SourceInvalid(
            f"{path}: column {text_column!r} should hold strings, found {found}. "
            f"Name the right one: --set data.text_column=…"
        )


def _parquet_tokens(path: Path, text_column: str) -> np.ndarray:
    with _parquet(path) as file:
        _text_type(file, path, text_column)
        names = file.schema_arrow.names
        if "token_count" in names and pa.types.is_integer(file.schema_arrow.field("token_count").type):
            try:
                column = file.read(columns=["token_count"]).column("token_count")
            except (pa.ArrowInvalid, OSError) as error:
                raise SourceInvalid(
                    f"{path}: column 'token_count' was asked for, found {error}. The file is damaged: fetch it again."
                ) from error
            if not column.null_count:
                counts: np.ndarray = np.clip(column.to_numpy(), 0, 2**31).astype(np.int64) + EOT_TOKENS
                return counts
        estimates = [np.empty(0, np.int64)]
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            size_bytes = group.column(_leaf(file, text_column)).total_uncompressed_size
            per_row = -(-size_bytes // (BYTES_PER_TOKEN * max(group.num_rows, 1)))
            estimates.append(np.full(group.num_rows, per_row + EOT_TOKENS, np.int64))
    estimated: np.ndarray = np.concatenate(estimates)
    return estimated


def _parquet_texts(path: Path, text_column: str, row_from: int, row_to: int) -> Iterator[str]:
    with _parquet(path) as file:
        _text_type(file, path, text_column)
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if start < row_to and end > row_from:
                try:
                    column = file.read_row_group(group, columns=[text_column]).column(0)
                except (pa.ArrowInvalid, OSError) as error:
                    raise SourceInvalid(
                        f"{path}: row group {group} was asked for, found {error}. The file is damaged: fetch it again."
                    ) from error
                first, last = max(row_from - start, 0), min(row_to, end) - start
                for row, text in enumerate(_decoded(column.slice(first, last - first)), start + first):
                    if text is None or isinstance(text, bytes):
                        raise _no_text(path, row, text_column, text)
                    yield text
            start = end


def _decoded(column: pa.ChunkedArray) -> list[str | bytes | None]:
    """The column's texts; where one is no UTF-8, those before it and then its bytes, so that its row can be named."""
    try:
        texts: list[str | bytes | None] = column.to_pylist()
    except UnicodeDecodeError:
        texts = []
        for body in column.cast(pa.large_binary()).to_pylist():
            try:
                texts.append(None if body is None else body.decode())
            except UnicodeDecodeError:
                return [*texts, body]
    return texts


def _jsonl_rows(path: Path, text_column: str) -> Rows:
    counted: list[int] = []
    estimated: list[int] = []
    starts: list[int] = []
    for start, text, item in _jsonl_lines(path, text_column, 0, 0):
        count = item.get("token_count")
        if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            counted.append(count + EOT_TOKENS)
        estimated.append(-(-len(text.encode(errors="surrogatepass")) // BYTES_PER_TOKEN) + EOT_TOKENS)
        starts.append(start)
    tokens = counted if len(counted) == len(estimated) else estimated
    return Rows(np.array(tokens, np.int64), np.array(starts, np.int64))


def _jsonl_texts(path: Path, text_column: str, row_from: int, row_to: int, start_byte: int) -> Iterator[str]:
    lines = _jsonl_lines(path, text_column, row_from, start_byte)
    for _, (_, text, _) in zip(range(row_from, row_to), lines, strict=False):
        yield text


def _jsonl_lines(path: Path, text_column: str, row: int, start_byte: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Start, text and the whole item of each line from `start_byte` on; blank lines are no rows."""
    try:
        with path.open("rb") as file:
            file.seek(start_byte)
            for line in file:
                start, start_byte = start_byte, start_byte + len(line)
                if line.isspace():
                    continue
                try:
                    item = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SourceInvalid(
                        f"{path}: row {row:,} should be a JSON object, found {line[:60]!r}. Mend or drop that line."
                    ) from error
                if not isinstance(item, dict) or text_column not in item:
                    found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
                    raise SourceInvalid(
                        f"{path}: row {row:,}: column {text_column!r} was asked for, found {found or 'nothing'}. "
                        f"Name the right one: --set data.text_column=…"
                    )
                if not isinstance(item[text_column], str):
                    raise _no_text(path, row, text_column, item[text_column])
                yield start, item[text_column], item
                row += 1
    except OSError as error:
        raise SourceInvalid(f"{path}: cannot be read: {error.strerror}. Check the path and its mode.") from error


def _no_text(path: Path, row: int, text_column: str, found: object) -> SourceInvalid:
    shown = "null" if found is None else f"{type(found).__name__} {str(found)[:40]!r}"
    return SourceInvalid(
        f"{path}: row {row:,}: column {text_column!r} should hold text, found {shown}. Mend or drop that row."
    )
