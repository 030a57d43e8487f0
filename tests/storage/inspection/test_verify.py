"""Each depth of verify finds its kinds of damage, names the shard, and finds none in an intact dataset.

`quick` finds a changed byte only if the store keeps a checksum of each object: S3 stores do, folders do not. `full`
also finds bytes that changed on disk beneath the store.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from model import tokenizer
from storage import keys
from storage.datasets import records
from storage.datasets.manifest import Manifest, ShardRow
from storage.datasets.plan import ShardJob
from storage.datasets.records import DTYPE, Record, read_record
from storage.datasets.shards import build_shard
from storage.digests import canonical_json, sha256
from storage.errors import StoreUnavailable
from storage.inspection import verify
from storage.inspection.verify import (
    Damage,
    check_documents,
    check_fully,
    check_quickly,
    check_versions,
    verify_dataset,
)
from storage.keys import DatasetKeys
from storage.sources import reading
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite
from tests.conftest import S3Url
from tests.damage import flip_bit
from tests.making import document
from tests.storage.sealing import jobs_of, rows_of, seal, sealed
from tests.storage.source_files import write_lines
from tests.storage.store_kinds import STORES, each

ALL = 1_000_000


@pytest.fixture(params=each(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path, s3_url: S3Url) -> Store:
    url = str(tmp_path / "store") if request.param == "folder" else s3_url(request.param)
    return open_store(url, create=True)


@pytest.fixture
def manifest(store: Store, files: list[Path]) -> Manifest:
    return sealed(store, *files[:2])


def quickly(store: Store, manifest: Manifest) -> list[str]:
    return [row.shard_id for row in manifest.rows() if check_quickly(store, "small", row)]


def fully(store: Store, manifest: Manifest) -> list[str]:
    return [row.shard_id for row in manifest.rows() if check_fully(store, "small", row, tokenizer.EOT)]


def deeply(store: Store, manifest: Manifest, *paths: Path, count: int = ALL, seed: int = 0) -> list[Damage | None]:
    files = [reading.identify(path) for path in paths]
    return list(check_documents(store, "small", manifest, files, tokenizer.encode, count=count, seed=seed))


def damaged(damages: list[Damage | None]) -> list[str]:
    return [damage.name for damage in damages if damage]


def key_of(row: ShardRow) -> str:
    return DatasetKeys("small").shard(row.shard_id)


def body_of(store: Store, row: ShardRow) -> bytes:
    return bytes(store.read(key_of(row)).body)


def change_record(store: Store, shard_id: str, **values: Any) -> Record:
    record = replace(read_record(store, "small", shard_id), **values)
    overwrite(store, DatasetKeys("small").record(shard_id), canonical_json(asdict(record)))
    return record


def swap_with_the_next(store: Store, row: ShardRow, other: ShardRow) -> None:
    ours, theirs = body_of(store, row), body_of(store, other)
    overwrite(store, key_of(row), theirs)
    overwrite(store, key_of(other), ours)


def flip(store: Store, row: ShardRow, _: ShardRow) -> None:
    flip_bit(store, key_of(row))


Damaging = Callable[[Store, ShardRow, ShardRow], object]
ALWAYS, WITH_SUMS, NEVER = "always", "if the store keeps checksums", "never"
DAMAGES: dict[str, tuple[Damaging, str, int]] = {  # the damage, when `quick` finds it, and the number of damaged shards
    "missing": (lambda store, row, _: store.delete(key_of(row)), ALWAYS, 1),
    "truncated": (lambda store, row, _: overwrite(store, key_of(row), body_of(store, row)[:-2]), ALWAYS, 1),
    "longer": (lambda store, row, _: overwrite(store, key_of(row), body_of(store, row) + b"\0\0"), ALWAYS, 1),
    "empty": (lambda store, row, _: overwrite(store, key_of(row), b""), ALWAYS, 1),
    "swapped": (swap_with_the_next, ALWAYS, 2),
    "flipped": (flip, WITH_SUMS, 1),
    "no record": (lambda store, row, _: store.delete(DatasetKeys("small").record(row.shard_id)), ALWAYS, 1),
    "other counts": (lambda store, row, _: change_record(store, row.shard_id, documents=row.documents + 1), NEVER, 1),
    "other sum": (lambda store, row, _: change_record(store, row.shard_id, sha256="0" * 64), NEVER, 1),
    "no JSON": (lambda store, row, _: overwrite(store, DatasetKeys("small").record(row.shard_id), b"{"), NEVER, 1),
}


def test_an_intact_dataset_has_no_damage(store: Store, manifest: Manifest, files: list[Path]) -> None:
    assert quickly(store, manifest) == fully(store, manifest) == []
    assert list(check_versions(store, "small", manifest)) == []
    assert deeply(store, manifest, *files[:2]) == [None] * sum(row.documents for row in manifest.rows())


def test_s3_stores_keep_a_checksum_of_each_object_and_folders_do_not(store: Store, manifest: Manifest) -> None:
    row = next(manifest.rows())
    assert store.stat(key_of(row)).sha256 == (row.sha256 if store.url.startswith("s3://") else None)


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_depth_finds_its_kinds_of_damage(store: Store, manifest: Manifest, damage: str) -> None:
    act, when, count = DAMAGES[damage]
    rows = list(manifest.rows())
    assert rows[3].tokens != rows[4].tokens  # so that a swap changes the sizes
    act(store, rows[3], rows[4])
    expected = [row.shard_id for row in rows[3 : 3 + count]]
    assert fully(store, manifest) == expected
    keeps_sums = store.stat(keys.FORMAT).sha256 is not None
    assert quickly(store, manifest) == (expected if when == ALWAYS or (when == WITH_SUMS and keeps_sums) else [])


@pytest.mark.parametrize("depth", ["quick", "full"])
def test_all_damage_of_a_dataset_is_reported_in_order(
    store: Store, files: list[Path], depth: Literal["quick", "full"]
) -> None:
    first, manifest = sealed(store, files[0]), sealed(store, *files[:2])
    rows = list(manifest.rows())
    for place in (4, 2):
        store.delete(key_of(rows[place]))
    store.delete(DatasetKeys("small").manifest(first.digest))
    calls: list[None] = []
    damages = verify_dataset(
        store, "small", manifest, eot=tokenizer.EOT, quick=depth == "quick", on_progress=lambda: calls.append(None)
    )
    shards_then_versions = [(rows[2].shard_id, True), (rows[4].shard_id, True), (f"manifest {first.digest}", False)]
    assert [(damage.name, damage.repairable) for damage in damages] == shards_then_versions[
        : 3 if depth == "full" else 2
    ]
    assert len(calls) == len(rows)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", ["no record", "no JSON"])
def test_versions_are_checked_despite_a_lost_record(store: Store, manifest: Manifest, damage: str, split: str) -> None:
    row = next(manifest.rows(split))
    DAMAGES[damage][0](store, row, row)
    assert fully(store, manifest) == [row.shard_id]
    assert {damage.name for damage in check_versions(store, "small", manifest)} <= {row.shard_id}


# Wrong builds: shard, record and manifest agree with each other


def build(store: Store, job: ShardJob, encode: Callable[[str], np.ndarray] = tokenizer.encode) -> Record:
    return build_shard(store, "small", job, encode, tokenizer.EOT)


def sealed_with(store: Store, jobs: list[ShardJob], build_wrong: Callable[[ShardJob], object]) -> Manifest:
    """A version with one wrong shard."""
    for job in jobs:
        build(store, job) if job is not jobs[3] else build_wrong(job)
    return seal(store, "small", [job.shard_id for job in jobs])


def test_a_manifest_with_a_wrong_number_of_documents_is_found(store: Store, files: list[Path]) -> None:
    jobs = jobs_of(*files)

    def miscount(job: ShardJob) -> None:
        change_record(store, job.shard_id, documents=build(store, job).documents + 1)

    manifest = sealed_with(store, jobs, miscount)
    assert fully(store, manifest) == [jobs[3].shard_id]
    assert quickly(store, manifest) == []
    compared = deeply(store, manifest, *files)
    assert set(damaged(compared)) <= {jobs[3].shard_id}
    assert None in compared


def test_an_id_outside_the_vocabulary_is_found(store: Store, files: list[Path]) -> None:
    jobs = jobs_of(*files)

    def raise_an_id(job: ShardJob) -> None:
        def encode(text: str) -> np.ndarray:
            ids = tokenizer.encode(text).copy()
            ids[-1] = tokenizer.EOT + 1
            return ids

        build(store, job, encode)

    manifest = sealed_with(store, jobs, raise_an_id)
    assert fully(store, manifest) == [jobs[3].shard_id]
    assert "50,257" in (check_fully(store, "small", list(manifest.rows())[3], tokenizer.EOT) or "")


def test_a_shard_of_another_tokenisation_is_found_only_by_comparing_documents(store: Store, files: list[Path]) -> None:
    jobs = jobs_of(*files)
    manifest = sealed_with(store, jobs, lambda job: build(store, job, lambda text: tokenizer.encode(text.upper())))
    assert quickly(store, manifest) == fully(store, manifest) == []
    rows = list(manifest.rows())
    compared = deeply(store, manifest, *files)
    assert damaged(compared) == [jobs[3].shard_id] * rows[3].documents
    assert len(compared) == sum(row.documents for row in rows)


def test_a_shard_of_other_rows_than_its_record_states_is_found_by_comparing_documents(
    store: Store, files: list[Path]
) -> None:
    jobs = jobs_of(*files)

    def shifted(job: ShardJob) -> None:
        row_from, row_to = rows_of(job)
        record = build(store, replace(job, recipe=replace(job.recipe, row_from=row_from + 1)))
        change_record(store, job.shard_id, recipe=job.recipe.to_json())
        assert record.documents == row_to - row_from - 1

    manifest = sealed_with(store, jobs, shifted)
    assert fully(store, manifest) == []
    assert set(damaged(deeply(store, manifest, *files))) == {jobs[3].shard_id}


# Documents compared with their source


def test_the_seed_decides_which_documents_are_compared(store: Store, files: list[Path]) -> None:
    jobs = jobs_of(*files)
    for job in jobs:
        build(store, job, lambda text: tokenizer.encode(text.upper()))
    manifest = seal(store, "small", [job.shard_id for job in jobs])
    drawn = [deeply(store, manifest, *files, count=5, seed=seed) for seed in (1, 1, 2)]
    assert [len(compared) for compared in drawn] == [5, 5, 5]
    assert drawn[0] == drawn[1] != drawn[2]


def test_documents_of_jsonl_are_compared(store: Store, tmp_path: Path) -> None:
    texts = [document(number) for number in range(30)]
    lines = [f'{{"body": "{text}"}}' for text in texts]
    path = write_lines(tmp_path / "lines.jsonl", *(line for text in lines for line in (text, "  ")))  # with blank lines
    jobs = jobs_of(path, text_column="body")
    manifest = sealed_with(store, jobs, lambda job: build(store, job, lambda text: tokenizer.encode(text + "!")))
    compared = deeply(store, manifest, path)
    assert len(compared) == len(texts)
    assert damaged(compared) == [jobs[3].shard_id] * list(manifest.rows())[3].documents


def test_a_missing_source_is_named_and_the_rest_is_compared(
    store: Store, manifest: Manifest, files: list[Path]
) -> None:
    of_second = [job.shard_id for job in jobs_of(files[1])]
    assert damaged(deeply(store, manifest, files[0])) == of_second
    assert None in deeply(store, manifest, files[0])
    identified = [reading.identify(path) for path in files[:2]]
    files[1].unlink()
    compared = list(check_documents(store, "small", manifest, identified, tokenizer.encode, count=ALL, seed=0))
    assert damaged(compared) == of_second
    assert str(files[1]) in next(damage.wrong for damage in compared if damage)


@pytest.mark.parametrize("damage", ["missing", "flipped", "no record", "no JSON"])
def test_documents_of_other_shards_are_compared_after_a_damaged_one(
    store: Store, manifest: Manifest, files: list[Path], damage: str
) -> None:
    rows = list(manifest.rows())
    DAMAGES[damage][0](store, rows[3], rows[4])
    compared = deeply(store, manifest, *files[:2])
    assert damaged(compared) == [rows[3].shard_id]
    assert len(compared) == 1 + sum(row.documents for row in rows if row != rows[3])


def test_an_unreachable_store_is_an_error_and_not_damage(
    store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair would delete the records of shards that are intact."""

    def unavailable(*_: object) -> None:
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(verify, "read_shard", unavailable)
    with pytest.raises(StoreUnavailable):
        verify_dataset(store, "small", manifest, eot=tokenizer.EOT, quick=False)


# Versions


def test_a_version_whose_parent_is_gone_or_damaged_is_named(store: Store, files: list[Path]) -> None:
    first = sealed(store, files[0])
    second = sealed(store, *files[:2])
    third = sealed(store, *files)
    assert [second.parent, third.parent] == [first.digest, second.digest]
    assert list(check_versions(store, "small", third)) == []
    overwrite(store, DatasetKeys("small").manifest(first.digest), b"{}")
    assert [damage.name for damage in check_versions(store, "small", third)] == [f"manifest {first.digest}"]
    store.delete(DatasetKeys("small").manifest(second.digest))
    assert [damage.name for damage in check_versions(store, "small", third)] == [f"manifest {second.digest}"]


def test_the_checksum_of_a_row_is_that_of_its_bytes(store: Store, manifest: Manifest) -> None:
    """Guards the tests above."""
    for row in manifest.rows():
        ids = np.frombuffer(body_of(store, row), DTYPE)
        assert (sha256(body_of(store, row)), int(ids[0])) == (row.sha256, tokenizer.EOT)
        assert records.is_finished(store, "small", row.shard_id)
