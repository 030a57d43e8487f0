"""Finds processes of this host in /proc, with the addresses on which they listen, and kills them."""

import os
import signal
import socket
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


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """The addresses and ports on which these processes listen."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(str(handle.readlink()).removeprefix("socket:[").removesuffix("]"))
    addresses = set()
    for table, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = line.split()[1], line.split()[3], line.split()[9]
            if state == "0A" and inode in inodes:  # LISTEN
                packed = bytes.fromhex(local.partition(":")[0])
                words = [packed[start : start + 4][::-1] for start in range(0, len(packed), 4)]
                addresses.add((socket.inet_ntop(kind, b"".join(words)), int(local.partition(":")[2], 16)))
    return addresses


def kill(pids: list[int]) -> None:
    """SIGKILL each process that still runs."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
