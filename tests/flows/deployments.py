"""The API calls of Prefect's UI (deployments, automations, flow runs and their states), and a worker."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.config import RunConfig
from model.form import DEFAULT, settings_beyond
from tests.flows.client import call_api
from tests.polling import poll

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def deployment(api: str, name: str) -> dict[str, Any]:
    [match] = call_api(api, "/deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    return dict(match)


def automation(api: str, name: str) -> dict[str, Any]:
    [match] = [entry for entry in call_api(api, "/automations/filter", {}) if entry["name"] == name]
    return dict(match)


def form(name: str, config: RunConfig) -> dict[str, Any]:
    """The deployment's form, filled so that its run has this configuration."""
    if name == "demo":
        return {"settings": settings_beyond("demo", config)}
    settings = settings_beyond(DEFAULT, config)
    of_run = {} if name == "dataset-refresh" else {"name": config.name}
    return of_run | ({} if name == "evaluate" else {"preset": DEFAULT}) | {"settings": settings}


def start(api: str, name: str, config: RunConfig) -> str:
    """Start a run of the deployment. Returns its id."""
    body = {"parameters": form(name, config)}
    return str(call_api(api, f"/deployments/{deployment(api, name)['id']}/create_flow_run", body)["id"])


def set_state(api: str, flow_run: str, kind: str, name: str | None = None) -> dict[str, Any]:
    state = {"type": kind, "name": name or kind.capitalize()}
    return dict(call_api(api, f"/flow_runs/{flow_run}/set_state", {"state": state, "force": kind in FINAL}))


def run(api: str, flow_run: str) -> dict[str, Any]:
    return dict(call_api(api, f"/flow_runs/{flow_run}"))


def ended(api: str, flow_run: str, attempt: int = 1) -> dict[str, Any]:
    """Wait until that attempt of the run has ended. Returns the run."""

    def ended_run() -> Any:
        current = run(api, flow_run)
        return current["state_type"] in FINAL and current["run_count"] >= attempt and current

    return dict(poll(ended_run))


def states(api: str, flow_run: str) -> list[str]:
    """The names of all states of the run, oldest first."""
    return [state["name"] for state in call_api(api, f"/flow_run_states/?flow_run_id={flow_run}")]


@contextmanager
def worker(pool: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker of the pool that polls for runs every second."""
    environment = os.environ | {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    with log.open("ab") as out:
        process = subprocess.Popen(argv, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
