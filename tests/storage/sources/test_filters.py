"""Filters: each has one canonical spelling; dropped rows are counted and in no shard."""

import json
import re
import time
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import tokenizer
from storage.datasets import records, shards
from storage.datasets.plan import ShardJob
from storage.datasets.records import Record
from storage.errors import SourceInvalid
from storage.inspection.lineage import source_rows
from storage.sources import reading
from storage.sources.filters import keeps_row, parse
from storage.stores.store import Store
from tests.making import document
from tests.storage.sealing import jobs_of, rows_of
from tests.storage.source_files import rows, write_lines, write_table

SCORES = [1, 4, None, 5, 3, 4]
TEXTS = [document(number) for number in range(len(SCORES))]
DUMPS = ["A", "B", "A", None, "C", "B"]


def write_source(folder: Path, kind: str) -> Path:
    columns: dict[str, Any] = {"text": TEXTS, "int_score": SCORES, "dump": DUMPS, "id": [f"<{n}>" for n in range(6)]}
    if kind == "parquet":
        return write_table(folder / "a.parquet", columns, row_group_size=2)
    items = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return write_lines(folder / "a.jsonl", *(json.dumps(item) for item in items))


def build_one(store: Store, path: Path, *filters: str, **settings: Any) -> tuple[ShardJob, Record, list[str]]:
    """The one shard of a file, its record, and the texts in it."""
    (job,) = jobs_of(path, shard_tokens=10_000, filters=filters, **settings)
    texts: list[str] = []

    def encode(text: str) -> Any:
        texts.append(text)
        return tokenizer.encode(text)

    return job, shards.build_shard(store, "small", job, encode, tokenizer.EOT), texts


@pytest.mark.parametrize(
    ("text", "value", "kept"),
    [
        ("int_score >= 4", 4, True),
        ("int_score>=4", 3.5, False),
        ("int_score > 4", 4, False),
        ("score < 0.5", 0.25, True),
        ("score <= 0.5", 0.5, True),
        ("dump == 'A'", "A", True),
        ('dump != "A"', "A", False),
        ("dump in ['B', 'A']", "A", True),
        ("dump   not  in ['B', 'A']", "A", False),
        ("dump not in ['B']", "A", True),
        ("int_score >= 4", None, False),
        ("dump not in ['B']", None, False),
        ("good == True", True, True),
        ("meta.score >= 4", 4, True),
        ('"my score" >= 4', 4, True),
        ("int_score >= 4", "4.5", True),
        ("int_score >= 4", "10", True),
        ("int_score in [4, 5]", "5", True),
        ("int_score >= 4", "", False),
        ("id == 9007199254740993", "9007199254740993", True),
        ("id != 9007199254740992", "9007199254740993", True),
        ("score >= 1.1", Decimal("1.10"), True),
        ("score in [1.1]", Decimal("1.1"), True),
        ("dump in []", "A", False),
        ("day >= '2024-03-01'", date(2024, 3, 1), True),
        ("day > '2024-03-01'", date(2024, 3, 1), False),
        ("day < '2024-03-01T12:00'", datetime(2024, 3, 1, 11, 59), True),
        ("day == '2024-03-01'", datetime(2024, 3, 1, 1, tzinfo=timezone(timedelta(hours=1))), True),
        ("day in ['2024-03-01', '2024-03-02']", date(2024, 3, 2), True),
    ],
)
def test_a_filter_keeps_matching_values(text: str, value: object, kept: bool) -> None:
    condition = parse(text)
    assert keeps_row([condition], {condition.column: value}, "a.jsonl", 0) is kept


def test_a_time_without_a_zone_is_utc_on_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as tokyo:
        tokyo.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        kept = keeps_row([parse("day == '2024-03-01'")], {"day": datetime(2024, 3, 1, tzinfo=UTC)}, "a.jsonl", 0)
    time.tzset()
    assert kept


def test_a_time_before_the_first_year_is_refused() -> None:
    with pytest.raises(SourceInvalid, match=r"a\.jsonl: row 0: data\.filters: day >= '0001-01-01T00:00\+09:00'"):
        keeps_row([parse("day >= '0001-01-01T00:00+09:00'")], {"day": date(2024, 3, 1)}, "a.jsonl", 0)


def test_a_filter_has_one_canonical_spelling() -> None:
    assert str(parse(" dump  in ('B','A' , 'A')")) == str(parse("dump in ['A', 'B']")) == "dump in ['A', 'B']"
    assert str(parse("x>=4")) == str(parse('"x" >= 4')) == "x >= 4"
    assert str(parse("a.b >=4")) == "a.b >= 4"
    assert str(parse(str(parse('"my score" >= 4')))) == '"my score" >= 4'


@pytest.mark.parametrize(
    "text",
    ["", "int_score", "int_score >=", ">= 4", "int_score => 4", "int_score >= four", "a..b == 1", "a b == 1",
     '"" == 1', '"a == 1', "dump in 'A'",
     "dump == ['A']", "int_score >= 4 and x", "x == open('/etc/passwd')", "x == None", "x == {}", "x in [[1]]"],
)  # fmt: skip
def test_text_that_is_not_a_filter_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"data\.filters.*cannot be read.*int_score >= 4"):
        parse(text)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (["int_score >= 4"], [1, 3, 5]),
        (["int_score >= 4", "dump == 'B'"], [1, 5]),
        (["dump in ['A', 'C']"], [0, 2, 4]),
        ([f"length > {len(TEXTS[2])}"], [n for n in range(6) if len(TEXTS[n]) > len(TEXTS[2])]),
    ],
)
def test_a_shard_holds_what_the_filters_keep(
    tmp_path: Path, store: Store, kind: str, filters: list[str], kept: list[int]
) -> None:
    path = write_source(tmp_path, kind)
    job, record, texts = build_one(store, path, *filters)
    assert texts == [TEXTS[number] for number in kept]
    assert (record.documents, record.filtered, record.skipped) == (len(kept), 6 - len(kept), 0)
    assert sum(record.lengths) == len(kept)
    assert sum(record.dumps.values()) == sum(DUMPS[number] is not None for number in kept)
    traced = dict(source_rows(job.source, record, range(len(kept))))
    assert [traced[number].number for number in range(len(kept))] == kept
    assert [traced[number].text for number in range(len(kept))] == texts


def test_filtered_rows_have_no_tokens_in_a_plan(tmp_path: Path) -> None:
    path = write_source(tmp_path, "parquet")
    assert list(np.flatnonzero(rows(path, "text", "int_score >= 4").tokens)) == [1, 3, 5]
    assert jobs_of(path, filters=("int_score >= 9",)) == []
    ranges = [rows_of(job) for job in jobs_of(path, shard_tokens=80, filters=("int_score >= 4",))]
    assert ranges == [(0, 3), (3, 5), (5, 6)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_missing_column_is_refused_and_the_others_listed(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        SourceInvalid, match=r"'score'.*score > 1.*dump.*id.*int_score.*length|'score'.*int_score.*'length'"
    ):
        rows(write_source(tmp_path, kind), "text", "score > 1")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("condition", [">= 'four'", "== '4'", "!= '4'", "in ['4']"])
def test_a_value_of_another_type_is_refused(tmp_path: Path, kind: str, condition: str) -> None:
    with pytest.raises(SourceInvalid, match=re.escape(f"int_score {condition}") + ".*int"):
        rows(write_source(tmp_path, kind), "text", f"int_score {condition}")


def test_filters_change_the_shard_id_and_their_spelling_does_not(tmp_path: Path) -> None:
    path = write_source(tmp_path, "parquet")
    (plain,) = jobs_of(path, shard_tokens=10_000)
    (strict,) = jobs_of(path, shard_tokens=10_000, filters=(str(parse("int_score>=4")),))
    assert plain.shard_id != strict.shard_id
    assert strict.recipe.to_json()["filters"] == ["int_score >= 4"]


# Documents that cannot be tokenised


def refusing(text: str) -> Any:
    if text == TEXTS[3]:
        raise ValueError("tiktoken gave up")
    return tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_document_that_cannot_be_tokenised_is_named_or_skipped(tmp_path: Path, store: Store, kind: str) -> None:
    path = write_source(tmp_path, kind)
    (job,) = jobs_of(path, shard_tokens=10_000)
    with pytest.raises(SourceInvalid, match=rf"a\.{kind}: row 3 \(id <3>\): tiktoken gave up.*on_bad_document=skip"):
        shards.build_shard(store, "small", job, refusing, tokenizer.EOT)
    (job,) = jobs_of(path, shard_tokens=10_000, on_bad_document="skip")
    record = shards.build_shard(store, "small", job, refusing, tokenizer.EOT)
    assert (record.documents, record.skipped, record.skipped_rows) == (5, 1, [3])
    traced = dict(source_rows(job.source, record, [2, 3]))
    assert [traced[number].number for number in (2, 3)] == [2, 4]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_null_text_is_skipped_on_request(tmp_path: Path, store: Store, kind: str) -> None:
    if kind == "parquet":
        path = write_table(tmp_path / "a.parquet", {"text": ["one", None, "three"]})
    else:
        path = write_lines(tmp_path / "a.jsonl", '{"text": "one"}', '{"text": null}', '{"text": "three"}')
    with pytest.raises(SourceInvalid, match="null"):
        jobs_of(path)
    (job,) = jobs_of(path, on_bad_document="skip")
    record = shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)
    assert (record.documents, record.skipped_rows) == (2, [1])


def test_a_shard_whose_rows_are_all_filtered_is_done_and_has_no_tokens(tmp_path: Path, store: Store) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["one", "two"]})
    (job,) = jobs_of(path)
    job = replace(job, recipe=replace(job.recipe, filters=("length > 9",)))
    record = shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)
    assert (record.tokens, record.filtered) == (0, 2)
    assert records.is_finished(store, "small", job.shard_id)
    assert set(records.finished_shards(store, "small", [job.shard_id], {})) == {job.shard_id}
    assert reading.identify(path).digest == job.recipe.source
