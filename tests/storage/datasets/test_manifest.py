"""Manifests: the same shards give the same version, and val shards stay in val in every version."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model import tokenizer
from storage.datasets import records, shards
from storage.datasets.manifest import COUNTS, latest_manifest, read_manifest
from storage.datasets.versions import history
from storage.digests import canonical_json, sha256
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.storage.sealing import RecordingStore, built, jobs_of, manifests, pointer, seal, sealed, source_file

# A pure function of the records


def test_the_digest_is_that_of_the_bytes_and_latest_points_to_it(store: Store, files: list[Path]) -> None:
    manifest = sealed(store, *files)
    body = store.read(DatasetKeys("small").manifest(manifest.digest)).body
    assert sha256(body) == manifest.digest
    assert body == canonical_json(json.loads(body))
    assert (pointer(store)["manifest"], pointer(store)["sequence"]) == (manifest.digest, 1)
    assert len(store.read(DatasetKeys("small").latest).body) < 1024
    assert latest_manifest(store, "small") == manifest == read_manifest(store, "small", manifest.digest)


def test_the_digest_does_not_depend_on_store_folder_order_or_name(tmp_path: Path, files: list[Path]) -> None:
    digests = set()
    for number, place in enumerate(("a", "deep/er/b", "c")):
        store = open_store(str(tmp_path / place), create=True)
        moved = [source_file(tmp_path / f"source_{number}", n) for n in range(3)]
        planned = built(store, *moved, dataset=f"name-{number}", order=random.Random(number).shuffle)
        digests.add(seal(store, f"name-{number}", planned).digest)
    assert len(digests) == 1


def test_threads_in_any_order_seal_the_same_version(tmp_path: Path, store: Store, files: list[Path]) -> None:
    serial = sealed(store, *files)
    other = open_store(str(tmp_path / "other"), create=True)
    jobs = jobs_of(*files)
    planned = [job.shard_id for job in jobs]
    random.Random(4).shuffle(jobs)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: shards.build_shard(other, "small", job, tokenizer.encode, tokenizer.EOT), jobs))
    assert seal(other, "small", planned).digest == serial.digest


def test_sealing_again_changes_nothing(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    latest = store.read(DatasetKeys("small").latest)
    assert sealed(store, *files) == first
    assert store.read(DatasetKeys("small").latest) == latest
    assert len(manifests(store)) == 1


def test_a_rebuilt_shard_gives_no_new_version(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    for shard_id in first.shard_ids[::2]:
        records.delete_shard(store, "small", shard_id)
    assert sealed(store, *files) == first
    assert pointer(store)["sequence"] == 1


def test_columns_and_totals_equal_the_records(store: Store, files: list[Path]) -> None:
    manifest = sealed(store, *files)
    rows = list(manifest.rows())
    assert manifest.shard_ids == [job.shard_id for job in jobs_of(*files)]
    for row in rows:
        assert row._replace(split="train") == records.read_record(store, "small", row.shard_id).row
        assert sha256(store.read(DatasetKeys("small").shard(row.shard_id)).body) == row.sha256
    for split in ("train", "val"):
        of_split = list(manifest.rows(split))
        assert manifest.totals[split] == {
            "shards": len(of_split),
            **{name: sum(getattr(row, name) for row in of_split) for name in COUNTS},
        }
    assert manifest.rows_by_id == {row.shard_id: row for row in rows}


def test_the_first_shards_are_val_and_the_others_train(store: Store, files: list[Path]) -> None:
    manifest = sealed(store, *files)
    assert manifest.columns["split"] == ["val"] * 2 + ["train"] * (len(manifest.shard_ids) - 2)


# Refresh


def test_a_new_file_gives_a_new_version_with_only_new_train_shards(
    store: Store, tmp_path: Path, files: list[Path]
) -> None:
    first = sealed(store, *files)
    new = source_file(tmp_path / "source", 9)
    second = sealed(store, *files, new)
    assert (second.parent, first.parent) == (first.digest, None)
    assert list(second.rows())[: len(first.shard_ids)] == list(first.rows())
    assert {row.split for row in list(second.rows())[len(first.shard_ids) :]} == {"train"}
    assert (pointer(store)["manifest"], pointer(store)["sequence"]) == (second.digest, 2)
    assert read_manifest(store, "small", first.digest) == first


def test_a_lost_newest_version_is_sealed_again_unchanged(store: Store, tmp_path: Path, files: list[Path]) -> None:
    """Including its parent, so that pinned runs find it and the version history is complete."""
    first = sealed(store, *files)
    second = sealed(store, *files, source_file(tmp_path / "source", 9))
    store.delete(DatasetKeys("small").manifest(second.digest))
    assert sealed(store, *files, source_file(tmp_path / "source", 9)) == second
    assert [version.digest for version in history(store, "small")] == [second.digest, first.digest]


def test_a_new_file_before_the_others_does_not_change_val(store: Store, tmp_path: Path, files: list[Path]) -> None:
    first = sealed(store, *files)
    second = sealed(store, source_file(tmp_path / "source", 9), *files)
    assert list(second.rows("val")) == list(first.rows("val"))
    assert second.digest != first.digest


def test_the_val_shards_stay_when_their_file_is_removed(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    second = sealed(store, *files[1:])
    assert list(second.rows("val")) == list(first.rows("val"))
    gone = {job.shard_id for job in jobs_of(files[0])} - {row.shard_id for row in first.rows("val")}
    assert gone
    assert set(second.shard_ids) == set(first.shard_ids) - gone
    assert len(set(second.shard_ids)) == len(second.shard_ids)


def test_a_changed_file_changes_its_train_shards_only(store: Store, tmp_path: Path, files: list[Path]) -> None:
    first, before = sealed(store, *files), {job.shard_id for job in jobs_of(files[1])}
    source_file(tmp_path / "source", 1, documents=25)
    second = sealed(store, *files)
    ours = {job.shard_id for job in jobs_of(files[1])}
    assert set(second.shard_ids) - ours == set(first.shard_ids) - before
    assert list(second.rows("val")) == list(first.rows("val"))


def test_a_refresh_reads_new_records_only(store: Store, tmp_path: Path, files: list[Path]) -> None:
    first = sealed(store, *files)
    planned = built(store, *files, source_file(tmp_path / "source", 9))
    counting = RecordingStore(store)
    seal(counting, "small", planned)  # type: ignore[arg-type]
    known = {DatasetKeys("small").record(shard_id) for shard_id in first.shard_ids}
    assert not known & set(counting.read_keys)
