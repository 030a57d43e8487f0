"""The whole platform as one process tree: Prefect's server with its UI, deployments, a worker per pool."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

from flows.platform import server
from model.config import RunConfig

CANCEL_SECONDS = 40.0  # Prefect kills a cancelled run after 30 s
WORKER_SECONDS = 3.0  # an idle worker stops within 1 s; after cancelling a run it may not stop at all
POLL_SECONDS = 0.5


@contextmanager
def platform(port: int, config: RunConfig) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run everything that the deployments need while the block lasts. Yields the processes by name.

    `config` fills the deployments' forms. At the end runs are cancelled: a training saves, and a retry resumes it.
    """
    with server.serving(port) as server_process:
        from flows.platform.bootstrap import POOLS, bootstrap  # Prefect reads the server's address when imported

        for _ in bootstrap(config, scheduled=False):
            pass
        settings = server.prefect_environment(port)
        workers = {
            f"worker-{pool}": server.start(f"worker-{pool}", "flows.platform.worker", ["--pool", pool], settings)
            for pool in POOLS
        }
        try:
            yield {"server": server_process, **workers}
        finally:
            with suppress(httpx.HTTPError):  # the server itself may have ended
                _cancel_runs(list(POOLS))
            for worker in workers.values():
                server.stop(worker, WORKER_SECONDS)


def _cancel_runs(pools: list[str]) -> None:
    """Cancel the active runs of these pools, and wait until they have ended."""
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

    active_types = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    active = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=active_types)))
    ours = WorkPoolFilter(name=WorkPoolFilterName(any_=pools))
    deadline = time.monotonic() + CANCEL_SECONDS
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=active, work_pool_filter=ours):
            client.set_flow_run_state(run.id, Cancelling())
        while client.read_flow_runs(flow_run_filter=active, work_pool_filter=ours) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
