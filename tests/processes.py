"""Finds processes of this host in /proc, and kills them."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def matching(condition: Callable[[Path], bool]) -> list[int]:
    """The processes whose folder in /proc satisfies the condition; processes that end meanwhile are skipped."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if condition(folder):
                    pids.append(int(folder.name))
    return pids


def with_arguments(*arguments: str) -> list[int]:
    """The processes that have all of these command-line arguments."""
    return matching(lambda folder: set(arguments) <= set((folder / "cmdline").read_text().split("\0")))


def parent(folder: Path) -> int:
    """The parent of the process with this folder in /proc."""
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def children(pid: int) -> list[int]:
    return matching(lambda folder: parent(folder) == pid)


def family(pid: int) -> list[int]:
    """The process and all its descendants, in any session."""
    members = [pid]
    for known in members:
        members += children(known)
    return members


def kill(pids: list[int]) -> None:
    """SIGKILL each process that still runs."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
