"""The console as a process, and Prefect's API, for tests that use the flows from outside."""

import os
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.polling import poll

# Else each request reads the certificates for HTTPS, 25 ms of processor time, and many tests poll.
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def login() -> tuple[str, str]:
    """User and password of the tests' server."""
    user, _, password = os.environ["PREFECT_API_AUTH_STRING"].partition(":")
    return user, password


def call_api(api: str, path: str, body: dict[str, Any] | None = None, method: str = "") -> Any:
    """Send a request: POST with a body, GET without one, or another method. Returns the decoded JSON.

    Without a login in the address (http://USER:PASSWORD@…), it sends that of the tests' server.
    Like Prefect's own clients it waits 60 s for a busy server, and retries after a 503 (SQLite is busy).
    """
    method = method or ("GET" if body is None else "POST")
    auth = None if "@" in api else login()

    def available() -> httpx.Response | None:
        response = httpx.request(method, f"{api}{path}", json=body, auth=auth, timeout=60, verify=NO_CERTIFICATES)
        return None if response.status_code == httpx.codes.SERVICE_UNAVAILABLE else response

    response = poll(available)
    response.raise_for_status()
    return response.json() if response.content else None


def shard_runs(api: str, flow_runs: dict[str, Any]) -> list[dict[str, Any]]:
    """The shard task runs of these flow runs. The filter is needed: Prefect may record those of earlier runs late."""
    body = {"flow_runs": flow_runs, "task_runs": {"name": {"like_": "shard-"}}}
    runs: list[dict[str, Any]] = call_api(api, "/task_runs/filter", body)
    return runs


def gpt2(
    *arguments: str, cwd: Path, api: str | None = None, password: str = "", **options: Any
) -> subprocess.Popen[str]:
    """Start the console as a process in its own session."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"DO_NOT_TRACK": "1"} | ({"PREFECT_API_URL": api} if api else {})
    if api and not password and api == os.environ.get("PREFECT_API_URL"):
        password = ":".join(login())
    environment |= {"PREFECT_API_AUTH_STRING": password} if password else {}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.console.cli", *arguments], cwd=cwd, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options,
    )  # fmt: skip


def run_gpt2(*arguments: str, cwd: Path, api: str | None = None, password: str = "") -> tuple[int, str]:
    """Run the console to its end. Returns the exit code and the output."""
    process = gpt2(*arguments, cwd=cwd, api=api, password=password)
    output, _ = process.communicate()
    return process.returncode, output
