"""The live view of a training in Prefect, and a training job that is only stored."""

import threading
from pathlib import Path
from typing import Any

import pytest

from flows import train
from flows.console.pipeline import train as train_verb
from flows.console.settings import Settings
from flows.inspection.alerts import Alerts
from flows.runtime.page import RunPage, page
from model.__main__ import run_job
from model.checkpoints.records import Progress, StepMetrics, checkpoints
from model.config import RunConfig
from model.runs.job import put_job, read_job, read_result
from model.runs.run import Run, pin_run, training_job
from storage.errors import StoreUnavailable
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.making import build_dataset, tiny_config


def test_the_progress_bar_survives_a_failing_store_and_a_nan_loss(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, moves = threading.Event(), []

    class Bar:
        def to(self, done: int, text: str) -> None:
            moves.append((done, text))
            ended.set()

    line = {"step": 2, "loss": None, "learning_rate": 1e-3, "gradient_norm": None, "tokens_per_second": 7.0}
    progress = Progress(step=3, max_steps=9, since_checkpoint=[StepMetrics(**line)])
    answers: list[Any] = [progress, StoreUnavailable("it answers 503")]

    def read(*_: object) -> Any:
        if isinstance(answer := answers.pop(), Exception):
            raise answer
        return answer

    monkeypatch.setattr(train, "read_as", read)
    monkeypatch.setattr(train, "read_metrics", lambda *_: [StepMetrics(**line | {"step": 1, "loss": 5.0})])
    shown = RunPage("Run tiny", RunConfig(), {})
    token = page.set(shown)
    monkeypatch.setattr(train, "WATCH_SECONDS", 0.01)
    train._watch(store, Run("tiny", {}, None, "", None, ""), Bar(), Alerts(RunConfig()), ended)  # type: ignore[arg-type]
    page.reset(token)
    assert moves == [(3, "loss NaN  7 tokens/s")]
    assert [metrics.step for metrics in shown.metrics] == [1, 2]  # 1 is from before the restart


@pytest.mark.full
@pytest.mark.usefixtures("api")
def test_a_training_whose_last_checkpoint_is_lost_runs_again(tmp_path: Path, source: str) -> None:
    config = tiny_config(str(tmp_path / "store"), source, "train.max_steps=4")
    store, version = open_store(config.store_url, create=True), build_dataset(config)
    job = training_job(pin_run(store, config, version.digest, None))
    assert run_job(store.url, put_job(store, job)) == 0
    store.delete(RunKeys("tiny").checkpoint_record(4))  # as the error of a damaged file says
    assert train.train(config).step == 4
    assert [record.step for record in checkpoints(store, "tiny")] == [4]


def test_a_training_job_can_be_stored_without_running_it(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(str(tmp_path / "store"), source)
    store, version = open_store(config.store_url, create=True), build_dataset(config)
    monkeypatch.setattr(Settings, "run", lambda *_: config)
    for _ in range(2):  # the second time the run is already pinned
        train_verb(ask=True)
        argv = capsys.readouterr().out.split()
        assert argv[-4:-1] == ["-m", "model", config.store_url]
        job = read_job(store, argv[-1])
        assert (job.kind, job.recipe["manifest"]) == ("train", version.digest)
        assert read_result(store, job) is None
