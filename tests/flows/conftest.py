"""A real Prefect server for the tests of the flows."""

import os
from collections.abc import Iterator
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
