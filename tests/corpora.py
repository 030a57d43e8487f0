"""One corpus as files of every format and compression."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda body: bytes(pa.compress(body, codec="zstd", asbytes=True)),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
Row = dict[str, Any]


def _jsonl(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _csv(rows: list[Row], delimiter: str = ",") -> bytes:
    body = io.StringIO(newline="")
    writer = csv.DictWriter(body, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return body.getvalue().encode()


def _parquet(rows: list[Row]) -> bytes:
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), body, row_group_size=100)
    return body.getvalue()


def _arrow(rows: list[Row], new: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    body, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with new(body, table.schema) as writer:
        writer.write_table(table, 100)
    return body.getvalue()


FORMATS: dict[str, tuple[str, Callable[[list[Row]], bytes]]] = {  # the suffix, and how rows are written
    "parquet": (".parquet", _parquet),
    "arrow stream": (".arrow", _arrow),
    "arrow file": (".arrow", lambda rows: _arrow(rows, pa.ipc.new_file)),
    "jsonl": (".jsonl", _jsonl),
    "json lines": (".json", _jsonl),
    "json array": (".json", lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode()),
    "csv": (".csv", _csv),
    "tsv": (".tsv", lambda rows: _csv(rows, "\t")),
    "txt": (".txt", lambda rows: str(rows[0]["text"]).encode()),
    "md": (".md", lambda rows: str(rows[0]["text"]).encode()),
}


def encoded(
    texts: list[str], kind: str, compression: str = "", files: int = 3, **columns: list[Any]
) -> dict[str, bytes]:
    """The corpus as the bytes of some files by name, with more columns of each document. A text file holds one."""
    suffix, write = FORMATS[kind]
    rows = [{"text": text} | {name: column[at] for name, column in columns.items()} for at, text in enumerate(texts)]
    size = 1 if suffix in (".txt", ".md") else -(-len(rows) // files)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return {f"part-{at:05d}{suffix}{compression}": COMPRESS[compression](write(part)) for at, part in enumerate(parts)}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder
