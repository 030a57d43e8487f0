"""What the tests of the control room ask Prefect's server for, as its UI does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.config import RunConfig
from tests.flows.client import ask, poll

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def deployment(api: str, name: str) -> dict[str, Any]:
    [found] = ask(api, "/deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    return dict(found)


def automation(api: str, name: str) -> dict[str, Any]:
    [found] = [one for one in ask(api, "/automations/filter", {}) if one["name"] == name]
    return dict(found)


def start(api: str, name: str, config: RunConfig) -> str:
    """The id of a new run of the deployment."""
    asked = {"parameters": {"config": config.model_dump(mode="json")}}
    return str(ask(api, f"/deployments/{deployment(api, name)['id']}/create_flow_run", asked)["id"])


def set_state(api: str, flow_run: str, kind: str, name: str | None = None) -> dict[str, Any]:
    state = {"type": kind, "name": name or kind.capitalize()}
    return dict(ask(api, f"/flow_runs/{flow_run}/set_state", {"state": state, "force": kind in FINAL}))


def run(api: str, flow_run: str) -> dict[str, Any]:
    return dict(ask(api, f"/flow_runs/{flow_run}"))


def ended(api: str, flow_run: str, attempt: int = 1, seconds: float = 180) -> dict[str, Any]:
    """The run, once its attempt has ended."""

    def found() -> Any:
        there = run(api, flow_run)
        return there["state_type"] in FINAL and there["run_count"] >= attempt and there

    return dict(poll(found, seconds))


def states(api: str, flow_run: str) -> list[str]:
    """The names of all states that the run was in, in their order."""
    return [state["name"] for state in ask(api, f"/flow_run_states/?flow_run_id={flow_run}")]


@contextmanager
def worker(pool: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of the pool that looks for runs every second."""
    environment = os.environ | {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    words = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    with log.open("ab") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
