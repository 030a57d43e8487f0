"""Source files: what is found, what is refused and why, and that a file is known by what it holds."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import sources
from storage.errors import SourceInvalid
from tests.making import document, write_parquet

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


# Found


@pytest.mark.parametrize("pattern", ["nothing.parquet", "*.parquet", "none/*.jsonl", "**/*.jsonl", "[", ""])
def test_a_source_that_names_no_file_is_refused(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data\.source") as found:
        sources.find(pattern)
    assert repr(pattern) in str(found.value)
    assert str(tmp_path) in str(found.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=str(tmp_path)):
        sources.find(str(tmp_path))


def test_a_file_of_another_kind_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.csv").touch()
    for source in (f"{tmp_path}/*", f"{tmp_path}/b.csv"):
        with pytest.raises(ValueError, match=r"b\.csv.*\.parquet.*\.jsonl"):
            sources.find(source)


def test_a_folder_gives_its_source_files_sorted_and_no_others(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.jsonl", "c.parquet", "notes.txt", "_SUCCESS"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.parquet").touch()
    assert [path.name for path in sources.find(str(tmp_path))] == ["a.jsonl", "b.parquet", "c.parquet"]


def test_a_folder_that_is_named_like_a_file_is_no_source_file(tmp_path: Path) -> None:
    (tmp_path / "spark.parquet").mkdir()
    (tmp_path / "a.parquet").touch()
    for source in (str(tmp_path), f"{tmp_path}/*.parquet"):
        assert [path.name for path in sources.find(source)] == ["a.parquet"]
    (tmp_path / "spark.parquet" / "part-0.parquet").touch()
    assert [path.name for path in sources.find(f"{tmp_path}/spark.parquet")] == ["part-0.parquet"]


def test_globs_are_sorted_and_may_be_recursive(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in sources.find(f"{tmp_path}/**/*.jsonl")]
    assert found == ["a/1.jsonl", "b/2.jsonl", "c.jsonl"]


def test_a_path_that_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    path = tmp_path / "data[1].parquet"
    path.touch()
    assert sources.find(str(path)) == [path]


# Identified


def test_identify_says_name_size_and_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"12345")
    found = sources.identify(path)
    assert (found.name, found.size_bytes, found.path) == ("a.jsonl", 5, str(path))
    assert found.sha256 == hashlib.sha256(b"12345").hexdigest()


def old(path: Path) -> Path:
    """The path, of a file that was last written a day ago."""
    os.utime(path, ns=(path.stat().st_mtime_ns - 86_400 * 10**9,) * 2)
    return path


def test_identify_reads_an_unchanged_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"12345")
    path = old(tmp_path / "a.jsonl")
    first = sources.identify(path)

    def never(*_: object) -> None:
        pytest.fail("the file was read again")

    monkeypatch.setattr(hashlib, "file_digest", never)
    assert sources.identify(path) == first


def test_identify_notices_a_file_of_other_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for body in (b"1", b"12", b"1"):
        path.write_bytes(body)
        assert sources.identify(path).sha256 == hashlib.sha256(body).hexdigest()


def test_identify_notices_a_file_of_other_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1")
    sources.identify(old(path))
    path.write_bytes(b"2")
    assert sources.identify(path).sha256 == hashlib.sha256(b"2").hexdigest()


def test_identify_notices_a_file_that_took_the_place_of_another(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(b"1")
    other.write_bytes(b"2")
    os.utime(path, ns=(10**18, 10**18))
    os.utime(other, ns=(10**18, 10**18))
    sources.identify(path)
    other.replace(path)
    assert sources.identify(path).sha256 == hashlib.sha256(b"2").hexdigest()


def test_identify_notices_a_file_that_is_written_again_at_once(tmp_path: Path) -> None:
    """A file system's clock ticks every few milliseconds: two writes within one tick carry the same time."""
    path = tmp_path / "a.jsonl"
    for number in range(200):
        body = b"%03d" % number
        path.write_bytes(body)
        assert sources.identify(path).sha256 == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("damage", [b"", b"0123", b"\xff\xfe", b"x" * 64])
def test_a_damaged_note_is_not_believed(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"12345")
    first = sources.identify(old(path))
    notes = [note for note in sources.REMEMBERED.rglob("*") if note.is_file()]
    assert len(notes) == 1
    notes[0].write_bytes(damage)
    assert sources.identify(path) == first


def test_a_home_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(sources, "REMEMBERED", tmp_path / "home" / "digests")
    (tmp_path / "a.jsonl").write_bytes(b"1")
    for _ in range(2):
        assert sources.identify(tmp_path / "a.jsonl").sha256 == hashlib.sha256(b"1").hexdigest()


def test_a_source_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"gone\.parquet"):
        sources.identify(tmp_path / "gone.parquet")


# Parquet


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("damage", [lambda body: body[: len(body) // 2], lambda _: b"", lambda _: b"PAR1 not parquet"])
def test_a_parquet_file_that_is_cut_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], look: Ask) -> None:
    path = write_parquet(tmp_path / "cut.parquet", TEXTS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceInvalid, match=r"cut\.parquet"):
        look(path)


@pytest.mark.parametrize("look", LOOKS)
def test_a_parquet_file_without_the_text_column_is_refused_with_those_it_has(tmp_path: Path, look: Ask) -> None:
    path = write_table(tmp_path / "a.parquet", {"content": ["a", "b"], "url": ["c", "d"]})
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*'text'.*content, url.*data\.text_column"):
        look(path)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2], "int64"), ([b"a", b"b"], "binary"), ([["a"], ["b"]], "list"), ([None, None], "null")],
)
def test_a_text_column_of_another_type_is_refused(tmp_path: Path, values: list[object], kind: str, look: Ask) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": values})
    with pytest.raises(SourceInvalid, match=rf"a\.parquet.*'text'.*{kind}"):
        look(path)


def test_null_text_is_seen_in_the_footer(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["a", "b", None, "d"]}, row_group_size=2)
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*'text'.*null"):
        sources.check(path, "text")


@pytest.mark.parametrize("statistics", [True, False])
def test_null_text_is_refused_where_it_is_read(tmp_path: Path, statistics: bool) -> None:
    path = write_table(
        tmp_path / "a.parquet", {"text": ["a", "b", None, "d"]}, row_group_size=2, write_statistics=statistics
    )
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*row 2.*null"):
        list(sources.documents(path, "text", 0, 4))
    assert list(sources.documents(path, "text", 0, 2)) == ["a", "b"]
    assert list(sources.documents(path, "text", 3, 4)) == ["d"]


def test_nulls_of_another_column_are_nobodys_business(tmp_path: Path) -> None:
    meta = [{"a": 1, "b": None}, {"a": None, "b": None}]  # a nested column: two leaves before `text`
    path = write_table(tmp_path / "a.parquet", {"meta": meta, "url": [None, "b"], "text": ["one", "two"]})
    sources.check(path, "text")
    assert list(sources.documents(path, "text", 0, 2)) == ["one", "two"]


def test_nulls_are_seen_behind_a_nested_column(tmp_path: Path) -> None:
    meta = [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    path = write_table(tmp_path / "a.parquet", {"meta": meta, "text": ["one", None]})
    with pytest.raises(SourceInvalid, match="null"):
        sources.check(path, "text")


def test_the_estimate_is_of_the_text_column_behind_a_nested_one(tmp_path: Path) -> None:
    texts = [document(number) for number in range(20)]
    plain = write_table(tmp_path / "a.parquet", {"text": texts})
    nested = write_table(tmp_path / "b.parquet", {"meta": [{"a": 1, "b": 2}] * 20, "text": texts})
    assert list(sources.rows(nested, "text").tokens) == list(sources.rows(plain, "text").tokens)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("row_group_size", [1, 4, 100])
def test_any_range_of_rows_is_read(tmp_path: Path, kind: pa.DataType, row_group_size: int) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": pa.array(TEXTS, kind)}, row_group_size=row_group_size)
    for start in range(len(TEXTS) + 1):
        for end in range(start, len(TEXTS) + 1):
            assert list(sources.documents(path, "text", start, end)) == TEXTS[start:end]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_rows_past_the_end_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_parquet(path, TEXTS) if name == "a.parquet" else write_jsonl(path, TEXTS)
    with pytest.raises(SourceInvalid, match=rf"{name}.*{len(TEXTS) + 3}.*{len(TEXTS)}"):
        list(sources.documents(path, "text", 0, len(TEXTS) + 3))


def test_bytes_that_are_no_utf8_in_a_string_column_are_refused(tmp_path: Path) -> None:
    offsets, body = pa.py_buffer(np.array([0, 1, 3], np.int32).tobytes()), pa.py_buffer(b"a\xff\xfe")
    texts = pa.StringArray.from_buffers(2, offsets, body)
    path = write_table(tmp_path / "a.parquet", {"text": texts})
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*row 1"):
        list(sources.documents(path, "text", 0, 2))


@pytest.mark.parametrize("column", ["text", "token_count"])
def test_a_damaged_page_is_refused(tmp_path: Path, column: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [document(number) for number in range(200)], row_group_size=200)
    with pq.ParquetFile(path) as file:
        index = file.schema_arrow.names.index(column)
        chunk = file.metadata.row_group(0).column(index)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
    body = bytearray(path.read_bytes())
    body[start : start + 40] = b"\xff" * 40
    path.write_bytes(body)
    with pytest.raises(SourceInvalid, match=r"a\.parquet"):
        sources.rows(path, "text") if column == "token_count" else list(sources.documents(path, "text", 0, 200))


def test_a_token_count_steers_by_its_own_number_and_eot(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["a", "b", "c"], "token_count": [0, 5, 7]})
    assert list(sources.rows(path, "text").tokens) == [1, 6, 8]


@pytest.mark.parametrize("counts", [[1, None, 3], [1.5, 2.5, 3.5], ["1", "2", "3"]])
def test_a_token_count_that_cannot_be_used_is_estimated(tmp_path: Path, counts: list[object]) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["a" * 400] * 3, "token_count": counts})
    found = sources.rows(path, "text").tokens
    assert len(found) == 3
    assert all(found >= 1)


@pytest.mark.parametrize("count", [-5, 2**62, 2**63 - 1])
def test_a_token_count_of_any_size_makes_no_row_cost_nothing(tmp_path: Path, count: int) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["a", "b"], "token_count": [count, count]})
    assert all(sources.rows(path, "text").tokens >= 1)


def test_a_parquet_file_without_rows_has_no_documents(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    sources.check(path, "text")
    assert len(sources.rows(path, "text").tokens) == 0
    assert list(sources.documents(path, "text", 0, 0)) == []


# JSON lines


READS: list[Ask] = LOOKS[1:]


@pytest.mark.parametrize("look", READS)
@pytest.mark.parametrize(
    "line", ["{", "text", '{"text": "a"', '{"text": "a"} {"text": "b"}', b'{"text": "\xff"}', "[" * 100_000]
)
def test_a_line_that_is_no_json_is_refused_and_named(tmp_path: Path, line: str | bytes, look: Ask) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a"}', line)
    with pytest.raises(SourceInvalid, match=r"a\.jsonl.*row 1\b"):
        look(path)


@pytest.mark.parametrize("look", READS)
@pytest.mark.parametrize(
    ("line", "found"), [('{"content": "a", "url": "b"}', "content, url"), ("{}", ""), ("[1]", "list"), ("7", "int")]
)
def test_a_line_without_the_text_column_is_refused_with_those_it_has(
    tmp_path: Path, line: str, found: str, look: Ask
) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a"}', line)
    with pytest.raises(SourceInvalid, match=rf"a\.jsonl.*row 1\b.*'text'.*{found}"):
        look(path)


@pytest.mark.parametrize("look", READS)
@pytest.mark.parametrize(
    ("value", "found"), [("null", "null"), ("1", "int"), ('["a"]', "list"), ("true", "bool"), ("{}", "dict")]
)
def test_text_that_is_no_string_is_refused(tmp_path: Path, value: str, found: str, look: Ask) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a"}', f'{{"text": {value}}}')
    with pytest.raises(SourceInvalid, match=rf"a\.jsonl.*row 1\b.*'text'.*{found}"):
        look(path)


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "one"}\n\n  \t\r\n{"text": "two"}\r\n\n{"text": "three"}')
    found = sources.rows(path, "text")
    assert len(found.tokens) == 3
    assert found.starts is not None
    for row, text in enumerate(["one", "two", "three"]):
        assert list(sources.documents(path, "text", row, row + 1, int(found.starts[row]))) == [text]
    assert list(sources.documents(path, "text", 0, 3)) == ["one", "two", "three"]


@pytest.mark.parametrize("escaped", [True, False])
def test_any_range_of_lines_is_read(tmp_path: Path, escaped: bool) -> None:
    path = write_lines(tmp_path / "a.jsonl", *(json.dumps({"text": text}, ensure_ascii=escaped) for text in TEXTS))
    starts = sources.rows(path, "text").starts
    assert starts is not None
    for start in range(len(TEXTS)):
        for end in range(start + 1, len(TEXTS) + 1):
            assert list(sources.documents(path, "text", start, end, int(starts[start]))) == TEXTS[start:end]


def test_a_lone_surrogate_is_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", r'{"text": "a\ud800b"}', r'{"text": "\udc00"}')
    assert len(sources.rows(path, "text").tokens) == 2
    assert list(sources.documents(path, "text", 0, 2)) == ["a\ud800b", "\udc00"]


def test_counts_of_lines_steer_only_when_every_line_has_one(tmp_path: Path) -> None:
    counted = ['{"text": "a", "token_count": 5}', '{"text": "b", "token_count": 7}']
    path = write_lines(tmp_path / "a.jsonl", *counted)
    assert list(sources.rows(path, "text").tokens) == [6, 8]
    for odd in ('{"text": "c"}', '{"text": "c", "token_count": -1}', '{"text": "c", "token_count": "9"}'):
        found = sources.rows(write_lines(tmp_path / "b.jsonl", *counted, odd), "text").tokens
        assert list(found) == [2, 2, 2]


def test_a_jsonl_file_without_lines_has_no_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "", " ")
    assert len(sources.rows(path, "text").tokens) == 0
    assert list(sources.documents(path, "text", 0, 0)) == []


def test_a_jsonl_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"gone\.jsonl"):
        sources.rows(tmp_path / "gone.jsonl", "text")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_another_column_may_hold_the_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_table(path, {"text": [1, 2], "content": ["one", "two"]})
    else:
        write_lines(path, '{"text": 1, "content": "one"}', '{"text": 2, "content": "two"}')
    sources.check(path, "content")
    assert len(sources.rows(path, "content").tokens) == 2
    assert list(sources.documents(path, "content", 0, 2)) == ["one", "two"]
