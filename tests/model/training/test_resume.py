"""Going on: kills leave no trace, a stop is saved, what is done is not done again, and no rank is left behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model.__main__ import run_job
from model.checkpoints.metrics import StepMetrics
from model.checkpoints.records import checkpoints
from model.runs.job import read_job, read_result
from model.training.metrics import MetricsLog
from storage.keys import RunKeys
from tests.model.training_runs import (
    SHORT,
    STEPS,
    House,
    Training,
    assert_equal_runs,
    copy_checkpoints,
    everything,
    kill_all,
    losses,
    processes_of,
    training,
    until,
)

PARENT = """
import os, signal, subprocess, sys
words = [sys.executable, "-m", "model", os.environ["STORE"], os.environ["JOB"], "--processes", "2"]
subprocess.Popen([*words, "--parent", str(os.getpid())], start_new_session=True)
signal.pause()
"""


# Going on


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_three_kills_leave_no_trace(
    house: House, undisturbed: Callable[[int], str], ranks: int, tmp_path: Path
) -> None:
    run = f"killed-{ranks}"
    store, key = house.store, house.ask(run)
    saving = RunKeys(run).checkpoints + "000008/"
    moments: list[Callable[[Training], object]] = [
        lambda process: 2 in process.steps(),  # before there is any checkpoint
        lambda _: list(store.list(saving)),  # while the second one is being saved
        lambda process: 9 in process.steps(),  # between checkpoints, in a process that resumed
    ]
    for number, reached in enumerate(moments):
        with training(store, key, ranks, tmp_path / str(number)) as process:
            process.until(lambda process=process, reached=reached: reached(process))
            process.kill()
        assert read_result(store, read_job(store, key)) is None
    with training(store, key, ranks, tmp_path / "last") as process:
        assert process.wait() == 0, process.said()
        assert process.steps()[0] in (5, 9)
    assert_equal_runs(store, run, undisturbed(ranks))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_sigterm_saves_and_ends_well_and_the_run_goes_on_from_there(
    house: House, undisturbed: Callable[[int], str], ranks: int, tmp_path: Path
) -> None:
    run = f"stopped-{ranks}"
    store, key = house.store, house.ask(run)
    with training(store, key, ranks, tmp_path / "first") as process:
        process.until(lambda: 2 in process.steps())
        process.terminate()
        assert process.wait() == 0, process.said()
        stopped_at = process.steps()[-1]
    assert 2 <= stopped_at < STEPS
    assert checkpoints(store, run)[-1].step == stopped_at
    assert read_result(store, read_job(store, key)) is None
    with training(store, key, ranks, tmp_path / "second") as process:
        assert process.wait() == 0, process.said()
        assert process.steps() == list(range(stopped_at + 1, STEPS + 1))
    assert_equal_runs(store, run, undisturbed(ranks))


def test_a_run_of_two_ranks_goes_on_with_one(house: House, undisturbed: Callable[[int], str]) -> None:
    run, key = "fewer", house.ask("fewer")
    copy_checkpoints(house.store, undisturbed(2), run, last_step=8)
    assert run_job(house.store.url, key) == 0
    assert losses(house.store, run) == pytest.approx(losses(house.store, undisturbed(2)), rel=1e-5, abs=0)


def test_a_finished_job_is_not_done_again(house: House, undisturbed: Callable[[int], str], tmp_path: Path) -> None:
    key, before = house.ask(undisturbed(1)), everything(house.store)
    started = time.monotonic()
    with training(house.store, key, 1, tmp_path) as process:
        assert process.wait() == 0
        assert process.said() == ""
    assert time.monotonic() - started < 30
    assert everything(house.store) == before


def test_killed_between_the_last_checkpoint_and_the_result_only_the_result_is_written(
    house: House, undisturbed: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, key = "unanswered", house.ask("unanswered")
    copy_checkpoints(house.store, undisturbed(1), run)
    before = everything(house.store)
    assert run_job(house.store.url, key) == 0
    job = read_job(house.store, key)
    assert set(everything(house.store)) - set(before) == {RunKeys(run).result(job.job_id)}
    assert "loss" not in capsys.readouterr().out


def test_dropout_goes_on_bit_for_bit_after_a_crash(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.trained_here("dropped", *SHORT, "train.dropout=0.2")
    key = house.ask("dropped-crashed", *SHORT, "train.dropout=0.2")
    add = MetricsLog.add

    def crash(log: MetricsLog, metrics: StepMetrics) -> None:
        if metrics.step == 6:
            raise RuntimeError("pulled the plug")
        add(log, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", crash)
        assert run_job(house.store.url, key) == 1
    assert [record.step for record in checkpoints(house.store, "dropped-crashed")] == [4]
    assert run_job(house.store.url, key) == 0
    assert_equal_runs(house.store, "dropped-crashed", "dropped")
    whole = losses(house.store, house.trained_here("undropped", *SHORT))
    assert losses(house.store, "dropped") != pytest.approx(whole, rel=1e-5, abs=0)


# Not outliving its parent


def test_every_rank_ends_when_the_process_that_started_them_is_killed(house: House, tmp_path: Path) -> None:
    key = house.ask("orphaned", "train.max_steps=100000")
    environment = os.environ | {"STORE": house.store.url, "JOB": key}
    with (tmp_path / "out").open("w") as out:
        parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=out, stderr=out)
    try:
        until(lambda: "step " in (tmp_path / "out").read_text(), "no step was made")
        assert len(processes_of(house.store, key)) == 3  # the launcher and two ranks
        parent.kill()
        parent.wait()
        until(lambda: not processes_of(house.store, key), "a rank outlives the process that started it", seconds=30)
    finally:
        parent.kill()
        parent.wait()
        kill_all(house.store, key)


def test_a_process_whose_parent_is_gone_already_does_not_begin() -> None:
    code = "from model.processes.parent import end_with_parent; end_with_parent(1); print('went on')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert not found.stdout
