"""Parquet files: any rows are read, token counts are used, damaged files and other types are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import SourceInvalid
from storage.sources import parquet
from tests.making import document, write_parquet
from tests.storage.source_files import READS, TEXTS, Read, rows, texts_of, write_table


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("damage", [lambda body: body[: len(body) // 2], lambda _: b"", lambda _: b"PAR1 not parquet"])
def test_a_truncated_parquet_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], read: Read) -> None:
    path = write_parquet(tmp_path / "cut.parquet", TEXTS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceInvalid, match=r"cut\.parquet"):
        read(path)


@pytest.mark.parametrize("read", READS)
def test_a_parquet_file_without_the_text_column_is_refused_and_its_columns_listed(tmp_path: Path, read: Read) -> None:
    path = write_table(tmp_path / "a.parquet", {"content": ["a", "b"], "url": ["c", "d"]})
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*'text'.*content, url.*data\.text_column"):
        read(path)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2], "int64"), ([b"a", b"b"], "binary"), ([["a"], ["b"]], "list"), ([None, None], "null")],
)
def test_a_text_column_of_another_type_is_refused(tmp_path: Path, values: list[object], kind: str, read: Read) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": values})
    with pytest.raises(SourceInvalid, match=rf"a\.parquet.*'text'.*{kind}"):
        read(path)


def test_null_text_is_refused_by_the_footer(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["a", "b", None, "d"]}, row_group_size=2)
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*'text'.*null"):
        rows(path)


@pytest.mark.parametrize("statistics", [True, False])
def test_null_text_is_refused_when_it_is_read(tmp_path: Path, statistics: bool) -> None:
    path = write_table(
        tmp_path / "a.parquet", {"text": ["a", "b", None, "d"]}, row_group_size=2, write_statistics=statistics
    )
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*row 2.*null"):
        texts_of(path, 0, 4)
    assert texts_of(path, 0, 2) == ["a", "b"]
    assert texts_of(path, 3, 4) == ["d"]


def test_nulls_of_another_column_do_not_matter(tmp_path: Path) -> None:
    meta = [{"a": 1, "b": None}, {"a": None, "b": None}]  # a nested column: two leaves before `text`
    path = write_table(tmp_path / "a.parquet", {"meta": meta, "url": [None, "b"], "text": ["one", "two"]})
    rows(path)
    assert texts_of(path, 0, 2) == ["one", "two"]


def test_null_text_behind_a_nested_column_is_refused(tmp_path: Path) -> None:
    meta = [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    path = write_table(tmp_path / "a.parquet", {"meta": meta, "text": ["one", None]})
    with pytest.raises(SourceInvalid, match="null"):
        rows(path)


def test_the_estimate_uses_the_text_column_behind_a_nested_one(tmp_path: Path) -> None:
    texts = [document(number) for number in range(20)]
    plain = write_table(tmp_path / "a.parquet", {"text": texts})
    nested = write_table(tmp_path / "b.parquet", {"meta": [{"a": 1, "b": 2}] * 20, "text": texts})
    assert list(rows(nested).tokens) == list(rows(plain).tokens)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("row_group_size", [1, 4, 100])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_any_range_of_rows_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType, row_group_size: int, at_once: int
) -> None:
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", at_once)
    path = write_table(tmp_path / "a.parquet", {"text": pa.array(TEXTS, kind)}, row_group_size=row_group_size)
    for start in range(len(TEXTS) + 1):
        for end in range(start, len(TEXTS) + 1):
            assert texts_of(path, start, end) == TEXTS[start:end]


def test_a_replaced_file_is_read_again(tmp_path: Path) -> None:
    for texts in (["one", "two"], ["three", "four"]):
        assert texts_of(write_table(tmp_path / "a.parquet", {"text": texts}), 0, 2) == texts
        shutil.rmtree(tmp_path / "0-2")


def test_text_that_is_not_utf8_is_refused_and_named(tmp_path: Path) -> None:
    offsets, body = pa.py_buffer(np.array([0, 1, 3], np.int32).tobytes()), pa.py_buffer(b"a\xff\xfe")
    texts = pa.StringArray.from_buffers(2, offsets, body)
    path = write_table(tmp_path / "a.parquet", {"text": texts})
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*row 1"):
        texts_of(path, 0, 2)


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
        rows(path) if column == "token_count" else texts_of(path, 0, 200)


def test_a_token_count_is_used_and_eot_added(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["a", "b", "c"], "token_count": [0, 5, 7]})
    assert list(rows(path).tokens) == [1, 6, 8]


@pytest.mark.parametrize("counts", [[1, None, 3], [1.5, 2.5, 3.5], ["1", "2", "3"]])
def test_a_token_count_that_cannot_be_used_is_estimated(tmp_path: Path, counts: list[object]) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["a" * 400] * 3, "token_count": counts})
    tokens = rows(path).tokens
    assert len(tokens) == 3
    assert all(tokens >= 1)


@pytest.mark.parametrize("count", [-5, 2**62, 2**63 - 1])
def test_every_row_costs_a_token_whatever_its_token_count(tmp_path: Path, count: int) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["a", "b"], "token_count": [count, count]})
    assert all(rows(path).tokens >= 1)


def test_a_parquet_file_without_rows_has_no_documents(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    assert len(rows(path).tokens) == 0
    assert texts_of(path, 0, 0) == []
