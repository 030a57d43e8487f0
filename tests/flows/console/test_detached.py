"""`--detach`, `gpt2 logs` and `gpt2 stop`."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.console import detached
from model.checkpoints.records import checkpoints
from model.config import RunConfig
from model.form import DEFAULT, settings_beyond
from storage.keys import RunKeys
from storage.stores.opening import open_store
from tests.flows.client import gpt2 as start_gpt2
from tests.flows.client import run_gpt2
from tests.flows.in_process import Gpt2
from tests.making import document, read_json, tiny_config, write_parquet
from tests.polling import poll
from tests.processes import kill, with_arguments

# A detached process outlives its Popen object, which warns of that.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STEPS = 300


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(detached, "HOME", tmp_path / ".gpt2")
    monkeypatch.setattr(detached, "login", lambda: (tmp_path / ".gpt2").mkdir(exist_ok=True))
    return tmp_path / ".gpt2"


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In place of Python, a program that prints its arguments and waits for this pipe."""
    pipe, program = tmp_path / "pipe", tmp_path / "program"
    os.mkfifo(pipe)
    program.write_text(f'#!/bin/sh\necho "$@"\nread line < {pipe}\necho "$line"\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    yield pipe
    kill([int(pid.read_text()) for pid in tmp_path.glob(".gpt2/runs/*.pid")])


def test_a_run_is_started_once_and_its_log_is_followed_to_its_end(
    gpt2: Gpt2, config: RunConfig, home: Path, waiting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_store = ["--set", f"store_url={config.store_url}"]
    detached.start("pretrain", config)
    for verb in (["pretrain", "tiny"], ["train", "tiny"]):
        refused = gpt2(*verb, "--detach", *in_store)
        assert (refused.code, "gpt2 stop tiny" in refused.error) == (2, True), refused
    detached.start("train", config.model_copy(update={"name": "another"}))
    kill([int((home / "runs" / "another.pid").read_text())])  # it would share the pipe
    poll((home / "runs" / "tiny.log").read_text)
    assert len(gpt2("logs", "tiny", "--no-follow", *in_store).out.splitlines()) == 1
    ends = iter(["its end\n"])
    monkeypatch.setattr(detached.time, "sleep", lambda _: [waiting.write_text(end) for end in ends])
    lines = gpt2("logs", "tiny", *in_store).out.splitlines()
    assert lines[1:] == ["its end"]
    assert f"pretrain --config {DEFAULT} --set name=tiny" in lines[0]
    assert all(setting in lines[0] for setting in settings_beyond(DEFAULT, config))


def test_a_stop_waits_for_the_process_id(
    gpt2: Gpt2, config: RunConfig, home: Path, waiting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detached.start("pretrain", config)
    pid = home / "runs" / "tiny.pid"
    started = pid.rename(home / "runs" / "started.pid")
    monkeypatch.setattr(detached.time, "sleep", lambda _: pid.write_text(started.read_text()))
    stopped = gpt2("stop", "tiny", "--set", f"store_url={config.store_url}")
    assert (stopped.code, "stopped" in stopped.out) == (0, True), stopped


def test_a_killed_run_leaves_no_lock(gpt2: Gpt2, config: RunConfig, home: Path, waiting: Path) -> None:
    in_store = ["--set", f"store_url={config.store_url}"]
    for _ in range(2):
        detached.start("pretrain", config)
        pid = int((home / "runs" / "tiny.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    refused = gpt2("stop", "tiny", *in_store)
    assert (refused.code, "not running" in refused.error) == (2, True), refused
    assert gpt2("logs", "tiny", *in_store).code == 0


@pytest.mark.full
def test_a_stopped_run_outlives_its_terminal_saves_a_checkpoint_and_continues(api: str, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source" / "file.parquet", [document(number, 90) for number in range(80)])
    steps = (f"train.max_steps={STEPS}", "train.checkpoint_every_steps=1000", "train.validate_every_steps=0")
    config = tiny_config(str(tmp_path / "data"), str(source), *steps)
    settings = [word for setting in settings_beyond(DEFAULT, config) for word in ("--set", setting)]
    store = open_store(config.store_url, create=True)
    terminal = start_gpt2("pretrain", "tiny", *settings, "--detach", cwd=tmp_path, api=api)
    output, _ = terminal.communicate()
    assert terminal.returncode == 0, output
    pid = int((tmp_path / ".gpt2" / "runs" / "tiny.pid").read_text())
    assert os.getsid(pid) == pid  # the terminal's hang-up goes to another session
    poll(lambda: read_json(store, RunKeys("tiny").progress))
    code, output = run_gpt2("stop", cwd=tmp_path, api=api)  # the only run of ./data
    assert (code, "gpt2 pretrain tiny continues it" in output) == (0, True), output
    assert not with_arguments(config.store_url)  # of its training processes
    [saved] = checkpoints(store, "tiny")
    assert 0 < saved.step < STEPS
    assert run_gpt2("pretrain", "--detach", cwd=tmp_path, api=api)[0] == 0
    code, log = run_gpt2("logs", cwd=tmp_path, api=api)
    assert code == 0
    assert checkpoints(store, "tiny")[-1].step == STEPS, log
    summary = log.partition("already done\n")[2].splitlines()
    assert len(summary) > 4
    again = subprocess.run(
        [sys.executable, "-m", "flows.console.cli", "pretrain"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.splitlines()[1:] == summary
