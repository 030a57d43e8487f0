"""Waits until Prefect has written down what happened. Task runs are recorded from events, after the fact."""

import time
from datetime import datetime

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterStartTime
from prefect.client.schemas.objects import TaskRun
from prefect.logging.handlers import APILogHandler

POLL_SECONDS = 0.5
SETTLED_POLLS = 2  # events that are still on their way would add task runs


def wait_for_task_runs(since: datetime, limit_seconds: float) -> None:
    """Return when every task run of the flows started since then has ended and no more appear, or at the limit."""
    APILogHandler().flush()  # or the log is sent at exit, 70 s of retries after the server was stopped
    deadline = time.monotonic() + limit_seconds
    seen, settled = -1, 0
    while settled < SETTLED_POLLS and time.monotonic() < deadline:
        runs = _task_runs(since)
        finished = all(run.state is not None and run.state.is_final() for run in runs)
        settled = settled + 1 if finished and len(runs) == seen else 0
        seen = len(runs)
        time.sleep(POLL_SECONDS)


def _task_runs(since: datetime) -> list[TaskRun]:
    started = FlowRunFilter(start_time=FlowRunFilterStartTime(after_=since))
    found: list[TaskRun] = []
    with get_client(sync_client=True) as client:
        while True:
            page = client.read_task_runs(flow_run_filter=started, offset=len(found))
            found += page
            if len(page) < 200:
                return found
