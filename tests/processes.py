"""The processes of this host, as /proc shows them: found by what they are, and killed."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def found(wanted: Callable[[Path], bool]) -> list[int]:
    """The processes whose folder in /proc is `wanted`; one that ends meanwhile is none."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if wanted(folder):
                    pids.append(int(folder.name))
    return pids


def with_words(*words: str) -> list[int]:
    """The processes that were started with all of these words."""
    return found(lambda folder: set(words) <= set((folder / "cmdline").read_text().split("\0")))


def parent(folder: Path) -> int:
    """The parent of the process of that folder in /proc."""
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def children(pid: int) -> list[int]:
    """The processes that it started, as far as they are there."""
    return found(lambda folder: parent(folder) == pid)


def family(pid: int) -> list[int]:
    """The process and all that descend from it, sessions of their own included."""
    members = [pid]
    for known in members:
        members += children(known)
    return members


def kill(pids: list[int]) -> None:
    """kill -9 of those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
