"""Runs one contender of a benchmark in a fresh process and watches it from outside. Knows no contender. Linux only.

The contender writes `result.json` into the folder it is started in: at least `begin` and `end` of its work, on the
clock that all processes of a host share (time.monotonic). All it starts belongs to its session, so whatever becomes of
its parents its memory and its processor time are counted as its own.
"""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

RESULT = "result.json"
TICKS = os.sysconf("SC_CLK_TCK")
LOOK_SECONDS, MEMORY_LOOK_SECONDS = 0.25, 0.05
LIMIT_SECONDS = 900.0


class Look(NamedTuple):
    """What one look found: processor ticks since they began, and proportional bytes now."""

    at: float
    busy: int  # of the whole machine
    own: int  # of the contender's session
    server: int  # that it talks to
    looks: int  # these
    pss_bytes: int


class Outcome(NamedTuple):
    """One contender in one round; `result` is what it wrote."""

    result: dict[str, Any]
    work_seconds: float
    outside_seconds: float  # of the whole process, without its work and its proof
    own_seconds: float  # processor time while it worked
    server_seconds: float  # the same of the server it talks to
    foreign: float  # share of the machine that others had while it worked
    peak_bytes: int  # 0 where memory was not looked at


def run(
    words: list[str], folder: Path, environment: dict[str, str], server: int | None = None, *, memory: bool = False
) -> Outcome:
    """Start the words in the folder, wait for their end. Raises RuntimeError, with the end of their log."""
    folder.mkdir(parents=True)
    looks: list[Look] = []
    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        looks += _watch(process.pid, server, memory)
        ended = time.monotonic()
    finally:
        with suppress(ProcessLookupError):  # what it left behind, or all of it when it took too long
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode or not (folder / RESULT).exists():
        raise RuntimeError(
            f"{' '.join(words)} ended with {process.returncode}:\n{(folder / 'log').read_text()[-3000:]}"
        )
    result = json.loads((folder / RESULT).read_text())
    work = result["end"] - result["begin"]
    during = [look for look in looks if result["begin"] <= look.at <= result["end"]] or looks[-1:]
    first, last = during[0], during[-1]
    here = (os.cpu_count() or 1) * TICKS * max(last.at - first.at, 1 / TICKS)
    return Outcome(
        result,
        work,
        ended - began - work - result.get("proof_seconds", 0.0),
        (last.own - first.own) / TICKS,
        (last.server - first.server) / TICKS,
        max(last.busy - first.busy - sum(last[2:5]) + sum(first[2:5]), 0) / here,
        max((look.pss_bytes for look in looks if look.at <= result["end"]), default=0),
    )


def settle(server: int) -> None:
    """Return when the server is idle: what it still writes down would slow the next contender."""
    for _ in range(60):
        before = _ticks(_session(server))
        time.sleep(0.5)
        if sum(_ticks(_session(server)).values()) - sum(before.values()) <= 0.02 * TICKS:
            return


def _watch(pid: int, server: int | None, memory: bool) -> Iterator[Look]:
    known: dict[int, int] = {}  # processes that have ended keep their last count
    poll = select.poll()
    poll.register(os.pidfd_open(pid), select.POLLIN)
    since, interval = time.monotonic(), MEMORY_LOOK_SECONDS if memory else LOOK_SECONDS
    while time.monotonic() - since < LIMIT_SECONDS:
        mine = _session(pid)
        known |= _ticks(mine)
        yield Look(
            time.monotonic(),
            _busy(),
            sum(known.values()),
            sum(_ticks(_session(server)).values()) if server else 0,
            round(time.process_time() * TICKS),
            sum(map(_pss_bytes, mine)) if memory else 0,
        )
        if poll.poll(1000 * interval):
            return


def _session(leader: int) -> list[int]:
    """The processes of the session that this one leads."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208  # thousands of times: no Path each
        if name.isdigit():
            with suppress(OSError):
                if os.getsid(int(name)) == leader:
                    found.append(int(name))
    return found


def _ticks(pids: list[int]) -> dict[int, int]:
    """User and system ticks of each process that is still there."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = int(fields[11]) + int(fields[12])
    return found


def _busy() -> int:
    """Ticks in which the machine's cores were not idle."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return user + nice + system + irq + softirq + steal


def _pss_bytes(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
