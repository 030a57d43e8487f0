"""The whole platform as one process tree: Prefect's server with its UI, deployments, a worker per pool."""

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

from flows.platform import server
from model.config import RunConfig
from model.processes.parent import end_with_parent, stop_signals

CANCEL_SECONDS = 40.0  # Prefect kills a cancelled run after 30 s
WORKER_SECONDS = 3.0  # an idle worker stops within 1 s; after cancelling a run it may not stop at all
POLL_SECONDS = 0.5


@contextmanager
def platform(port: int, preset: str, config: RunConfig) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run the server and the workers, yielded by name; after the block, cancel active runs. Raises as `serving`."""
    with server.serving(port) as server_process:
        assert server_process is not None
        from flows.platform.bootstrap import POOLS, bootstrap  # Prefect reads the server's address when imported

        list(bootstrap(preset, config, scheduled=False))
        workers = {}
        for pool in POOLS:
            name = f"worker-{pool}"
            argv = ["flows.platform.serve", str(os.getpid()), "worker", "start", "--pool", pool, "--type", "process"]
            workers[name] = server.start(name, port, *argv)
        try:
            yield {"server": server_process, **workers}
        finally:
            with suppress(httpx.HTTPError):  # the server itself may have ended
                _cancel_runs(list(POOLS))
            server.stop(workers.values(), WORKER_SECONDS)


def wait_for_end(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Return at Ctrl-C, SIGTERM or the end of the terminal. Raises ValueError when a process ends before that."""
    stopping = threading.Event()
    for signum in stop_signals():
        signal.signal(signum, lambda *_: stopping.set())
    while not stopping.wait(1):
        for name, process in processes.items():
            if process.poll() is not None:
                problem = f"{name} ended unexpectedly with exit code {process.returncode}"
                raise ValueError(f"{problem}. See {server.log_path(name)}, run gpt2 serve again, and retry the runs.")


def _cancel_runs(pools: list[str]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.states import Cancelled, Cancelling

    active = FlowRunFilter(state={"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}})
    ours = WorkPoolFilter(name={"any_": pools})
    deadline = time.monotonic() + CANCEL_SECONDS
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=active, work_pool_filter=ours):
            client.set_flow_run_state(run.id, Cancelling())
        while runs := client.read_flow_runs(flow_run_filter=active, work_pool_filter=ours):
            if time.monotonic() > deadline:  # a slow host: the runs' processes end now, and nobody would report it
                for run in runs:
                    client.set_flow_run_state(run.id, Cancelled(), force=True)
                break
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":  # PARENT_PID worker start …: a Prefect command that ends with its parent process
    end_with_parent(int(sys.argv[1]))
    sys.argv = ["prefect", *sys.argv[2:]]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
