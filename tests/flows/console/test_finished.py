"""A run or dataset of which nothing is missing is answered from the store alone, without Prefect."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from flows.console.finished import finished_dataset, finished_run
from flows.pages.run_report import write_report
from model import tokenizer
from model.__main__ import run_job
from model.checkpoints.records import checkpoints
from model.config import RunConfig
from model.runs.job import put_job
from model.runs.run import evaluation_jobs, keep_request, pin_run, training_job
from storage.datasets.manifest import Manifest
from storage.datasets.plan import plan_files, planner, put_plan
from storage.keys import DatasetKeys, RunKeys
from storage.sources import reading
from storage.sources.mirror import list_source
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.flows.in_process import Gpt2
from tests.making import build_dataset, document, tiny_config, write_parquet

RUN, DATASET = RunKeys("tiny"), DatasetKeys("small")


class Finished(NamedTuple):
    """A store with a finished run, and the run's configuration."""

    store: Store
    config: RunConfig
    manifest: Manifest


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """What `gpt2 pretrain` leaves, made without Prefect."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        write_parquet(folder / "source" / "file.parquet", [document(number, 90) for number in range(40)])
        every = ("train.max_steps=2", "train.checkpoint_every_steps=1", "evaluation.checkpoint=every")
        config = tiny_config(str(folder / "store"), str(folder / "source"), *every)
        manifest, store, data = build_dataset(config), open_store(config.store_url), config.data
        settings = data.spec(tokenizer.identity()).settings
        listing, _ = list_source(store, data.source, "", "", "train")
        for plan in plan_files(store, "small", listing.files, settings, planner(store, settings, tokenizer.encode)):
            put_plan(store, "small", plan)
        assert run_job(store.url, put_job(store, training_job(pin_run(store, config, manifest.digest, None)))) == 0
        for record in checkpoints(store, "tiny"):
            for job in evaluation_jobs(config, record, manifest.digest, None):
                assert run_job(store.url, put_job(store, job)) == 0
        write_report(store, "tiny")
        keep_request(store, RUN.request, config)
        keep_request(store, DATASET.request, config)
        yield Finished(store, config, manifest)


@pytest.fixture
def finished(pristine: Finished, tmp_path: Path) -> Finished:
    """A copy of it that a test may change."""
    shutil.copytree(pristine.store.url, tmp_path / "store")
    config = pristine.config.model_copy(update={"store_url": str(tmp_path / "store")})
    return Finished(open_store(config.store_url), config, pristine.manifest)


MISSING: dict[str, Callable[[Finished], object]] = {
    "a shard's record": lambda finished: finished.store.delete(DATASET.record(finished.manifest.shard_ids[-1])),
    "the last checkpoint": lambda finished: finished.store.delete(RUN.checkpoint_record(2)),
    "an evaluation": lambda finished: finished.store.delete(RUN.evaluation(2, "val_loss")),
    "the report": lambda finished: finished.store.delete(RUN.report("html")),
    "a report of the newest evaluation": lambda finished: os.utime(
        Path(finished.store.url) / RUN.evaluation(2, "val_loss"), (2**33, 2**33)
    ),
}


@pytest.mark.parametrize("missing", [*MISSING, "the leak report", "an evaluation with these settings"])
def test_a_run_that_lacks_something_is_not_finished(finished: Finished, missing: str) -> None:
    store, config = finished.store, finished.config
    reported = finished_run(store, config)
    assert reported is not None
    assert reported.dataset is not None
    assert (reported.dataset.version, reported.training.steps) == (finished.manifest, 2)
    assert {result.name for result in reported.evaluations} == {"val_loss", "completion", "samples"}
    if missing == "the leak report":
        config = audited(config)
    elif missing == "an evaluation with these settings":
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"samples": 2})})
    else:
        MISSING[missing](finished)
    assert finished_run(store, config) is None


def audited(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"resources": config.resources.model_copy(update={"audit": True})})


@pytest.mark.parametrize("missing", ["a shard's record", "a source file", "the leak report", "the dataset"])
def test_a_dataset_that_lacks_something_is_not_finished(
    finished: Finished, missing: str, request: pytest.FixtureRequest
) -> None:
    store, config = finished.store, finished.config
    assert finished_dataset(store, config) == finished.manifest
    if missing == "a source file":
        path = write_parquet(Path(config.data.source) / "new.parquet", [document(number) for number in range(9)])
        request.addfinalizer(path.unlink)
    elif missing == "the leak report":
        config = audited(config)
    elif missing == "the dataset":
        store.delete(DATASET.latest)
    else:
        MISSING[missing](finished)
    before = {listed.key for listed in store.list("")}
    assert finished_dataset(store, config) is None
    assert {listed.key for listed in store.list("")} <= before | {DATASET.split}


LOADED = """
import sys
from flows.console.cli import main
try:
    main()
finally:
    print("LOADED", *(name for name in ("prefect", "torch", "pydantic", "numpy") if name in sys.modules))
"""


def run_console(*argv: str, cwd: Path) -> tuple[str, set[str]]:
    """What a real process prints, and which of the heavy packages it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *argv], cwd=cwd, capture_output=True, text=True, check=True, env=os.environ
    )
    output, _, loaded = done.stdout.rpartition("LOADED")
    return output, set(loaded.split())


def test_a_second_time_starts_no_prefect(finished: Finished) -> None:
    folder = Path(finished.store.url).parent
    for argv in (["pretrain", "tiny"], ["dataset", "build", "small"]):
        output, loaded = run_console(*argv, "--set", f"store_url={finished.store.url}", cwd=folder)
        assert finished.manifest.digest[:12] in output
        assert "prefect" not in loaded
    assert not (folder / ".gpt2").exists()


def test_help_and_version_import_nothing_heavy(tmp_path: Path) -> None:
    for argv in (["--help"], ["dataset", "-h"], ["--version"]):
        assert run_console(*argv, cwd=tmp_path)[1] == set()


def test_the_report_is_printed_as_json_too(gpt2: Gpt2, pristine: Finished) -> None:
    [report] = gpt2("report", "--json", "--set", f"store_url={pristine.config.store_url}").json_lines
    assert (report["run"], report["steps"], report["max_steps"]) == ("tiny", 2, 2)
    assert {evaluation["step"] for evaluation in report["evaluations"]} == {1, 2}
    assert any("val_loss_t32" in evaluation["metrics"] for evaluation in report["evaluations"])
