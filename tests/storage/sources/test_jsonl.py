"""JSON lines: any rows are read, and a line that is not a document is refused and named."""

import json
import shutil
from pathlib import Path

import pytest

from model import tokenizer
from storage.datasets import shards
from storage.datasets.plan import cut
from storage.datasets.records import read_record
from storage.errors import SourceInvalid
from storage.inspection.lineage import source_rows
from storage.sources import rows as row_types
from storage.stores.folder import FolderStore
from tests.storage.sealing import jobs_of, rows_of
from tests.storage.source_files import READS, TEXTS, Read, rows, texts_of, write_lines


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    "line", ["{", "text", '{"text": "a"', '{"text": "a"} {"text": "b"}', b'{"text": "\xff"}', "[" * 100_000]
)
def test_a_line_that_is_not_json_is_refused_and_named(tmp_path: Path, line: str | bytes, read: Read) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a"}', line)
    with pytest.raises(SourceInvalid, match=r"a\.jsonl.*row 1\b"):
        read(path)


BAD_LINES: list[str | bytes] = [
    "{", "text", '{"text": "a"', '{"text": "a"} {"text": "b"}', b'{"text": "\xff"}', b'{"text": "a\x00"}', b"\x00" * 50,
    b'\x00\x00{"text": "a"}', "[" * 100_000, f'{{"text": "a", "n": {"9" * 5_000}}}', '{"content": "a"}', "{}", "[1]",
    "7", '"text"', "null",
]  # fmt: skip


@pytest.mark.parametrize("filters", [(), ("int_score >= 4", "length >= 1")])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_skipped_and_counted_on_request(
    tmp_path: Path, bad: str | bytes, filters: tuple[str, ...]
) -> None:
    good = [f'{{"text": "{word}", "int_score": 5}}' for word in ("one", "two", "three")]
    path = write_lines(tmp_path / "a.jsonl", good[0], bad, good[1], "", good[2], bad)
    path.write_bytes(path.read_bytes()[:-1])
    store = FolderStore(tmp_path / "store", "store")
    for shard_tokens in (1, 1_000):
        jobs = jobs_of(path, shard_tokens=shard_tokens, on_bad_document="skip", filters=filters)
        assert [row for job in jobs for row in range(*rows_of(job))] == list(range(5))
        built = [shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT) for job in jobs]
        assert sorted(row for record in built for row in record.skipped_rows) == [1, 4]
        assert sum(record.skipped for record in built) == 2
        kept = (source_rows(job.source, made, range(made.documents)) for job, made in zip(jobs, built, strict=True))
        assert [row.text for part in kept for _, row in part] == ["one", "two", "three"]
    with pytest.raises(SourceInvalid, match=r"a\.jsonl: row 1\b.*on_bad_document=skip"):
        jobs_of(path, filters=filters)


def test_a_file_whose_rows_all_have_another_column_is_refused_although_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "{", '{"content": "a"}', '{"content": "b", "odd \\ud800": 1}')
    with pytest.raises(SourceInvalid, match=r"a\.jsonl.*'text'.*content.*data\.text_column") as error:
        rows(path, strict=False)
    assert str(error.value).encode()


def test_a_name_with_a_lone_surrogate_is_escaped(tmp_path: Path) -> None:
    names = r'"dump": "d\ud800", "id": "i\udcff", "url": "u\udc00"'
    path = write_lines(tmp_path / "a.jsonl", f'{{"text": "one", {names}}}', f'{{"text": null, {names}}}')
    store = FolderStore(tmp_path / "store", "store")
    (job,) = jobs_of(path, on_bad_document="skip")
    shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)
    record = read_record(store, "small", job.shard_id)
    assert record.dumps == {r"d\ud800": 1}
    ((_, row),) = source_rows(job.source, record, [0])
    assert (row.id, row.url) == (r"i\udcff", r"u\udc00")
    with pytest.raises(SourceInvalid, match=r"row 1 \(id i\\udcff\)") as error:
        jobs_of(path)
    assert str(error.value).encode()


def test_token_counts_are_used_beside_bad_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a", "token_count": 5}', "{", '{"text": "b", "token_count": 7}')
    assert list(rows(path, strict=False).tokens) == [6, 1, 8]


@pytest.mark.parametrize("count", [2**62, 10**30])
def test_an_impossible_token_count_only_moves_the_cut(tmp_path: Path, count: int) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[f'{{"text": "a", "token_count": {count}}}'] * 3)
    assert list(cut(rows(path).tokens, 500)) == [1, 2, 3]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    ("line", "columns"), [('{"content": "a", "url": "b"}', "content, url"), ("{}", ""), ("[1]", "list"), ("7", "int")]
)
def test_a_line_without_the_text_column_is_refused_and_its_columns_listed(
    tmp_path: Path, line: str, columns: str, read: Read
) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a"}', line)
    with pytest.raises(SourceInvalid, match=rf"a\.jsonl.*row 1\b.*'text'.*{columns}"):
        read(path)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    ("value", "kind"), [("null", "null"), ("1", "int"), ('["a"]', "list"), ("true", "bool"), ("{}", "dict")]
)
def test_text_that_is_not_a_string_is_refused(tmp_path: Path, value: str, kind: str, read: Read) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a"}', f'{{"text": {value}}}')
    with pytest.raises(SourceInvalid, match=rf"a\.jsonl.*row 1\b.*'text'.*{kind}"):
        read(path)


def test_blank_lines_are_not_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "one"}\n\n  \t\r\n{"text": "two"}\r\n\n{"text": "three"}')
    planned = rows(path)
    assert len(planned.tokens) == 3
    assert planned.starts is not None
    for row, text in enumerate(["one", "two", "three"]):
        assert texts_of(path, row, row + 1, int(planned.starts[row])) == [text]
    assert texts_of(path, 0, 3) == ["one", "two", "three"]


@pytest.mark.parametrize("escaped", [True, False])
def test_any_range_of_lines_is_read(tmp_path: Path, escaped: bool) -> None:
    path = write_lines(tmp_path / "a.jsonl", *(json.dumps({"text": text}, ensure_ascii=escaped) for text in TEXTS))
    starts = rows(path).starts
    assert starts is not None
    for start in range(len(TEXTS)):
        for end in range(start + 1, len(TEXTS) + 1):
            assert texts_of(path, start, end, int(starts[start])) == TEXTS[start:end]
            shutil.rmtree(tmp_path / f"{start}-{end}")
            assert texts_of(path, start, end) == TEXTS[start:end]  # where the first row starts is not known


def test_a_lone_surrogate_is_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", r'{"text": "a\ud800b"}', r'{"text": "\udc00"}')
    assert len(rows(path).tokens) == 2
    assert texts_of(path, 0, 2) == ["a\ufffdb", "\ufffd"]  # as tiktoken replaces it


def test_token_counts_are_used_only_if_every_line_has_one(tmp_path: Path) -> None:
    counted = ['{"text": "a", "token_count": 5}', '{"text": "b", "token_count": 7}']
    path = write_lines(tmp_path / "a.jsonl", *counted)
    assert list(rows(path).tokens) == [6, 8]
    for odd in ('{"text": "c"}', '{"text": "c", "token_count": -1}', '{"text": "c", "token_count": "9"}'):
        tokens = rows(write_lines(tmp_path / "b.jsonl", *counted, odd)).tokens
        assert list(tokens) == [2, 2, 2]


def test_a_file_without_lines_has_no_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "", " ")
    assert len(rows(path).tokens) == 0
    assert texts_of(path, 0, 0) == []


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"gone\.jsonl"):
        rows(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("read", READS)
def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Read
) -> None:
    exact = json.dumps({"text": "b" * 987})
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a"}', exact)
    monkeypatch.setattr(row_types, "DOCUMENT_BYTES", len(exact) + 1)  # with its line feed
    read(path)
    path = write_lines(tmp_path / "b.jsonl", '{"text": "a"}', exact + " " * 1_000)
    with pytest.raises(SourceInvalid, match=r"b\.jsonl: the line that starts at byte 14 is longer than 1,000 bytes"):
        read(path)
