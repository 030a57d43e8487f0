"""The plan: every row in one shard, no shard too large, and the same shards wherever the files are."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import tokenizer
from storage.datasets import shards
from storage.datasets.plan import FilePlan, ShardJob, cut, plan_file
from storage.datasets.recipe import DatasetSettings
from storage.errors import SourceInvalid
from storage.keys import DatasetKeys
from storage.sources import reading
from storage.stores.store import Store
from tests.making import document, write_parquet
from tests.storage.sealing import rows_of

TOKENIZER = tokenizer.identity()["sha256"]
SETTINGS = DatasetSettings(1_000, TOKENIZER)
COUNTS = [0, 15, 16, 17, 33, 100]


def planned(
    *paths: Path, shard_tokens: int = 1_000, text_column: str = "text", digest: str = TOKENIZER
) -> list[ShardJob]:
    shape = DatasetSettings(shard_tokens, digest, text_column)
    return [job for path in paths for job in plan_file(reading.identify(path), shape, tokenizer.encode).jobs()]


def ranges_of(tokens: np.ndarray, shard_tokens: int) -> list[tuple[int, int]]:
    ends = list(cut(tokens, shard_tokens))
    return list(zip([0, *ends], ends, strict=False))


def ids(jobs: list[ShardJob]) -> list[str]:
    return [job.shard_id for job in jobs]


def write_jsonl(path: Path, texts: list[str], *, counted: bool = True) -> Path:
    counts = ({"token_count": len(tokenizer.encode(text))} if counted else {} for text in texts)
    path.write_text(
        "".join(json.dumps({"text": text} | count) + "\n" for text, count in zip(texts, counts, strict=True))
    )
    return path


def bodies(store: Store, jobs: list[ShardJob]) -> Iterator[bytes]:
    for job in jobs:
        shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)
        yield store.read(DatasetKeys("small").shard(job.shard_id)).body


# Cutting


@settings(deadline=None, database=None, max_examples=300)
@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 100))
def test_a_cut_covers_every_row_once_and_is_greedy(tokens: list[int], shard_tokens: int) -> None:
    ranges = ranges_of(np.array(tokens, np.int64), shard_tokens)
    assert [row for start, end in ranges for row in range(start, end)] == list(range(len(tokens)))
    for start, end in ranges:
        assert end > start
        assert sum(tokens[start:end]) <= shard_tokens or end == start + 1
        assert end == len(tokens) or sum(tokens[start : end + 1]) > shard_tokens


def test_a_cut_of_trillions_of_tokens_does_not_overflow() -> None:
    tokens = np.full(100_000, 2**31 - 1, np.int64)
    ranges = ranges_of(tokens, 2**32)
    assert ranges[0] == (0, 2)
    assert ranges[-1] == (99_998, 100_000)
    assert len(ranges) == 50_000


@pytest.mark.parametrize(
    ("counts", "expected"),
    [  # tokens of a document, EOT counted: one more
        (COUNTS, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]),
        ([15], [(0, 1)]),
        ([0] * 16, [(0, 16)]),
        ([0] * 17, [(0, 16), (16, 17)]),
        ([7, 7, 7], [(0, 2), (2, 3)]),
        ([7, 8, 7], [(0, 1), (1, 2), (2, 3)]),
        ([15, 0], [(0, 1), (1, 2)]),
        ([14, 0, 0], [(0, 2), (2, 3)]),
        ([16, 0], [(0, 1), (1, 2)]),
        ([0, 16, 0], [(0, 1), (1, 2), (2, 3)]),
        ([100, 100], [(0, 1), (1, 2)]),
        ([1, 2, 3, 100, 4, 5], [(0, 3), (3, 4), (4, 6)]),
    ],
)
def test_sixteen_tokens_a_shard(
    tmp_path: Path, store: Store, counts: list[int], expected: list[tuple[int, int]]
) -> None:
    texts = [" the" * count for count in counts]
    for path in (write_parquet(tmp_path / "a.parquet", texts), write_jsonl(tmp_path / "b.jsonl", texts)):
        jobs = planned(path, shard_tokens=16)
        assert [rows_of(job) for job in jobs] == expected
        for job, body in zip(jobs, bodies(store, jobs), strict=True):
            start, end = rows_of(job)
            assert len(body) == 2 * sum(1 + count for count in counts[start:end])


@pytest.mark.parametrize("shard_tokens", [1, 50, 300, 1_000, 10**9])
def test_no_shard_exceeds_the_limit_unless_it_is_one_document(tmp_path: Path, store: Store, shard_tokens: int) -> None:
    texts = [document(number, 1 + number * 37 % 200) for number in range(60)]
    jobs = planned(write_parquet(tmp_path / "a.parquet", texts), shard_tokens=shard_tokens)
    for job, body in zip(jobs, bodies(store, jobs), strict=True):
        start, end = rows_of(job)
        assert len(body) // 2 <= shard_tokens or end == start + 1
    assert [row for job in jobs for row in range(*rows_of(job))] == list(range(60))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_without_counts_shards_are_estimated_and_hold_whole_documents(tmp_path: Path, store: Store, kind: str) -> None:
    texts = [document(number) for number in range(100)]
    write = write_parquet if kind == "parquet" else write_jsonl
    jobs = planned(write(tmp_path / f"a.{kind}", texts, counted=False), shard_tokens=1_000)
    assert len(jobs) > 3
    assert [row for job in jobs for row in range(*rows_of(job))] == list(range(100))
    stored = list(bodies(store, jobs))
    for job, body in zip(jobs, stored, strict=True):
        start, end = rows_of(job)
        ids_of = [tokenizer.encode(text) for text in texts[start:end]]
        assert body == b"".join(np.array([tokenizer.EOT, *ids], "<u2").tobytes() for ids in ids_of)
    assert all(250 < len(body) // 2 < 4_000 for body in stored[:-1])  # within a factor of four of the requested size


@pytest.mark.parametrize("shard_tokens", [16, 700, 10**9])
def test_jsonl_and_parquet_of_the_same_rows_give_the_same_tokens(
    tmp_path: Path, store: Store, shard_tokens: int
) -> None:
    texts = ["", "żółć 🙂\n", *(document(number, number) for number in range(50))]
    parquet = planned(write_parquet(tmp_path / "a.parquet", texts), shard_tokens=shard_tokens)
    lines = planned(write_jsonl(tmp_path / "a.jsonl", texts), shard_tokens=shard_tokens)
    assert [rows_of(job) for job in parquet] == [rows_of(job) for job in lines]
    assert list(bodies(store, parquet)) == list(bodies(store, lines))


# Determinism


def test_a_plan_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    paths = [write_parquet(tmp_path / "a" / f"{n}.parquet", [document(n * 9 + i) for i in range(30)]) for n in range(2)]
    first = planned(*paths)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = planned(*(tmp_path / "b" / path.name for path in paths))
    assert ids(again) == ids(first) == ids(planned(*paths))
    assert [job.recipe for job in again] == [job.recipe for job in first]
    assert str(tmp_path) not in json.dumps([job.recipe.to_json() for job in first])


def test_another_file_does_not_change_the_shards_of_the_first(tmp_path: Path) -> None:
    first = write_parquet(tmp_path / "a.parquet", [document(n) for n in range(30)])
    other = write_parquet(tmp_path / "b.parquet", [document(n + 99) for n in range(30)])
    assert ids(planned(other, first)) == ids(planned(other)) + ids(planned(first))


def test_every_input_that_changes_the_bytes_changes_the_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [document(n) for n in range(10)])
    (job,) = planned(path, shard_tokens=10**6)
    others = {
        "tokenizer": planned(path, shard_tokens=10**6, digest="0" * 64)[0],
        "text_column": _with_column(tmp_path),
        "rows": planned(path, shard_tokens=500)[0],
    }
    for name, other in others.items():
        assert other.shard_id != job.shard_id, name
    write_parquet(path, [document(n) for n in range(11)])
    assert planned(path, shard_tokens=10**6)[0].shard_id != job.shard_id
    assert len({*ids(list(others.values())), job.shard_id}) == 4


def _with_column(tmp_path: Path) -> ShardJob:
    path = tmp_path / "column" / "a.jsonl"
    path.parent.mkdir()
    path.write_text('{"content": "x", "text": "y"}\n')
    by_content, by_text = (planned(path, text_column=column)[0] for column in ("content", "text"))
    assert by_content.shard_id != by_text.shard_id
    assert by_content.recipe.text_column == "content"
    return by_content


def test_a_default_never_enters_a_recipe(tmp_path: Path) -> None:
    """Existing stores hold shards of these names: another name would tokenise everything again."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "hello world"}\n')
    (job,) = planned(path)
    assert set(job.recipe.to_json()) == {"format", "source", "row_from", "row_to", "tokenizer", "eot", "dtype"}
    assert job.shard_id == "c63b7329f362-00000-f1e642bd2279"


def test_content_and_not_its_file_name_names_a_shard(tmp_path: Path) -> None:
    texts = [document(n) for n in range(30)]
    same_name = [write_parquet(tmp_path / where / "a.parquet", texts[:n]) for where, n in (("x", 29), ("y", 30))]
    shard_ids = ids(planned(*same_name, shard_tokens=100))
    assert len(set(shard_ids)) == len(shard_ids)
    renamed = write_parquet(tmp_path / "b.parquet", texts)
    assert ids(planned(renamed, shard_tokens=100)) == ids(planned(same_name[1], shard_tokens=100))


@pytest.mark.parametrize(
    "name", ["ünïcode file (1).parquet", "..parquet", "-x.parquet", "a" * 240 + ".parquet", "🙂.parquet"]
)
def test_any_file_name_gives_names_that_are_keys(tmp_path: Path, name: str) -> None:
    for job in planned(write_parquet(tmp_path / name, ["text"])):
        assert DatasetKeys("small").shard(job.shard_id).endswith(f"{job.shard_id}.bin")


# Refused


def test_an_invalid_file_is_refused_before_any_job(tmp_path: Path) -> None:
    good, bad = write_parquet(tmp_path / "a.parquet", ["text"]), tmp_path / "b.parquet"
    bad.write_bytes(b"PAR1")
    with pytest.raises(SourceInvalid, match=r"b\.parquet"):
        planned(good, bad)


def test_the_place_of_a_source_file_is_not_in_the_recipe(tmp_path: Path) -> None:
    (job,) = planned(write_parquet(tmp_path / "a.parquet", ["text"]))
    moved = replace(job, source=replace(job.source, place="/elsewhere"), start_byte=5)
    assert (moved.recipe, moved.shard_id) == (job.recipe, job.shard_id)


# Counts


def tokens_of(plan: FilePlan) -> int:
    """The real tokens of the planned rows."""
    path = Path(plan.file.place)
    table = (
        pq.read_table(path).to_pylist() if path.suffix == ".parquet" else map(json.loads, path.read_text().splitlines())
    )
    texts = [row["text"] for row in islice(table, plan.row_ends[-1])]
    return sum(1 + len(tokenizer.encode(text)) for text in texts)


CHINESE = "我能吞下玻璃而不伤身体。你呢？今天天气很好，我们去公园散步吧。"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("rows", [100, 3_000])
@pytest.mark.parametrize("counts", ["absent", "zero", "words", "one is absurd"])
def test_a_limit_and_a_shard_hold_real_tokens(tmp_path: Path, kind: str, rows: int, counts: str) -> None:
    """Chinese has 2.9 times the tokens that its bytes suggest; some token_count columns hold zeros or words."""
    texts = [CHINESE[number % 7 :] * (1 + number % 5) for number in range(rows)]
    columns: dict[str, list[int]] = {
        "absent": {}, "zero": {"token_count": [0] * rows}, "words": {"token_count": [len(text) for text in texts]},
        "one is absurd": {"token_count": [10**9, *(len(tokenizer.encode(text)) for text in texts[1:])]},
    }[counts]  # fmt: skip
    table = pa.table({"text": texts} | columns)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=200)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    file, total = reading.identify(path), sum(1 + len(tokenizer.encode(text)) for text in texts)
    shape = DatasetSettings(total // 10, TOKENIZER)
    whole = plan_file(file, shape, tokenizer.encode)
    assert len(whole.row_ends) in (10, 11, 12)
    assert whole.estimated == (rows == 3_000)
    assert abs(whole.tokens / total - 1) < 0.03
    half = plan_file(file, shape, tokenizer.encode, total // 2)
    assert abs(tokens_of(half) / (total // 2) - 1) < 0.05


def test_published_counts_that_agree_with_the_sample_stand(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [document(number) for number in range(1_000)])
    plan = plan_file(reading.identify(path), DatasetSettings(1_000, TOKENIZER), tokenizer.encode)
    assert (plan.tokens, plan.estimated) == (tokens_of(plan), False)


@pytest.mark.parametrize("counted", [True, False])
def test_a_limit_does_not_count_documents_that_a_filter_on_length_drops(tmp_path: Path, counted: bool) -> None:
    texts = [document(number, 300 if number % 4 else 5) for number in range(200)]
    path = write_parquet(tmp_path / "a.parquet", texts, counted=counted)
    shape = DatasetSettings(1_000, TOKENIZER, filters=("length < 200",))
    plan = plan_file(reading.identify(path), shape, tokenizer.encode, 300)
    kept = [text for text in texts[: plan.row_ends[-1]] if len(text) < 200]
    assert 280 < plan.tokens == sum(1 + len(tokenizer.encode(text)) for text in kept) <= 300
