"""Runs that outlive their terminal (--detach), and the verbs that follow and stop them: logs, stop.

A detached command writes to `.gpt2/runs/NAME.log` and holds a lock on that file until it ends, even if it is killed.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from flows.console.options import say
from flows.console.settings import DEFAULTS, RunName, Settings
from flows.platform.server import HOME, login
from model.config import RunConfig
from model.form import DEFAULT, settings_beyond

POLL_SECONDS = 0.2


def start(verb: str, config: RunConfig) -> None:
    """Start `gpt2 VERB` in the background. Raises ValueError if this run is already running in this folder."""
    login()  # creates the folder, which only this user may enter
    path = _log_path(config.name)
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = f"Follow it with gpt2 logs {config.name}, or stop it with gpt2 stop {config.name}."
            raise ValueError(f"run {config.name!r} is already running. {remedy}") from None
        log.truncate(0)
        path.with_suffix(".pid").unlink(missing_ok=True)  # of an earlier process
        argv = [sys.executable, "-m", "flows.console.cli", verb, "--config", DEFAULT, "--set", f"name={config.name}"]
        argv += [word for setting in settings_beyond(DEFAULT, config) for word in ("--set", setting)]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    path.with_suffix(".pid").write_text(str(process.pid))
    say("started", f"gpt2 logs {config.name} follows it, gpt2 stop {config.name} saves a checkpoint and stops it")


def logs(name: RunName = None, /, *, settings: Settings = DEFAULTS, no_follow: bool = False) -> None:
    """Show the output of a run started with --detach, and follow it until the run ends.

    Example: gpt2 logs gpt2-124m

    Args:
        no_follow: Print the log so far, and end.
    """
    name = settings.run(name).name
    path = _log_path(name)
    if not path.exists():
        raise ValueError(f"run {name!r} was not started with --detach in this folder. Its log is in Prefect's UI.")
    with path.open(errors="replace") as log:
        while True:
            ended = no_follow or not _is_running(name)  # before the last read
            for line in log:
                print(line, end="", flush=True)
            if ended:
                return
            time.sleep(POLL_SECONDS)


def stop(name: RunName = None, /, *, settings: Settings = DEFAULTS) -> None:
    """Stop a run started with --detach, after saving a checkpoint. To continue, run its original command again.

    Example: gpt2 stop gpt2-124m
    """
    name = settings.run(name).name
    if not _is_running(name):
        remedy = "Cancel a run of gpt2 serve in Prefect's UI, and press Ctrl-C in the terminal of another command."
        raise ValueError(f"run {name!r} is not running with --detach in this folder. {remedy}")
    pid, asked = _log_path(name).with_suffix(".pid"), False
    while _is_running(name):
        with suppress(OSError, ValueError):  # not written yet; or killed, and a process of its pool holds the lock
            if not asked:
                os.kill(int(pid.read_text()), signal.SIGTERM)
                asked = True
        time.sleep(POLL_SECONDS)
    say("stopped", f"run {name}; gpt2 pretrain {name} continues it from its newest checkpoint")


def _log_path(name: str) -> Path:
    return HOME / "runs" / f"{name}.log"


def _is_running(name: str) -> bool:
    with suppress(FileNotFoundError), _log_path(name).open() as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
