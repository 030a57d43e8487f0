"""Waits until Prefect has recorded every task run: its server writes them from events, some seconds later."""

import time
from contextlib import suppress
from datetime import datetime

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterStartTime
from prefect.client.schemas.objects import TaskRun
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

POLL_SECONDS = 0.5
SETTLED_POLLS = 2  # an event still under way would add a task run
PAGE_SIZE = 200  # the API's largest page


def wait_for_task_runs(since: datetime, limit_seconds: float) -> None:
    """Wait until all task runs of flows started after `since` have ended, for about `limit_seconds` at most."""
    APILogHandler().flush()  # else sent at exit, after the server has stopped: 70 s of retries
    deadline = time.monotonic() + limit_seconds
    previous_count, settled_polls = -1, 0
    while settled_polls < SETTLED_POLLS and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):  # it would hide the error of the flow
            runs = _task_runs(since, limit_seconds)
            all_ended = all(run.state is not None and run.state.is_final() for run in runs)
            settled_polls = settled_polls + 1 if all_ended and len(runs) == previous_count else 0
            previous_count = len(runs)
        time.sleep(POLL_SECONDS)


def _task_runs(since: datetime, timeout_seconds: float) -> list[TaskRun]:
    started = FlowRunFilter(start_time=FlowRunFilterStartTime(after_=since))
    runs: list[TaskRun] = []
    once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})  # by default a minute of retries per request
    with once, get_client(httpx_settings={"timeout": timeout_seconds}, sync_client=True) as client:
        while True:
            page = client.read_task_runs(flow_run_filter=started, offset=len(runs))
            runs += page
            if len(page) < PAGE_SIZE:
                return runs
