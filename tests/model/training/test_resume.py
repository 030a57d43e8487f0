"""Resuming: kills leave no trace, a stop is saved, finished work is not repeated, and no rank outlives its parent."""

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
    StoredDataset,
    Training,
    assert_equal_runs,
    copy_checkpoints,
    kill_all,
    losses,
    modification_times,
    processes_of,
    training,
)
from tests.polling import poll
from tests.processes import listening

PARENT = """
import os, signal, subprocess, sys
argv = [sys.executable, "-m", "model", os.environ["STORE"], os.environ["JOB"], "--processes", "2"]
subprocess.Popen([*argv, "--parent", str(os.getpid())], start_new_session=True)
signal.pause()
"""


# Resuming


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_three_kills_leave_no_trace(
    dataset: StoredDataset, undisturbed: Callable[[int], str], ranks: int, tmp_path: Path
) -> None:
    run = f"killed-{ranks}"
    store, key = dataset.store, dataset.put_job(run)
    saving = RunKeys(run).checkpoints + "000008/"
    moments: list[Callable[[Training], object]] = [
        lambda process: 2 in process.steps(),  # before the first checkpoint
        lambda _: list(store.list(saving)),  # while the second one is being saved
        lambda process: 9 in process.steps(),  # between checkpoints, in a process that resumed
    ]
    for number, reached in enumerate(moments):
        with training(store, key, ranks, tmp_path / str(number)) as process:
            process.wait_until(lambda process=process, reached=reached: reached(process))
            process.kill()
        assert read_result(store, read_job(store, key)) is None
    with training(store, key, ranks, tmp_path / "last") as process:
        assert process.wait() == 0, process.output()
        assert process.steps()[0] in (5, 9)
    assert_equal_runs(store, run, undisturbed(ranks))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_sigterm_saves_a_checkpoint_and_the_run_resumes_from_it(
    dataset: StoredDataset, undisturbed: Callable[[int], str], ranks: int, tmp_path: Path
) -> None:
    run = f"stopped-{ranks}"
    store, key = dataset.store, dataset.put_job(run)
    with training(store, key, ranks, tmp_path / "first") as process:
        process.wait_until(lambda: 2 in process.steps())
        process.terminate()
        assert process.wait() == 0, process.output()
        stopped_at = process.steps()[-1]
    assert 2 <= stopped_at < STEPS
    assert checkpoints(store, run)[-1].step == stopped_at
    assert read_result(store, read_job(store, key)) is None
    with training(store, key, ranks, tmp_path / "second") as process:
        assert process.wait() == 0, process.output()
        assert process.steps() == list(range(stopped_at + 1, STEPS + 1))
    assert_equal_runs(store, run, undisturbed(ranks))


def test_a_run_of_two_ranks_resumes_on_one(dataset: StoredDataset, undisturbed: Callable[[int], str]) -> None:
    run, key = "fewer", dataset.put_job("fewer")
    copy_checkpoints(dataset.store, undisturbed(2), run, last_step=8)
    assert run_job(dataset.store.url, key) == 0
    assert losses(dataset.store, run) == pytest.approx(losses(dataset.store, undisturbed(2)), rel=1e-5, abs=0)


def test_a_finished_job_is_not_repeated(
    dataset: StoredDataset, undisturbed: Callable[[int], str], tmp_path: Path
) -> None:
    key, before = dataset.put_job(undisturbed(1)), modification_times(dataset.store)
    started = time.monotonic()
    with training(dataset.store, key, 1, tmp_path) as process:
        assert process.wait() == 0
        assert process.output() == ""
    assert time.monotonic() - started < 30
    assert modification_times(dataset.store) == before


def test_a_run_killed_after_its_last_checkpoint_writes_only_the_result(
    dataset: StoredDataset, undisturbed: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, key = "unanswered", dataset.put_job("unanswered")
    copy_checkpoints(dataset.store, undisturbed(1), run)
    before = modification_times(dataset.store)
    assert run_job(dataset.store.url, key) == 0
    job = read_job(dataset.store, key)
    assert set(modification_times(dataset.store)) - set(before) == {RunKeys(run).result(job.job_id)}
    assert "loss" not in capsys.readouterr().out


def test_dropout_resumes_bit_for_bit_after_a_crash(dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.train("dropped", *SHORT, "train.dropout=0.2")
    key = dataset.put_job("dropped-crashed", *SHORT, "train.dropout=0.2")
    add = MetricsLog.add

    def crash(log: MetricsLog, metrics: StepMetrics) -> None:
        if metrics.step == 6:
            raise RuntimeError("pulled the plug")
        add(log, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", crash)
        assert run_job(dataset.store.url, key) == 1
    assert [record.step for record in checkpoints(dataset.store, "dropped-crashed")] == [4]
    assert run_job(dataset.store.url, key) == 0
    assert_equal_runs(dataset.store, "dropped-crashed", "dropped")
    whole = losses(dataset.store, dataset.train("undropped", *SHORT))
    assert losses(dataset.store, "dropped") != pytest.approx(whole, rel=1e-5, abs=0)


# No rank outlives its parent


def test_every_rank_ends_when_the_process_that_started_them_is_killed(dataset: StoredDataset, tmp_path: Path) -> None:
    key = dataset.put_job("orphaned", "train.max_steps=100000")
    environment = os.environ | {"STORE": dataset.store.url, "JOB": key}
    with (tmp_path / "out").open("w") as out:
        parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=out, stderr=out)
    try:
        poll(lambda: "step " in (tmp_path / "out").read_text(), failure="no step was run")
        assert len(pids := processes_of(dataset.store, key)) == 3  # the launcher and two ranks
        # Only gloo listens. torchrun's own ports would be open to every host, and unpickle what is sent.
        assert {address for address, _ in listening(pids)} == {"127.0.0.1"}
        assert [pid for pid in pids if not listening([pid])], "the launcher listens"
        parent.kill()
        parent.wait()
        poll(lambda: not processes_of(dataset.store, key), 30, failure="a rank outlives the process that started it")
    finally:
        parent.kill()
        parent.wait()
        kill_all(dataset.store, key)


def test_a_process_whose_parent_has_ended_does_not_start() -> None:
    code = "from model.processes.parent import end_with_parent; end_with_parent(1); print('started')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert not ended.stdout
