"""Parquet files: any rows are read, token counts are used, damaged files and other types are refused."""

import base64
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from model import tokenizer
from storage.datasets import shards
from storage.errors import SourceInvalid
from storage.sources import parquet
from storage.stores.folder import FolderStore
from tests.making import document, write_parquet
from tests.storage.sealing import jobs_of
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
    [([1, 2], "int64"), ([["a"], ["b"]], "list"), (pa.array([b"ab", b"cd"], pa.binary(2)), "fixed_size_binary")],
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


# Types


def text_arrays() -> dict[str, pa.Array]:
    bodies = [text.encode() for text in TEXTS]
    kinds = {str(kind): pa.array(bodies, kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())}
    return kinds | {
        "string_view": pa.array(TEXTS, pa.string_view()),
        "dictionary": pa.array(TEXTS).dictionary_encode(),
        "dictionary of binary": pa.array(bodies).dictionary_encode(),
        "json": pa.array(TEXTS, pa.json_(pa.string())),
        "opaque": pa.ExtensionArray.from_storage(
            pa.opaque(pa.large_string(), "t", "v"), pa.array(TEXTS, "large_string")
        ),
    }


@pytest.mark.parametrize("kind", text_arrays())
def test_text_of_any_string_type_gives_the_same_tokens(tmp_path: Path, kind: str) -> None:
    array = text_arrays()[kind]
    path = write_table(tmp_path / "a.parquet", {"text": array, "dump": array, "id": array}, row_group_size=4)
    plain = write_table(tmp_path / "b.parquet", {"text": TEXTS, "dump": TEXTS, "id": TEXTS}, row_group_size=4)
    assert len(rows(path).tokens) == len(TEXTS)
    (job,), (other) = jobs_of(path, filters=("dump != 'one'",)), jobs_of(plain, filters=("dump != 'one'",))
    for builds in (job, *other):
        record = shards.build_shard(FolderStore(tmp_path / "s", "s"), "a", builds, tokenizer.encode, tokenizer.EOT)
        assert record.documents == len(TEXTS) - 1
        assert record.dumps == dict.fromkeys(TEXTS[1:], 1)
    assert texts_of(path, 0, len(TEXTS)) == TEXTS


@pytest.mark.parametrize("kind", ["binary", "binary_view", "dictionary"])
def test_bytes_that_are_not_utf8_are_a_bad_document(tmp_path: Path, kind: str) -> None:
    texts = pa.array([b"one", b"\xff\xfe", b"two"], pa.binary() if kind == "dictionary" else getattr(pa, kind)())
    texts = texts.dictionary_encode() if kind == "dictionary" else texts
    path = write_table(tmp_path / "a.parquet", {"text": texts, "id": texts, "dump": texts})
    store = FolderStore(tmp_path / "store", "store")
    (job,) = jobs_of(path)
    with pytest.raises(SourceInvalid, match=r"a\.parquet: row 1 \(id \\xff\\xfe\).*not UTF-8") as error:
        shards.build_shard(store, "a", job, tokenizer.encode, tokenizer.EOT)
    assert str(error.value).encode()
    (job,) = jobs_of(path, on_bad_document="skip")
    record = shards.build_shard(store, "a", job, tokenizer.encode, tokenizer.EOT)
    assert (record.documents, record.skipped_rows) == (2, [1])
    assert len(jobs_of(path, filters=(r"dump == '\\xff\\xfe'",))) == 1  # as it is shown


def test_a_column_of_nulls_is_no_conflict(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["one", "two"], "dump": pa.nulls(2), "id": pa.nulls(2)})
    assert texts_of(path, 0, 2) == ["one", "two"]
    assert jobs_of(path, filters=("dump == 'a'",)) == []
    nulls = write_table(tmp_path / "b.parquet", {"text": pa.nulls(2)})
    (job,) = jobs_of(nulls, on_bad_document="skip")
    record = shards.build_shard(FolderStore(tmp_path / "s", "s"), "a", job, tokenizer.encode, tokenizer.EOT)
    assert (record.tokens, record.skipped_rows) == (0, [0, 1])
    with pytest.raises(SourceInvalid, match=r"b\.parquet: row 0.*null"):
        texts_of(nulls, 0, 2)


@pytest.mark.parametrize("columns", [{}, {"text": pa.nulls(0)}, {"other": pa.array([], pa.int64())}])
def test_a_file_without_rows_may_have_any_columns(tmp_path: Path, columns: dict[str, object]) -> None:
    assert jobs_of(write_table(tmp_path / "a.parquet", columns), filters=("dump == 'a'",)) == []


@pytest.mark.parametrize("name", ["text", "dump", "token_count"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    columns = [("text", ["a"]), ("dump", ["b"]), ("token_count", [1]), ("more", [1]), ("more", [1])]
    columns += [(name, values) for column, values in columns if column == name]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.Table.from_arrays([pa.array(values) for _, values in columns], [name for name, _ in columns]), path
    )
    with pytest.raises(SourceInvalid, match=rf"a\.parquet: 2 columns are named '{name}'"):
        rows(path)


def test_values_that_python_cannot_hold_are_named_as_text(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["one"], "dump": pa.array([2**62], pa.timestamp("us"))})
    assert texts_of(path, 0, 1) == ["one"]


# Footers


class Kms(encryption.KmsClient):  # type: ignore[misc]
    """Keys that encrypt nothing: the files only have to look encrypted."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def wrap_key(self, key_bytes: bytes, _: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, _: str) -> bytes:
        return base64.b64decode(wrapped_key)


def write_encrypted(path: Path, column: str) -> Path:
    """A file with one encrypted column, whose footer anyone can read."""
    settings = encryption.EncryptionConfiguration(
        footer_key="a", column_keys={"b": [column]}, plaintext_footer=True, data_key_length_bits=128
    )
    keys = encryption.CryptoFactory(Kms).file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    table = pa.table({"text": ["one", "two"], "secret": [1, 2], "token_count": [1, 1], "dump": ["a", "b"]})
    pq.write_table(table, path, encryption_properties=keys)
    return path


def test_an_encrypted_column_that_is_not_read_does_no_harm(tmp_path: Path) -> None:
    path = write_encrypted(tmp_path / "a.parquet", "secret")
    assert list(rows(path).tokens) == [2, 2]
    assert texts_of(path, 0, 2) == ["one", "two"]


@pytest.mark.parametrize("column", ["text", "token_count", "dump", "secret"])
def test_an_encrypted_column_that_is_read_is_named(tmp_path: Path, column: str) -> None:
    path = write_encrypted(tmp_path / "a.parquet", column)
    with pytest.raises(SourceInvalid, match=rf"a\.parquet: .*column '{column}'.*decrypt"):
        rows(path, "text", *(["secret == 1"] if column == "secret" else []))


def rewrite_footer(path: Path, old: bytes, new: bytes) -> Path:
    body = path.read_bytes()
    footer_bytes = int.from_bytes(body[-8:-4], "little")
    footer = body[-8 - footer_bytes : -8]
    assert old in footer
    footer = footer.replace(old, new)
    path.write_bytes(body[: -8 - footer_bytes] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return path


def claiming(path: Path, claimed: int) -> Path:
    """A file of 12,345 rows whose footer claims another number."""

    def varint(number: int) -> bytes:  # of Thrift's compact protocol
        more = number << 1
        return bytes([more >> shift & 127 | 128 for shift in range(0, 63, 7)]) + bytes([more >> 63])

    write_table(path, {"text": ["a"] * 12_345, "token_count": [1] * 12_345}, compression="none")
    short = bytes([24_690 & 127 | 128, 24_690 >> 7 & 127 | 128, 24_690 >> 14])
    return rewrite_footer(path, short, varint(claimed))


@pytest.mark.parametrize("claimed", [2**28, 2**40, 2**62])
@pytest.mark.parametrize("read", READS)
def test_a_footer_that_claims_too_many_rows_is_refused(tmp_path: Path, claimed: int, read: Read) -> None:
    with pytest.raises(SourceInvalid, match=rf"a\.parquet.*{claimed:,} rows"):
        read(claiming(tmp_path / "a.parquet", claimed))


@pytest.mark.parametrize("claimed", [12_346, 20_000])
def test_a_footer_that_claims_more_rows_than_its_columns_have_is_refused(tmp_path: Path, claimed: int) -> None:
    with pytest.raises(SourceInvalid, match=r"a\.parquet"):
        rows(claiming(tmp_path / "a.parquet", claimed))


def test_damaged_metadata_of_the_text_column_are_an_error(tmp_path: Path) -> None:
    """The column is no longer optional, but has counts of definition levels: pyarrow would abort the process."""
    path = write_table(tmp_path / "a.parquet", {"text": ["one", "two"]})
    rewrite_footer(path, b"\x25\x02\x18\x04text", b"\x25\x00\x18\x04text")
    with pytest.raises(SourceInvalid, match=r"a\.parquet: .*column 'text'"):
        rows(path)


def test_a_column_name_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["one"], "other": ["b"]}, store_schema=False)
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*utf-8"):
        rows(rewrite_footer(path, b"other", b"oth\xff\xfe"))
