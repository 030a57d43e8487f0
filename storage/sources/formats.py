"""Rewrites source files of any format as one parquet file: streamed, in bounded memory, by the readers of pyarrow.

JSON stays as written, one row for each line or array element, so that no value changes its type and a bad line keeps
its row. A text file is one row. CSV, TSV and Arrow keep their columns; the values of CSV stay text.
"""

import bz2
import codecs
import csv
import io
import lzma
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from isal import igzip
from isal.igzip_lib import IsalError

from storage.errors import SourceInvalid
from storage.sources.files import SourceFile
from storage.sources.parquet import PLAUSIBLE_ROWS
from storage.sources.rows import DOCUMENT_BYTES, LINE, PACKED_FILE, PACKED_ROW
from storage.sources.selection import TEXT

GROUP_BYTES = 1 << 22  # of a row group
BLOCK_BYTES = 1 << 20  # to read at once
CSV_BLOCK_BYTES = 1 << 21  # the same of CSV: pyarrow needs a whole row in one block
DEEPEST = 1 << 20  # brackets: more are a bomb
WHITESPACE = list(b" \t\n\v\f\r")
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)  # of JSON, without numbers and words
ARROW_FILE = b"ARROW1"  # an Arrow file begins and ends with it; between them are a stream and a footer
READING_ERRORS: tuple[type[Exception], ...] = (
    pa.ArrowException, OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, csv.Error,
    IsalError,  # type: ignore[assignment]  # isal's stub takes the class for an instance
)  # fmt: skip
Opened = Callable[[SourceFile], AbstractContextManager[BinaryIO]]


def write_parquet(files: Sequence[SourceFile], opened: Opened, output: BinaryIO) -> None:
    """Write the rows in order; of several files (all JSON or all text), with file and row. Raises SourceInvalid."""
    if files[0].suffix.format == ".parquet":
        with _decompressed(files[0], opened) as body:
            shutil.copyfileobj(body, output, BLOCK_BYTES)
        return
    rows, most_rows = 0, max(PLAUSIBLE_ROWS, sum(file.size_bytes for file in files))
    groups = _ahead(_row_groups(_batches(files, opened)))
    first = next(groups)  # every file has a batch
    repeated = [name for name in first.schema.names if name not in (LINE, "text")]  # may be worth a dictionary
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": repeated}
    with pq.ParquetWriter(output, first.schema, **options) as writer:
        for group in chain([first], groups):
            if (rows := rows + len(group)) > most_rows:
                problem = f"more than {most_rows:,} rows, too many for its size: it may be a decompression bomb"
                raise SourceInvalid(f"{files[0].place}: {problem}. Remove the file from data.source.")
            writer.write_table(group, max(len(group) * GROUP_BYTES // max(group.nbytes, 1), 1))


def _batches(files: Sequence[SourceFile], opened: Opened) -> Iterator[pa.RecordBatch]:
    """The rows of the files; at least one batch, perhaps empty, for the names of the columns."""
    for file in files:
        row = 0
        for batch in _batches_of(file, opened):
            if len(files) == 1:
                yield batch
                continue
            names, numbers = pa.array([file.name] * len(batch), pa.string()), pa.array(range(row, row + len(batch)))
            yield batch.append_column(PACKED_FILE, names).append_column(PACKED_ROW, numbers.cast(pa.int64()))
            row += len(batch)


def _batches_of(file: SourceFile, opened: Opened) -> Iterator[pa.RecordBatch]:
    kind = file.suffix.format
    with _decompressed(file, opened) as body:
        if kind in (".csv", ".tsv"):
            delimiter = "\t" if kind == ".tsv" else ","
            head = io.StringIO(body.peek(BLOCK_BYTES).decode("utf-8-sig", "replace"), newline="")
            names = next(csv.reader(head, delimiter=delimiter), [])
            reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES)
            parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
            types = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()))
            with pyarrow.csv.open_csv(body, reading, parsing, types) as reader:
                # `from_pylist` would import pandas: 0.2 s and 30 MB
                yield pa.RecordBatch.from_struct_array(pa.nulls(0, pa.struct(reader.schema)))
                yield from reader
        elif kind == ".arrow":
            is_file = body.peek(len(ARROW_FILE)).startswith(ARROW_FILE)
            body.read(8 if is_file else 0)
            with pa.ipc.open_stream(body) as reader:
                pq.ParquetWriter(pa.BufferOutputStream(), reader.schema).close()  # raises for what parquet cannot hold
                yield pa.RecordBatch.from_struct_array(pa.nulls(0, pa.struct(reader.schema)))
                for batch in reader:
                    batch.validate(full=True)  # to write damaged offsets would end the process
                    yield batch
            if is_file and not body.read().endswith(ARROW_FILE):
                raise pa.ArrowInvalid("it is cut: its footer is missing")
        elif kind in TEXT:
            text = body.read(DOCUMENT_BYTES + 1).removeprefix(codecs.BOM_UTF8)
            _check_length(file, len(text), "its text")
            yield pa.record_batch([pa.array([text], pa.large_binary())], ["text"])
        else:
            yield pa.record_batch([pa.nulls(0, pa.large_binary())], [LINE])
            is_array = kind == ".json" and body.peek(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
            arrays = _elements(file, body) if is_array else map(_split, _blocks_of_lines(file, body))
            yield from (pa.record_batch([array], [LINE]) for array in arrays)


def _blocks_of_lines(file: SourceFile, body: BinaryIO) -> Iterator[bytes]:
    pieces = [body.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)]
    for block in iter(partial(body.read, BLOCK_BYTES), b""):
        if end := block.rfind(b"\n") + 1:
            yield b"".join([*pieces, block[:end]])
            pieces = []
        pieces.append(block[end:])
        _check_length(file, sum(map(len, pieces)), "a line")
    if any(pieces):
        yield b"".join(pieces)


def _split(block: bytes) -> pa.Array:
    """The lines of a block that are not blank, without copying them."""
    if block.isspace():  # a bomb of line feeds would take minutes below
        return pa.array([], pa.large_binary())
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    bounds = np.unique(np.concatenate([[0], ends, [len(block)]]))
    buffers = [None, pa.py_buffer(bounds.astype(np.int64)), pa.py_buffer(block)]
    lines = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(bounds) - 1, buffers)
    is_blank = np.isin(np.frombuffer(block, np.uint8)[bounds[:-1]], WHITESPACE)
    for line in np.flatnonzero(is_blank):
        is_blank[line] = block[bounds[line] : bounds[line + 1]].isspace()
    return lines.filter(pa.array(~is_blank)) if is_blank.any() else lines


def _elements(file: SourceFile, body: BinaryIO) -> Iterator[pa.Array]:
    """The elements of one array of JSON as they are written, in blocks: what is between commas outside of brackets."""
    data, start, is_open = body.read(BLOCK_BYTES), 0, False
    while data:
        elements, depth = list[bytes](), 0
        for token in TOKEN.finditer(data, start):
            if token[0] == b'"':  # of a string that goes on in the next block
                break
            if not is_open:
                is_open = True
            elif token[0] in (b"[", b"{"):
                depth += 1
                if depth > DEEPEST:
                    raise pa.ArrowInvalid(f"its brackets are nested more than {DEEPEST:,} deep")
                continue
            elif depth:
                depth -= token[0] in (b"]", b"}")
                continue
            elif token[0] not in (b",", b"]"):
                continue
            elif element := data[start : token.start()].strip():
                elements.append(element)
            start = token.end()
            if token[0] == b"]":
                yield pa.array(elements, pa.large_binary())
                if rest := (data[start:] + body.read(BLOCK_BYTES)).strip():
                    raise pa.ArrowInvalid(f"it is not one array of JSON: {rest[:40]!r} follows the array")
                return
        yield pa.array(elements, pa.large_binary())
        data, start = data[start:], 0
        _check_length(file, len(data), "an element of the array, or what follows it,")
        size = max(BLOCK_BYTES, len(data))  # twice as much each time: a long element takes log time
        if not (more := body.read(min(size, DOCUMENT_BYTES + 1 - len(data)))):
            raise pa.ArrowInvalid(f"it is not one array of JSON: it breaks off, or is damaged, after {data[:40]!r}")
        data += more


def _row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    group, group_bytes = list[pa.RecordBatch](), 0
    for batch in batches:
        group.append(batch)
        group_bytes += batch.nbytes
        if group_bytes >= GROUP_BYTES:
            yield pa.Table.from_batches(group)
            group, group_bytes = [], 0
    if group:
        yield pa.Table.from_batches(group)


def _ahead(groups: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The groups. A thread reads each while the one before it is written."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, groups, None)
        while (group := pending.result()) is not None:
            pending = pool.submit(next, groups, None)
            yield group


class _Streams(io.RawIOBase):
    """Compressed streams in a row, padded with zeros. Python's own readers end at a damaged one without an error."""

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw, self._new, self._stream = raw, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's name for it is private
        size = 0
        while size < len(buffer):  # in full, for `peek`
            piece = b""
            if self._stream.eof:
                piece = self._stream.unused_data.lstrip(b"\0") or self._raw.read(BLOCK_BYTES).lstrip(b"\0")
                if not piece:
                    break
                self._stream = self._new()
            elif self._stream.needs_input and not (piece := self._raw.read(BLOCK_BYTES)):
                raise EOFError("it is cut: its last stream does not end")
            body = self._stream.decompress(piece, len(buffer) - size)
            buffer[size : size + len(body)] = body
            size += len(body)
        return size


DECOMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: igzip.IGzipFile(fileobj=raw, mode="rb"),  # type: ignore[no-untyped-call]  # 2.6 times as fast as pyarrow's
    ".zst": lambda raw: pa.CompressedInputStream(raw, "zstd"),
    ".bz2": lambda raw: _Streams(raw, bz2.BZ2Decompressor),
    ".xz": lambda raw: _Streams(raw, lzma.LZMADecompressor),
}


@contextmanager
def _decompressed(file: SourceFile, opened: Opened) -> Iterator[io.BufferedReader]:
    """The file's content. Raises SourceInvalid for errors of reading it."""
    try:
        with opened(file) as raw:
            yield io.BufferedReader(DECOMPRESSED[file.suffix.compression](raw), BLOCK_BYTES)
    except READING_ERRORS as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not a decompressor's
            raise
        reason = str(error).partition("\n")[0].rstrip(". ")
        if "straddling" in reason:  # its advice, a larger block, is not for a user
            reason = f"a row has over {CSV_BLOCK_BYTES:,} bytes; use JSON lines"
        problem = f"{file.place}: cannot be read as {''.join(file.suffix)}: {reason}"
        remedy = "If the file is cut or damaged, download it again; else correct its suffix, or remove it from"
        raise SourceInvalid(f"{problem}. {remedy} data.source.") from error


def _check_length(file: SourceFile, size_bytes: int, what: str) -> None:
    if size_bytes > DOCUMENT_BYTES:
        problem = f"{what} is longer than {DOCUMENT_BYTES:,} bytes, the limit of a document"
        raise SourceInvalid(f"{file.place}: {problem}. Split it into documents, or remove it from data.source.")
