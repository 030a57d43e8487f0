"""Metrics: every line is complete and kept until a checkpoint includes it."""

from model.checkpoints.records import StepMetrics, read_metrics
from model.training.metrics import MetricsLog
from storage.keys import RunKeys
from storage.stores.store import Store
from tests.making import read_json
from tests.model.training_runs import SHORT, STEPS, StoredDataset


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
