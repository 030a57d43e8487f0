"""How a process ends: the signals that stop a training, and the death of its parent. Imports no torch."""

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # prctl(2)
POLL_SECONDS = 0.5


def stop_signals() -> list[signal.Signals]:
    """The signals that make a training save and end: all of these, except those that nohup or a shell ignores."""
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    return [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]


def end_with_parent(parent: int, signum: signal.Signals = signal.SIGTERM) -> None:
    """Send this process `signum` when the process `parent` that started it dies. Exits at once if `parent` is dead.

    The child calls this itself, since a `preexec_fn` may deadlock in a parent that has threads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    else:
        threading.Thread(target=_poll_parent, args=(parent, signum), daemon=True).start()
    if os.getppid() != parent:
        sys.exit(f"parent process {parent} has already ended")


def _poll_parent(parent: int, signum: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signum)
