"""Every format: the same documents whatever a file is written as, and an error for a file that is not whole."""

import codecs
import errno
import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import RunConfig
from storage.datasets.manifest import Manifest
from storage.datasets.shards import read_shard
from storage.errors import SourceInvalid
from storage.sources import formats
from storage.sources import rows as row_types
from storage.sources.files import SourceFile
from storage.stores.opening import open_store
from tests.corpora import COMPRESS, FORMATS, encoded, write_files
from tests.making import build_dataset, document, tiny_config

TEXTS = [document(number, 20) + ('\r\n"żółć",\t🙂\n' if number % 7 == 0 else "") for number in range(200)]
KEEP_ALL = "data.keep_val_duplicates=true"


def dataset_of(folder: Path, files: dict[str, bytes], *settings: str) -> tuple[RunConfig, Manifest]:
    """The dataset of these files."""
    source = write_files(folder / "source", files)
    config = tiny_config(str(folder / "store"), str(source), "data.shard_tokens=1500", *settings)
    return config, build_dataset(config)


def stream_of(config: RunConfig, manifest: Manifest) -> bytes:
    """The tokens of all shards in order."""
    store = open_store(config.store_url)
    return b"".join(read_shard(store, "small", row) for row in manifest.rows())


def parquet_of(name: str, body: bytes, *members: bytes) -> pa.Table:
    """The rows of a file, or of several with the same name, as a conversion writes them."""
    output, files = io.BytesIO(), [SourceFile(name, 0, str(number), name) for number in range(1 + len(members))]
    formats.write_parquet(files, lambda file: nullcontext(io.BytesIO((body, *members)[int(file.digest)])), output)
    return pq.read_table(output)


def lines_of(name: str, body: bytes) -> list[bytes]:
    return [line.strip() for line in parquet_of(name, body).column(row_types.LINE).to_pylist()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return stream_of(*dataset_of(tmp_path_factory.mktemp("jsonl"), encoded(TEXTS, "jsonl"), KEEP_ALL))


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_tokens(tmp_path: Path, expected: bytes, kind: str, compression: str) -> None:
    assert stream_of(*dataset_of(tmp_path, encoded(TEXTS, kind, compression), KEEP_ALL)) == expected


@pytest.mark.nightly
@pytest.mark.parametrize("compression", COMPRESS)
def test_every_format_gives_the_tokens_of_2_000_documents(tmp_path: Path, compression: str) -> None:
    texts = [document(number) for number in range(2_000)]
    streams = {
        stream_of(*dataset_of(tmp_path / kind, encoded(texts, kind, compression), KEEP_ALL, "data.shard_tokens=20000"))
        for kind in FORMATS
    }
    assert len(streams) == 1


@pytest.mark.parametrize("compression", [name for name in COMPRESS if name])
def test_a_file_that_is_cut_is_refused_wherever_it_is_cut(compression: str) -> None:
    whole = encoded(TEXTS, "jsonl", compression, files=1)[f"part-00000.jsonl{compression}"]
    for length in (1, 5, len(whole) // 3, len(whole) // 2, len(whole) - 5, len(whole) - 1):
        with pytest.raises(SourceInvalid, match=rf"a\.jsonl{compression}: cannot be read as \.jsonl{compression}: "):
            parquet_of(f"a.jsonl{compression}", whole[:length])


@pytest.mark.parametrize("compression", [".bz2", ".xz"])
def test_a_damaged_stream_of_several_is_refused_and_an_empty_one_is_not(compression: str) -> None:
    compress, lines = COMPRESS[compression], [b'{"text": %d}\n' % number for number in range(4)]
    streams = [compress(lines[0]), compress(b""), *map(compress, lines[1:])]
    assert lines_of(f"a.jsonl{compression}", b"".join(streams) + bytes(512)) == [line.strip() for line in lines]
    many = compress(lines[0] * 200_000)  # more than a block
    assert parquet_of(f"a.jsonl{compression}", many).num_rows == 200_000
    for place in (0, 1, len(streams[3]) // 2, len(streams[3]) - 9):
        damaged = streams[3][:place] + bytes([streams[3][place] ^ 8]) + streams[3][place + 1 :]
        with pytest.raises(SourceInvalid, match=rf"a\.jsonl{compression}: cannot be read as .*"):
            parquet_of(f"a.jsonl{compression}", b"".join([*streams[:3], damaged, streams[4]]))


def test_arrow_that_parquet_cannot_hold_or_with_damaged_offsets_is_refused() -> None:
    def written(table: pa.Table) -> bytes:
        body = io.BytesIO()
        with pa.ipc.new_stream(body, table.schema) as writer:
            writer.write_table(table)
        return body.getvalue()

    with pytest.raises(SourceInvalid, match=r"a\.arrow: cannot be read as \.arrow: .*'x' with no child field"):
        parquet_of("a.arrow", written(pa.table({"text": TEXTS, "x": pa.array([{}] * 200, pa.struct([]))})))
    offset = pa.array([0, 1 << 30, 2], pa.int32()).buffers()[1]
    column = pa.StringArray.from_buffers(2, offset, pa.py_buffer(b"ab"))
    with pytest.raises(SourceInvalid, match=r"a\.arrow: cannot be read as \.arrow: "):
        parquet_of("a.arrow", written(pa.table({"text": column})))


@pytest.mark.parametrize("kind", ["arrow file", "json array"])
def test_a_plain_file_that_is_cut_is_refused(kind: str) -> None:
    suffix, write = FORMATS[kind]
    whole = write([{"text": text} for text in TEXTS])
    for length in (len(whole) // 2, len(whole) - 8, len(whole) - 2):
        with pytest.raises(SourceInvalid, match=rf"a\{suffix}: cannot be read as \{suffix}: "):
            parquet_of(f"a{suffix}", whole[:length])


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", b","), ("a.tsv", b"\t")])
def test_values_stay_text_after_a_byte_order_mark(name: str, delimiter: bytes) -> None:
    lines = [codecs.BOM_UTF8 + b"id" + delimiter + b"text", b"007" + delimiter + b'"two\nlines"', b""]
    assert parquet_of(name, b"\n".join(lines)).to_pylist() == [{"id": b"007", "text": b"two\nlines"}]


def test_a_second_array_is_refused_however_far_it_is() -> None:
    for space in (1, formats.BLOCK_BYTES):
        with pytest.raises(SourceInvalid, match=r"a\.json: .*not one array of JSON: b'\[2\]' follows"):
            lines_of("a.json", b"[1]" + b" " * space + b"[2]")


def test_a_row_of_csv_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CSV_BLOCK_BYTES", 1_000)
    with pytest.raises(SourceInvalid, match=r"a\.csv: .*a row has over 1,000 bytes; use JSON lines"):
        parquet_of("a.csv", b"text\n" + b"x" * 5_000 + b"\nend\n")


def test_a_block_of_csv_may_end_inside_a_value_of_many_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CSV_BLOCK_BYTES", 1_000)
    texts = [f"{number}\n{number},\n" * 9 for number in range(200)]
    body = FORMATS["csv"][1]([{"text": text} for text in texts])
    assert parquet_of("a.csv", body).column("text").to_pylist() == [text.encode() for text in texts]


def test_a_header_without_an_end_is_refused() -> None:
    with pytest.raises(SourceInvalid, match=r"a\.csv: cannot be read as \.csv: field larger than field limit"):
        parquet_of("a.csv", b"text," + b"x" * 140_000 + b"\n")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.zst", ".csv.xz", ".txt.bz2", ".arrow", ".parquet.gz"])
def test_a_file_of_another_format_than_its_name_says_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(SourceInvalid, match=rf"a\{suffix}: cannot be read as"):
        dataset_of(tmp_path, {f"a{suffix}": b"This is no archive.\n" * 9})


@pytest.mark.parametrize(
    ("kind", "name", "body"),
    [
        ("txt", "a.txt", "ż".encode("utf-16")),
        ("md", "a.md", "naïve".encode("latin-1")),
        ("csv", "a.csv", "text\nnaïve\n".encode("latin-1")),
        ("json lines", "a.json", '{"text": "naïve"}'.encode("latin-1")),
        ("json array", "a.json", '[{"text": "naïve"}]'.encode("latin-1")),
        ("jsonl", "a.jsonl", '{"text": "naïve"}'.encode("latin-1")),
    ],
)
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_text_in_another_encoding_is_named_and_refused_or_skipped(
    tmp_path: Path, kind: str, name: str, body: bytes, compression: str
) -> None:
    files = {name + compression: COMPRESS[compression](body)} | encoded(TEXTS, kind, compression)
    with pytest.raises(SourceInvalid, match=rf"\b{name}{compression}: row 0\b.*on_bad_document=skip"):
        dataset_of(tmp_path, files)
    _, manifest = dataset_of(tmp_path, files, "data.on_bad_document=skip", KEEP_ALL)
    assert sum(counts["skipped"] for counts in manifest.totals.values()) == 1
    assert sum(counts["documents"] for counts in manifest.totals.values()) == len(TEXTS)


def test_what_surrounds_lines_is_no_row() -> None:
    body = codecs.BOM_UTF8 + b'\n{"text": 1}\r\n\n \t\n{"text": 2}\n\n  \r\nbroken\n{"text": 3}'
    assert lines_of("a.jsonl.gz", COMPRESS[".gz"](body)) == [b'{"text": 1}', b'{"text": 2}', b"broken", b'{"text": 3}']
    assert lines_of("a.jsonl.gz", COMPRESS[".gz"](b"\n \n" * (1 << 22))) == []  # in no time: a bomb is like this
    assert lines_of("a.json", b"[1, %s]" % (b"9" * 5_000)) == [b"1", b"9" * 5_000]  # Python's limit is 4,300
    assert parquet_of("a.txt", codecs.BOM_UTF8 + b"one\n").column("text").to_pylist() == [b"one\n"]
    assert lines_of("a.json", b"") == lines_of("a.json", b" \n") == lines_of("a.json", b" [ ] ") == []


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    elements=st.lists(JSON, max_size=20),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    block=st.integers(8, 200),
)
def test_the_rows_of_an_array_are_its_elements(
    elements: list[Any], ascii_only: bool, indent: int | None, block: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(formats, "BLOCK_BYTES", block)
        body = json.dumps(elements, ensure_ascii=ascii_only, indent=indent).encode(errors="surrogatepass")
        assert [json.loads(line.decode(errors="surrogatepass")) for line in lines_of("a.json", body)] == elements


@given(lines=st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line)), block=st.integers(1, 50))
def test_the_rows_of_lines_are_those_that_are_not_blank(lines: list[bytes], block: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(formats, "BLOCK_BYTES", block)
        body = COMPRESS[".gz"](b"\n".join([b"{}", *lines]))
        rows = parquet_of("a.jsonl.gz", body).column(row_types.LINE).to_pylist()
    assert [row.removesuffix(b"\n") for row in rows] == [b"{}", *(line for line in lines if line.strip())]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz"])
def test_a_document_over_the_limit_is_refused_in_bounded_memory(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A bomb: 1 GB of zeros from 1 MB. The limit of a document is 256 MiB, here 1 MiB."""
    monkeypatch.setattr(formats, "DOCUMENT_BYTES", 1 << 20)
    read = 0

    class Counting(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            nonlocal read
            read += (count := super().readinto(buffer))
            return count

        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            read += len(body := super().read(size))
            return body

    member = COMPRESS[".gz"](b"[" + bytes(1 << 24))
    body = member + COMPRESS[".gz"](bytes(1 << 24)) * 60
    file = SourceFile(name, 0, "0", name)
    with pytest.raises(SourceInvalid, match=rf"{name}: .*longer than 1,048,576 bytes"):
        formats.write_parquet([file], lambda _: nullcontext(Counting(body)), io.BytesIO())
    assert read < len(body)


def test_a_deeply_nested_element_is_one_row_unless_it_is_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    assert lines_of("a.json", b"[" + deep + b', {"text": "}]"} ]') == [deep, b'{"text": "}]"}']
    monkeypatch.setattr(formats, "DEEPEST", 1_000)
    with pytest.raises(SourceInvalid, match=r"a\.json.*more than 1,000 deep"):
        lines_of("a.json", b"[" + deep + b"]")


@pytest.mark.parametrize(("name", "body"), [("a.jsonl.gz", b"{}\n" * 5_000), ("a.json.gz", b"[" + b"[]," * 5_000)])
def test_more_rows_than_bytes_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, body: bytes) -> None:
    """A bomb of empty rows: 300 million of them would take minutes, and their plan 2.4 GB."""
    monkeypatch.setattr(formats, "PLAUSIBLE_ROWS", 1_000)
    monkeypatch.setattr(formats, "GROUP_BYTES", 1_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1_000)
    with pytest.raises(SourceInvalid, match=rf"{name}: more than 1,000 rows"):
        parquet_of(name, COMPRESS[".gz"](body))
    large = SourceFile(name, 5_000, "0", name)
    formats.write_parquet([large], lambda _: nullcontext(io.BytesIO(COMPRESS[".gz"](b"{}\n" * 5_000))), io.BytesIO())


def test_an_error_of_the_disk_is_not_one_of_the_file() -> None:
    class Broken(io.BytesIO):
        def readinto(self, _: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        formats.write_parquet([SourceFile("a.txt", 0, "0", "a.txt")], lambda _: nullcontext(Broken()), io.BytesIO())


def test_the_limit_of_an_element_counts_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "DOCUMENT_BYTES", 1 << 20)
    with pytest.raises(SourceInvalid, match="longer than 1,048,576 bytes"):
        lines_of("a.json", b'["' + "🙂".encode() * (1 << 19))


def test_a_large_file_becomes_many_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "GROUP_BYTES", 2_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1_000)
    output, body = io.BytesIO(), COMPRESS[".gz"](FORMATS["jsonl"][1]([{"text": text} for text in TEXTS]))
    file = SourceFile("a.jsonl.gz", 0, "", "a.jsonl.gz")
    formats.write_parquet([file], lambda _: nullcontext(io.BytesIO(body)), output)
    footer = pq.ParquetFile(output).metadata
    assert footer.num_rows == len(TEXTS)
    assert footer.num_row_groups > 10
