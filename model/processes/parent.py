"""Ends a process with the one that started it, however that one dies. Imports no torch."""

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(parent: int, sign: signal.Signals = signal.SIGTERM) -> None:
    """Ask to be sent a signal when the process `parent`, which started this one, dies; exit now if it is dead already.

    Asked by the child itself: a `preexec_fn` may deadlock in a parent with threads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sign)
    else:
        threading.Thread(target=_watch, args=(parent, sign), daemon=True).start()
    if os.getppid() != parent:
        sys.exit(f"the process {parent} that started this one is gone")


def _watch(parent: int, sign: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), sign)
