"""A real Prefect server for the tests of the flows."""

import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp

import pytest

from flows.platform import server
from tests.ports import free_port

# Prefect reads its settings at import, so they are set before the tests import it.
server.HOME = Path(mkdtemp(prefix="prefect-"))
PORT = free_port()
os.environ.update(server.prefect_environment(PORT))
os.environ["PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS"] = "5"  # default: 60


@pytest.fixture(scope="session")
def api() -> Iterator[str]:
    """The API address of the tests' server, for flows in this process and in child processes."""
    from flows.runtime import settle

    since = datetime.now(UTC)
    with server.running_server(PORT):
        yield os.environ["PREFECT_API_URL"]
        settle.wait_for_task_runs(since, 15)


@pytest.fixture
def evaluating_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations run in this process, one at a time: for each process of their own, torch is imported for seconds."""
    from flows.runtime.processes import Processes
    from model.__main__ import run_job
    from model.runs.job import read_job
    from storage.stores.opening import open_store

    turn, run_process = threading.Lock(), Processes.run

    def run(processes: Processes, job_key: str, log: Callable[[str], None]) -> None:
        url = processes.store_url
        if read_job(open_store(url), job_key).kind == "train":
            run_process(processes, job_key, log)
        else:
            with turn:
                assert run_job(url, job_key) == 0

    monkeypatch.setattr(Processes, "run", run)
