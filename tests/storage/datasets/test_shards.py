"""Shards: the bytes equal tiktoken's ids, also after kills, races and damage, and a record marks a shard as done."""

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model import tokenizer
from storage import keys
from storage.datasets import records, shards
from storage.datasets.plan import ShardJob
from storage.digests import sha256
from storage.errors import Conflict, ObjectMissing, ShardCorrupt, SourceInvalid, StorageError
from storage.keys import DatasetKeys
from storage.stores.store import Store, overwrite
from tests.damage import flip_bit
from tests.making import document, published, write_parquet
from tests.storage import sealing
from tests.storage.sealing import rows_of

TEXTS = [
    "", " ", "\n", "hello world", "<|endoftext|>", "a<|endoftext|>b <|endoftext|><|endoftext|>", "<|endoftext|",
    "Zażółć gęślą jaźń", "Съешь ещё этих мягких французских булок", "我能吞下玻璃而不伤身体。",
    "私はガラスを食べられます。",
    "나는 유리를 먹을 수 있어요", "أنا قادر على أكل الزجاج", "אני יכול לאכול זכוכית", "मैं काँच खा सकता हूँ",
    "ฉันกินกระจกได้",
    "Ξεσκεπάζω",
    "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈🇵🇱e\u0301\u200d\u200b\ufeff", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \U0001f9ff",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31m\x7f\x80\x9f",
    "tabs\t\t and  spaces   \r\n\r\n\u2028\u2029\u00a0\u3000end   ", "0000000000 00 000 3.14159 1,000,000",
    "I'll we've THEY'RE don't 'S", "x" * 5_000, " " * 3_000, "ab" * 40_000, "\ufffd\ufffe\uffff",
    *(document(number) for number in range(40)),
]  # fmt: skip


def reference(texts: list[str]) -> bytes:
    """`<|endoftext|>` and tiktoken's own ids of each document."""
    encoding = published()
    return b"".join(np.array([50256, *encoding.encode_ordinary(text)], "<u2").tobytes() for text in texts)


def jobs_of(*paths: Path, shard_tokens: int = 1_000) -> list[ShardJob]:
    return sealing.jobs_of(*paths, shard_tokens=shard_tokens)


def build(store: Store, job: ShardJob) -> shards.Record:
    return shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)


def body_of(store: Store, job: ShardJob) -> bytes:
    return store.read(DatasetKeys("small").shard(job.shard_id)).body


def error_of(store: Store, record: shards.Record) -> str | None:
    """The error of reading the shard and its record, if any."""
    try:
        shards.read_shard(store, "small", record)
        records.read_record(store, "small", record.shard_id)
    except StorageError as error:
        return str(error)
    return None


def finished(store: Store, *jobs: ShardJob) -> list[bool]:
    finished = records.finished_shards(store, "small", [job.shard_id for job in jobs], {})
    return [job.shard_id in finished for job in jobs]


def written(store: Store) -> list[str]:
    return sorted(listed.key for listed in store.list(DatasetKeys("small").shards))


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    return jobs_of(write_parquet(tmp_path / "one.parquet", TEXTS), shard_tokens=10**9)[0]


# Bytes


@pytest.mark.parametrize("shard_tokens", [1, 500, 60_000, 10**9])
@pytest.mark.parametrize("counted", [True, False])
def test_concatenated_shards_are_tiktokens_ids(tmp_path: Path, store: Store, counted: bool, shard_tokens: int) -> None:
    paths = [
        write_parquet(tmp_path / "a.parquet", TEXTS, counted=counted, row_group_size=7),
        write_parquet(tmp_path / "b.parquet", TEXTS[::-1], counted=counted, row_group_size=1_000),
    ]
    jobs = jobs_of(*paths, shard_tokens=shard_tokens)
    records = [build(store, job) for job in jobs]
    body = b"".join(body_of(store, job) for job in jobs)
    assert body == reference(TEXTS + TEXTS[::-1])
    assert int((np.frombuffer(body, "<u2") == 50256).sum()) == 2 * len(TEXTS)
    assert sum(record.documents for record in records) == 2 * len(TEXTS)


def test_lines_with_lone_surrogates_are_tiktokens_ids(tmp_path: Path, store: Store) -> None:
    texts = [*TEXTS, "a\ud800b", "\udfff", "\ud83d", "\ude42\ud83d"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    jobs = jobs_of(path, shard_tokens=5_000)
    for job in jobs:
        build(store, job)
    assert b"".join(body_of(store, job) for job in jobs) == reference(texts)


def test_a_record_describes_its_shard(store: Store, job: ShardJob) -> None:
    record = build(store, job)
    body = body_of(store, job)
    assert record == records.read_record(store, "small", job.shard_id)
    assert (record.sha256, 2 * record.tokens) == (sha256(body), len(body))
    assert (record.documents, record.skipped) == (len(TEXTS), 0)
    assert record.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (record.source, record.recipe) == ("one.parquet", job.recipe)
    assert {"python", "numpy", "tiktoken"} <= set(record.versions)


def test_versions_are_not_in_a_recipe(job: ShardJob) -> None:
    assert not {"python", "numpy", "tiktoken", "versions"} & set(job.recipe.to_json())


# Rebuilding


def truncate(store: Store, job: ShardJob) -> None:
    path = store.local_path(DatasetKeys("small").shard(job.shard_id))
    assert path is not None
    path.write_bytes(path.read_bytes()[:-100])


def flip(store: Store, job: ShardJob) -> None:
    flip_bit(store, DatasetKeys("small").shard(job.shard_id))


def drop_record(store: Store, job: ShardJob) -> None:
    store.delete(DatasetKeys("small").record(job.shard_id))


def drop_shard(store: Store, job: ShardJob) -> None:
    store.delete(DatasetKeys("small").shard(job.shard_id))


@pytest.mark.parametrize(
    ("damages", "still_finished"),
    [
        ([], True),
        ([drop_record], False),
        ([drop_shard], False),
        ([drop_record, drop_shard], False),
        ([truncate], False),
        ([truncate, drop_record], False),
        ([flip, drop_record], False),
        ([flip], True),  # a listing shows only sizes; `verify` reads the bytes
    ],
)
def test_a_repeated_job_writes_the_same_bytes(
    store: Store, job: ShardJob, damages: list[Callable[[Store, ShardJob], None]], still_finished: bool
) -> None:
    assert finished(store, job) == [False]
    record = build(store, job)
    body = body_of(store, job)
    assert finished(store, job) == [True]
    for damage in damages:
        damage(store, job)
    assert finished(store, job) == [still_finished]
    assert (error_of(store, record) is None) == (not damages)
    assert build(store, job) == record
    assert body_of(store, job) == body
    assert finished(store, job) == [True]
    assert error_of(store, record) is None
    assert written(store) == [DatasetKeys("small").shard(job.shard_id), DatasetKeys("small").record(job.shard_id)]


def test_a_deleted_shard_is_rebuilt_with_the_same_bytes(store: Store, job: ShardJob) -> None:
    record = build(store, job)
    records.delete_shard(store, "small", job.shard_id)
    assert finished(store, job) == [False]
    assert written(store) == []
    assert build(store, job) == record


def test_reading_a_damaged_shard_names_both_digests(store: Store, job: ShardJob) -> None:
    record = build(store, job)
    flip(store, job)
    error = error_of(store, record)
    assert error is not None
    assert record.sha256 in error
    assert sha256(body_of(store, job)) in error


def test_a_shard_is_finished_if_its_size_matches_the_manifest(store: Store, job: ShardJob) -> None:
    record = build(store, job)
    for tokens, expected in ((record.tokens, {job.shard_id}), (record.tokens + 1, set())):
        known = {job.shard_id: record.row._replace(tokens=tokens)}
        assert set(records.finished_shards(store, "small", [job.shard_id], known)) == expected


def test_a_record_with_a_wrong_digest_is_refused_and_named(store: Store, job: ShardJob) -> None:
    record = build(store, job)
    path = store.local_path(DatasetKeys("small").record(job.shard_id))
    assert path is not None
    path.write_text(path.read_text().replace(record.sha256, "0" * 64))
    with pytest.raises(ShardCorrupt) as caught:
        build(store, job)
    for fact in (job.shard_id, record.sha256, "0" * 64, "gpt2 dataset verify --repair"):
        assert fact in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"tokens": 1}', b"\xff"])
def test_a_damaged_record_is_named(store: Store, job: ShardJob, damage: bytes) -> None:
    build(store, job)
    path = store.local_path(DatasetKeys("small").record(job.shard_id))
    assert path is not None
    path.write_bytes(damage)
    with pytest.raises(ShardCorrupt, match=job.shard_id):
        records.read_record(store, "small", job.shard_id)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"tokens": 1}'])
def test_a_shard_with_an_unreadable_record_is_rebuilt(store: Store, job: ShardJob, damage: bytes) -> None:
    """In a dataset that was never sealed, `verify --repair` could not repair it, because no version lists it."""
    record = build(store, job)
    overwrite(store, DatasetKeys("small").record(job.shard_id), damage)
    assert finished(store, job) == [False]
    assert not records.is_finished(store, "small", job.shard_id)
    assert build(store, job) == record == records.read_record(store, "small", job.shard_id)
    assert finished(store, job) == [True]


def test_a_missing_record_is_named(store: Store) -> None:
    with pytest.raises(ObjectMissing, match="none"):
        records.read_record(store, "small", "none")


# Races and kills


def test_threads_in_any_order_write_the_same_shards(tmp_path: Path, store: Store) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    jobs = jobs_of(path, shard_tokens=300)
    serial = [build(store, job) for job in jobs]
    bytes_before = [body_of(store, job) for job in jobs]
    for job in jobs:
        records.delete_shard(store, "small", job.shard_id)
    twice = [*jobs, *jobs]  # two threads may run the same job concurrently
    random.Random(3).shuffle(twice)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: build(store, job), twice))
    assert [body_of(store, job) for job in jobs] == bytes_before
    assert [records.read_record(store, "small", job.shard_id) for job in jobs] == serial


class StoreWithInterruption:
    """A store that calls `act` once, after the first call of this method on this key."""

    def __init__(self, store: Store, verb: str, key: str, act: Callable[[], object]) -> None:
        self._store, self._verb, self._key, self._act = store, verb, key, act

    def __getattr__(self, name: str) -> object:
        verb = getattr(self._store, name)
        if name != self._verb:
            return verb

        def call(key: str, *arguments: object) -> object:
            answer = verb(key, *arguments)
            if key == self._key:
                self._key = ""
                self._act()
            return answer

        return call


@pytest.mark.parametrize("verb", ["read", "delete"])
def test_two_jobs_that_repair_the_same_shard_concurrently_both_succeed(store: Store, job: ShardJob, verb: str) -> None:
    record = build(store, job)
    flip(store, job)
    drop_record(store, job)
    other = StoreWithInterruption(store, verb, DatasetKeys("small").shard(job.shard_id), lambda: build(store, job))
    assert build(other, job) == record  # type: ignore[arg-type]
    assert finished(store, job) == [True]
    assert error_of(store, record) is None


class SimulatedKill(BaseException):
    """Stands for a kill: no `except Exception` catches it."""


class StoreOfKilledProcess:
    """A store whose process is killed at its n-th write: after it if `after`, else before it."""

    def __init__(self, store: Store, writes: int, after: bool) -> None:
        self._store, self._left, self._after = store, writes, after

    def __getattr__(self, name: str) -> object:
        verb = getattr(self._store, name)
        if name not in {"put_new", "swap", "delete"}:
            return verb

        def call(*arguments: object) -> object:
            self._left -= 1
            if self._left:
                return verb(*arguments)
            if self._after:
                with suppress(Conflict):
                    verb(*arguments)
            raise SimulatedKill

        return call


def test_a_record_never_exists_without_its_shard(store: Store, job: ShardJob) -> None:
    with suppress(SimulatedKill):
        build(StoreOfKilledProcess(store, 1, after=True), job)  # type: ignore[arg-type]
    assert written(store) == [DatasetKeys("small").shard(job.shard_id)]
    build(store, job)
    with suppress(SimulatedKill):
        records.delete_shard(StoreOfKilledProcess(store, 1, after=True), "small", job.shard_id)  # type: ignore[arg-type]
    assert written(store) == [DatasetKeys("small").shard(job.shard_id)]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("writes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("damages", [[], [flip, drop_record], [truncate]])
def test_a_job_killed_at_any_write_is_finished_or_rebuilt(
    store: Store, job: ShardJob, damages: list[Callable[[Store, ShardJob], None]], writes: int, after: bool
) -> None:
    record = build(store, job)
    for damage in damages:
        damage(store, job)
    if not damages:
        records.delete_shard(store, "small", job.shard_id)
    with suppress(SimulatedKill):
        build(StoreOfKilledProcess(store, writes, after), job)  # type: ignore[arg-type]
    if finished(store, job) == [True]:
        assert error_of(store, record) is None
    assert build(store, job) == record
    assert error_of(store, record) is None


# Refused


@pytest.mark.parametrize("change", [lambda path: write_parquet(path, ["other"]), lambda path: path.unlink()])
def test_a_source_that_changed_since_the_plan_writes_nothing(
    tmp_path: Path, store: Store, change: Callable[[Path], object]
) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    (job,) = jobs_of(path, shard_tokens=10**9)
    change(path)
    with pytest.raises(SourceInvalid, match=r"a\.parquet"):
        build(store, job)
    assert written(store) == []


def test_null_text_writes_nothing(tmp_path: Path, store: Store) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet", write_statistics=False)
    (job,) = jobs_of(tmp_path / "a.parquet")
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*row 1\b.*null"):
        build(store, job)
    assert written(store) == []


def test_a_document_that_cannot_be_tokenised_is_named_by_its_row(tmp_path: Path, store: Store) -> None:
    jobs = jobs_of(write_parquet(tmp_path / "a.parquet", [document(n) for n in range(40)]), shard_tokens=500)

    def encode(text: str) -> np.ndarray:
        if text == document(17):
            raise ValueError("too long")
        return tokenizer.encode(text)

    (job,) = (job for job in jobs if 17 in range(*rows_of(job)))
    with pytest.raises(SourceInvalid, match=r"a\.parquet.*row 17\b.*too long"):
        shards.build_shard(store, "small", job, encode, tokenizer.EOT)
    assert written(store) == []


def test_a_job_with_rows_past_the_end_of_the_file_writes_nothing(store: Store, job: ShardJob) -> None:
    longer = replace(job, recipe=replace(job.recipe, row_to=len(TEXTS) + 1))
    with pytest.raises(SourceInvalid, match=r"one\.parquet"):
        build(store, longer)
    assert written(store) == []


def test_failures_are_listed_by_shard(store: Store) -> None:
    store.put_new(keys.failure(DatasetKeys("small").record("a-00001-x")), b'{"why": "no space"}')
    store.put_new(DatasetKeys("small").record("a-00002-x"), b"{}")
    assert records.failures(store, "small") == {"a-00001-x": "no space"}
