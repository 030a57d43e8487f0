"""Each alert is given once for each occurrence, and ordinary trainings give none."""

import random
from itertools import pairwise
from typing import Any

import pytest

from flows.inspection.alerts import Alerts
from model.checkpoints.records import StepMetrics
from model.config import RunConfig

CONFIG = RunConfig()  # a checkpoint every 250 steps, at most 30 minutes without one
PLENTY = 10**12


def training(steps: int, **changes: Any) -> list[StepMetrics]:
    """Steps of a run that goes well: noise around a falling loss, a validation every 10 steps, some slow steps."""
    drawn = random.Random(7)
    lines = []
    for step in range(steps):
        loss = 3.0 + 8.0 / (1 + step / 20)
        speed = 1000.0 / drawn.choice([1, 1, 1, 1, 1.2, 3])
        line = StepMetrics(
            step=step, loss=loss + drawn.gauss(0, 0.15), learning_rate=1e-3, gradient_norm=1.0, step_seconds=2.0,
            tokens_per_second=speed, val_loss=loss + drawn.gauss(0, 0.003) if step % 10 == 9 else None,
        )  # fmt: skip
        lines.append(line)
    return [line.model_copy(update=changes) for line in lines]


def changed(lines: list[StepMetrics], steps: range, **changes: Any) -> None:
    for step in steps:
        lines[step] = lines[step].model_copy(update=changes)


def alerts_of(lines: list[StepMetrics]) -> list[str]:
    """The alerts of a run that is read as the watcher reads it: overlapping parts of the history."""
    alerts, given = Alerts(CONFIG), list[str]()
    for start, end in pairwise([*range(0, len(lines), 7), len(lines)]):
        given += alerts.after(lines[max(start - 3, 0) : end])
    return given


def test_a_training_that_goes_well_gives_no_alert() -> None:
    assert alerts_of(training(3_000)) == []


def test_a_loss_spike_is_told_once_until_the_loss_is_normal_again() -> None:
    lines = training(1_000)
    changed(lines, range(400, 500), loss=7.5)
    changed(lines, range(430, 433), loss=3.4)  # part of the same spike
    changed(lines, range(540, 542), loss=4.5)
    given = alerts_of(lines)
    assert [alert.partition(":")[0] for alert in given] == ["loss spike"] * 2
    assert "7.500 at step 401, usually 3." in given[0]
    assert "4.500 at step 541" in given[1]


def test_consecutive_skipped_steps_are_one_alert() -> None:
    lines = training(200)
    changed(lines, range(20, 23), loss=None, gradient_norm=None, skipped=True)
    changed(lines, range(50, 51), skipped=True)
    given = alerts_of(lines)
    assert len(given) == 2
    assert given[0].startswith("step 21 was skipped")
    assert given[1].startswith("step 51 was skipped")


def test_a_rising_val_loss_is_told_at_the_third_validation_above_the_best() -> None:
    lines = training(400)
    changed(lines, range(209, 230, 10), val_loss=5.0)
    assert ["val loss rises: 5.0000 at step 230" in alert for alert in alerts_of(lines)] == [True]
    changed(lines, range(239, 400, 10), val_loss=5.0)
    assert len(alerts_of(lines)) == 1
    changed(lines, range(229, 230), val_loss=2.0)  # only two in a row
    assert len(alerts_of(lines[:250])) == 0


def test_half_the_usual_throughput_is_told_once_and_a_few_slow_steps_are_not() -> None:
    lines = training(2_000)
    changed(lines, range(500, 520), tokens_per_second=100.0)
    assert alerts_of(lines) == []
    changed(lines, range(1_000, 1_100), tokens_per_second=400.0)
    changed(lines, range(1_500, 1_600), tokens_per_second=400.0)
    given = alerts_of(lines)
    assert len(given) == 2
    assert given[0].startswith("throughput fell to 400 tokens/s at step 1,02")


def test_a_missing_checkpoint_is_told_once_after_half_of_the_minutes_or_three_usual_intervals() -> None:
    alerts = Alerts(CONFIG)
    seconds = [*range(0, 3_600, 10), *range(0, 1_000, 10)]  # a checkpoint after an hour
    given = [alert for second in seconds for alert in alerts.at(float(second), PLENTY)]
    assert [alert.partition(".")[0] for alert in given] == ["no checkpoint was stored for 15 minutes"] * 2
    alerts = Alerts(CONFIG)
    alerts.after(training(10, step_seconds=4.0))  # a checkpoint takes 1,000 s
    given = [alert for second in range(0, 3_100, 10) for alert in alerts.at(float(second), PLENTY)]
    assert [alert.partition(".")[0] for alert in given] == ["no checkpoint was stored for 50 minutes"]


def test_a_full_disk_is_told_once_even_if_it_changes_a_little() -> None:
    alerts = Alerts(CONFIG)
    free = [6, 4, 6, 4, *[6] * 100, 4, 3]  # GB
    given = [alerts.at(0.0, gigabytes * 10**9) for gigabytes in free]
    assert [index for index, new in enumerate(given) if new] == [1, 104]
    assert "4.0 GB" in given[1][0]


def test_the_history_before_a_restart_gives_no_alert_again() -> None:
    lines = training(1_000)
    changed(lines, range(400, 405), loss=9.0)
    changed(lines, range(990, 1_000), loss=9.0)
    alerts = Alerts(CONFIG)
    assert len(alerts.after(lines)) == 2  # the watcher drops these
    assert alerts.after(lines[900:]) == []
    repeated = lines[-1].model_copy(update={"step": 1_000})
    assert alerts.after([repeated]) == []  # the spike goes on


@pytest.mark.parametrize("batch_noise", [0.05, 0.4])
def test_the_noise_of_small_batches_is_no_spike(batch_noise: float) -> None:
    drawn = random.Random(11)
    lines = [line.model_copy(update={"loss": 3.0 + drawn.gauss(0, batch_noise)}) for line in training(3_000)]
    assert alerts_of(lines) == []
