"""A build in a process of its own, as a user starts it: seconds and peak memory of each of its phases. Linux only.

The process runs the verb `gpt2 dataset build`. A phase begins when the stages call one of a few functions, or when that
function returns: nothing is added to what is measured but a look at the clocks.

    python -m tests.benchmarks.tokenise.phases OUT SETTING...     builds in this process, writes measurements to OUT
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flows.platform import server
from tests import hub as stand_in
from tests.ports import free_port

IMPORTS, BEGIN, LIST, PLAN, BETWEEN, LOOK, MAKE, SEAL, END, RECORDS, OVER = PHASES = (
    "imports", "Prefect begins", "list the source", "fetch and plan", "Prefect between the stages",
    "look what is done", "make shards", "seal", "Prefect ends", "Prefect's records", "",
)  # fmt: skip
WORK = (LIST, PLAN, LOOK, MAKE, SEAL)
FLOW = (BEGIN, *WORK, BETWEEN, END)  # from the call of the flow to its return
LIMIT_MEGABYTES = 400  # of the process that the flow runs in
HEAD = """| phase | seconds | seconds of 1,000 shards | processor seconds of 1,000 | peak MB | limit |
| --- | ---: | ---: | ---: | ---: | --- |"""
HUB_PAGE = 1_000  # entries of one page of the real Hub's listings


class Phase(NamedTuple):
    """Seconds on the clock, processor seconds of the process, its peak of resident memory."""

    seconds: float
    cpu_seconds: float
    peak_megabytes: float


class Phases:
    """The phases so far, by name, in the order of PHASES; one that is skipped takes no time."""

    def __init__(self) -> None:
        self.found: dict[str, Phase] = {}
        self._at, self._since = IMPORTS, self._now()

    def enter(self, name: str) -> None:
        """A phase ends and this one begins, unless it is here or past: a seal looks again what is done."""
        if PHASES.index(name) <= PHASES.index(self._at):
            return
        seconds, cpu_seconds = (now - since for now, since in zip(self._now(), self._since, strict=True))
        self.found[self._at] = Phase(seconds, cpu_seconds, megabytes("VmHWM"))
        forget_peak()
        self._at, self._since = name, self._now()

    def mark(self, owner: object, name: str, called: str = "", returned: str = "") -> None:
        """Enter one phase when a function is called, another one when it has returned."""
        act = getattr(owner, name)

        @functools.wraps(act)
        def marked(*args: Any, **options: Any) -> Any:
            if called:
                self.enter(called)
            found = act(*args, **options)
            if returned:
                self.enter(returned)
            return found

        setattr(owner, name, marked)

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def megabytes(name: str) -> float:
    """VmHWM is the peak of this process since `forget_peak`, VmRSS what it holds now."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e6


def forget_peak() -> None:
    """Let the peak begin anew with what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class Build(NamedTuple):
    """What a build printed, and its phases by name."""

    said: str
    phases: dict[str, Phase]

    def sum(self, *names: str) -> Phase:
        """Some of the phases as one."""
        asked = [self.phases[name] for name in names]
        return Phase(
            sum(phase.seconds for phase in asked),
            sum(phase.cpu_seconds for phase in asked),
            max(phase.peak_megabytes for phase in asked),
        )

    def show(self, title: str, shards: int) -> None:
        """A row for each phase, for the work among them, and for the flow from its call to its return."""
        for name, phase in self.phases.items():
            row(f"{title}: {name}", phase, shards)
        row(f"**{title}: the work**", self.sum(*WORK), shards)
        row(f"**{title}: the flow**", self.sum(*FLOW), shards)


def row(what: str, phase: Phase, shards: int, *, limited: bool = True) -> None:
    """A row below HEAD."""
    verdict = f"{LIMIT_MEGABYTES}: {'yes' if phase.peak_megabytes <= LIMIT_MEGABYTES else '**no**'}" if limited else ""
    each = 1e3 / shards
    print(
        f"| {what} | {phase.seconds:,.2f} | {phase.seconds * each:.3f} | {phase.cpu_seconds * each:.3f} "
        f"| {phase.peak_megabytes:,.0f} | {verdict} |",
        flush=True,
    )


def build_alone(
    folder: Path, settings: list[str], program: tuple[str, ...] = ("-m", "tests.benchmarks.tokenise.phases")
) -> Build:
    """Build in a new process; raises AssertionError with what it printed when it fails."""
    out = folder / "measured.json"
    words = [sys.executable, *program, str(out), *settings]
    done = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(out.read_text())
    out.unlink()
    return Build(done.stdout, {name: Phase(*values) for name, values in found.items()})


def build(out: str, settings: list[str]) -> None:
    """Build in this process, and write its phases to the file."""
    phases = Phases()
    from flows import download, tokenise
    from flows.console import dataset
    from flows.console.settings import Settings
    from flows.runtime import settle
    from storage.datasets import shards

    phases.mark(dataset, "run_flow", called=BEGIN)
    phases.mark(download, "list_source", called=LIST, returned=PLAN)
    phases.mark(download.download, "fn", returned=BETWEEN)
    phases.mark(tokenise.tokenise_flow, "fn", called=LOOK)
    phases.mark(shards, "done", returned=MAKE)
    phases.mark(tokenise, "seal", called=SEAL, returned=END)
    phases.mark(settle, "wait_for_task_runs", called=RECORDS)
    dataset.build(settings=Settings(None, tuple(settings)))
    phases.enter(OVER)
    missing = set(PHASES) - {OVER} - set(phases.found)
    assert not missing, f"the build went by other functions: {missing} never began"
    Path(out).write_text(json.dumps(phases.found))


@contextmanager
def surroundings(folder: Path, database_url: str = "") -> Iterator[stand_in.Hub]:
    """The Hub's stand-in and a Prefect server: processes started in the block find them, and a home, in `folder`."""
    home, prefect_home = folder / "home", folder / "prefect"
    home.mkdir()
    server.HOME = prefect_home
    os.environ |= server.prefect_environment(port := free_port()) | {
        "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": stand_in.ENDPOINT,
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # as the verb sets it, before Prefect is imported
    }  # fmt: skip
    os.environ.pop("HF_TOKEN", None)
    if database_url:
        os.environ["PREFECT_API_DATABASE_CONNECTION_URL"] = database_url
    stand_in.PAGE_ENTRIES = HUB_PAGE
    stand_in.entry = functools.cache(stand_in.entry)  # it hashes a file each time that it is listed
    with stand_in.serving() as hub, server.running_server(port):
        yield hub


if __name__ == "__main__":
    build(sys.argv[1], sys.argv[2:])
