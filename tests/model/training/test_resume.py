"""Resuming: kills leave no trace, a stop is saved, finished work is not repeated, and no rank outlives its parent."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.__main__ import run_job
from model.checkpoints.records import StepMetrics, checkpoints
from model.processes.distributed import DDPConfig
from model.runs.job import read_job, read_result
from model.training.metrics import MetricsLog
from model.training.trainer import Trainer
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
from tests.processes import kill, listening

PARENT = """
import os, subprocess, sys
argv = [sys.executable, "-m", "model", *sys.argv[1:], "--parent", str(os.getpid())]
started = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
print(started.pid, flush=True)
for line in started.stdout:
    print(line.decode(), end="", flush=True)
"""
ENDLESS = ("train.max_steps=100000", "train.checkpoint_every_steps=100000", "train.validate_every_steps=0")


# Resuming


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.nightly)])
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


@pytest.mark.parametrize(
    ("signum", "ranks"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.nightly),
        pytest.param(signal.SIGHUP, 2, marks=pytest.mark.nightly),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.nightly),
    ],
)
def test_a_stop_signal_saves_a_checkpoint_and_the_run_resumes_from_it(
    dataset: StoredDataset, undisturbed: Callable[[int], str], signum: signal.Signals, ranks: int, tmp_path: Path
) -> None:
    run = f"{signum.name}-{ranks}"
    store, key = dataset.store, dataset.put_job(run)
    with training(store, key, ranks, tmp_path / "first") as process:
        process.wait_until(lambda: 2 in process.steps())
        process.send(signum)
        assert process.wait() == 0, process.output()
        stopped_at = process.steps()[-1]
    assert 2 <= stopped_at < STEPS
    assert checkpoints(store, run)[-1].step == stopped_at
    assert read_result(store, read_job(store, key)) is None
    with training(store, key, ranks, tmp_path / "second") as process:
        assert process.wait() == 0, process.output()
        assert process.steps() == list(range(stopped_at + 1, STEPS + 1))
    assert_equal_runs(store, run, undisturbed(ranks))


def test_a_second_ctrl_c_ends_at_once(dataset: StoredDataset) -> None:
    """The first one saves, which takes up to `unsaved_minutes` when the store is gone."""
    job = read_job(dataset.store, dataset.put_job("interrupted"))
    trainer = Trainer(dataset.store, job, DDPConfig(0, 1, torch.device("cpu")))
    handler = signal.signal(signal.SIGINT, trainer._on_stop_signal)
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)


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


# A training saves and ends when its parent, its terminal or its reader is gone


def assert_saved(dataset: StoredDataset, key: str, printed: str) -> None:
    """The processes have ended, and the run resumes at the last step that they printed or at a later one."""
    poll(lambda: not processes_of(dataset.store, key), failure="a process outlives the one that started it")
    job = read_job(dataset.store, key)
    resumed = Trainer(dataset.store, job, DDPConfig(0, 1, torch.device("cpu")))
    assert resumed.step >= int(re.findall(r"^step +(\d+)/", printed, re.MULTILINE)[-1])
    assert len(losses(dataset.store, job.run)) == resumed.step


@pytest.mark.parametrize(("killed", "ranks"), [("parent", 1), ("launcher", 2)])
def test_every_rank_saves_and_ends_when_the_process_that_started_it_is_killed(
    dataset: StoredDataset, tmp_path: Path, killed: str, ranks: int
) -> None:
    """With its parent, a launcher loses the reader of its output, like that of `gpt2 train`."""
    key, out = dataset.put_job(f"orphan-of-{killed}", *ENDLESS), tmp_path / "out"
    with out.open("w") as file:
        argv = [sys.executable, "-c", PARENT, dataset.store.url, key, "--processes", str(ranks)]
        parent = subprocess.Popen(argv, stdout=file, stderr=file)
    try:
        poll(lambda: "loss" in out.read_text(), failure="no step was run")
        pids = processes_of(dataset.store, key)
        assert len(pids) == 1 + (1 if ranks == 1 else 1 + ranks)  # with the parent
        # Only gloo listens. torchrun's own ports would be open to every host, and unpickle what is sent.
        assert {address for address, _ in listening(pids)} <= {"127.0.0.1"}
        launcher = int(out.read_text().split()[0])
        kill([parent.pid] if killed == "parent" else [launcher])
        parent.wait()
        assert_saved(dataset, key, out.read_text())
    finally:
        kill_all(dataset.store, key)
        parent.wait()


def test_a_training_whose_terminal_closes_saves_a_checkpoint(dataset: StoredDataset) -> None:
    """The kernel sends SIGHUP, and every write to the terminal fails."""
    key = dataset.put_job("hung-up", *ENDLESS)
    terminal, name = os.openpty()
    on_terminal = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(name)]
    argv = [*on_terminal, sys.executable, "-m", "model", dataset.store.url, key]
    process = subprocess.Popen(argv, start_new_session=True)
    try:
        printed = ""
        while "loss" not in printed:
            printed += os.read(terminal, 4096).decode()
        os.close(name)
        os.close(terminal)
        assert process.wait() == 0
        assert_saved(dataset, key, printed.replace("\r", ""))
    finally:
        kill_all(dataset.store, key)
        process.wait()


def test_a_training_outlives_the_reader_of_its_output(dataset: StoredDataset) -> None:
    key = dataset.put_job("unread")
    argv = [sys.executable, "-m", "model", dataset.store.url, key]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0
    assert read_result(dataset.store, read_job(dataset.store, key)) is not None


def test_a_process_whose_parent_has_ended_does_not_start() -> None:
    code = "from model.processes.parent import end_with_parent; end_with_parent(1); print('started')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert not ended.stdout
