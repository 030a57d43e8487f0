"""JSON lines: any lines are read, and a line that is no row is named."""

import json
from pathlib import Path

import pytest

from storage.datasets.plan import cut
from storage.errors import SourceInvalid
from tests.storage.source_files import LOOKS, TEXTS, Ask, rows, texts_of, write_lines


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    "line", ["{", "text", '{"text": "a"', '{"text": "a"} {"text": "b"}', b'{"text": "\xff"}', "[" * 100_000]
)
def test_a_line_that_is_no_json_is_refused_and_named(tmp_path: Path, line: str | bytes, look: Ask) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a"}', line)
    with pytest.raises(SourceInvalid, match=r"a\.jsonl.*row 1\b"):
        look(path)


@pytest.mark.parametrize("count", [2**62, 10**30])
def test_a_count_that_no_document_has_steers_the_cut_and_no_more(tmp_path: Path, count: int) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[f'{{"text": "a", "token_count": {count}}}'] * 3)
    assert list(cut(rows(path).tokens, 500)) == [1, 2, 3]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    ("line", "found"), [('{"content": "a", "url": "b"}', "content, url"), ("{}", ""), ("[1]", "list"), ("7", "int")]
)
def test_a_line_without_the_text_column_is_refused_with_those_it_has(
    tmp_path: Path, line: str, found: str, look: Ask
) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"text": "a"}', line)
    with pytest.raises(SourceInvalid, match=rf"a\.jsonl.*row 1\b.*'text'.*{found}"):
        look(path)


@pytest.mark.parametrize("look", LOOKS)
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
    found = rows(path)
    assert len(found.tokens) == 3
    assert found.starts is not None
    for row, text in enumerate(["one", "two", "three"]):
        assert texts_of(path, row, row + 1, int(found.starts[row])) == [text]
    assert texts_of(path, 0, 3) == ["one", "two", "three"]


@pytest.mark.parametrize("escaped", [True, False])
def test_any_range_of_lines_is_read(tmp_path: Path, escaped: bool) -> None:
    path = write_lines(tmp_path / "a.jsonl", *(json.dumps({"text": text}, ensure_ascii=escaped) for text in TEXTS))
    starts = rows(path).starts
    assert starts is not None
    for start in range(len(TEXTS)):
        for end in range(start + 1, len(TEXTS) + 1):
            assert texts_of(path, start, end, int(starts[start])) == TEXTS[start:end]


def test_a_lone_surrogate_is_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", r'{"text": "a\ud800b"}', r'{"text": "\udc00"}')
    assert len(rows(path).tokens) == 2
    assert texts_of(path, 0, 2) == ["a\ud800b", "\udc00"]


def test_counts_of_lines_steer_only_when_every_line_has_one(tmp_path: Path) -> None:
    counted = ['{"text": "a", "token_count": 5}', '{"text": "b", "token_count": 7}']
    path = write_lines(tmp_path / "a.jsonl", *counted)
    assert list(rows(path).tokens) == [6, 8]
    for odd in ('{"text": "c"}', '{"text": "c", "token_count": -1}', '{"text": "c", "token_count": "9"}'):
        found = rows(write_lines(tmp_path / "b.jsonl", *counted, odd)).tokens
        assert list(found) == [2, 2, 2]


def test_a_jsonl_file_without_lines_has_no_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "", " ")
    assert len(rows(path).tokens) == 0
    assert texts_of(path, 0, 0) == []


def test_a_jsonl_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"gone\.jsonl"):
        rows(tmp_path / "gone.jsonl")
