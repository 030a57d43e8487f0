"""Source files of the tests' own making, and every way to look into one."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage import sources

TEXTS = ["one", "", "two words", "żółć 🙂", "a\r\nb\u2028c\x00d", "<|endoftext|>"]
Ask = Callable[[Path], object]
LOOKS: list[Ask] = [
    lambda path: sources.check(path, "text"),
    lambda path: sources.rows(path, "text"),
    lambda path: list(sources.documents(path, "text", 0, 2)),
]


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    return write_lines(path, *(json.dumps({"text": text}) for text in texts))


def write_table(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path
