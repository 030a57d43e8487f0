"""Waits until Prefect has recorded every task run: its server writes them from events, some seconds later."""

import time
from contextlib import suppress
from datetime import datetime

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import TERMINAL_STATES
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

POLL_SECONDS = 0.5
SETTLED_POLLS = 2  # an event still under way would add a task run
ENDED = {"task_runs": {"state": {"type": {"any_": sorted(TERMINAL_STATES)}}}}


def wait_for_task_runs(since: datetime, limit_seconds: float) -> None:
    """Wait until all task runs of flows started after `since` have ended, for about `limit_seconds` at most."""
    APILogHandler().flush()  # else sent at exit, after the server has stopped: 70 s of retries
    deadline = time.monotonic() + limit_seconds
    timeout = {"timeout": limit_seconds}
    started = {"flow_runs": {"start_time": {"after_": since.isoformat()}}}
    previous_count, settled_polls = -1, 0
    while settled_polls < SETTLED_POLLS and time.monotonic() < deadline:
        once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})  # by default a minute of retries per request
        # An error would hide that of the flow.
        with suppress(httpx.HTTPError), once, get_client(httpx_settings=timeout, sync_client=True) as client:
            count, ended = (
                client.request("POST", "/task_runs/count", json=runs).json() for runs in (started, started | ENDED)
            )
            settled_polls = settled_polls + 1 if count == ended == previous_count else 0
            previous_count = count
        time.sleep(POLL_SECONDS)
