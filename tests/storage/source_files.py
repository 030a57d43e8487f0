"""Writers of source files, and two ways to read one: like a plan, and like a shard."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from model import tokenizer
from storage.datasets import shards
from storage.datasets.plan import ShardJob
from storage.datasets.recipe import ShardRecipe
from storage.sources import documents, reading
from storage.sources.rows import RowTokens
from storage.stores.folder import FolderStore

TEXTS = ["one", "", "two words", "żółć 🙂", "a\r\nb\u2028c\x00d", "<|endoftext|>"]
Read = Callable[[Path], object]


def rows(path: Path, column: str = "text", *filters: str, strict: bool = True) -> RowTokens:
    """The file as a plan reads it."""
    return documents.rows(reading.identify(path), column, filters, strict=strict)


def texts_of(path: Path, row_from: int, row_to: int, start_byte: int = 0, column: str = "text") -> list[str]:
    """The texts of a shard of these rows."""
    file = reading.identify(path)
    recipe = ShardRecipe(file.digest, row_from, row_to, tokenizer="", text_column=column)
    job = ShardJob("a", recipe, file, start_byte)
    store = FolderStore(path.parent / f"{row_from}-{row_to}", "texts")
    texts: list[str] = []
    shards.build_shard(store, "a", job, lambda text: texts.append(text) or tokenizer.encode(text), tokenizer.EOT)
    return texts


READS: list[Read] = [rows, lambda path: texts_of(path, 0, 2)]


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    return write_lines(path, *(json.dumps({"text": text}) for text in texts))


def write_table(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path
