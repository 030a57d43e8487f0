"""A run is pinned to its inputs, and a job's id is the digest of its recipe."""

import json
from pathlib import Path

import pytest

from model.checkpoints.records import WEIGHTS, CheckpointFile, CheckpointRecord
from model.config import RunConfig
from model.runs.job import Job, note_failure, put_job, put_result, read_job, read_result
from model.runs.run import evaluation_jobs, find_run, pin_run, pinned_run, training_job
from storage import keys
from storage.digests import canonical_json
from storage.errors import DatasetMismatch, ObjectMissing
from storage.keys import RunKeys
from storage.stores.store import Store, overwrite
from tests.making import read_json, tiny_config

MANIFEST = "a" * 64


def config(*overrides: str) -> RunConfig:
    return tiny_config("./store", "*.parquet", *overrides)


def pin(store: Store, *overrides: str, manifest: str = MANIFEST, items: str | None = None) -> list[Job]:
    """Pin a run. Returns its training and evaluation jobs."""
    pinned = config(*overrides)
    return [training_job(pin_run(store, pinned, manifest, items)), *evaluation_jobs(pinned, record(), manifest, items)]


def record(step: int = 12, weights: str = "b" * 64) -> CheckpointRecord:
    files = {WEIGHTS: CheckpointFile(1, weights)}
    return CheckpointRecord(step, "train-x", config().model.model_dump(), {}, attempt="a", files=files)


def ids(jobs: list[Job]) -> list[str]:
    return [job.job_id for job in jobs]


# Pinning


def test_a_run_that_was_never_started_is_pinned_to_nothing(store: Store) -> None:
    assert pinned_run(store, config()) is None
    assert find_run(store, "tiny") is None


def test_a_run_is_pinned_to_its_settings_and_its_manifest(store: Store) -> None:
    run = pin_run(store, config(), MANIFEST, "sources/x/items.jsonl")
    assert (run.manifest, run.items, run.dataset, run.name) == (MANIFEST, "sources/x/items.jsonl", "small", "tiny")
    assert run == pinned_run(store, config()) == find_run(store, "tiny")
    assert RunConfig.model_validate({"name": "tiny"} | run.config).computed() == config().computed()


def test_a_second_pin_changes_nothing(store: Store) -> None:
    first = pin_run(store, config(), MANIFEST, None)
    body = store.read(RunKeys("tiny").config)
    assert pin_run(store, config(), "b" * 64, "other") == first
    assert store.read(RunKeys("tiny").config) == body


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["train.seed=5"], ["train.seed", "1337", "5"]),
        (["model.layers=3"], ["model.layers", "1", "3"]),
        (["data.shard_tokens=7"], ["data.shard_tokens", "1000", "7"]),
        (["data.source=other"], ["data.source", "*.parquet", "other"]),
        (["train.betas=[0.5, 0.6]"], ["train.betas", "0.5"]),
        (["train.seed=5", "model.layers=3"], ["train.seed", "model.layers"]),
        (["train.batch_tokens=1024", "train.micro_batch_sequences=32"], ["train.batch_tokens", "256", "1024"]),
    ],
)
def test_other_settings_under_the_same_name_are_refused_and_named(
    store: Store, overrides: list[str], facts: list[str]
) -> None:
    pin_run(store, config(), MANIFEST, None)
    for attempt in (
        lambda: pinned_run(store, config(*overrides)),
        lambda: pin_run(store, config(*overrides), MANIFEST, None),
    ):
        with pytest.raises(DatasetMismatch) as caught:
            attempt()
        for fact in ["tiny", "another name", "gpt2 train NEW --extend tiny", *facts]:
            assert fact in str(caught.value)
        assert "train.max_steps" not in str(caught.value), "only differing settings are named"


def test_other_settings_under_another_name_are_another_run(store: Store) -> None:
    pin_run(store, config(), MANIFEST, None)
    assert pinned_run(store, config("name=other", "train.seed=5")) is None
    assert pin_run(store, config("name=other", "train.seed=5"), MANIFEST, None).name == "other"


@pytest.mark.parametrize(
    "overrides",
    [
        ["resources.workers=3"], ["resources.runner=processes"], ["resources.processes=2"], ["store_url=/elsewhere"],
        ["resources.concurrent_evaluations=3", "store_url=file:///x"],
        ["evaluation.samples=9", "evaluation.checkpoint=5000", 'evaluation.prompts=["x"]'],
    ],
)  # fmt: skip
def test_resources_store_and_evaluation_settings_may_change_between_starts(store: Store, overrides: list[str]) -> None:
    run = pin_run(store, config(), MANIFEST, None)
    assert pinned_run(store, config(*overrides)) == run


def test_a_setting_added_after_the_run_started_has_its_default(store: Store) -> None:
    pin_run(store, config(), MANIFEST, None)
    key = RunKeys("tiny").config
    older = json.loads(store.read(key).body)
    del older["config"]["train"]["dropout"], older["config"]["data"]["mirror"]
    overwrite(store, key, json.dumps(older).encode())
    assert pinned_run(store, config()) is not None
    with pytest.raises(DatasetMismatch, match=r"train\.dropout"):
        pinned_run(store, config("train.dropout=0.1"))


def test_a_setting_removed_since_the_run_started_is_ignored(store: Store) -> None:
    pin_run(store, config(), MANIFEST, None)
    key = RunKeys("tiny").config
    older = json.loads(store.read(key).body)
    older["config"]["data"]["removed_since"] = True
    overwrite(store, key, json.dumps(older).encode())
    assert pinned_run(store, config()) is not None


# Jobs


def test_jobs_are_named_by_their_recipes_only(store: Store, tmp_path: Path) -> None:
    first = ids(pin(store))
    assert (
        ids(pin(store, "name=other", "resources.workers=5", "resources.processes=2", f"store_url={tmp_path}")) == first
    )
    assert len(set(first)) == 4
    assert [name.rsplit("-", 1)[0] for name in first] == ["train", "val_loss", "completion", "samples"]


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("train.seed=5", {0, 2, 3}),
        ("train.max_steps=13", {0}),
        ("model.layers=3", {0}),
        ("train.sequence_tokens=16", {0, 1}),
        ("evaluation.precision=bf16", {1, 2}),
        ("evaluation.checkpoint=12", set()),
        ("evaluation.validation_tokens=99", {1}),
        ("evaluation.completion_items=99", {2}),
        ("evaluation.temperature=0.1", {3}),
        ("evaluation.top_k=3", {3}),
        ('evaluation.prompts=["x"]', {3}),
        ("evaluation.samples=5", {3}),
    ],
)
def test_a_setting_changes_only_the_jobs_that_depend_on_it(store: Store, override: str, changed: set[int]) -> None:
    before, after = ids(pin(store)), ids(pin(store, "name=other", override))
    assert {place for place in range(4) if before[place] != after[place]} == changed


def test_another_manifest_changes_every_job_except_samples(store: Store) -> None:
    before, after = ids(pin(store)), ids(pin(store, "name=other", manifest="b" * 64))
    assert set(before) & set(after) == {before[3]}


@pytest.mark.parametrize("other", [record(step=8), record(weights="c" * 64)])
def test_another_step_or_other_weights_change_every_evaluation(other: CheckpointRecord) -> None:
    ours, theirs = (ids(evaluation_jobs(config(), checkpoint, MANIFEST, None)) for checkpoint in (record(), other))
    assert not set(ours) & set(theirs)


def test_without_a_dataset_and_hellaswag_items_only_samples_are_evaluated() -> None:
    with_hellaswag = config("evaluation.hellaswag=org/swag")  # which could not be downloaded
    assert [job.kind for job in evaluation_jobs(with_hellaswag, record(), None, None)] == ["samples"]
    assert [job.kind for job in evaluation_jobs(with_hellaswag, record(), MANIFEST, None)] == ["val_loss", "samples"]


def test_hellaswag_items_replace_the_completion_set(store: Store) -> None:
    kinds = [job.kind for job in pin(store, items="sources/x/items.jsonl")]
    assert kinds == ["train", "val_loss", "hellaswag", "samples"]
    other = ids(pin(store, "name=other", items="sources/y/items.jsonl"))
    assert {place for place, name in enumerate(ids(pin(store))) if name != other[place]} == {2}


def test_a_stored_job_is_read_back_unchanged(store: Store) -> None:
    for job in pin(store):
        assert read_job(store, put_job(store, job)) == job
        assert read_job(store, put_job(store, job)).job_id == job.job_id


@pytest.mark.parametrize(("folder", "tracker"), [("logs/a", "tensorboard:logs/a"), ("", "")])
def test_a_job_of_an_earlier_version_keeps_its_tensorboard(store: Store, folder: str, tracker: str) -> None:
    job = pin(store)[0]
    key = put_job(store, job)
    older = read_json(store, key) or {}
    del older["how"]["resources"]["tracker"]
    older["how"]["resources"]["tensorboard"] = folder
    overwrite(store, key, canonical_json(older))
    assert read_job(store, key).how.resources.tracker == tracker


def test_the_first_result_of_a_job_counts(store: Store) -> None:
    job = pin(store)[1]
    record = RunKeys(job.run).result(job.job_id)
    assert read_result(store, job) is None
    note_failure(store, record, "no space")
    note_failure(store, record, "killed")
    assert json.loads(store.read(keys.failure(record)).body) == {"why": "killed"}
    assert read_result(store, job) is None
    result = {"name": "val_loss", "step": 12, "metrics": {"loss": 3.5}, "key": "runs/tiny/evaluations/x.json"}
    put_result(store, job, result)
    assert read_result(store, job) == result
    put_result(store, job, result | {"metrics": {"loss": 4.5}})
    assert read_result(store, job) == result
    with pytest.raises(ObjectMissing):
        store.read(keys.failure(record))


def test_an_unknown_job_is_named(store: Store) -> None:
    with pytest.raises(ObjectMissing, match="train-00000000"):
        read_job(store, RunKeys("tiny").job("train-00000000"))
