"""gpt2 retry runs what failed and nothing else, with the settings of the last request."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows import pretrain as flow_module
from flows.console import pipeline
from flows.console.settings import Settings
from flows.handoffs import DatasetVersion
from flows.pretrain import build_dataset, pretrain
from model.config import ResourcesConfig, RunConfig
from model.config_file import load_config
from model.runs.job import JobFailed
from model.runs.run import find_run, keep_request, pin_run
from storage.cache import host as host_cache
from storage.datasets.manifest import Manifest, latest_manifest
from storage.errors import DatasetMismatch, ShardCorrupt
from storage.keys import DatasetKeys, RunKeys
from storage.sources import mirror, reading
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import making
from tests.flows.client import shard_runs
from tests.flows.in_process import Gpt2
from tests.flows.jobs import counting_jobs, put_wrong_record
from tests.making import document, read_json, tiny_config, write_parquet
from tests.polling import poll

DATASET = "failing"


class Failed(NamedTuple):
    """A build in which one job in ten failed, and the version that it should seal."""

    config: RunConfig
    failed: list[str]
    expected: Manifest

    @property
    def store(self) -> Store:
        return open_store(self.config.store_url)

    def retry(self, name: str, *overrides: str) -> None:
        pipeline.retry(name, settings=Settings(None, (f"store_url={self.config.store_url}", *overrides)), verbose=True)

    def sealed(self) -> Manifest | None:
        return latest_manifest(self.store, DATASET)


@pytest.fixture(scope="module")
def failed_once(api: str, tmp_path_factory: pytest.TempPathFactory) -> Failed:
    folder = tmp_path_factory.mktemp("failing")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((reading, "REMEMBERED"), (host_cache, "FOLDER"), (mirror, "FOLDER")):
            patch.setattr(module, name, folder / module.__name__)
        for number in range(4):
            write_parquet(
                folder / "source" / f"file_{number}.parquet", [document(number * 100 + n, 90) for n in range(30)]
            )
        settings = [
            f"data.dataset={DATASET}",
            "data.shard_tokens=450",
            "train.max_steps=2",
            "train.checkpoint_every_steps=2",
        ]
        undisturbed = tiny_config(str(folder / "undisturbed"), str(folder / "source"), *settings)
        expected = making.build_dataset(undisturbed)
        config = undisturbed.model_copy(update={"store_url": str(folder / "store")})
        store, failing = open_store(config.store_url, create=True), expected.shard_ids[4::12]
        assert (len(failing), len(expected.shard_ids) > 25) == (3, True)
        for shard_id in failing:
            put_wrong_record(store, DATASET, shard_id)
        with pytest.raises(ShardCorrupt):
            build_dataset(config)
        return Failed(config, sorted(failing), expected)


@pytest.fixture
def failed(failed_once: Failed, tmp_path: Path) -> Failed:
    """A copy of `failed_once` in which the cause of the failures is removed."""
    url = str(shutil.copytree(failed_once.config.store_url, tmp_path / "store"))
    failed = failed_once._replace(config=failed_once.config.model_copy(update={"store_url": url}))
    for shard_id in failed_once.failed:
        failed.store.delete(DatasetKeys(DATASET).record(shard_id))
    return failed


def completed(api: str) -> dict[str, str]:
    """The names of this dataset's completed shard tasks, by id."""
    runs = shard_runs(api, {"name": {"any_": [f"tokenise-{DATASET}"]}})
    return {run["id"]: run["name"] for run in runs if run["state_type"] == "COMPLETED"}


@pytest.mark.parametrize("how", ["retry", "the same build again"])
def test_only_failed_jobs_are_rerun(api: str, failed: Failed, how: str) -> None:
    assert failed.sealed() is None
    poll(lambda: len(completed(api)) >= len(failed.expected.shard_ids) - len(failed.failed))
    before = completed(api)
    with counting_jobs() as jobs:
        if how == "retry":
            failed.retry(DATASET, "resources.audit=true")
        else:
            build_dataset(failed.config)
    assert sorted(jobs.shard_ids) == failed.failed
    assert failed.sealed() == failed.expected
    names = sorted(shard_id.partition("-")[2] for shard_id in failed.failed)  # its file's name replaces the digest

    def rerun() -> list[str]:
        new = (name for task_run, name in completed(api).items() if task_run not in before)
        return sorted("-".join(name.split("-")[-2:]) for name in new)

    poll(lambda: rerun() == names)
    audit = read_json(failed.store, DatasetKeys(DATASET).leaks(failed.expected.digest))
    assert (audit is not None) == (how == "retry")  # the retry's own setting is used


def stopped(_: RunConfig, version: DatasetVersion) -> None:
    raise JobFailed(f"trained on {version.manifest}")


@pytest.mark.parametrize("to", ["train", pytest.param("the report", marks=pytest.mark.full)])
def test_a_run_whose_shards_failed_before_it_was_pinned_is_retried_by_its_name(
    failed: Failed, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    for shard_id in failed.failed:
        put_wrong_record(failed.store, DATASET, shard_id)
    with pytest.raises(ShardCorrupt):
        pretrain(failed.config)
    assert read_json(failed.store, RunKeys("tiny").config) is None
    for shard_id in failed.failed:
        failed.store.delete(DatasetKeys(DATASET).record(shard_id))
    with counting_jobs() as jobs, monkeypatch.context() as patch:
        if to == "train":  # which takes a minute
            patch.setattr(flow_module, "train", stopped)
            with pytest.raises(JobFailed, match=failed.expected.digest):
                failed.retry("tiny")
        else:
            failed.retry("tiny")
    assert sorted(jobs.shard_ids) == failed.failed
    assert failed.sealed() == failed.expected
    if to == "the report":
        assert find_run(failed.store, "tiny").manifest == failed.expected.digest
        assert find_run(failed.store, "tiny").config == failed.config.computed()
        assert list(failed.store.list(RunKeys("tiny").report("html")))


def test_an_unknown_name_is_exit_code_2(gpt2: Gpt2, tmp_path: Path) -> None:
    open_store(str(tmp_path / "data"), create=True)
    outcome = gpt2("retry", "nobody", cwd=tmp_path)
    assert (outcome.code, "'nobody'" in outcome.error) == (2, True), outcome


def test_a_refused_build_does_not_replace_the_request(failed_once: Failed) -> None:
    """As for a run: settings that the name is not bound to are refused before they are stored."""
    url = str(Path(failed_once.config.store_url).with_name("undisturbed"))
    config = failed_once.config.model_copy(update={"store_url": url})
    key, store = DatasetKeys(DATASET).request, open_store(config.store_url)
    keep_request(store, key, config)  # like the build that sealed it
    before = read_json(store, key)
    data = config.data.model_copy(update={"text_column": "body"})
    with pytest.raises(DatasetMismatch, match="text_column"):
        build_dataset(config.model_copy(update={"data": data}))
    assert read_json(store, key) == before


# Requests, without a flow


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, RunConfig]]:
    """The configurations that the verb passes to the flows, which are not run."""
    started: list[tuple[str, RunConfig]] = []
    monkeypatch.setattr(pipeline, "_pretrain", lambda config, _: started.append(("run", config)))
    monkeypatch.setattr(pipeline, "_train", lambda config, _: started.append(("train", config)))
    monkeypatch.setattr(pipeline, "build_dataset", lambda config, _: started.append(("dataset", config)))
    return started


def requested(store: Store, *overrides: str) -> RunConfig:
    return load_config(None, [f"store_url={store.url}", "name=mine", "data.dataset=mine", *overrides])


UNUSUAL = [
    'data.filters=["dump in [\\"a\\", \\"b\\"]", "length >= 20"]', "data.config=2024", "data.mirror=false",
    "train.betas=[0.5, 0.75]", 'evaluation.prompts=["Zwei\\nZeilen 🙂", ""]', "train.batch_tokens=24576",
    "resources.dask_address=tcp://host:1", "train.learning_rate=3e-5", "train.min_learning_rate=0",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["run", "dataset"])
def test_the_last_request_is_repeated_with_every_setting(store: Store, started: list[Any], kind: str) -> None:
    key = (RunKeys if kind == "run" else DatasetKeys)("mine").request
    keep_request(store, key, requested(store))
    keep_request(store, key, requested(store, *UNUSUAL))
    pipeline.retry("mine", settings=Settings(None, (f"store_url={store.url}",)))
    assert started == [(kind, requested(store, *UNUSUAL))]
    assert store.url not in bytes(store.read(key).body).decode()


def test_a_run_that_was_only_trained_is_trained_again(store: Store, started: list[Any]) -> None:
    """gpt2 train stores no request; the run is pinned to everything that decides its result."""
    config = requested(store, *UNUSUAL)
    pin_run(store, config, "a" * 64, None)
    pipeline.retry("mine", settings=Settings(None, (f"store_url={store.url}", "resources.workers=1")))
    assert started == [("train", config.model_copy(update={"resources": ResourcesConfig(workers=1)}))]


def test_a_setting_is_checked_against_the_request(store: Store, started: list[Any]) -> None:
    """3 ranks can share the batch of the request, and could not share the default batch."""
    keep_request(store, RunKeys("mine").request, requested(store, *UNUSUAL))
    pipeline.retry("mine", settings=Settings(None, (f"store_url={store.url}", "resources.processes=3")))
    assert started == [("run", requested(store, *UNUSUAL, "resources.processes=3"))]
    with pytest.raises(ValueError, match="5 ranks"):
        pipeline.retry("mine", settings=Settings(None, (f"store_url={store.url}", "resources.processes=5")))
