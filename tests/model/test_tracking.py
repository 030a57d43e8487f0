"""A tracker gets every step once, in order, from the store alone, also across restarts. The real packages are used."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import tracking
from model.checkpoints.records import Progress, read_metrics
from storage.digests import canonical_json
from storage.keys import RunKeys
from storage.stores.store import Store, overwrite
from tests.model.training_runs import SHORT, STEPS, StoredDataset, copy_checkpoints
from tests.polling import poll

DRAWN = {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "data_seconds", "checkpoint_seconds",
         "memory_bytes"}  # fmt: skip
ALL = list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def trained(dataset: StoredDataset) -> str:
    return dataset.train("tracked", *SHORT)


class Sent:
    """A tracker in memory, which keeps what it got from earlier processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.values: list[dict[str, float]] = []
        self.closed = 0
        monkeypatch.setitem(tracking.TRACKERS, "sent", self.open)
        monkeypatch.setattr(tracking, "EVERY_SECONDS", 0.01)

    def open(self, *_: str) -> tracking.Curve:
        return max(self.steps, default=0), self.add, self.close

    def add(self, values: dict[str, float], step: int) -> None:
        self.values.append(values)
        self.steps.append(step)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


def stopping() -> "SimpleQueue[int]":
    signals: SimpleQueue[int] = SimpleQueue()
    signals.put(signal.SIGTERM)
    return signals


def show(store: Store, run: str, source: str, steps: range) -> None:
    """Store the live progress of a run: these steps of another run."""
    lines = [read_metrics(store, source)[step] for step in steps]
    progress = Progress(step=steps.stop, max_steps=STEPS, since_checkpoint=lines)
    overwrite(store, RunKeys(run).progress, canonical_json(progress.model_dump()))


def test_a_finished_run_is_sent_whole_and_only_once(dataset: StoredDataset, trained: str, sent: Sent) -> None:
    show(dataset.store, trained, trained, range(5))  # the last progress could not be stored
    for _ in range(2):
        tracking.follow(dataset.store, trained, "sent", "", SimpleQueue())
    assert (sent.steps, sent.closed) == (ALL, 2)
    assert sent.values[0].keys() == DRAWN
    assert [values["loss"] for values in sent.values] == [line.loss for line in read_metrics(dataset.store, trained)]


def test_a_run_is_followed_through_checkpoints_and_restarts(dataset: StoredDataset, trained: str, sent: Sent) -> None:
    """What one process missed, because a checkpoint took it from the progress, the next reads from the segments."""
    dataset.put_job("live", *SHORT)
    for steps, last_checkpoint in (
        (range(3), 0),
        (range(5), 0),
        (range(8, 10), 8),
        (range(8, 9), 0),
        (range(8, 11), 0),
    ):
        if last_checkpoint:
            copy_checkpoints(dataset.store, trained, "live", last_checkpoint)
        show(dataset.store, "live", trained, steps)
        tracking.follow(dataset.store, "live", "sent", "", stopping())
        assert steps.stop in sent.steps
    assert sent.steps == ALL[:11]


def test_val_losses_of_a_mix_have_their_datasets_names_and_nan_is_left_out(
    dataset: StoredDataset, trained: str, sent: Sent
) -> None:
    dataset.put_job("mixed", *SHORT)
    line = read_metrics(dataset.store, trained)[0]
    line = line.model_copy(update={"loss": None, "val_loss": 2.5, "val_losses": {"web": 2.0, "code": 3.0}, "mfu": 0.4})
    progress = Progress(step=1, max_steps=STEPS, since_checkpoint=[line])
    overwrite(dataset.store, RunKeys("mixed").progress, canonical_json(progress.model_dump()))
    tracking.follow(dataset.store, "mixed", "sent", "", stopping())
    assert sent.values[0].keys() == DRAWN - {"loss"} | {"val_loss", "val_loss/web", "val_loss/code", "mfu"}


@contextmanager
def process(store: Store, *arguments: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    argv = [sys.executable, "-m", "model.tracking", store.url, *arguments]
    with subprocess.Popen(
        argv, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def drawn_steps(folder: Path) -> list[int]:
    accumulated = events(folder)
    return [event.step for event in accumulated.Scalars("loss")] if "loss" in accumulated.Tags()["scalars"] else []


def test_tensorboard_shows_every_step_once_after_a_kill_and_sigterm_sends_the_last_steps(
    dataset: StoredDataset, trained: str, tmp_path: Path
) -> None:
    store, folder = dataset.store, tmp_path / "board"
    dataset.put_job("board", *SHORT)
    show(store, "board", trained, range(5))
    arguments = ("board", "tensorboard", str(tmp_path))
    with process(store, *arguments) as killed:
        poll(lambda: folder.is_dir() and drawn_steps(folder) == ALL[:5])
        killed.kill()
    with process(store, *arguments) as stopped:
        poll(lambda: len(list(folder.iterdir())) == 2)
        show(store, "board", trained, range(7))
        stopped.terminate()
        assert stopped.wait() == 0
    assert drawn_steps(folder) == ALL[:7]
    assert set(events(folder).Tags()["scalars"]) == DRAWN
    losses = [line.loss for line in read_metrics(store, trained)[:7]]
    assert [event.value for event in events(folder).Scalars("loss")] == pytest.approx(losses, rel=1e-6)


def test_a_failure_is_one_line_and_an_unknown_run_is_named(dataset: StoredDataset, trained: str) -> None:
    for arguments, reason in (((trained, "tensorboard", "/proc/no"), "/proc/no"), (("nobody", "wandb"), "'nobody'")):
        with process(dataset.store, *arguments) as failing:
            _, errors = failing.communicate()
        assert (failing.returncode, errors.count("\n"), reason in errors) == (1, 1, True), errors


def steps_in(tracker: str, folder: Path, run: str) -> list[int]:
    """The steps that the local files of a tracker have."""
    if tracker == "trackio":
        import trackio.sqlite_storage as storage

        logs: list[dict[str, Any]] = storage.SQLiteStorage.get_logs(tracking.PROJECT, run)
        return [log["step"] for log in logs]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    [experiment] = client.search_experiments(filter_string=f"name = '{tracking.PROJECT}'")
    [only] = client.search_runs([experiment.experiment_id])
    return [metric.step for metric in client.get_metric_history(only.info.run_id, "loss")]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # of these packages
@pytest.mark.parametrize("tracker", ["trackio", "mlflow"])
def test_a_tracker_on_this_host_continues_the_same_curve(
    dataset: StoredDataset, trained: str, tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = f"real-{tracker}"
    dataset.put_job(run, *SHORT)
    show(dataset.store, run, trained, range(5))
    tracking.follow(dataset.store, run, tracker, "", stopping())
    assert steps_in(tracker, tmp_path, run) == ALL[:5]
    dataset.train(run, *SHORT)
    target = os.environ["MLFLOW_TRACKING_URI"] if tracker == "mlflow" else tracking.PROJECT
    tracking.follow(dataset.store, run, tracker, target, SimpleQueue())
    assert steps_in(tracker, tmp_path, run) == ALL


@pytest.mark.nightly
def test_wandb_gets_a_whole_run(dataset: StoredDataset, trained: str, tmp_path: Path) -> None:
    with process(dataset.store, trained, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path)) as whole:
        assert whole.wait() == 0
    assert [path.name[-len(trained) :] for path in tmp_path.rglob("offline-run-*") if path.is_dir()] == [trained]
