"""Metrics: every line is complete and kept until a checkpoint includes it; TensorBoard shows every step once."""

import sys
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.checkpoints.metrics import StepMetrics
from model.checkpoints.records import read_metrics
from model.processes.distributed import DDPConfig
from model.runs.job import read_job
from model.training.metrics import DRAWN, MetricsLog
from model.training.trainer import Trainer
from storage.keys import RunKeys
from storage.stores.store import Store
from tests.making import read_json
from tests.model.training_runs import SHORT, STEPS, StoredDataset
from tests.polling import poll


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step=step, loss=5.0, learning_rate=1e-3, gradient_norm=1.0, tokens_per_second=100.0)


def test_every_line_has_all_metrics(dataset: StoredDataset) -> None:
    lines = read_metrics(dataset.store, dataset.train("watched", *SHORT))
    assert len(lines) == STEPS
    for line in lines:
        assert {
            "step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "step_seconds", "data_seconds",
            "metrics_seconds", "checkpoint_seconds", "memory_bytes",
        } == set(line.model_dump())  # fmt: skip
        assert 0 <= line.data_seconds <= line.step_seconds
        assert 10**8 < line.memory_bytes < 10**11
    assert [line.step for line in lines if line.checkpoint_seconds > 0]


def test_lines_are_kept_until_a_checkpoint_includes_them(store: Store) -> None:
    log = MetricsLog(store, "kept", 10, [])
    for step in range(3):
        log.add(metrics(step))
    first = log.unsaved()
    log.add(metrics(3))
    segments = log.put_segment(first)
    assert [line.step for line in log.unsaved()] == [0, 1, 2, 3]  # the checkpoint may still fail
    again = log.put_segment(log.unsaved())
    assert len(again) == 1, "the segment of a failed checkpoint is not in the chain"
    log.saved(4, again)
    assert log.unsaved() == []
    log.add(metrics(4))
    assert log.put_segment(log.unsaved())[:-1] == again
    assert segments[0] != again[0]
    assert (read_json(store, RunKeys("kept").progress) or {})["step"] == 4


def test_tensorboard_shows_every_step_once_after_a_resume(dataset: StoredDataset, tmp_path: Path) -> None:
    settings = (*SHORT, f"resources.tensorboard={tmp_path}")
    key = dataset.put_job("drawn", *settings)
    training = Trainer(dataset.store, read_job(dataset.store, key), DDPConfig(0, 1, torch.device("cpu")))
    training._stop_requested = True
    assert training.fit() is None
    dataset.train("drawn", *settings)
    events = EventAccumulator(str(tmp_path / "drawn")).Reload()
    assert set(events.Tags()["scalars"]) == set(DRAWN) - {"val_loss", "mfu"}
    losses = [line.loss for line in read_metrics(dataset.store, "drawn")]
    assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 1))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses, rel=1e-6)


def test_a_missing_tensorboard_is_refused_with_a_remedy(
    dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tensorboard\]'"):
        MetricsLog(dataset.store, "any", 1, [], tensorboard=str(tmp_path))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_tensorboard_folder_that_cannot_be_written_ends_its_files_and_not_the_training(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = {*threading.enumerate()}
    log = MetricsLog(store, "drawn", 1_000, [], tensorboard=str(tmp_path))
    (tmp_path / "drawn").rename(tmp_path / "moved")
    (tmp_path / "drawn").touch()
    poll(lambda: log.add(metrics(0)) or "TensorBoard" in capsys.readouterr().out)
    log.add(metrics(1))
    log.close()
    poll(lambda: threads.issuperset(threading.enumerate()))  # else a later test gets the error of TensorBoard's thread
    with pytest.raises(ValueError, match=r"resources\.tensorboard"):
        MetricsLog(store, "drawn", 1_000, [], tensorboard=str(tmp_path))
