"""A laptop's whole platform as one process tree: Prefect's server with its UI, deployments, a worker a pool."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

from flows.platform import server
from model.config import RunConfig

CANCEL_SECONDS = 40.0  # Prefect itself kills a run that it cancels after 30 s
WORKER_SECONDS = 3.0  # an idle worker leaves in 1 s, or, having cancelled a run, not at all
POLL_SECONDS = 0.5


@contextmanager
def platform(port: int, config: RunConfig) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Everything that deployments need, for as long as the block lasts; yields its processes by name.

    The forms begin with `config`. At the end runs are cancelled: a training saves a checkpoint, and a retry goes on.
    """
    with server.serving(port) as process:
        from flows.platform.bootstrap import POOLS, bootstrap  # reads the server's address when it is imported

        for _ in bootstrap(config, scheduled=False):
            pass
        settings = server.prefect_environment(port)
        workers = {
            f"worker-{pool}": server.start(f"worker-{pool}", "flows.platform.worker", ["--pool", pool], settings)
            for pool in POOLS
        }
        try:
            yield {"server": process, **workers}
        finally:
            with suppress(httpx.HTTPError):  # where it is the server that has ended, nobody can be asked
                _cancel_runs(list(POOLS))
            for worker in workers.values():
                server.stop(worker, WORKER_SECONDS)


def _cancel_runs(pools: list[str]) -> None:
    """Cancel what runs in these pools, and wait until it has ended."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelling

    active = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    asked = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=active)))
    ours = WorkPoolFilter(name=WorkPoolFilterName(any_=pools))
    deadline = time.monotonic() + CANCEL_SECONDS
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=asked, work_pool_filter=ours):
            client.set_flow_run_state(run.id, Cancelling())
        while client.read_flow_runs(flow_run_filter=asked, work_pool_filter=ours) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
