"""Garbage collection deletes exactly the unreferenced objects; a dry run lists them."""

import os
import time
from pathlib import Path

import pytest

from flows.inspection.garbage import Garbage, collect
from model.__main__ import run_job
from model.checkpoints.records import CheckpointRecord, checkpoints, retained
from model.config import RunConfig, TrainingConfig
from model.runs.job import put_job, read_result
from model.runs.run import evaluation_jobs, find_run, pin_run, training_job
from model.training import saver, trainer
from storage import keys
from storage.cache import host as host_cache
from storage.cache.host import HostCache
from storage.datasets.lease import claim
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.s3_client import own_client
from storage.stores.store import Store
from tests.conftest import S3Url
from tests.flows.garbage_places import HOUR, Place, holder, make_old
from tests.flows.in_process import Gpt2
from tests.making import build_dataset, tiny_config
from tests.model.training_runs import assert_equal_runs
from tests.storage.sealing import built, record_key, seal, shard_key, source_file

KINDS = ["folder", "seaweedfs"]


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, s3_url: S3Url) -> Store:
    url = str(tmp_path / "store") if request.param == "folder" else s3_url(request.param)
    return open_store(url, create=True)


@pytest.fixture
def place(store: Store, tmp_path: Path) -> Place:
    return Place(store, tmp_path)


@pytest.fixture
def in_folder(tmp_path: Path) -> Place:
    """A place where each object has its own age."""
    return Place(open_store(str(tmp_path / "store"), create=True), tmp_path)


def find(store: Store, grace_seconds: float) -> list[Garbage]:
    return list(collect(store, grace_seconds, remove=False))


def deleted(store: Store, grace_seconds: float) -> set[str]:
    return {item.name for item in collect(store, grace_seconds)}


# Shards


def test_a_dry_run_lists_what_would_be_deleted_and_deletes_nothing(place: Place) -> None:
    before = place.stored_keys()
    garbage = find(place.store, place.grace)
    assert {item.name for item in garbage} == place.orphan_keys()
    assert sum(item.size_bytes for item in garbage) == sum(
        listed.size for listed in place.store.list("") if listed.key in place.orphan_keys()
    )
    assert place.stored_keys() == before
    assert holder(place.store) is None
    assert deleted(place.store, place.grace) == place.orphan_keys()


def test_orphans_are_deleted_and_the_shards_of_every_version_stay(place: Place) -> None:
    newest = seal(place.store, "small", built(place.store, place.folder / "source" / "file_1.parquet"))
    assert newest.parent == place.manifest.digest
    assert set(place.manifest.shard_ids) - set(newest.shard_ids)  # shards that only the older version lists
    orphans = built(place.store, source_file(place.folder / "source", 2))
    place.store.put_new(keys.failure(record_key(orphans[0])), b'{"why": "it was killed"}')
    place.age("")
    before = place.stored_keys()
    deleted_keys = deleted(place.store, place.grace)
    expected = {key(name) for name in orphans for key in (shard_key, record_key)}
    assert deleted_keys == expected | {keys.failure(record_key(orphans[0]))}
    assert place.stored_keys() == before - deleted_keys
    assert place.whole(newest)
    assert place.whole(place.manifest)
    assert deleted(place.store, place.grace) == set()


def test_objects_younger_than_the_grace_period_stay(store: Store, tmp_path: Path) -> None:
    place = Place(store, tmp_path)
    built(store, source_file(tmp_path / "source", 2))  # young
    before = place.stored_keys()
    assert find(store, HOUR) == []
    assert deleted(store, HOUR) == set()
    assert place.stored_keys() == before


@pytest.mark.parametrize("young", ["shard", "record", "failure"])
def test_one_young_orphan_keeps_all_of_its_dataset(in_folder: Place, young: str) -> None:
    store, name = in_folder.store, in_folder.orphans[0]
    store.put_new(keys.failure(record_key(name)), b"{}")
    in_folder.age("")
    key = {"shard": shard_key(name), "record": record_key(name), "failure": keys.failure(record_key(name))}[young]
    path = store.local_path(key)
    assert path
    os.utime(path)
    assert deleted(store, HOUR) == set()
    in_folder.age("")
    assert deleted(store, HOUR) == in_folder.orphan_keys() | {keys.failure(record_key(name))}


def test_all_orphans_stay_while_a_build_began_within_the_grace(in_folder: Place) -> None:
    claim(in_folder.store, "small", "build")
    assert deleted(in_folder.store, HOUR) == set()
    in_folder.age("")
    assert deleted(in_folder.store, HOUR) == in_folder.orphan_keys()


def test_a_build_after_the_collection_rebuilds_what_it_needs(place: Place) -> None:
    assert deleted(place.store, place.grace)
    assert holder(place.store) is None
    newest = seal(place.store, "small", built(place.store, place.source, place.other))
    assert set(place.orphans) < set(newest.shard_ids)
    assert place.whole(newest)


# Runs


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next training end at this step without saving."""
    train_step = trainer.Trainer._train_step

    def step_or_end(self: trainer.Trainer) -> object:
        if self.step == step:
            raise SystemExit
        return train_step(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", step_or_end)


def steps(records: list[CheckpointRecord]) -> list[int]:
    return [record.step for record in records]


def test_a_run_resumes_and_is_evaluated_after_its_garbage_was_deleted(
    store: Store, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.checkpoint_every_steps=2", "train.keep_last=2", "train.keep_every_steps=4")
    manifest = build_dataset(tiny_config(store.url, config.data.source))
    jobs = {
        name: training_job(
            pin_run(store, tiny_config(store.url, config.data.source, f"name={name}", *settings), manifest.digest, None)
        )
        for name in ("undisturbed", "killed")
    }
    assert run_job(store.url, put_job(store, jobs["undisturbed"])) == 0
    with monkeypatch.context() as patch:
        patch.setattr(saver, "retain", lambda *_: None)  # killed before retention deleted anything
        killed_at(9, patch)
        with pytest.raises(SystemExit):
            run_job(store.url, put_job(store, jobs["killed"]))
    assert steps(checkpoints(store, "killed")) == [2, 4, 6, 8]
    attempt = RunKeys("killed").checkpoint_file(10, "deadbeef", "model.safetensors")
    segment = RunKeys("killed").metrics_segment(8, "deadbeef")
    store.put_new(attempt, b"partial")
    store.put_new(segment, b'{"step": 8}\n')
    store.put_new(RunKeys("killed").prefix + "latest.json", b"{}")  # older versions wrote it
    make_old(store, "")
    before = {listed.key for listed in store.list("")}
    grace = HOUR if store.local_path("FORMAT") else -HOUR
    records = checkpoints(store, "killed")
    kept = retained(records, TrainingConfig(keep_last=2, keep_every_steps=4))
    assert steps(kept) == [4, 6, 8]
    expected = {attempt, segment, RunKeys("killed").checkpoint_record(2)}
    expected |= {RunKeys("killed").checkpoint_file(2, records[0].attempt, name) for name in records[0].files}
    assert {item.name for item in find(store, grace)} == expected
    assert deleted(store, grace) == expected
    assert {listed.key for listed in store.list("")} == before - expected
    assert checkpoints(store, "killed") == kept
    assert run_job(store.url, put_job(store, jobs["killed"])) == 0
    assert_equal_runs(store, "killed", "undisturbed")
    make_old(store, "")
    deleted(store, grace)
    manifest = find_run(store, "killed").manifest
    jobs_of_checkpoint = evaluation_jobs(
        config.model_copy(update={"name": "killed"}), checkpoints(store, "killed")[-1], manifest, None
    )
    evaluations = [job for job in jobs_of_checkpoint if job.kind in ("val_loss", "samples")]
    assert len(evaluations) == 2
    for job in evaluations:
        assert run_job(store.url, put_job(store, job)) == 0
        assert read_result(store, job) is not None


def test_a_checkpoint_that_lost_a_file_is_deleted_and_its_predecessor_stays(config: RunConfig, tmp_path: Path) -> None:
    store = open_store(config.store_url, create=True)
    job = training_job(pin_run(store, config, build_dataset(config).digest, None))
    assert run_job(store.url, put_job(store, job)) == 0
    *before, newest = checkpoints(store, config.name)
    lost = RunKeys(config.name).checkpoint_file(newest.step, newest.attempt, "optimizer.safetensors")
    store.delete(lost)
    make_old(store, "")
    deleted_keys = deleted(store, HOUR)
    assert RunKeys(config.name).checkpoint_record(newest.step) in deleted_keys
    assert checkpoints(store, config.name) == before


# Unfinished writes, probes and the host's cache


def test_unfinished_writes_are_deleted(place: Place) -> None:
    if place.in_folder:
        partial_write = Path(place.store.url) / ".store" / "tmp" / "0123456789abcdef"
        partial_write.write_bytes(b"partial")
        assert {item.kind for item in find(place.store, HOUR)} <= {"shard"}
        os.utime(partial_write, (0, 0))
    else:
        bucket, prefix = place.store.url.removeprefix("s3://").split("/")
        key = f"{prefix}/{shard_key('half')}"
        own_client().create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="SHA256")
        assert find(place.store, HOUR) == []
    named = [item.name for item in find(place.store, place.grace) if item.kind == "unfinished"]
    assert len(named) == 1
    assert list(place.store.unfinished(time.time() + HOUR)) == named
    assert [item.name for item in collect(place.store, place.grace) if item.kind == "unfinished"] == named
    assert list(place.store.unfinished(time.time() + HOUR)) == []


def test_probes_of_killed_processes_are_deleted(place: Place) -> None:
    key = keys.probe()
    place.store.put_new(key, b"1")
    assert key not in deleted(place.store, HOUR)
    place.age(keys.TEMPORARY)
    assert key in deleted(place.store, place.grace)
    assert key not in place.stored_keys()


def test_quarantined_files_are_deleted(in_folder: Place) -> None:
    host = HostCache(host_cache.FOLDER, 1 << 30)
    host.open("0" * 64, lambda: b"damaged").close()
    host.open("1" * 64, lambda: b"in use").close()
    host.quarantine("0" * 64)
    assert "quarantine" not in {item.kind for item in collect(in_folder.store, HOUR)}
    listed = [item for item in find(in_folder.store, -HOUR) if item.kind == "quarantine"]
    assert [item.size_bytes for item in listed] == [len(b"damaged")]
    assert [item for item in collect(in_folder.store, -HOUR) if item.kind == "quarantine"] == listed
    assert host.quarantined() == []
    assert host.has("1" * 64)


def test_a_file_that_another_collector_removed_first_is_skipped(in_folder: Place) -> None:
    host = HostCache(host_cache.FOLDER, 1 << 30)
    for sha256 in ("0" * 64, "1" * 64):
        host.open(sha256, lambda: b"damaged").close()
        host.quarantine(sha256)
    collected = (item for item in collect(in_folder.store, -HOUR) if item.kind == "quarantine")
    assert next(collected).name.startswith("0")
    for path in host.quarantined():
        path.unlink()
    assert list(collected) == []


# The verb


def test_the_verb_lists_garbage_and_deletes_it_on_request(gpt2: Gpt2, in_folder: Place) -> None:
    arguments = ["--set", f"store_url={in_folder.store.url}", "--grace-days", "0.05"]
    before = in_folder.stored_keys()
    outcome = gpt2("gc", *arguments)
    assert (outcome.code, "nothing was deleted" in outcome.out, "--grace-days 0.05" in outcome.out) == (0, True, True)
    assert all(key in outcome.out for key in in_folder.orphan_keys())
    assert in_folder.stored_keys() == before
    outcome = gpt2("gc", "--delete", *arguments)
    assert (outcome.code, "nothing was deleted" in outcome.out) == (0, False)
    assert in_folder.stored_keys() == before - in_folder.orphan_keys()
    outcome = gpt2("gc", *arguments)
    assert (outcome.code, "0 objects" in outcome.out, "--delete" in outcome.out) == (0, True, False)
