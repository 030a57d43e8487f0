"""The wait for Prefect's records of task runs."""

import time
from datetime import UTC, datetime

from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.runtime import settle
from tests.ports import free_port


def test_an_unreachable_server_neither_raises_nor_exceeds_the_limit() -> None:
    """It is called while a flow's own error propagates, which must reach the user."""
    started_at = time.monotonic()
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        settle.wait_for_task_runs(datetime.now(UTC), 1)
    assert time.monotonic() - started_at < 15
